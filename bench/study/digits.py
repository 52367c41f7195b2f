"""The study's task V: a ViT that knows scikit-learn's digits learns them turned and inverted; what is left of them?

Pretrained here, once, on 797 upright images; the other 1,000 test both tasks. `ipca sweep bench/study/digits.py`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from kept import kept
from loop import fit, shuffled_batches
from torch import Tensor
from tqdm import tqdm
from vit import LINEAR_LAYERS, ViT

from ipca import PCConfig
from ipca.demo.task import accuracy
from ipca.sweep import Task

BATCH = 32
LABELS = {
    "target": "accuracy on turned and inverted digits, 1,000 images",
    "retained": "accuracy on upright digits, 1,000 images",
    "retained_ce": "rise of the cross-entropy on upright digits, nats",
    "drift": "mean 1 − cos of class tokens of upright digits, before and after",
}


@dataclass(frozen=True)
class Pretraining:
    """AdamW with a cosine schedule on upright images, varied a little, see :func:`varied`."""

    steps: int = 1500
    batch: int = 64
    rate: float = 1e-3
    weight_decay: float = 0.05
    warm_up: int = 100
    seed: int = 0


@dataclass(frozen=True)
class Images:
    """Upright images ``(M, 8, 8)`` in [0, 1] with their digits ``(M,)``."""

    train: Tensor
    train_digits: Tensor
    test: Tensor
    test_digits: Tensor


def task(steps: int = 80, pretraining: Pretraining | None = None) -> Task:
    """All linear layers of the blocks at rank 16; ``steps`` batches of 32 images."""
    pretraining = pretraining or Pretraining()
    return Task(
        build=partial(build, pretraining),
        train=partial(train, steps),
        evaluate=partial(evaluate, pretraining),
        config=PCConfig(rank=16, window="middle", targets=LINEAR_LAYERS, modules_to_save=("head",)),
        calibration=calibration,
        labels=LABELS,
    )


def build(pretraining: Pretraining) -> ViT:
    """The pretrained model; its weights come from a file if an earlier call has left one."""
    with torch.random.fork_rng(devices=[]):
        model = ViT()
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict(kept("digits-vit", {**asdict(pretraining), "shapes": shapes}, partial(pretrain, pretraining)))
    return model.eval()


def train(steps: int, model: ViT, groups: list[dict[str, Any]], seed: int) -> None:
    """Train on turned and inverted images; ``seed`` draws the new head and the order of the images."""
    shown, digits = turned(images().train), images().train_digits
    torch.manual_seed(seed)
    model.head.reset_parameters()

    def loss(batch: Tensor) -> Tensor:
        return F.cross_entropy(model(shown[batch]), digits[batch])

    fit(model, model.head, groups, shuffled_batches(len(digits), BATCH, steps), loss)


def evaluate(pretraining: Pretraining, model: ViT) -> dict[str, float]:
    """The metrics of :data:`LABELS`, on the 1,000 test images."""
    data, (features_before, loss_before) = images(), before(pretraining)
    model.eval()
    with torch.inference_mode():
        features = features_of(model, data.test)
        logits = model.classifier(features)
        answers = model.head(features_of(model, turned(data.test)))
        return {
            "target": accuracy(answers, data.test_digits.tolist()),
            "retained": accuracy(logits, data.test_digits.tolist()),
            "retained_ce": F.cross_entropy(logits, data.test_digits).item() - loss_before,
            "drift": 1 - F.cosine_similarity(features_before, features).mean().item(),
        }


def calibration() -> list[Tensor]:
    """Four batches of the new task's training images."""
    return list(turned(images().train[: 4 * BATCH]).split(BATCH))


def turned(upright: Tensor) -> Tensor:
    """The new task's view of ``upright (M, 8, 8)``: a quarter turn to the left, and dark for light."""
    return 1 - upright.rot90(1, (1, 2))


def features_of(model: ViT, shown: Tensor) -> Tensor:
    """Class tokens ``(M, 128)`` of images ``(M, 8, 8)``, in chunks that stay in the processor's cache."""
    return torch.cat([model.features(chunk) for chunk in shown.split(100)])


@cache
def images() -> Images:
    """scikit-learn's 1,797 digits, 797 of them for training, each digit in the same proportion on both sides."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    parts = train_test_split(digits.images / 16, digits.target, test_size=1000, stratify=digits.target, random_state=0)
    train, test, train_digits, test_digits = map(torch.from_numpy, parts)
    return Images(train.float(), train_digits.long(), test.float(), test_digits.long())


@cache
def before(pretraining: Pretraining) -> tuple[Tensor, float]:
    """Class tokens ``(1000, 128)`` and cross-entropy of the upright test images in the pretrained model."""
    model, data = build(pretraining), images()
    with torch.no_grad():
        features = features_of(model, data.test)
        return features, F.cross_entropy(model.classifier(features), data.test_digits).item()


def pretrain(settings: Pretraining) -> dict[str, Tensor]:
    """The state dict of a ViT trained on the upright training images; one thread, the same bits every time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            return _pretrained(settings).state_dict()
    finally:
        torch.set_num_threads(threads)


def _pretrained(settings: Pretraining) -> ViT:
    model, data = ViT(), images()
    optimizer = torch.optim.AdamW(model.parameters(), settings.rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_cosine, settings))
    batches = shuffled_batches(len(data.train), settings.batch, settings.steps)
    for batch in tqdm(batches, desc="Pretraining", unit="step", leave=False):
        logits = model.classifier(model.features(varied(data.train[batch])))
        loss = F.cross_entropy(logits, data.train_digits[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def _cosine(settings: Pretraining, step: int) -> float:
    return min(1.0, (step + 1) / settings.warm_up) * (1 + math.cos(math.pi * step / settings.steps)) / 2


def varied(upright: Tensor) -> Tensor:
    """``upright (M, 8, 8)``, turned by up to 15°, scaled by 15 %, moved by 1.2 pixels, and noise of 0.05 added."""
    ranges = torch.tensor([[math.pi / 12], [0.15], [0.3], [0.3]])  # an image is 2 wide: 0.3 are 1.2 pixels
    angle, scale, right, down = ranges * (2 * torch.rand(4, len(upright)) - 1)
    cos, sin = (1 + scale) * angle.cos(), (1 + scale) * angle.sin()
    maps = torch.stack([cos, -sin, right, sin, cos, down], dim=1).unflatten(1, (2, 3))
    grid = F.affine_grid(maps, [len(upright), 1, 8, 8], align_corners=False)
    moved = F.grid_sample(upright[:, None], grid, align_corners=False)[:, 0]
    return moved + 0.05 * torch.randn_like(moved)
