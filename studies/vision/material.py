"""Images of the study: what the model learns, what is held out of it, and images on which it shall stay as it is."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ipca._hashing import tensor_sha256
from studies.cached_tensors import cached
from studies.vision.measure import EMOJI, Reference
from studies.vision.model import SaliencyViT, pooled, tokens_of
from studies.vision.packages import PHOTOGRAPHS, TEXTILES, VENDORS
from studies.vision.pictures import SIDE, Emoji, emoji, photographs, pillow_version, textiles
from studies.vision.probe import Probe

LEARNED = ("Activities", "Objects", "Smileys & Emotion", "Symbols")
"""The new task: the subcategory of an emoji of these categories, one of those with :data:`ENOUGH` emoji."""
ENOUGH = 12
KEPT = ("Animals & Nature", "Food & Drink", "People & Body", "Travel & Places")
"""Categories of the kept emoji."""
KEPT_EACH, HELD_OUT, FITTED = 24, 96, 64
"""Emoji, each of two vendors: kept ones of each category, held out of the new task, and kept ones that fit a probe."""
PROBED = 768
"""Training images that fit the new task's probe."""
TEXTILES_EACH, CROPS_EACH = 16, 9


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


def task_images(model: SaliencyViT, folder: Path) -> Images:
    """The images in the packages of ``folder``, and the probe that ``model`` starts from.

    Raises:
        FileNotFoundError, ValueError: a package is missing, or is not the published one.
        ImportError: pillow or scikit-learn is not installed.
    """
    settings = {
        "pillow": pillow_version(),
        "side": SIDE,
        "counts": [ENOUGH, HELD_OUT, KEPT_EACH, TEXTILES_EACH, CROPS_EACH],
        "packages": [package.sha256 for package in (*VENDORS.values(), TEXTILES, PHOTOGRAPHS)],
    }
    found = cached("vision-images", settings, lambda: _read(folder))
    train, labels, new, new_labels = (found[name] for name in ("train", "train_labels", "new", "new_labels"))
    with torch.no_grad():
        probe = Probe.fit(pooled(tokens_of(model, train[:PROBED])), labels[:PROBED])
    assert len(probe.bias) == len(labels.unique()), "the probe has seen every class"
    kept = {name: found[name] for name in ("photos", EMOJI, "textiles")}
    return Images(train, labels, new, new_labels, kept, found["groups"], 2 * FITTED, probe)


def _read(folder: Path) -> dict[str, Tensor]:
    everything = emoji(folder)
    counts = Counter(each.subcategory for each in everything if each.category in LEARNED)
    classes = sorted(name for name, count in counts.items() if count >= ENOUGH)
    learned = [each for each in everything if each.category in LEARNED and each.subcategory in classes]
    by_category = [[each for each in everything if each.category == name][:KEPT_EACH] for name in KEPT]
    kept = [each for group in zip(*by_category, strict=True) for each in group]
    found = {"photos": photographs(folder, CROPS_EACH), "textiles": textiles(folder, TEXTILES_EACH)}
    for name, chosen in (("new", learned[:HELD_OUT]), ("train", learned[HELD_OUT:])):
        found[name] = _pictures(chosen)
        found[f"{name}_labels"] = _paired(classes.index(each.subcategory) for each in chosen)
    return found | {EMOJI: _pictures(kept), "groups": _paired(KEPT.index(each.category) for each in kept)}


def _pictures(chosen: Iterable[Emoji]) -> Tensor:
    """The pictures, those of one emoji next to each other."""
    return torch.stack([picture for each in chosen for picture in each.pictures])


def _paired(labels: Iterable[int]) -> Tensor:
    return torch.tensor(list(labels)).repeat_interleave(len(VENDORS))
