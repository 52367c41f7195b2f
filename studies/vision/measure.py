"""A task of images, and what is measured of a tuned model: success on it, and how far kept images have moved."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from ipca._hashing import tensor_sha256
from ipca.model.batches import evaluating
from studies.vision.model import SaliencyViT, maps_of, pooled, tokens_of
from studies.vision.probe import Probe

NEIGHBORS = 5
EMOJI = "emoji"
"""The kept emoji, of other categories than the new task's."""


@dataclass(frozen=True)
class Images:
    """Images ``(M, 3, side, side)``, uint8, of one new task and of what is kept.

    Attributes:
        train, labels: of the new task.
        new, new_labels: held out of it.
        kept: by name.
        groups: of the kept emoji, which come in pairs: one emoji of two vendors.
        fitted: so many of the kept emoji's images, the first ones, fit a probe of their groups; the rest test it.
        probe: the new task's, of the base's features; no arm changes it.
    """

    train: Tensor
    labels: Tensor
    new: Tensor
    new_labels: Tensor
    kept: dict[str, Tensor]
    groups: Tensor
    fitted: int
    probe: Probe
    kind: ClassVar[str] = "images"

    def loss(self, model: SaliencyViT, chosen: Tensor) -> Tensor:
        """The mean cross-entropy of the training images ``chosen``."""
        logits = self.probe(pooled(model(self.train[chosen])))
        return F.cross_entropy(logits, self.labels[chosen].to(logits.device))

    def reference(self, model: SaliencyViT) -> Reference:
        """What measures models against the base ``model``."""
        return Reference(model, self)

    def inputs(self, of: str, model: SaliencyViT) -> list[Tensor]:
        """The first 64 training images of the ``"new"`` task; nothing is kept that is not measured.

        Raises:
            ValueError: of the base's.
        """
        if of != "new":
            raise ValueError(f"this task has inputs of the 'new' task only, not of {of!r}.")
        return list(self.train[:64].split(16))

    def sha256(self) -> str:
        """A hash of all images and labels."""
        kept = [self.kept[name] for name in sorted(self.kept)]
        parts = [self.train, self.labels, self.new, self.new_labels, *kept, self.groups]
        return hashlib.sha256(" ".join(map(tensor_sha256, parts)).encode()).hexdigest()


@dataclass(frozen=True)
class Measurement:
    """What was measured.

    Attributes:
        ce: cross-entropy of each held-out image of the new task ``(M,)``, in nats.
        kl: by kept images, the divergence of each image's saliency map ``(M,)``, in nats a pixel.
        others: means by name.
    """

    ce: Tensor
    kl: dict[str, Tensor]
    others: dict[str, float]

    def means(self) -> dict[str, float | None]:
        """``ce_new``, ``kl_photos``, …, and :attr:`others`; None where they are not finite."""
        found = {"ce_new": float(self.ce.double().mean())}
        found |= {f"kl_{name}": float(values.double().mean()) for name, values in self.kl.items()} | self.others
        return {name: value if math.isfinite(value) else None for name, value in found.items()}

    def items(self) -> dict[str, Tensor]:
        """The values of single images ``(M, 1)``."""
        found = {"ce_new": self.ce, **{f"kl_{name}": values for name, values in self.kl.items()}}
        return {name: values[:, None].float().cpu() for name, values in found.items()}


class Reference:
    """The base's tokens, saliency maps and probe on the kept images.

    Args:
        model: the base.
        images: of the task.
    """

    def __init__(self, model: SaliencyViT, images: Images) -> None:
        self.images = images
        with evaluating(model):
            self._tokens = {name: tokens_of(model, kept) for name, kept in images.kept.items()}
            self._maps = {name: maps_of(model, tokens) for name, tokens in self._tokens.items()}
        self._probe = self._fitted(pooled(self._tokens[EMOJI]))

    def measure(self, model: SaliencyViT) -> Measurement:
        """``model`` against the base; each grows with what is lost.

        ======================  ===================================================================================
        ``ce_new``              cross-entropy on the held-out images of the new task
        ``error_new``           share of them that is classified wrongly
        ``kl_…``                ``KL(base ‖ tuned)`` of the saliency map, each pixel a Bernoulli distribution
        ``cka_…``               1 − linear CKA of all tokens (Kornblith et al., ICML 2019), which no rotation changes
        ``neighbors_…``         share of an image's five nearest neighbors by cosine that are not the base's
        ``frozen_emoji``        error of a probe of the kept emoji's categories that was fitted on the base
        ``refit_emoji``         error of one that is fitted on the model's own features
        ======================  ===================================================================================
        """
        images, kl, others = self.images, {}, {}
        with evaluating(model):
            logits = images.probe(pooled(tokens_of(model, images.new))).cpu()
            ce = F.cross_entropy(logits, images.new_labels, reduction="none")
            others["error_new"] = _share(logits.argmax(-1) != images.new_labels)
            for name, kept in images.kept.items():
                before, after = self._tokens[name], tokens_of(model, kept)
                kl[name] = bernoulli_kl(self._maps[name], maps_of(model, after)).flatten(1).mean(1)
                others[f"cka_{name}"] = 1 - linear_cka(before.flatten(0, 1), after.flatten(0, 1))
                then, now = nearest(pooled(before)), nearest(pooled(after))
                others[f"neighbors_{name}"] = 1 - _share((now[:, :, None] == then[:, None]).any(-1))
                if name == EMOJI:
                    features = pooled(after)
        if all(map(math.isfinite, others.values())):
            others["frozen_emoji"] = self._error(self._probe, features)
            others["refit_emoji"] = self._error(self._fitted(features), features)
        return Measurement(ce, kl, others)

    def _fitted(self, features: Tensor) -> Probe:
        return Probe.fit(features[: self.images.fitted], self.images.groups[: self.images.fitted])

    def _error(self, probe: Probe, features: Tensor) -> float:
        found = probe(features[self.images.fitted :]).argmax(-1).cpu()
        return _share(found != self.images.groups[self.images.fitted :])


def bernoulli_kl(before: Tensor, after: Tensor) -> Tensor:
    """``p log(p / q) + (1 − p) log((1 − p) / (1 − q))`` in nats, float64, of logits of ``p`` and ``q``."""
    before, after = before.double(), after.double()  # in float32, rounding would exceed a small divergence
    there = F.logsigmoid(before) - F.logsigmoid(after)
    absent = F.logsigmoid(-before) - F.logsigmoid(-after)
    return before.sigmoid() * there + (-before).sigmoid() * absent


def linear_cka(x: Tensor, y: Tensor) -> float:
    """``‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖)`` of centered ``X, Y (n, width)``, computed in float64."""
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    found = (x.mT @ y).square().sum() / ((x.mT @ x).norm() * (y.mT @ y).norm())
    return float(found.clamp_max(1))


def nearest(features: Tensor) -> Tensor:
    """``(M, 5)``: of each image the nearest others by cosine."""
    unit = F.normalize(features.double(), dim=-1)
    return (unit @ unit.mT).fill_diagonal_(-2).topk(NEIGHBORS, dim=-1).indices


def _share(values: Tensor) -> float:
    return float(values.double().mean())
