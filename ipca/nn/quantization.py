"""Layers with a quantized weight: detection, the weight as floats, the same layer with another weight.

| kind | module | stored |
|---|---|---|
| ``"nf4"``, ``"fp4"`` | ``bitsandbytes.nn.Linear4bit`` | 4-bit codes, a scale for each block |
| ``"int8"`` | ``bitsandbytes.nn.Linear8bitLt`` | int8, a scale for each row |
| ``"torchao-int8"`` | ``nn.Linear`` with torchao's ``Int8Tensor`` | int8, a scale for each row or tensor |
| ``"torchao-int4"``, … | ``nn.Linear`` with torchao's ``IntxUnpackedToInt8Tensor`` | 1 to 8 bits, a scale a group |

bitsandbytes and torchao are not imported to find out: where they are not loaded, no module is theirs.
"""

from __future__ import annotations

import copy
import hashlib
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ipca._hashing import tensor_sha256


def quantization_kind(module: nn.Module) -> str | None:
    """The kind of a layer with a quantized weight, such as ``"nf4"`` or ``"torchao-int8"``; None for other modules.

    Only the type counts: :func:`dequantize` raises where such a layer is not supported.

    Args:
        module: any module.
    """
    bnb: Any = sys.modules.get("bitsandbytes")
    if bnb is not None and isinstance(module, bnb.nn.Linear4bit):
        return str(getattr(module.weight, "quant_type", "4bit"))
    if bnb is not None and isinstance(module, bnb.nn.Linear8bitLt):
        return "int8"
    if type(module) is not nn.Linear:  # whose weight costs nothing to read, and which does not note that it was read
        return None
    weight: Any = getattr(module, "weight", None)
    if not type(weight).__module__.startswith("torchao."):
        return None
    name = type(weight).__name__
    if name == "IntxUnpackedToInt8Tensor":
        return f"torchao-{str(weight.target_dtype).removeprefix('torch.')}"
    return {"Int8Tensor": "torchao-int8"}.get(name, f"torchao-{name}")


def packs_when_evaluated(module: nn.Module) -> bool:
    """Whether the layer may pack its weight for good when it is evaluated, as 4-bit ones do on some CPUs.

    In training mode it computes the same from the weight as it is: the mode has no other effect on such a layer.
    """
    bnb: Any = sys.modules.get("bitsandbytes")
    return bnb is not None and isinstance(module, bnb.nn.Linear4bit)


def unsupported_quantization(module: nn.Module) -> str | None:
    """The reason why a layer with a :func:`quantization_kind` cannot be adapted, or None."""
    kind, weight = quantization_kind(module), module.weight
    assert kind is not None
    assert isinstance(weight, Tensor)
    if weight.is_meta:
        return "its quantized weight is on the meta device; load the weights first"
    if kind == "int8":
        return _unsupported_8bit(module)
    return _unsupported_torchao(weight) if kind.startswith("torchao-") else _unsupported_4bit(module)


def _unsupported_4bit(module: Any) -> str | None:
    state = getattr(module.weight, "quant_state", None)
    if state is None:
        return "its weight is not quantized yet; bitsandbytes does that when the model moves to its device"
    if getattr(state, "packing_format_for_cpu", False):
        return (
            "bitsandbytes packed its weight for evaluation on this CPU, which rounds its scales and passes no "
            "gradient; load the model again and adapt it before it is evaluated"
        )
    if tuple(state.shape) != (module.out_features, module.in_features):
        return f"its weight was quantized as {tuple(state.shape)}, not as (out, in)"
    return None


def _unsupported_8bit(module: Any) -> str | None:
    if module.state.has_fp16_weights:
        return "it keeps a 16-bit weight; load it with has_fp16_weights off"
    if module.weight.dtype != torch.int8:
        return "its weight is not quantized yet; bitsandbytes does that when the model moves to its device"
    return None


def _unsupported_torchao(weight: Any) -> str | None:
    name = type(weight).__name__
    if name not in ("Int8Tensor", "IntxUnpackedToInt8Tensor"):
        return (
            f"torchao's {name} is not supported; quantize with Int8WeightOnlyConfig or "
            "IntxWeightOnlyConfig to 4 bits, or with bitsandbytes"
        )
    if getattr(weight, "act_quant_kwargs", None) or getattr(weight, "activation_quantization", None):
        return "it quantizes its input too; use a weight-only configuration of torchao"
    return None


@torch.no_grad()
def dequantize(module: nn.Module) -> Tensor:
    """The weight ``(out, in)`` that the layer multiplies by, as a new float tensor on its device.

    Its dtype is the one the library dequantizes to: that of the weight before it was quantized, float32 for ``int8``.

    Args:
        module: a layer that has a :func:`quantization_kind`.

    Raises:
        TypeError: the module is not quantized.
        ValueError: it is, but in a way that is not supported.
    """
    kind = _usable(module)
    weight: Any = module.weight
    if kind.startswith("torchao-"):
        return weight.dequantize()
    functional = sys.modules["bitsandbytes"].functional
    if kind == "int8":
        return functional.int8_vectorwise_dequant(weight.detach(), _row_scales(module))
    return functional.dequantize_4bit(weight.detach(), weight.quant_state)


