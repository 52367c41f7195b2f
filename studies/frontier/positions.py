"""How far a window moves the model as a function of its position: ratios to the middle, two lines, the best positions.

A U is what two lines show, one through the positions up to the middle and one through those from the middle on, in
logarithms of the divergence (two-lines test; Simonsohn, Advances in Methods and Practices in Psychological Science 1,
2018, with the break fixed beforehand): down on the left, up on the right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ipca.lab.statistics import LEVEL, holm
from studies.frontier.analysis import Analysis, Comparison, Ratio, corrected

MIDDLE = 0.5
SIDES = {"left end": (0.0, MIDDLE), "right end": (MIDDLE, 1.0)}
"""Ranges of positions, by what their line is read at; it is compared with the middle."""


@dataclass(frozen=True)
class Shape:
    """Two lines at one target.

    Attributes:
        left, right: the divergence at an end over that at the middle, on the line through the positions between them.
    """

    left: Comparison
    right: Comparison

    @property
    def verdict(self) -> str:
        """``"U"``, ``"inverted U"``, what the two sides are, or why there is no verdict."""
        obstacles = list(dict.fromkeys(c.obstacle for c in (self.left, self.right) if c.obstacle))
        if obstacles:
            return "; ".join(obstacles)
        both = {"higher": "U", "lower": "inverted U"}
        if self.left.verdict == self.right.verdict and self.left.verdict in both:
            return both[self.left.verdict]
        return f"no U: the left end is {_words(self.left)}, the right end {_words(self.right)}"

    @property
    def outcome(self) -> str:
        """``"holds"``, ``"refuted"`` or ``"not shown"`` of a U; empty without a verdict.

        It is refuted where an end is below the middle, or equivalent to it.
        """
        sides = (self.left, self.right)
        if any(side.obstacle for side in sides):
            return ""
        if all(side.verdict == "higher" for side in sides):
            return "holds"
        return "refuted" if any(side.verdict in ("lower", "equivalent") for side in sides) else "not shown"


def profile(analysis: Analysis, task: str, steps: int, place: int) -> dict[str, Ratio]:
    """By position's arm, its divergence at a target over the middle window's, paired over seeds."""
    positions, found = _positions(analysis, task, steps), {}
    middle = next(arm for arm, at in positions.items() if at == MIDDLE)
    for arm in positions:
        ratio = analysis.compare(task, steps, place, arm, middle).ratio
        if ratio is not None:
            found[arm] = ratio
    return found


def shapes(analysis: Analysis) -> list[Shape]:
    """The two lines of every cell and target, with Holm's correction over all sides."""
    found = (
        _side(analysis, task, steps, place, side)
        for task, steps in analysis.design.targets
        for place in range(3)
        for side in SIDES
    )
    sides = corrected(found, whole=analysis.design.whole_family)
    return [Shape(left, right) for left, right in zip(sides[::2], sides[1::2], strict=True)]


def best_positions(analysis: Analysis, task: str, steps: int, place: int) -> tuple[str, list[str]] | None:
    """The arm of the lowest mean divergence at a target, and all that are not shown to be higher than it.

    Paired t-tests against the lowest, with Holm's correction; None where no seed has all positions, or the best rate of
    one is not known.
    """
    arms = list(_positions(analysis, task, steps))
    by_arm = _common(analysis, task, steps, place, arms)[0]
    if not by_arm or any(analysis.untuned(task, steps, arm) for arm in arms):
        return None
    lowest = min(by_arm, key=lambda arm: float(np.mean(np.log(by_arm[arm]))))
    others = [arm for arm in by_arm if arm != lowest]
    ratios = [Ratio.of(list(zip(by_arm[arm], by_arm[lowest], strict=True))) for arm in others]
    adjusted = holm([1.0 if math.isnan(ratio.p) else ratio.p for ratio in ratios])
    close = {arm for arm, p in zip(others, adjusted, strict=True) if p > LEVEL}
    return lowest, [arm for arm in by_arm if arm == lowest or arm in close]


def _positions(analysis: Analysis, task: str, steps: int) -> dict[str, float]:
    """The positions of a cell, by arm, ascending."""
    cells = set(analysis.design.cells())
    return {arm: at for arm, at in analysis.design.positions.items() if (task, steps, arm) in cells}


def _side(analysis: Analysis, task: str, steps: int, place: int, side: str) -> Comparison:
    low, high = SIDES[side]
    positions = {arm: at for arm, at in _positions(analysis, task, steps).items() if low <= at <= high}
    by_arm, seeds = _common(analysis, task, steps, place, list(positions))
    found = by_arm.values()
    reached = len(next(iter(found))) if by_arm else 0
    end = 0.0 if low == 0 else 1.0
    distances = [abs(at - MIDDLE) / abs(end - MIDDLE) for at in positions.values()]
    slopes = np.polyfit(distances, np.log([list(values) for values in found]), 1)[0] if reached else []
    ratio = Ratio.of([(math.exp(slope), 1.0) for slope in slopes]) if reached else None
    obstacle = analysis.obstacle(task, steps, list(positions), seeds, reached)
    return Comparison(task, steps, place, side, "middle", ratio, obstacle)


def _common(
    analysis: Analysis, task: str, steps: int, place: int, arms: list[str]
) -> tuple[Mapping[str, tuple[float, ...]], int]:
    """Divergences by arm, of the seeds with which all arms reach the target, and the number of seeds that all have."""
    found = {arm: analysis.tuned(task, steps, arm, place) for arm in arms}
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in found.values())))
    reached = [seed for seed in seeds if all(found[arm][seed] is not None for arm in arms)]
    by_arm = {arm: tuple(v for seed in reached if (v := found[arm][seed]) is not None) for arm in arms}
    return (by_arm if reached else {}), len(seeds)


def _words(side: Comparison) -> str:
    return {"higher": "higher", "lower": "lower", "equivalent": "equivalent to the middle"}.get(
        side.verdict, "not shown to differ from the middle"
    )
