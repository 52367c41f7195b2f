"""Serialization of a WindowLayer's non-tensor state (``_extra_state``) as JSON in a uint8 tensor."""

from __future__ import annotations

import json
from typing import NamedTuple

import torch
from torch import Tensor


class LayerRecord(NamedTuple):
    """A layer's settings and its window's first index, which is None before the window is set."""

    rank: int
    alpha: float
    form: str
    start: int | None
    base_sha256: str | None


def encode_extra_state(record: LayerRecord) -> Tensor:
    """The record as a 1-D uint8 tensor, which every checkpoint format can hold."""
    return torch.frombuffer(bytearray(json.dumps(record._asdict()).encode()), dtype=torch.uint8)


def decode_extra_state(state: Tensor) -> LayerRecord:
    """The inverse of :func:`encode_extra_state`.

    Raises:
        ValueError: the bytes are no such record.
    """
    try:
        values = json.loads(bytes(state.cpu().tolist()))
        missing = set(LayerRecord._fields) - values.keys()
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"the layer's record is damaged: {error}.") from None
    if missing:
        raise ValueError(f"the layer's record lacks {', '.join(sorted(missing))}.")
    return LayerRecord(**{name: values[name] for name in LayerRecord._fields})


def check_extra_state(record: LayerRecord, state: Tensor) -> None:
    """Raise ValueError where the saved ``state`` has another rank, alpha or form than ``record``."""
    saved = decode_extra_state(state)
    for name in ("rank", "alpha", "form"):
        if getattr(saved, name) != getattr(record, name):
            raise ValueError(
                f"the state dict was saved with {name}={getattr(saved, name)!r}, "
                f"this layer has {getattr(record, name)!r}."
            )
