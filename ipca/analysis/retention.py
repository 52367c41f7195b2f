"""What training has cost on held-out batches, against the base: cross-entropy, accuracy, KL divergence, embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipca.analysis.without_adapter import check_base, check_other_model, without_adapter
from ipca.model.batches import check_batches, evaluating, inner_model, names_labels

Measure = Callable[[nn.Module, Any], Any]
"""``measure(model, batch)``: a tensor with the measurement of each item or token that counts."""
IGNORED = -100
"""The label of a position that does not count, as in ``torch.nn.functional.cross_entropy``."""
_CLOSE = 0.01
"""Relative; a model's own loss may be computed in 16 bits."""


def cross_entropy_rise(
    model: nn.Module, base: nn.Module | None, batches: Iterable[Any], *, loss_of: Measure | None = None
) -> float:
    """``mean(log p_base(y) − log p_model(y))`` in nats, over the tokens or items with a label ``y``; above 0 is loss.

    Labels of −100 and positions that the attention mask leaves out do not count. Every other label counts alike,
    whatever batch it is in. For a model that gives its loss too, such as those of transformers, position ``t`` is
    judged by label ``t + 1`` where that is how its loss comes about (causal language models).

    Args:
        model: in any mode; it and ``base`` stay as they are, and so do their modes and torch's random generators.
        base: the model to compare with. None: ``model`` itself without its adapter, ipca's or PEFT's, without a second
            copy. In ipca's residual form that is the pretrained model up to rounding, and fully trained modules beside
            ipca's layers stay as trained.
        batches: each a mapping that the model takes by keyword, ``labels`` among it, or a pair ``(inputs, labels)``
            with a tensor or a mapping as inputs; on the model's device. Read once.
        loss_of: ``loss_of(model, batch)`` gives the losses of all items in a tensor of any shape, for what is neither;
            a single number counts as one item.

    Raises:
        TypeError: a batch or an output of another kind, or one batch in place of several.
        ValueError: ``base=None`` for a model without an adapter, or with one that has changed the base weights, as
            PEFT's PiSSA; a ``base`` that holds an adapted layer of ``model`` itself; nothing that counts; labels that
            do not fit the logits; or a model's own loss that is not the mean cross-entropy of its labels.
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

    >>> model = ipca.apply_pc(nn.Sequential(nn.Linear(64, 32)), rank=4, progress=False)
    >>> ipca.analysis.kl_to_base(model, None, [torch.randn(8, 64)], logits_of=lambda model, batch: model(batch))
    0.0

    Args:
        model, base: as for :func:`cross_entropy_rise`.
        batches: as for :func:`cross_entropy_rise`; without labels a mapping or a tensor.
        logits_of: ``logits_of(model, batch)`` gives logits ``(…, C)``, all of which count.

    Raises:
        TypeError, ValueError: as :func:`cross_entropy_rise`.
    """
    return _mean(model, base, batches, logits_of, lambda found: counted(found)[0], _kl)


@dataclass(frozen=True)
class Forgetting:
    """What a model has lost on batches that it should go on predicting as its base does.

    Attributes:
        kl: ``mean KL(base ‖ model)`` in nats, see :func:`kl_to_base`.
        loss_rise: see :func:`cross_entropy_rise`.
        tokens: the number of tokens, or items, that counted.
    """

    kl: float
    loss_rise: float
    tokens: int


def forgetting(model: nn.Module, base: nn.Module | None, batches: Iterable[Any]) -> Forgetting:
    """:func:`kl_to_base` and :func:`cross_entropy_rise` in one pass over ``batches``, which have labels.

    Args:
        model, base, batches: as for :func:`cross_entropy_rise`.

    Raises:
        TypeError, ValueError: as :func:`cross_entropy_rise`.
    """

    def costs(now: Any, then: Any) -> tuple[Tensor, Tensor]:
        rise = F.cross_entropy(at_least_float32(now[0]), now[1], reduction="none").double()
        return _kl(now[0], then[0]), rise - F.cross_entropy(at_least_float32(then[0]), then[1], reduction="none")

    (kl, rise), tokens = _means(model, base, batches, costs, read=_labeled)
    return Forgetting(kl, rise, tokens)


