"""Images of the study: what the model learns, what is held out of it, and images on which it shall stay as it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from studies.cached_tensors import cached
from studies.vision.measure import EMOJI, Images
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
