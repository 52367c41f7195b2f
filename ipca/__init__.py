"""Fine-tune a chosen window of the singular components of pretrained weights.

>>> model = ipca.apply_pc(model, rank=16, window="middle")
>>> print(ipca.summary(model))
>>> optimizer = torch.optim.AdamW(ipca.adapter_parameters(model), lr=1e-3)
>>> ...
>>> ipca.save_adapter(model, "adapter")   # stock PEFT loads it on the original base

The method is that of "Least but not Last: Fine-tuning Intermediate Principal Components for Better
Performance-Forgetting Trade-Offs", arXiv 2602.03493.
"""

from ipca._namesake import check_distribution

check_distribution()

from ipca import nn  # noqa: E402
from ipca._version import __version__  # noqa: E402
from ipca.config import PCConfig  # noqa: E402
from ipca.io import export, import_peft, load_adapter, load_unquantized_weights, save_adapter, write_model_card  # noqa: E402
from ipca.model import (  # noqa: E402
    Summary,
    adapter_parameters,
    apply_pc,
    disabled,
    merge_adapter,
    param_groups,
    summary,
    unload,
    unmerge_adapter,
)
from ipca.nn import backends, explain  # noqa: E402
from ipca.ops import set_backend  # noqa: E402
from ipca.svd import SpectralCache, SVDReport, WindowSVD, singular_values, window_svd  # noqa: E402
from ipca.window import Window  # noqa: E402

__all__ = [
    "PCConfig",
    "SVDReport",
    "SpectralCache",
    "Summary",
    "Window",
    "WindowSVD",
    "__version__",
    "adapter_parameters",
    "apply_pc",
    "backends",
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
    "singular_values",
    "summary",
    "unload",
    "unmerge_adapter",
    "window_svd",
    "write_model_card",
]
