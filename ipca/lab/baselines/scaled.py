"""The trained change of an adapted model, scaled: ``W + λ ΔW`` in every layer, whatever the method."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from torch import nn

from ipca.analysis import weight_pairs
from ipca.analysis.layer_pairs import Base, LayerPair, inside_peft
from ipca.analysis.without_adapter import check_base
from ipca.model.apply import adapted_layers
from ipca.nn.layer_kinds import LINEAR, build_layer, layer_kind, read_layer
from ipca.nn.registry import set_layer
from ipca.nn.window_layer import WindowLayer

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def scaled(model: Model, scale: float, base: Base | None = None) -> Iterator[Model]:
    """Within the block, ``model`` computes with ``W + scale · ΔW``: 0 is the base to the bit, 1 the tuned model.

    ``ΔW = W' − W`` is the change of the effective weight, also of methods whose change is no product, such as OFT's
    ``W R − W`` or full fine-tuning's. Where it is a product ``scaling · B A``, of ipca's layers in the intact form and
    of PEFT's LoRA, only ``scaling`` changes, as in PEFT's ``rescale_adapter_scale``, and ``base`` is not needed.
    Modules that train whole, such as a head, stay as trained. Source: WiSE-FT (arXiv 2109.01903).

    Args:
        model: adapted by :func:`ipca.lab.baselines.apply` or by PEFT, or fully fine-tuned; not trained in the block.
        scale: ``λ``; above 1 the change is extrapolated.
        base: the plain model before training, or its weights ``{path: (out, in)}``, as for
            :func:`ipca.analysis.weight_pairs`; required for full fine-tuning and for PEFT's methods whose layers are
            not ``W + scaling · B A``: KaSA, CorDA, PiSSA, OSF, OFT, DoRA.

    Raises:
        TypeError, ValueError: ``base`` is missing, or as :func:`ipca.analysis.weight_pairs`; or a layer is not linear.
    """
    if any(getattr(module, "merged", False) for module in model.modules()):
        raise ValueError("a merged adapter cannot be scaled; unmerge it first.")
    windows = adapted_layers(model).values()
    problem = None if windows else _no_product(model)
    with ExitStack() as stack:
        if windows and all(layer.form == "intact" for layer in windows):
            for layer in windows:
                stack.callback(setattr, layer, "alpha", layer.alpha)
                layer.alpha *= scale
        elif not windows and problem is None:
            from peft.helpers import rescale_adapter_scale

            stack.enter_context(rescale_adapter_scale(model, scale))
        elif problem is not None and base is None:
            raise problem
        elif scale != 1:
            plain_model = inside_peft(model)
            for name, own, plain in [_scaled_layer(pair, scale) for pair in weight_pairs(model, base)]:
                stack.callback(set_layer, plain_model, name, own)
                set_layer(plain_model, name, plain)
        yield model


def _no_product(model: Any) -> ValueError | None:
    """Why the change of ``model`` is not PEFT's ``scaling · B A`` on an untouched base; None where it is."""
    try:
        check_base(model)
    except ValueError as error:
        return error
    from peft import LoraConfig

    for name, config in model.peft_config.items():
        if not isinstance(config, LoraConfig) or config.use_dora or config.lora_bias:
            kind = f"{type(config).__name__}{' with DoRA' * getattr(config, 'use_dora', False)}"
            return ValueError(f"the change of the adapter {name!r}, a {kind}, is no product scaling · B A; pass base.")
    return None


def _scaled_layer(pair: LayerPair, scale: float) -> tuple[str, nn.Module, nn.Module]:
    """The path, the layer there, and a plain one with the scaled change."""
    layer: Any = pair.layer
    if isinstance(layer, WindowLayer):
        plain = layer.to_plain(base=True)
    else:
        plain = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    kind = layer_kind(plain)
    if kind not in LINEAR:
        raise ValueError(f"{pair.name}: of this method only linear layers can be scaled, not {kind!r}.")
    weight, bias = read_layer(plain)
    moved = (pair.base + scale * pair.change).to(weight)
    return pair.name, layer, build_layer(kind, moved, bias).train(layer.training)
