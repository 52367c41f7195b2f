"""Fine-tune a chosen window of the principal components (PC) of pretrained weights.

::

    ipca.apply_pc(model, rank=16, window="middle")
    print(ipca.summary(model))
    optimizer = torch.optim.AdamW(ipca.adapter_parameters(model), lr=1e-3, weight_decay=0)
    ...
    ipca.save_adapter(model, "adapter")  # stock PEFT loads it on the original base

The principal components of a weight are its singular triplets, largest first. The method is that of "Least but not
Last: Fine-tuning Intermediate Principal Components for Better Performance-Forgetting Trade-Offs", arXiv 2602.03493.

Everything is imported when it is first used, so that ``ipca --help`` needs no torch: the names below, and subpackages
such as ``ipca.analysis``, ``ipca.peft`` (the layers of ``peft.get_peft_model``), ``ipca.lab`` (sweeps, baselines,
continual learning). ``import ipca.ops`` registers the op ``ipca::pc_linear``.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any


def _check_distribution() -> None:
    """Raise ImportError where PyPI's ``ipca``, another project, is installed into the same package folder."""
    try:
        other = importlib.metadata.distribution("ipca")
    except importlib.metadata.PackageNotFoundError:
        return
    raise ImportError(
        f"The distribution 'ipca' {other.version} (instrumented PCA) is installed beside 'ipca-lora', and both provide "
        "the package `ipca`. Uninstall both and install ipca-lora again: pip uninstall ipca ipca-lora"
    )


_check_distribution()

from ipca._version import __version__ as __version__

if TYPE_CHECKING:
    from ipca import nn
    from ipca.io import (
        export,
        import_peft,
        load_adapter,
        load_unquantized_weights,
        save_adapter,
        write_model_card,
    )
    from ipca.model import (
        adapter_parameters,
        apply_pc,
        disabled,
        merge_adapter,
        param_groups,
        summary,
        unload,
        unmerge_adapter,
    )
    from ipca.nn import explain
    from ipca.ops import set_backend
    from ipca.svd import SpectralCache, window_svd
    from ipca.window import Window

__all__ = [
    "SpectralCache",
    "Window",
    "adapter_parameters",
    "apply_pc",
    "disabled",
    "explain",
    "export",
    "import_peft",
    "load_adapter",
    "load_unquantized_weights",
    "merge_adapter",
    "nn",
    "param_groups",
    "save_adapter",
    "set_backend",
    "summary",
    "unload",
    "unmerge_adapter",
    "window_svd",
    "write_model_card",
]
_HOMES = {
    "ipca.io": (
        "export",
        "import_peft",
        "load_adapter",
        "load_unquantized_weights",
        "save_adapter",
        "write_model_card",
    ),
    "ipca.model": (
        "adapter_parameters",
        "apply_pc",
        "disabled",
        "merge_adapter",
        "param_groups",
        "summary",
        "unload",
        "unmerge_adapter",
    ),
    "ipca.nn": ("explain",),
    "ipca.ops": ("set_backend",),
    "ipca.svd": ("SpectralCache", "window_svd"),
    "ipca.window": ("Window",),
}
"""The modules of the names above."""
_MODULES = ("analysis", "cli", "io", "lab", "model", "nn", "offline", "ops", "peft", "svd", "train", "window")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"ipca.{name}")
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'ipca' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
