"""Time decompositions that take from milliseconds to minutes against each other, in turn, round after round.

A ratio is the median over the rounds that both took part in of two times of the same round; ``ratio_best`` is that of
the best times.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from bench.rows import Row
from bench.svd_grid import OURS, Cell
from bench.svd_providers import Call, Provider
from bench.timing import Timing, synchronize

SECONDS, MOST_ROUNDS = 0.3, 25
"""For the rounds of one provider in one window; ours and the yardstick take part in ``Cell.rounds`` at the least."""


@dataclass
class Lane:
    """One call in the race: how it is prepared, what its first run returned, took, and needed; its counted times."""

    entrant: Provider
    result: Any
    first_seconds: float
    peak_mib: float | None
    times: list[float] = field(default_factory=list)

    def timing(self, rounds: int | None = None) -> Timing:
        """Seconds of the first ``rounds`` rounds, as if all equal calls had been made."""
        return Timing(tuple(seconds * self.entrant.scaled_by for seconds in self.times[:rounds]))


def clock(device: torch.device) -> str:
    """``"cpu"`` where one thread computes, whose time other processes change little; else ``"wall"``."""
    return "cpu" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


def now(device: torch.device) -> float:
    """Seconds on that clock."""
    return time.process_time() if clock(device) == "cpu" else time.perf_counter()


def first_call(call: Call, device: torch.device) -> tuple[Any, float, float | None]:
    """The call's result, its seconds, and its peak memory in MiB: None on a CPU, where it is not counted."""
    if device.type != "cuda":
        began = now(device)
        return call(), now(device) - began, None
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    result = call()
    synchronize(device)
    seconds = time.perf_counter() - began
    return result, seconds, (torch.cuda.max_memory_allocated(device) - before) / 2**20


def race(lanes: Sequence[tuple[str, Lane]], cell: Cell, device: torch.device) -> None:
    """Time all lanes in turn, in an order that changes; a slow rival leaves after fewer rounds."""
    counts = {}
    for i, (name, lane) in enumerate(lanes):
        least = cell.rounds if name in (OURS, cell.yardstick) else 1
        counts[i] = max(least, min(MOST_ROUNDS, int(SECONDS / max(lane.first_seconds, 1e-9))))
    random = np.random.default_rng(0)
    for number in range(max(counts.values(), default=0)):
        for i in random.permutation(len(lanes)):
            if number < counts[i]:
                lane = lanes[i][1]
                call = lane.entrant.prepare()
                synchronize(device)
                began = now(device)
                result = call()
                synchronize(device)
                lane.times.append(now(device) - began)
                del call, result


def times(lane: Lane, base: Lane | None) -> Row:
    """The columns of a lane's times, and of their ratios to the yardstick's."""
    own = lane.timing()
    found: Row = {
        "median_s": f"{own.quantile(0.5):.6f}",
        "p20_s": f"{own.quantile(0.2):.6f}",
        "p80_s": f"{own.quantile(0.8):.6f}",
        "best_s": f"{min(own.rounds):.6f}",
        "rounds": len(own.rounds),
        "scaled_by": lane.entrant.scaled_by,
    }
    if base is not None:
        both = min(len(lane.times), len(base.times))
        found["ratio"] = f"{lane.timing(both).ratio(base.timing(both)):.4f}"
        found["ratio_best"] = f"{min(own.rounds) / min(base.timing().rounds):.4f}"
    return found
