"""Deterministic pretraining of the study's own models: AdamW with a cosine schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ipca.lab.sweep.device import deterministic, device_name, use_device
from studies.window_position.train_loop import shuffled_batches


@dataclass(frozen=True)
class Pretraining:
    """``steps`` batches, with linear warm-up over ``warm_up`` of them and cosine decay to 0."""

    steps: int = 1500
    batch: int = 64
    rate: float = 1e-3
    weight_decay: float = 0.05
    warm_up: int = 100
    seed: int = 0


def pretrain(
    make: Callable[[], nn.Module],
    settings: Pretraining,
    device: str,
    items: int,
    loss: Callable[[nn.Module, Tensor], Tensor],
) -> dict[str, Tensor]:
    """The state dict, on the CPU, of ``make()`` trained on shuffled passes over ``items``.

    One thread on a CPU, bfloat16 autocast on a GPU; torch's random generators, threads and modes are restored.

    Args:
        loss: ``loss(model, indices)`` of a batch.
    """
    use_device(device)
    where, threads = torch.device(device), torch.get_num_threads()
    generators = [torch.cuda.current_device() if where.index is None else where.index] if where.type == "cuda" else []
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=generators), deterministic(where):
            torch.manual_seed(settings.seed)
            model = make().to(where)
            _train(model, settings, items, partial(_autocast_loss, loss, where))
            return {name: value.cpu() for name, value in model.state_dict().items()}
    finally:
        torch.set_num_threads(threads)


def device_record(device: str) -> dict[str, Any]:
    """The entry of a cached model on where it was pretrained; empty for a CPU."""
    return {} if device == "cpu" else {"device": device_name(torch.device(device))}


def _train(model: nn.Module, settings: Pretraining, items: int, loss: Callable[[nn.Module, Tensor], Tensor]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), settings.rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_cosine, settings))
    batches = shuffled_batches(items, settings.batch, settings.steps)
    for batch in tqdm(batches, desc="Pretraining", unit="step", leave=False):
        value = loss(model, batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()


def _autocast_loss(
    loss: Callable[[nn.Module, Tensor], Tensor], device: torch.device, model: nn.Module, batch: Tensor
) -> Tensor:
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return loss(model, batch)


def _cosine(settings: Pretraining, step: int) -> float:
    return min(1.0, (step + 1) / settings.warm_up) * (1 + math.cos(math.pi * step / settings.steps)) / 2
