"""What a WindowLayer is besides its tensors, as a JSON record that a state dict carries as a tensor of bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ipca.nn.window_layer import WindowLayer

_MUST_AGREE = ("rank", "alpha", "form")
_FACTORS = ("lora_A", "lora_B", "lora_A0", "lora_B0")


def encode_extra_state(layer: WindowLayer) -> Tensor:
    """The record of ``layer`` as a 1-D uint8 tensor, which every checkpoint format can hold."""
    record = {name: getattr(layer, name) for name in _MUST_AGREE}
    record["start"] = None if layer.window is None else layer.window.index
    record["base_sha256"] = layer.base_sha256
    return torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8)


def describe(layer: WindowLayer) -> str:
    """What ``repr`` says of ``layer``."""
    where = repr(layer.requested_window.text)
    if layer.window is not None:
        where = f"[{layer.window.index}, {layer.window.index + layer.rank})"
    return (
        f"in_features={layer.in_features}, out_features={layer.out_features}, bias={layer.has_bias}, "
        f"window={where}, rank={layer.rank}, alpha={layer.alpha:g}, form={layer.form}"
        + (f", dropout={layer.dropout:g}" if layer.dropout else "")
        + (", merged" if layer.merged else "")
        + (", disabled" if layer.is_disabled else "")
    )


def decode_extra_state(state: Tensor) -> dict[str, Any]:
    """The inverse of :func:`encode_extra_state`, or a ValueError."""
    try:
        record: dict[str, Any] = json.loads(bytes(state.cpu().tolist()))
        missing = {*_MUST_AGREE, "start", "base_sha256"} - record.keys()
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"the layer's record is damaged: {error}.") from None
    if missing:
        raise ValueError(f"the layer's record lacks {', '.join(sorted(missing))}.")
    return record


def check_extra_state(layer: WindowLayer, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Raise ValueError where a state dict of a WindowLayer contradicts ``layer``, or has base_weight without factors.

    Strict loading reports other missing keys.
    """
    if prefix + "base_weight" in state_dict:
        missing = [name for name in _FACTORS if prefix + name not in state_dict]
        if missing:
            raise ValueError(f"the state dict holds base_weight, which means nothing without {', '.join(missing)}.")
    state = state_dict.get(prefix + "_extra_state")
    record = {} if state is None else decode_extra_state(state)
    for name, value in record.items():
        if name in _MUST_AGREE and value != getattr(layer, name):
            raise ValueError(
                f"the state dict was saved with {name}={value!r}, this layer has {getattr(layer, name)!r}."
            )
