"""What a model predicts of a batch: logits, the labels they are judged by, and which of them count."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100
"""The label of a position that does not count, as in ``torch.nn.functional.cross_entropy``."""
_CLOSE = 0.01
"""Relative; a model's own loss may be computed in 16 bits."""


@dataclass(frozen=True)
class Predictions:
    """One batch's.

    Attributes:
        logits: ``(…, C)``.
        labels: ``(…)``, :data:`IGNORED` where nothing is to be predicted; None for a batch without labels.
        mask: ``(…)``, True where a position counts.
        loss: what the model says its loss is; None where it does not.
    """

    logits: Tensor
    labels: Tensor | None
    mask: Tensor
    loss: Tensor | None

    def shifted(self) -> Predictions:
        """With each label, and its mask, at the position before it: a causal language model's."""
        assert self.labels is not None
        labels = F.pad(self.labels, (0, 1), value=IGNORED)[..., 1:]
        mask = self.mask & F.pad(self.mask, (0, 1), value=False)[..., 1:]
        return Predictions(self.logits, labels, mask, self.loss)


def predict(model: nn.Module, batch: Any) -> Predictions:
    """Call ``model`` on ``batch``.

    Args:
        batch: a mapping, all of which the model takes by keyword (its ``labels`` are the labels); a pair
            ``(inputs, labels)``, whose inputs are a tensor or a mapping; or a tensor, without labels.

    Raises:
        TypeError: another batch, or an output without logits.
        ValueError: labels that do not fit the logits.
    """
    is_pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    inputs, labels = batch if is_pair else (batch, None)
    if isinstance(inputs, Mapping):
        labels = inputs.get("labels") if labels is None else labels
        output = model(**inputs)
    elif isinstance(inputs, Tensor):
        output = model(inputs)
    else:
        raise TypeError(f"a batch is a mapping, a pair (inputs, labels) or a tensor; got {_described(batch)}.")
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or not logits.ndim:
        raise TypeError(
            f"{type(model).__name__} gave {_described(output)}, not a tensor or an output with `.logits`; say how to "
            "read it: loss_of, logits_of or correct_of."
        )
    if labels is not None:
        labels = _checked(labels, logits)
    return Predictions(logits, labels, _mask(model, inputs, logits), getattr(output, "loss", None))


def is_shifted(found: Predictions) -> bool:
    """Whether the model's own loss shows that position ``t`` predicts label ``t + 1``, as in causal language models.

    No attribute of a model says so reliably. So the mean cross-entropy of the batch is computed both ways and compared
    with ``found.loss``. Without a loss, or with one label an item, positions predict their own labels.

    Raises:
        ValueError: the loss is neither of both.
    """
    if found.loss is None or found.labels is None or found.labels.ndim < 2:
        return False
    own, ways = float(found.loss), []
    for labels in (found.labels, found.shifted().labels):
        assert labels is not None
        logits = at_least_float32(found.logits)
        ways.append(float(F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)))
    distances = [_distance(own, way) for way in ways]
    if min(distances) > (_CLOSE * abs(own) if math.isfinite(own) else 0.0):
        raise ValueError(
            f"the model's own loss is {own:.4g}, but the cross-entropy of its logits is {ways[0]:.4g}, or "
            f"{ways[1]:.4g} with each position predicting the next label; say how to read it: loss_of, logits_of or "
            "correct_of."
        )
    return distances[1] < distances[0]


def counted(found: Predictions) -> tuple[Tensor, Tensor | None]:
    """The logits ``(n, C)`` that count, and their labels ``(n,)``."""
    keep = found.mask if found.labels is None else found.mask & (found.labels != IGNORED)
    return found.logits[keep], None if found.labels is None else found.labels[keep]


def at_least_float32(logits: Tensor) -> Tensor:
    """``logits`` as float32 where they are narrower."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _distance(own: float, way: float) -> float:
    """0 of two NaN, which are the loss where every label is :data:`IGNORED`; infinite of a NaN and a number."""
    if own == way or (math.isnan(own) and math.isnan(way)):
        return 0.0
    return abs(own - way) if math.isfinite(own - way) else math.inf


def _checked(labels: Any, logits: Tensor) -> Tensor:
    """``labels`` on the logits' device, or a ValueError where they are not a class index for each row of logits."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must be class indices, integers {tuple(logits.shape[:-1])} for logits {tuple(logits.shape)}; got "
            f"{_described(labels)}. Say how to read the model: loss_of, logits_of or correct_of."
        )
    labels, classes = labels.to(logits.device, torch.int64), logits.shape[-1]
    outside = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
    if len(outside):
        raise ValueError(
            f"labels must be class indices from 0 to {classes - 1}, or {IGNORED} where nothing is to be predicted; got "
            f"{int(outside[0])}."
        )
    return labels


def _mask(model: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
    """The attention mask where it has an entry for each row of logits, else all True."""
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    name = "decoder_attention_mask" if is_encoder_decoder else "attention_mask"
    mask = inputs.get(name) if isinstance(inputs, Mapping) else None
    if isinstance(mask, Tensor) and mask.shape == logits.shape[:-1]:
        return mask.to(logits.device) != 0
    return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, (tuple, list)) else "")
