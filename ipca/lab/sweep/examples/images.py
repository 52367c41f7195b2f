"""A task for `ipca sweep`: an image classifier learns patterns, and must not forget how it sees other images.

    ipca sweep --example images > task.py
    ipca sweep task.py --windows 0.0 0.5 1.0 --lrs 2e-4 1e-3 --seeds 3 -o sweep-out --dry-run

Needs pip install 'ipca-lora[hf,sweep]'. Put your own in place of MODEL, SETTINGS, CLASSES, labeled() and others().
"""

from functools import cache
from math import pi
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification
from transformers.utils import logging

from ipca.lab import sweep
from ipca.model import AdapterSettings

MODEL = "WinKawaks/vit-tiny-patch16-224"  # a folder, or an id on the Hugging Face Hub
SETTINGS = AdapterSettings(rank=16, targets="all-linear")  # the head is trained too, without being named
CLASSES = 4
STEPS, BATCH = 50, 16
logging.set_verbosity_error()  # else every process reports its new head and its loading
logging.disable_progress_bar()


def labeled(count: int, size: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images ``(count, 3, size, size)`` from −1 to 1 and their classes; here noisy stripes in four directions."""
    classes = torch.randint(CLASSES, (count,), generator=draw, device="cpu")
    angle = (classes / CLASSES * pi).view(-1, 1, 1)
    place = torch.linspace(0, 1, size, device="cpu")
    along = angle.cos() * place.view(1, -1, 1) + angle.sin() * place.view(1, 1, -1)
    stripes = (2 * pi * (8 * along + torch.rand(count, 1, 1, generator=draw, device="cpu"))).sin().unsqueeze(1)
    noise = torch.randn(count, 3, size, size, generator=draw, device="cpu")
    return (0.5 * stripes + 0.5 * noise).clamp(-1, 1), classes


def others(size: int) -> Tensor:
    """Images of another kind, whose embeddings must stay; here blurred noise."""
    coarse = torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(1), device="cpu")
    return nn.functional.interpolate(2 * coarse - 1, size=(size, size), mode="bilinear")


def build() -> nn.Module:
    """The pretrained model with a new head."""
    options: Any = {"num_labels": CLASSES, "ignore_mismatched_sizes": True, "dtype": torch.float32}
    return AutoModelForImageClassification.from_pretrained(MODEL, **options)


def train(model: Any, groups: list[dict[str, Any]], seed: int) -> None:
    """Train with the rates of ``groups``; weight decay would pull a window to 0, not to where it began."""
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    draw = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(STEPS):
        images, classes = labeled(BATCH, model.config.image_size, draw)
        model(pixel_values=images.to(model.device), labels=classes.to(model.device)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def evaluate(model: Any) -> dict[str, float]:
    """Larger is better for both: accuracy on new images, similarity of other embeddings to the pretrained ones."""
    images, classes = labeled(64, model.config.image_size, torch.Generator().manual_seed(2**32))
    right = model(pixel_values=images.to(model.device)).logits.argmax(-1).cpu() == classes
    similar = torch.cosine_similarity(embeddings(model), pretrained_embeddings().to(model.device))
    return {"target": right.double().mean().item(), "retained": similar.double().mean().item()}


def embeddings(model: Any) -> Tensor:
    """The mean hidden state of each of the other images."""
    images = others(model.config.image_size).to(model.device)
    return model.base_model(pixel_values=images).last_hidden_state.mean(1)


@cache
def pretrained_embeddings() -> Tensor:
    """Those of the pretrained model."""
    return embeddings(build().eval())


def task() -> sweep.Task:
    """What `ipca sweep` reads."""
    labels = {"target": "accuracy, new images", "retained": "similarity of other embeddings (cosine)"}
    return sweep.Task(build, train, evaluate, SETTINGS, labels=labels)
