"""Watch an optimiser from outside: call something after chosen steps, whoever wrote the training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


class Watch:
    """What was seen of the watched optimiser.

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
    """Within the block ``call(step)`` runs after each of ``steps`` of the first optimiser that holds a parameter.

    Steps count from 1. Of several optimisers over these parameters the one that steps first is counted.

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
            if not watch.at_rate:
                _look_at_rates(watch, optimizer, given)
            if watch.steps in wanted:
                call(watch.steps)

    handle = register_optimizer_step_post_hook(after)
    try:
        yield watch
    finally:
        handle.remove()


def _look_at_rates(watch: Watch, optimizer: Optimizer, given: Mapping[nn.Parameter, float]) -> None:
    for group in optimizer.param_groups:
        now, first = float(group["lr"]), float(group.get("initial_lr", group["lr"]))
        watch.rates += [first] * (watch.steps == 1)
        expected = {given[p] for p in group["params"] if p in given}
        watch.at_rate |= any(math.isclose(rate, lr, rel_tol=1e-6) for rate in (now, first) for lr in expected)