def embedding_drift(model: nn.Module, base: nn.Module | None, batches: Iterable[Any]) -> float:
    """``mean 1 − cos(e_base(x), e_model(x))`` over the items, from 0 to 2: for models whose head is new.

    ``e(x)`` is the mean over the positions of the last hidden states, ``(tokens, C)`` or ``(C, height, width)``;
    positions that the attention mask leaves out do not count.

    Args:
        model: of transformers.
        base: as for :func:`cross_entropy_rise`.
        batches: each a mapping that the model takes by keyword. Read once.

    Raises:
        TypeError: another batch, or a model that gives no hidden states.
        ValueError: ``base`` as for :func:`cross_entropy_rise`, or no batches.
    """

    def drift(now: Tensor, then: Tensor) -> tuple[Tensor]:
        return ((1 - F.cosine_similarity(now, then, dim=-1)).clamp_min(0),)  # of rounding

    return _means(model, base, batches, drift, measure=_embeddings)[0][0]


def _mean(
    model: nn.Module,
    base: nn.Module | None,
    batches: Iterable[Any],
    measure: Measure | None,
    read: Callable[[Predictions], Tensor],
    compare: Callable[[Tensor, Tensor], Tensor],
) -> float:
    """The mean of ``compare(now, then)`` over all items."""
    return _means(model, base, batches, lambda now, then: (compare(now, then),), measure=measure, read=read)[0][0]


def _means(
    model: nn.Module,
    base: nn.Module | None,
    batches: Iterable[Any],
    compare: Callable[[Any, Any], tuple[Tensor, ...]],
    *,
    measure: Measure | None = None,
    read: Callable[[Predictions], Any] = lambda found: found,
) -> tuple[list[float], int]:
    """The means over all items of each tensor of ``compare(now, then)``, and the number of items.

    ``now`` and ``then`` are what ``measure`` gives, or what ``read`` takes from :class:`Predictions`.
    """
    if base is None:
        check_base(model)
    else:
        check_other_model(model, base)
    check_batches(batches)
    totals, items = [0.0], 0
    with evaluating(model, *([] if base is None else [base])):
        for batch in batches:
            now, then = _both(model, base, batch, measure, read)
            if _shape(now) != _shape(then):
                raise ValueError(
                    f"model and base returned tensors of {_shape(now)} and {_shape(then)} for the same "
                    "batch; they must have the same classes and items to be compared."
                )
            values = compare(now, then)
            sums = [float(each.sum(dtype=torch.float64)) for each in values]
            totals = [sum(pair) for pair in zip_longest(totals, sums, fillvalue=0.0)]
            items += values[0].numel()
    if not items:
        raise ValueError("nothing counts: there are no batches, or every label is −100 or masked.")
    return [total / items for total in totals], items


def _shape(found: Tensor | tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple((found if isinstance(found, Tensor) else found[0]).shape)


def _both(
    model: nn.Module,
    base: nn.Module | None,
    batch: Any,
    measure: Measure | None,
    read: Callable[[Predictions], Any],
) -> tuple[Any, Any]:
    """The measurements of the model and of its base on ``batch``."""

    def of_base(function: Measure) -> Any:
        with without_adapter(model) if base is None else nullcontext():
            return function(model if base is None else base, batch)

    if measure is not None:
        return _as_tensor(measure(model, batch)), _as_tensor(of_base(measure))
    now, (then, shifted) = predict(model, batch), of_base(_with_shift)
    if shifted:  # the base decides for both: its loss is one that was trained to be low
        now, then = now.shifted(), then.shifted()
    return read(now), read(then)


def _as_tensor(found: Any) -> Tensor:
    """A measurement as a tensor on its own device, or the CPU, whatever the default device is."""
    return found if isinstance(found, Tensor) else torch.as_tensor(found, device="cpu")


def _embeddings(model: nn.Module, batch: Any) -> Tensor:
    """``(items, C)``, in float64."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"a batch is a mapping of the model's inputs; got {_described(batch)}.")
    output = model(**batch, output_hidden_states=True)
    states = (getattr(output, "hidden_states", None) or (None,))[-1]
    if not isinstance(states, Tensor):
        raise TypeError(f"{type(model).__name__} returned no hidden states, so that its embeddings cannot be compared.")
    positions = (states.flatten(2).mT if states.ndim == 4 else states).double()
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != positions.shape[:2]:
        return positions.mean(1)
    weight = mask.double()[..., None]
    counted = weight.sum(1) > 0  # an item of nothing but padding has no embedding
    found = (positions * weight).sum(1) / weight.sum(1).clamp_min(1)
    return found[counted.squeeze(-1)]


def _labeled(found: Predictions) -> tuple[Tensor, Tensor]:
    logits, labels = counted(found)
    if labels is None:
        raise ValueError("these batches have no labels: pass pairs (inputs, labels), or mappings with 'labels'.")
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


@dataclass(frozen=True)
class Predictions:
    """The predictions of a model on one batch.

    Attributes:
        logits: ``(…, C)``.
        labels: ``(…)``, :data:`IGNORED` where nothing is to be predicted; None for a batch without labels.
        mask: ``(…)``, True where a position counts.
        loss: the loss that the model itself returns; None without one.
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
        batch: a mapping of keyword arguments for the model (its ``labels`` are the labels); a pair
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
            f"{type(model).__name__} returned {_described(output)}, not a tensor or an output with `.logits`; pass "
            "loss_of, logits_of or correct_of to read it."
        )
    if labels is not None:
        labels = _checked(labels, logits)
    return Predictions(logits, labels, _mask(model, inputs, logits), _own_loss(model, output))


