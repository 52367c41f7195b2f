"""Methods that PEFT implements, injected into the layers of a model: MiCA, KaSA, OSF, OFT and CorDA.

Everything that such a method computes is PEFT's; here are its configuration from :class:`ipca.model.AdapterSettings`,
and the way back where an injection fails.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ipca._atomic import uninterrupted
from ipca.model.batches import as_batches, evaluating, run_batch
from ipca.model.settings import AdapterSettings
from ipca.model.targets import Target
from ipca.nn.layer_kinds import LINEAR
from ipca.nn.registry import get_layer, set_layer

if TYPE_CHECKING:
    from peft import PeftConfig

PEFT_METHODS = ("mica", "kasa", "osf", "oft", "corda-ipm", "corda-kpm")
ADAPTER = "default"
_OF_CORDA = ("covariance_matrix", "sample_count", "corda_method", "rank", "eigens")
"""Attributes that PEFT's CorDA leaves on a layer until it is initialized."""


def require_peft(method: str) -> None:
    """Raise ImportError without PEFT; the message names ``method`` and the extra."""
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError(f"method {method!r} needs PEFT ({error}); pip install 'ipca-lora[peft]'.") from None


def check_kinds(method: str, targets: Sequence[Target]) -> None:
    """Raise TypeError where PEFT's ``method`` is not for a layer of ``targets``; the message names it."""
    kinds: tuple[str, ...] = LINEAR if method in ("mica", "corda-ipm", "corda-kpm") else ("linear",)
    for target in targets:
        if target.kind not in kinds:
            raise TypeError(
                f"{target.name} is a layer of the kind {target.kind!r}; PEFT's {method} is for {' and '.join(kinds)} "
                "layers: exclude it."
            )


def apply_peft(
    model: nn.Module,
    method: str,
    targets: Sequence[Target],
    settings: AdapterSettings,
    modules_to_save: Iterable[str],
    *,
    seed: int,
    batches: Iterable[Any] | None,
) -> None:
    """Adapt ``targets`` for ``method``, one of :data:`PEFT_METHODS`; the arguments are those of ``baselines.apply``.

    Raises:
        ImportError: PEFT is missing.
        TypeError, ValueError: PEFT does not adapt a layer of this kind, or not at this rank; the model is unchanged.
    """
    require_peft(method)
    from peft.tuners.lora.corda import preprocess_corda
    from peft.tuners.tuners_utils import cast_adapter_dtype

    check_kinds(method, targets)
    config, names = _config(method, targets, settings), [target.name for target in targets]
    held = None if batches is None else as_batches(batches)

    def look_at_inputs() -> None:
        def run() -> None:
            for batch in held or ():
                run_batch(model, batch)

        with evaluating(model), _inputs_as_rows([get_layer(model, name) for name in names]):
            preprocess_corda(model, config, run_model=run)

    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with uninterrupted(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        inject(model, config, names, prepare=look_at_inputs if held else None)
        if method != "osf":  # whose gradients are projected by hooks on the parameters, which a cast replaces
            cast_adapter_dtype(model, ADAPTER)
        for name in modules_to_save:
            model.get_submodule(name).requires_grad_(True)


def inject(model: nn.Module, config: PeftConfig, layers: Sequence[str], *, prepare: Any = None) -> None:
    """Put PEFT's layers for ``config`` in the place of those at the paths ``layers``; everything else is frozen.

    Args:
        model: changed in place; unchanged if this fails.
        prepare: called before, within the part that is undone.

    Raises:
        Exception: any error of PEFT or of ``prepare``.
    """
    from peft import inject_adapter_in_model

    before = {name: model.get_submodule(name) for name in layers}
    weights = {module: module.get_parameter("weight").data for module in before.values()}
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        if prepare is not None:
            prepare()
        inject_adapter_in_model(config, model, ADAPTER)
    except BaseException:
        for name, module in before.items():
            set_layer(model, name, module)
            module.get_parameter("weight").data = weights[module]  # KaSA and CorDA replace it
            for attribute in _OF_CORDA:
                vars(module).pop(attribute, None)
        for parameter, required in requires_grad:
            parameter.requires_grad_(required)
        remove_peft_config(model)
        raise
    for name, module in before.items():
        model.get_submodule(name).train(module.training)


def remove_peft_config(model: nn.Module) -> None:
    """Remove the attribute that PEFT leaves on a model it injects layers into."""
    if hasattr(model, "peft_config"):
        del model.peft_config


def penalty(model: nn.Module) -> Tensor | float:
    """The term that a method adds to the loss, for training loops to add; 0.0 but for KaSA.

    KaSA's is ``β Σ ‖ΔΣ‖² + γ Σ (‖BᵀB − I‖_F + ‖A Aᵀ − I‖_F)`` over its layers, computed by PEFT, with PEFT's default
    ``β = 1e-4``, ``γ = 1e-3``. PEFT cannot add it by itself; a loop that leaves it out trains KaSA without its
    regularizers.

    Args:
        model: adapted by :func:`ipca.lab.baselines.apply`; any other has none.
    """
    configs = getattr(model, "peft_config", {})
    if getattr(configs.get(ADAPTER), "kasa_config", None) is None:
        return 0.0
    from peft import LoraModel

    found: Any = LoraModel._get_kasa_loss
    return found(model, ADAPTER)


def _config(method: str, targets: Sequence[Target], settings: AdapterSettings) -> Any:
    """PEFT's configuration of ``method`` for ``targets``."""
    from peft import KasaConfig, LoraConfig, OFTConfig, OSFConfig
    from peft.tuners.lora.config import CordaConfig

    layers = "|".join(re.escape(target.name) for target in targets)
    if method == "osf":
        return OSFConfig(target_modules=layers)
    if method == "oft":
        return OFTConfig(target_modules=layers, oft_block_size=4 * settings.rank, use_cayley_neumann=False)
    choices: dict[str, dict[str, Any]] = {
        "mica": {"init_lora_weights": "mica"},
        "kasa": {"kasa_config": KasaConfig()},
        "corda-ipm": {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method="ipm")},
        "corda-kpm": {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method="kpm")},
    }
    exact = {f"^{re.escape(target.name)}": target for target in targets}  # PEFT matches the ends of paths
    return LoraConfig(
        target_modules=layers,
        r=settings.rank,
        rank_pattern={key: target.window.rank for key, target in exact.items()},
        alpha_pattern={key: target.alpha for key, target in exact.items()},
        lora_dropout=settings.dropout,
        fan_in_fan_out=all(target.kind == "conv1d" for target in targets),
        **choices[method],
    )


@contextmanager
def _inputs_as_rows(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Give each of ``layers`` its input as ``(rows, in)`` within the block, the only shape that CorDA reads."""
    shapes: dict[nn.Module, torch.Size] = {}

    def before(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shapes[layer] = args[0].shape[:-1]
        rows = args[0].flatten(0, -2)
        if rows.shape[0] < 2:
            raise ValueError("CorDA needs at least 2 inputs of a layer in every batch; give larger batches.")
        return (rows, *args[1:])

    def after(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.unflatten(0, shapes[layer])

    handles = [layer.register_forward_pre_hook(before) for layer in layers]
    handles += [layer.register_forward_hook(after) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
