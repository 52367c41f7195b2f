"""Task V of the study: a ViT pretrained on scikit-learn's digits learns them rotated and inverted.

It was pretrained by :func:`pretrain`, once, on 797 upright images; the other 1,000 test both tasks. Its weights are in
``digits-vit.safetensors``, since pretraining rounds differently on other processors. Run it with
``ipca sweep studies/window_position/digits.py``.

    python -m studies.window_position.digits FILE    pretrain again, a minute, into FILE; says whether the bits agree

The size "base" is for a GPU and has not been run. Estimated, one run takes about 2 seconds of an H100: 80 steps of 544
tokens through 85 M parameters are 15 TFLOP and the evaluation 6, half a second in float32, and the 1,500 launches of a
step are limited by Python, about 20 ms.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipca._atomic import read_checksummed, write_checksummed
from ipca.lab.demo.encoder import accuracy
from ipca.lab.sweep import Task
from ipca.lab.sweep.device import device_of
from ipca.model import AdapterSettings
from studies.cached_tensors import cached
from studies.window_position.pretraining import Pretraining, device_record
from studies.window_position.pretraining import pretrain as trained
from studies.window_position.train_loop import fit, shuffled_batches
from studies.window_position.vit import LINEAR_LAYERS, SHAPES, ViT

BATCH = 32
LABELS = {
    "target": "accuracy on turned and inverted digits, 1,000 images",
    "retained": "accuracy on upright digits, 1,000 images",
    "retained_ce": "rise of the cross-entropy on upright digits, nats",
    "drift": "mean 1 − cos of class tokens of upright digits, before and after",
}


SETTINGS = AdapterSettings(rank=16, window="middle", form="residual", targets=LINEAR_LAYERS, modules_to_save=("head",))
WEIGHTS = Path(__file__).with_name("digits-vit.safetensors")
"""The model of size "small", as :data:`PRETRAINING` made it with torch 2.13.0 on an Intel Xeon."""
PRETRAINING = {"small": Pretraining(), "base": Pretraining(rate=3e-4, warm_up=200)}
"""By size, on augmented upright images, see :func:`varied`."""


@dataclass(frozen=True)
class Images:
    """Upright images ``(M, 8, 8)`` in [0, 1] with their digits ``(M,)``."""

    train: Tensor
    train_digits: Tensor
    test: Tensor
    test_digits: Tensor


def task(
    size: str = "small",
    device: str = "cpu",
    steps: int = 80,
    pretraining: Pretraining | None = None,
    *,
    known: bool = False,
) -> Task:
    """All linear layers of the blocks at rank 16; ``steps`` batches of 32 images.

    Args:
        size: of the model, one of :data:`vit.SHAPES`.
        device: where it is pretrained and starts, "cpu" or "cuda".
        known: calibrate on images of the pretraining instead of the new task's.

    Raises:
        ValueError: an unknown size.
    """
    if size not in SHAPES:
        raise ValueError(f"size must be one of {', '.join(SHAPES)}; got {size!r}.")
    made = (pretraining or PRETRAINING[size], size, device)
    return Task(
        build=partial(build, *made),
        train=partial(train, steps),
        evaluate=partial(evaluate, *made),
        settings=SETTINGS,
        calibration=partial(calibration, known),
        labels=LABELS,
    )


def build(pretraining: Pretraining, size: str = "small", device: str = "cpu") -> ViT:
    """The pretrained model on ``device``: from :data:`WEIGHTS`, or, of another size or pretraining, made and cached."""
    with torch.random.fork_rng(devices=[]):
        model = ViT(size)
    if (pretraining, size) == (PRETRAINING["small"], "small"):
        model.load_state_dict(read_checksummed(WEIGHTS)[1])
    else:
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        settings = {**asdict(pretraining), "shapes": shapes, **device_record(device)}
        model.load_state_dict(cached("digits-vit", settings, partial(pretrain, pretraining, size, device)))
    return model.to(device).eval()


def train(steps: int, model: ViT, groups: list[dict[str, Any]], seed: int) -> None:
    """Train on rotated and inverted images; ``seed`` determines the new head and the order of the images."""
    data = images(device_of(model))
    shown, digits = turned(data.train), data.train_digits
    torch.manual_seed(seed)
    model.head.reset_parameters()

    def loss(batch: Tensor) -> Tensor:
        return F.cross_entropy(model(shown[batch]), digits[batch])

    fit(model, model.head, groups, shuffled_batches(len(digits), BATCH, steps), loss)


def evaluate(pretraining: Pretraining, size: str, device: str, model: ViT) -> dict[str, float]:
    """The metrics of :data:`LABELS`, on the 1,000 test images."""
    data, (features_before, loss_before) = images(device_of(model)), before(pretraining, size, device)
    model.eval()
    with torch.inference_mode():
        features = features_of(model, data.test)
        logits = model.classifier(features)
        answers = model.head(features_of(model, turned(data.test)))
        return {
            "target": accuracy(answers.cpu(), data.test_digits.tolist()),
            "retained": accuracy(logits.cpu(), data.test_digits.tolist()),
            "retained_ce": F.cross_entropy(logits, data.test_digits).item() - loss_before,
            "drift": 1 - F.cosine_similarity(features_before.to(features.device), features).mean().item(),
        }


def calibration(known: bool = False) -> list[Tensor]:
    """Four batches of the new task's training images, or, if ``known``, of the pretraining's."""
    upright = images().train[: 4 * BATCH]
    return list((upright if known else turned(upright)).split(BATCH))


def turned(upright: Tensor) -> Tensor:
    """The new task's view of ``upright (M, 8, 8)``: rotated by 90° to the left, and inverted."""
    return 1 - upright.rot90(1, (1, 2))


