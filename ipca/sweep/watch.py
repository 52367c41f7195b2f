"""Watch an optimiser from outside: call something after chosen steps, whoever wrote the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


class StepCount:
    """``steps`` that the watched optimiser has taken."""

    def __init__(self) -> None:
        self.steps = 0


@contextmanager
def watched(
    parameters: Iterable[nn.Parameter], steps: Iterable[int], call: Callable[[int], None]
) -> Iterator[StepCount]:
    """Within the block ``call(step)`` runs after each of ``steps`` of the first optimiser that holds a parameter.

    Steps count from 1. Of several optimisers over these parameters the one that steps first is counted.
    """
    mine = {id(parameter) for parameter in parameters}
    wanted = frozenset(steps)
    count = StepCount()
    followed: list[Optimizer] = []

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not followed and any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
            followed.append(optimizer)
        if followed and optimizer is followed[0]:
            count.steps += 1
            if count.steps in wanted:
                call(count.steps)

    handle = register_optimizer_step_post_hook(after)
    try:
        yield count
    finally:
        handle.remove()