def dequantized_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of :func:`dequantize`, without computing it."""
    weight: Any = module.weight
    kind = quantization_kind(module) or ""
    if kind.startswith("torchao-"):
        return weight.dtype
    return torch.float32 if kind == "int8" else weight.quant_state.dtype


@torch.no_grad()
def quantize_like(module: nn.Module, weight: Tensor) -> nn.Module:
    """A copy of the layer ``module`` with ``weight (out, in)``, any float dtype, quantized by the same settings.

    Args:
        module: a layer that has a :func:`quantization_kind`.
        weight: of the same shape, finite.

    Raises:
        TypeError, ValueError: as :func:`dequantize`; or the shape is another, or the weight has NaN or Inf.
    """
    kind, own, shape = _usable(module), module.weight, (module.out_features, module.in_features)
    if tuple(weight.shape) != shape:  # type: ignore[comparison-overlap]
        raise ValueError(f"the weight has shape {tuple(weight.shape)}, the layer takes {shape}.")
    if not (weight.is_floating_point() and torch.isfinite(weight).all()):
        raise ValueError(
            f"the weight must hold finite floats to be quantized; it is {weight.dtype}, or has NaN or Inf."
        )
    assert isinstance(own, Tensor)
    new: Any = copy.deepcopy(module)
    if kind.startswith("torchao-"):
        new.weight = nn.Parameter(_torchao_like(own, weight), requires_grad=False)
    elif kind == "int8":
        new.weight = _int8_params(weight, own.device)
        new.state.reset_grads()
        new.state.CB = new.state.SCB = None  # taken from the weight at the next call
    else:
        new.weight = _params_4bit(new, weight, own)
    return new


def quantized_sha256(module: nn.Module) -> str:
    """``"nf4-<hex digest>"`` over the stored integers and scales, by which an adapter identifies its quantized base.

    Not over the floats, whose bits may differ between a CPU and a GPU.

    Raises:
        TypeError, ValueError: as :func:`dequantize`.
    """
    kind, digest = _usable(module), hashlib.sha256()
    for name, tensor in sorted(_stored(module, kind).items()):
        digest.update(f"{name} {tensor_sha256(tensor)}\n".encode())
    return f"{kind}-{digest.hexdigest()}"


def _usable(module: nn.Module) -> str:
    """The module's kind, or an exception."""
    kind = quantization_kind(module)
    if kind is None:
        raise TypeError(f"expected a layer with a quantized weight, got {type(module).__name__} without one.")
    why = unsupported_quantization(module)
    if why:
        raise ValueError(f"this {type(module).__name__} is not supported: {why}.")
    return kind


def _stored(module: Any, kind: str) -> dict[str, Tensor]:
    """The tensors that a quantized weight consists of."""
    weight = module.weight
    if kind.startswith("torchao-"):
        return {name: getattr(weight, name) for name in weight.__tensor_flatten__()[0]}
    if kind == "int8":
        return {"CB": weight.detach(), "SCB": _row_scales(module)}
    state = weight.quant_state
    held = {"codes": weight.detach().view(torch.uint8).flatten(), "absmax": state.absmax}
    return held | ({"nested": state.state2.absmax, "offset": state.offset.reshape(1)} if state.nested else {})


def _row_scales(module: Any) -> Tensor:
    """``127 · scale`` of each row of a ``Linear8bitLt``; its first call moves them from the weight to the state."""
    return module.state.SCB if module.weight.SCB is None else module.weight.SCB


def _params_4bit(module: nn.Module, weight: Tensor, like: Any) -> Any:
    new = sys.modules["bitsandbytes"].nn.Params4bit(
        weight.to(like.quant_state.dtype).cpu(),
        requires_grad=False,
        blocksize=like.blocksize,
        compress_statistics=like.compress_statistics,
        quant_type=like.quant_type,
        quant_storage=like.quant_storage,
        module=module,
    )
    return new.to(like.device)


def _int8_params(weight: Tensor, device: torch.device) -> Any:
    new = sys.modules["bitsandbytes"].nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    return new.to(device)


def _torchao_like(like: Any, weight: Tensor) -> Tensor:
    """``weight`` as a tensor of torchao with the blocks, bits and dtype of ``like``, symmetric if that is."""
    from torchao.quantization import PerRow, PerTensor
    from torchao.quantization.quant_primitives import MappingType

    weight = weight.to(like.device, like.dtype)
    asymmetric = like.zero_point is not None and bool(like.zero_point.any())
    mapping = MappingType.ASYMMETRIC if asymmetric else MappingType.SYMMETRIC
    if type(like).__name__ == "Int8Tensor":
        granularity = PerTensor() if like.block_size[0] == weight.shape[0] else PerRow()
        return type(like).from_hp(weight, granularity, mapping_type=mapping, reduce_range=like.reduce_range)
    return type(like).from_hp(weight, like.block_size, like.target_dtype, mapping_type=mapping)
