"""Watch an optimizer from outside: call something after chosen steps, whoever wrote the training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


class Watch:
    """What was seen of the watched optimizer.

    Attributes:
        steps: that it has taken.
        rates: its learning rates at the first step, before any schedule where a scheduler has noted them.
        at_rate: whether any parameter has had the rate that it was given.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.rates: list[float] = []
        self.at_rate = False


@contextmanager
def watched(groups: Sequence[Mapping[str, Any]], steps: Iterable[int], call: Callable[[int], None]) -> Iterator[Watch]:
    """Within the block ``call(step)`` runs after each of ``steps`` of the first optimizer that holds a parameter.

    Steps count from 1. Of several optimizers over these parameters the one that steps first is counted.

    Args:
        groups: parameter groups, each with ``params`` and ``lr``; read before the block, as schedules change them.
    """
    given: dict[nn.Parameter, float] = {p: float(group["lr"]) for group in groups for p in group["params"]}
    wanted = frozenset(steps)
    watch = Watch()
    followed: list[Optimizer] = []

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not followed and any(p in given for group in optimizer.param_groups for p in group["params"]):
            followed.append(optimizer)
        if followed and optimizer is followed[0]:
            watch.steps += 1
            if watch.steps == 1:
                watch.rates = [_before_schedule(group) for group in optimizer.param_groups]
            watch.at_rate = watch.at_rate or any(_is_at_rate(group, given) for group in optimizer.param_groups)
            if watch.steps in wanted:
                call(watch.steps)

    handle = register_optimizer_step_post_hook(after)
    try:
        yield watch
    finally:
        handle.remove()


def _before_schedule(group: Mapping[str, Any]) -> float:
    return float(group.get("initial_lr", group["lr"]))


def _is_at_rate(group: Mapping[str, Any], given: Mapping[nn.Parameter, float]) -> bool:
    """Whether a parameter of ``group`` has the rate that it was given, now or before any schedule."""
    rates = float(group["lr"]), _before_schedule(group)
    expected = {given[p] for p in group["params"] if p in given}
    return any(math.isclose(rate, lr, rel_tol=1e-6) for rate in rates for lr in expected)
