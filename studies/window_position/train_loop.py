"""Training loop of the study's tasks: AdamW over the sweep's groups, with a fixed rate for the new head."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

HEAD_RATE = 2e-3
"""Learning rate of the new head, so that a sweep over rates varies only that of the adapter."""


def fit(
    model: nn.Module,
    head: nn.Linear | None,
    groups: list[dict[str, Any]],
    batches: Iterable[Tensor],
    loss: Callable[[Tensor], Tensor],
) -> None:
    """Train ``groups`` by one AdamW step on the ``loss`` of each of ``batches``; constant rates, no weight decay.

    Training continues if the loss becomes NaN: the resulting model is evaluated.

    Args:
        head: trained at a rate of its own, see :func:`with_head_rate`; None for a model without a new head.
    """
    optimizer = torch.optim.AdamW(groups if head is None else with_head_rate(groups, head), weight_decay=0.0)
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()


def with_head_rate(groups: list[dict[str, Any]], head: nn.Linear) -> list[dict[str, Any]]:
    """``groups`` with the parameters of ``head`` in a last group of their own at :data:`HEAD_RATE`."""
    own = {id(parameter) for parameter in head.parameters()}
    others = [{**group, "params": [p for p in group["params"] if id(p) not in own]} for group in groups]
    last = {"params": list(head.parameters()), "lr": HEAD_RATE, "name": "head"}
    return [*(group for group in others if group["params"]), last]


def shuffled_batches(items: int, size: int, steps: int) -> tuple[Tensor, ...]:
    """``steps`` batches of ``size`` indices: passes over ``items``, each shuffled by torch's global generator."""
    passes = [torch.randperm(items) for _ in range(-(-steps * size // items))]
    return torch.cat(passes)[: steps * size].split(size)