def _with_shift(model: nn.Module, batch: Any) -> tuple[Predictions, bool]:
    """:func:`predict`, and whether position ``t`` predicts label ``t + 1``."""
    found = predict(model, batch)
    return found, is_shifted(found, lambda labels: _loss_of(model, batch, labels))


def _loss_of(model: nn.Module, batch: Any, labels: Tensor) -> Tensor | None:
    """The model's own loss of ``labels`` for the inputs of ``batch``; None of a pair for a model that takes none."""
    inputs = batch if isinstance(batch, Mapping) else batch[0]
    if inputs is not batch and not names_labels(model):
        return None
    output = model(**{**inputs, "labels": labels}) if isinstance(inputs, Mapping) else model(inputs, labels=labels)
    loss: Tensor | None = _own_loss(model, output)
    return loss


def _own_loss(model: nn.Module, output: Any) -> Any:
    """The model's loss, without the share of a mixture of experts that balances its router."""
    loss, balance = getattr(output, "loss", None), getattr(output, "aux_loss", None)
    share = getattr(getattr(inner_model(model), "config", None), "router_aux_loss_coef", None)
    return loss if loss is None or balance is None or share is None else loss - share * balance


def is_shifted(found: Predictions, loss_of: Callable[[Tensor], Tensor | None]) -> bool:
    """Whether the model's own loss shows that position ``t`` predicts label ``t + 1``, as in causal language models.

    No attribute of a model says so reliably. So the mean cross-entropy of the batch is computed both ways and compared
    with ``found.loss``. Where the two differ by no more than that is rounded, the loss is asked for once more with the
    first label of each item alone, which a shifted loss does not count. Without a loss, or with one label an item,
    positions predict their own labels.

    Args:
        loss_of: the model's own loss of other labels for the same inputs.

    Raises:
        ValueError: the loss is neither of both.
    """
    if found.labels is None or found.labels.ndim < 2:
        return False
    loss = loss_of(found.labels) if found.loss is None else found.loss
    if loss is None:
        return False
    own, ways = float(loss), []
    for labels in (found.labels, found.shifted().labels):
        assert labels is not None
        logits = at_least_float32(found.logits)
        ways.append(float(F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)))
    distances = [_distance(own, way) for way in ways]
    if min(distances) > (_CLOSE * abs(own) if math.isfinite(own) else 0.0):
        raise ValueError(
            f"the model's own loss is {own:.4g}, but the cross-entropy of its logits is {ways[0]:.4g}, or "
            f"{ways[1]:.4g} with each position predicting the next label; pass loss_of, logits_of or correct_of to "
            "read it."
        )
    rounding = 4 * torch.finfo(loss.dtype).eps * abs(own)
    if abs(ways[0] - ways[1]) <= rounding:
        first = torch.full_like(found.labels, IGNORED)
        first[:, 0] = 0
        alone = loss_of(first)
        return alone is not None and (not math.isfinite(float(alone)) or float(alone) == 0)
    return distances[1] < distances[0]


def counted(found: Predictions) -> tuple[Tensor, Tensor | None]:
    """The logits ``(n, C)`` that count, and their labels ``(n,)``."""
    keep = found.mask if found.labels is None else found.mask & (found.labels != IGNORED)
    return found.logits[keep], None if found.labels is None else found.labels[keep]


def at_least_float32(logits: Tensor) -> Tensor:
    """``logits`` in float32, or in float64 if they are."""
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
            f"{_described(labels)}. Pass loss_of, logits_of or correct_of to read the model."
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
    is_encoder_decoder = getattr(getattr(inner_model(model), "config", None), "is_encoder_decoder", False)
    name = "decoder_attention_mask" if is_encoder_decoder else "attention_mask"
    mask = inputs.get(name) if isinstance(inputs, Mapping) else None
    if isinstance(mask, Tensor) and mask.shape == logits.shape[:-1]:
        return mask.to(logits.device) != 0
    return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, (tuple, list)) else "")