def features_of(model: ViT, shown: Tensor) -> Tensor:
    """Class tokens ``(M, hidden)`` of images ``(M, 8, 8)``, in chunks that fit into the processor's cache."""
    return torch.cat([model.features(chunk) for chunk in shown.split(100)])


@cache
def images(device: torch.device | str = "cpu") -> Images:
    """scikit-learn's 1,797 digits, 797 of them for training, stratified by digit.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise ImportError(
            "the digits are scikit-learn's; run: pip install scikit-learn, or leave V1 and G1 out"
        ) from None

    digits = load_digits()
    parts = train_test_split(digits.images / 16, digits.target, test_size=1000, stratify=digits.target, random_state=0)
    train, test, train_digits, test_digits = map(torch.from_numpy, parts)
    found = (train.float(), train_digits.long(), test.float(), test_digits.long())
    return Images(*(tensor.to(device) for tensor in found))


@cache
def before(pretraining: Pretraining, size: str, device: str) -> tuple[Tensor, float]:
    """Class tokens ``(1000, hidden)`` and cross-entropy of the pretrained model on the upright test images."""
    model, data = build(pretraining, size, device), images(device)
    with torch.no_grad():
        features = features_of(model, data.test)
        return features, F.cross_entropy(model.classifier(features), data.test_digits).item()


def pretrain(settings: Pretraining, size: str = "small", device: str = "cpu") -> dict[str, Tensor]:
    """The state dict of a ViT trained on the upright training images."""
    data = images(device)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        assert isinstance(model, ViT)
        logits = model.classifier(model.features(varied(data.train[batch])))
        return F.cross_entropy(logits, data.train_digits[batch])

    return trained(partial(ViT, size), settings, device, len(data.train), loss)


def varied(upright: Tensor) -> Tensor:
    """``upright (M, 8, 8)``, rotated by up to 15°, scaled by 15 %, shifted by 1.2 pixels, with noise of 0.05."""
    ranges = torch.tensor([[math.pi / 12], [0.15], [0.3], [0.3]])  # an image is 2 wide: 0.3 are 1.2 pixels
    angle, scale, right, down = ranges * (2 * torch.rand(4, len(upright)) - 1)
    cos, sin = (1 + scale) * angle.cos(), (1 + scale) * angle.sin()
    maps = torch.stack([cos, -sin, right, sin, cos, down], dim=1).unflatten(1, (2, 3)).to(upright.device)
    grid = F.affine_grid(maps, [len(upright), 1, 8, 8], align_corners=False)
    moved = F.grid_sample(upright[:, None], grid, align_corners=False)[:, 0]
    return moved + 0.05 * torch.randn_like(moved)


def main() -> None:
    """Pretrain the small model again, and compare it with the one in the repository."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE", help="where the weights are written, as safetensors")
    path = parser.parse_args().file
    torch.set_num_threads(1)
    made, known = pretrain(PRETRAINING["small"]), read_checksummed(WEIGHTS)[1]
    write_checksummed(path, {**asdict(PRETRAINING["small"]), "torch": torch.__version__}, made)
    far = max((made[name] - known[name]).abs().max().item() for name in known)
    print(f"{path}: {'the same bits' if far == 0 else f'other bits, weights differ by up to {far:.2g}'}")


if __name__ == "__main__":
    main()
