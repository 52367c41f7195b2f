"""What a model lost against its base on held-out batches: cross-entropy in nats, accuracy, KL divergence."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipca.analysis.predictions import Predictions, at_least_float32, counted, is_shifted, predict
from ipca.model.apply import adapted_layers
from ipca.model.batches import check_batches, evaluating
from ipca.model.merge import disabled

Measure = Callable[[nn.Module, Any], Any]
"""``measure(model, batch)``: a tensor with what was measured of each item or token that counts."""


def cross_entropy_rise(
    model: nn.Module, base: nn.Module | None, batches: Iterable[Any], *, loss_of: Measure | None = None
) -> float:
    """``mean(log p_base(y) − log p_model(y))`` in nats, over the tokens or items with a label ``y``; above 0 is loss.

    Labels of −100 and positions that the attention mask leaves out do not count. Every other label counts alike,
    whatever batch it is in. For a model that gives its loss too, such as those of transformers, position ``t`` is
    judged by label ``t + 1`` where that is how its loss comes about (causal language models).

    Args:
        model: in any mode; it and ``base`` stay as they are, and so do their modes and torch's random generators.
        base: what it is compared with. None: ``model`` itself without its adapter, as under :func:`ipca.disabled`,
            which takes no second copy. In the residual form that is the pretrained model up to rounding, and modules
            that are fully trained stay as trained.
        batches: each a mapping that the model takes by keyword, ``labels`` among it, or a pair ``(inputs, labels)``
            with a tensor or a mapping as inputs; on the model's device. Read once.
        loss_of: ``loss_of(model, batch)`` gives the losses of all items in a tensor of any shape, for what is neither;
            a single number counts as one item.

    Raises:
        TypeError: a batch or an output of another kind, or one batch in place of several.
        ValueError: ``base=None`` for a model without adapted layers, nothing that counts, labels that do not fit the
            logits, or a model's own loss that is not the mean cross-entropy of its labels.
    """
    return _mean(model, base, batches, loss_of, _cross_entropy, lambda now, then: now.double() - then.double())


def accuracy_drop(
    model: nn.Module, base: nn.Module | None, batches: Iterable[Any], *, correct_of: Measure | None = None
) -> float:
    """The share of labels that ``base`` predicts minus the share that ``model`` does, from −1 to 1; above 0 is loss.

    The prediction is the largest logit; where one is NaN it is wrong. Which labels count, and all else, is as for
    :func:`cross_entropy_rise`.

    Args:
        model, base, batches: as for :func:`cross_entropy_rise`.
        correct_of: ``correct_of(model, batch)`` gives True or 1 for each item predicted right, else False or 0, in a
            tensor of any shape.

    Raises:
        TypeError, ValueError: as :func:`cross_entropy_rise`.
    """
    return _mean(model, base, batches, correct_of, _correct, lambda now, then: then.double() - now.double())


def kl_to_base(
    model: nn.Module, base: nn.Module | None, batches: Iterable[Any], *, logits_of: Measure | None = None
) -> float:
    """``mean KL(base ‖ model) = mean Σ_c p_base(c) log(p_base(c) / p_model(c))``, nats per item or token.

    ``p`` are softmaxes of the logits over their last dimension, in float32 (of float64 logits in float64), summed in
    float64; rounding moves a KL by about 1e-7. Where a batch has labels, the positions that predict one count, as in
    :func:`cross_entropy_rise`; else all that the attention mask leaves.

    Args:
        model, base: as for :func:`cross_entropy_rise`.
        batches: as for :func:`cross_entropy_rise`; without labels a mapping or a tensor.
        logits_of: ``logits_of(model, batch)`` gives logits ``(…, C)``, all of which count.

    Raises:
        TypeError, ValueError: as :func:`cross_entropy_rise`.
    """
    return _mean(model, base, batches, logits_of, lambda found: counted(found)[0], _kl)


def _mean(
    model: nn.Module,
    base: nn.Module | None,
    batches: Iterable[Any],
    measure: Measure | None,
    read: Callable[[Predictions], Tensor],
    compare: Callable[[Tensor, Tensor], Tensor],
) -> float:
    """The mean of ``compare(now, then)`` over all items; ``read`` is for what :func:`predict` gives."""
    if base is None and not adapted_layers(model):
        raise ValueError(
            f"base=None takes the model without its adapter, but this {type(model).__name__} has no adapted layer of "
            "ipca; give the pretrained model as base."
        )
    check_batches(batches)
    total, items = 0.0, 0
    with evaluating(model, *([] if base is None else [base])):
        for batch in batches:
            now, then = _both(model, base, batch, measure, read)
            if now.shape != then.shape:
                raise ValueError(
                    f"model and base gave tensors of {tuple(now.shape)} and {tuple(then.shape)} for the same batch; "
                    "they must have the same classes and items to be compared."
                )
            values = compare(now, then)
            total += float(values.sum(dtype=torch.float64))
            items += values.numel()
    if not items:
        raise ValueError("nothing counts: there are no batches, or every label is −100 or masked.")
    return total / items


def _both(
    model: nn.Module,
    base: nn.Module | None,
    batch: Any,
    measure: Measure | None,
    read: Callable[[Predictions], Tensor],
) -> tuple[Tensor, Tensor]:
    """What the model gives for ``batch``, and what its base does."""

    def of_base(function: Measure) -> Any:
        with disabled(model) if base is None else nullcontext():
            return function(model if base is None else base, batch)

    if measure is not None:
        return torch.as_tensor(measure(model, batch)), torch.as_tensor(of_base(measure))
    now, then = predict(model, batch), of_base(predict)
    if is_shifted(then):  # the base decides for both: its loss is one that was trained to be low
        now, then = now.shifted(), then.shifted()
    return read(now), read(then)


def _labeled(found: Predictions) -> tuple[Tensor, Tensor]:
    logits, labels = counted(found)
    if labels is None:
        raise ValueError("these batches have no labels: give pairs (inputs, labels), or mappings with 'labels'.")
    return logits, labels


def _cross_entropy(found: Predictions) -> Tensor:
    logits, labels = _labeled(found)
    return F.cross_entropy(at_least_float32(logits), labels, reduction="none")


def _correct(found: Predictions) -> Tensor:
    logits, labels = _labeled(found)
    largest, predicted = logits.max(-1)
    return (predicted == labels) & ~largest.isnan()


def _kl(now: Tensor, then: Tensor) -> Tensor:
    log_p, log_q = (torch.log_softmax(at_least_float32(logits), -1) for logits in (then, now))
    p = log_p.exp()
    terms = torch.where(p == 0, 0.0, p * (log_p - log_q))  # what the base rules out adds nothing: 0 log 0 = 0
    return terms.sum(-1, dtype=torch.float64)
