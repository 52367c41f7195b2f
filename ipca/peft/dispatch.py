"""Selection of the layer class that PEFT puts around a base layer, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from ipca.nn.quantization import quantization_kind, unsupported_quantization
from ipca.nn.subclasses import computes_as
from ipca.nn.window_layer import WindowLayer
from ipca.peft.layers import WindowConv1d, WindowConv2d, WindowConv3d, WindowEmbedding, WindowLinear, WindowLora
from ipca.peft.parameter import ParamWrapper

_CONVOLUTIONS: dict[type[nn.Module], type[WindowLora]] = {
    nn.Conv1d: WindowConv1d,
    nn.Conv2d: WindowConv2d,
    nn.Conv3d: WindowConv3d,
}

_KINDS: tuple[type[nn.Module], ...] = (nn.Linear, Conv1D, nn.Embedding, *_CONVOLUTIONS)
"""Classes of base layers; of their subclasses only those fit that compute the same."""

_STOCK: dict[type[nn.Module], type[WindowLora]] = {
    lora.Linear: WindowLinear,
    lora.Embedding: WindowEmbedding,
    lora.Conv1d: WindowConv1d,
    lora.Conv2d: WindowConv2d,
    lora.Conv3d: WindowConv3d,
}


def build_layer(
    target: nn.Module, adapter_name: str, *, config: LoraConfig, target_name: str = "", **kwargs: Any
) -> nn.Module:
    """The layer around ``target`` with its first adapter, in the place of PEFT's own dispatch.

    Args:
        target: a plain layer, or for a parameter the module that holds it.
        adapter_name: of the adapter.
        config: its PCConfig.
        target_name: path of the layer in the model that PEFT wraps.
        kwargs: PEFT's, with ``r`` and ``lora_alpha`` of this layer.

    Raises:
        ValueError: the layer cannot have a window; the message begins with its path.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if kwargs.get("parameter_name") is not None:
        return ParamWrapper(target, adapter_name, config=config, target_name=target_name, **kwargs)
    kwargs.pop("parameter_name", None)
    why = unsupported_reason(base)
    if why:
        raise ValueError(f"{target_name}: {why}; exclude it, or adapt it with peft.LoraConfig.")
    if isinstance(base, (nn.Linear, Conv1D)):
        config.fan_in_fan_out = kwargs["is_target_conv_1d_layer"] = isinstance(base, Conv1D)
    return class_for(base)(target, adapter_name, config=config, target_name=target_name, **kwargs)


def class_for(base: nn.Module) -> type[WindowLora]:
    """The class of the layer around ``base``, for which there is no :func:`unsupported_reason`."""
    kind = quantization_kind(base)
    if kind is not None:
        from ipca.peft.quantized import quantized_class  # imports bitsandbytes

        return quantized_class(kind)
    if isinstance(base, nn.Embedding):
        return WindowEmbedding
    for convolution, layer in _CONVOLUTIONS.items():
        if isinstance(base, convolution):
            return layer
    return WindowLinear


def admit_windows(model: nn.Module, paths: Container[str] | None = None) -> None:
    """Turn PEFT's own LoRA layers into layers that can hold a window too; their adapters stay as they are.

    Args:
        model: holds layers of PEFT.
        paths: of the layers to turn; default all of a kind that can have a window.
    """
    for path, layer in model.named_modules():
        if (
            type(layer) in _STOCK
            and (paths is None or path in paths)
            and not unsupported_reason(layer.get_base_layer())
        ):
            layer.__class__, layer.path, layer.starts = _STOCK[type(layer)], path, {}


def unsupported_reason(base: nn.Module) -> str:
    """The reason why a base layer cannot have a window, or an empty text."""
    if quantization_kind(base) is not None:
        return unsupported_quantization(base) or ""
    if isinstance(base, WindowLayer):
        return "it is adapted by ipca.apply_pc already; call ipca.unload(model) first"
    if isinstance(base, NonDynamicallyQuantizableLinear | nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weights without calling their layers"
    if getattr(base, "_hf_tp_plan", None) is not None:
        return "it is tensor parallel, and no rank has the weight to decompose"
    kind = next((kind for kind in _KINDS if isinstance(base, kind)), None)
    if kind is None:
        return f"a {type(base).__name__} has no weight matrix that PEFT's format knows"
    if kind in _CONVOLUTIONS and (why := _unsupported_convolution(base)):
        return why
    if getattr(base, "max_norm", None) is not None:
        return f"max_norm={base.max_norm} changes the embedding's weight as it is read"
    weight = base.weight
    if not isinstance(weight, nn.Parameter):
        return "its weight is computed from other parameters, so that nothing could be merged into it"
    if not (type(weight.data) is Tensor and weight.is_floating_point()):
        return f"its weight is a {type(weight.data).__name__} of {weight.dtype}"
    if not computes_as(base, kind):
        return f"a {type(base).__name__} may compute something else than its base class {kind.__name__}"
    return ""


def _unsupported_convolution(base: Any) -> str:
    """The option of a convolution that PEFT's convolution by ``A`` does not take from the base layer, if any."""
    for name, plain in (("groups", 1), ("dilation", (1,) * len(base.kernel_size)), ("padding_mode", "zeros")):
        if getattr(base, name) != plain:
            return f"PEFT's format knows no convolution with {name}={getattr(base, name)!r}"
    return ""
