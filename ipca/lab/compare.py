"""Comparison of methods that learn and forget: Pareto frontier, retention at an equal score, best learning rates."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from statistics import stdev
from typing import Any, NamedTuple

import numpy as np

from ipca.analysis.figures import DASHES, MARKS, PALETTE, picture

Point = tuple[float, float]
"""``(target, retained)`` of one run or checkpoint: the scores on the new task and on what the model knew."""


class Matched(NamedTuple):
    """Result of :func:`target_matched`.

    Attributes:
        target: the score at which methods are compared.
        retained: ``{method: {seed: retained}}``; NaN if a method did not reach ``target`` with a seed.
    """

    target: float
    retained: dict[str, dict[Any, float]]


def frontier(points: Iterable[Sequence[float]]) -> list[int]:
    """Indices of the Pareto-optimal ``(target, retained)``, larger is better in both, by ascending target.

    A point is on the frontier if no other is at least as good in both and better in one. Equal points are all on it,
    in the order given. Non-finite points, such as those of diverged runs, are never on it.

    Raises:
        ValueError: a point is not a pair of numbers.
    """
    pairs = [_point(point) for point in points]
    best = -math.inf
    found: list[int] = []
    known = [i for i, pair in enumerate(pairs) if _is_finite(pair)]
    for i in sorted(known, key=lambda i: (-pairs[i][0], -pairs[i][1], -i)):
        if pairs[i][1] > best or (found and pairs[i] == pairs[found[-1]]):
            best = pairs[i][1]
            found.append(i)
    return found[::-1]


def target_matched(
    curves: Mapping[str, Mapping[Any, Sequence[Sequence[float]]]], target: float | None = None
) -> Matched:
    """Retention of each method at an equal score on the new task: learning less must not count as forgetting less.

    The points of one method and seed are its rates and checkpoints. ``retained`` is interpolated linearly along their
    :func:`frontier`; below its lowest target it is that of the frontier's first point, which reaches more. So
    ``retained(t)`` is the largest on the frontier's line with a target of at least ``t``.

    Selecting along the frontier by the scores themselves is biased upward, and more so for more points near the target:
    give all methods equally many rates, and as many of them below their best one. In simulated pairs of equal methods
    with six rates each, three more of which lie below the best of one method, the two differ in 37 %
    (bench/error_rates.py).

    Args:
        curves: ``{method: {seed: [(target, retained), …]}}``; non-finite points are ignored.
        target: the score ``t``. By default the largest that every method reaches with every seed: the minimum over
            methods and seeds of the largest target. Seeds without any point are ignored.

    Raises:
        ValueError: no points at all, or ``target`` is not finite.
    """
    lines = {
        method: {seed: [_point(points[i]) for i in frontier(points)] for seed, points in seeds.items()}
        for method, seeds in curves.items()
    }
    reached = [line[-1][0] for seeds in lines.values() for line in seeds.values() if line]
    if not reached:
        raise ValueError(f"there are no finite points to compare; got the methods {', '.join(curves) or '(none)'}.")
    t = min(reached) if target is None else float(target)
    if not math.isfinite(t):
        raise ValueError(f"target must be a finite score; got {target!r}.")
    return Matched(t, {m: {seed: _retained_at(line, t) for seed, line in seeds.items()} for m, seeds in lines.items()})


def best_rate(rows: Iterable[Mapping[str, Any]], *, metric: str = "target", within_se: float = 0.0) -> dict[Any, float]:
    """For each seed, the learning rate with the best mean ``metric`` over the *other* seeds, ``{seed: lr}``.

    Where the metric hardly depends on the rate, noise chooses. ``within_se=1`` is the one-standard-error rule: the
    lowest rate whose mean is at most one standard error of the best rate's scores below the best mean.

    Taking for each seed its own best rate would report the maximum of several noisy numbers, which is biased upward,
    and more so for more rates. A rate chosen on the other seeds is independent of this seed's noise, so its score is
    that of a rate tuned elsewhere. The choices of different seeds share runs and are not independent of each other.

    Ties go to the lowest rate. Rates at which another seed's run failed (its metric is None, empty or NaN) come last;
    if that holds for every rate, the seed gets NaN.

    Args:
        rows: of one method in one comparison, each at the end of training: ``lr``, ``seed`` and ``metric``, as numbers
            or as the text of a CSV file. A complete grid: every rate with every seed, once.
        metric: a column, larger is better.
        within_se: standard errors below the best mean; above 0 it needs three seeds.

    Raises:
        ValueError: a negative ``within_se``, too few seeds, a run that is missing or duplicated, or a row that is not a
            run; the message names it.
        KeyError: a row lacks one of the columns.
    """
    if not within_se >= 0:
        raise ValueError(f"within_se must be a number of standard errors from 0, such as 1; got {within_se!r}.")
    scores: dict[tuple[float, Any], float] = {}
    for row in rows:
        if row["lr"] in ("", None):
            raise ValueError("a row has no lr, such as that of the untrained model; pass the runs of one method only.")
        key = float(row["lr"]), row["seed"]
        if key in scores:
            raise ValueError(
                f"two rows at lr {key[0]:g} with seed {key[1]}; pass one method, one comparison, and no checkpoints."
            )
        if metric not in row:
            raise KeyError(f"no column {metric!r}; a row has {', '.join(map(str, row))}")
        scores[key] = _number(row[metric])
    rates, seeds = sorted({lr for lr, _ in scores}), list(dict.fromkeys(seed for _, seed in scores))
    missing = [(lr, seed) for lr in rates for seed in seeds if (lr, seed) not in scores]
    if missing:
        raise ValueError(f"no run at lr {missing[0][0]:g} with seed {missing[0][1]}; leave out the rate or the seed.")
    fewest = 3 if within_se else 2
    if len(seeds) < fewest:
        raise ValueError(
            f"choosing a rate on the other seeds needs at least {('two', 'three')[fewest - 2]} seeds; got {len(seeds)}."
        )
    others = {seed: [(lr, [scores[lr, s] for s in seeds if s != seed]) for lr in rates] for seed in seeds}
    return {seed: _best(candidates, within_se) for seed, candidates in others.items()}


def draw_frontier(
    points: Mapping[str, Iterable[Sequence[float]]],
    path: str | os.PathLike[str],
    *,
    base: float | None = None,
    labels: tuple[str, str] = ("target (higher is better)", "retained (higher is better)"),
) -> None:
    """Draw all points of all methods, a line along each method's frontier, and a gray one along the joint frontier.

    Args:
        points: ``{method: [(target, retained), …]}``; non-finite points are ignored.
        path: the suffix selects the format: ``.png``, ``.pdf``, ``.svg``.
        base: ``retained`` of the untrained model, drawn as a dotted line.
        labels: of the axes, with units.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no points, or an unknown format.
        OSError: ``path`` cannot be written; an existing file is intact.
    """
    known = {m: [p for p in map(_point, found) if _is_finite(p)] for m, found in points.items()}
    together = [p for found in known.values() for p in found]
    if not together:
        raise ValueError(f"there are no finite points to draw; got the methods {', '.join(known) or '(none)'}.")
    with picture(path, (7, 4.5)) as figure:
        axis = figure.subplots()
        _staircase(axis, together)
        for k, (method, found) in enumerate(known.items()):
            color, mark, line = PALETTE[k % len(PALETTE)], MARKS[k % len(MARKS)], DASHES[k % len(DASHES)]
            axis.plot(*_columns(found), mark, color=color, markersize=5, alpha=0.7, label=method)
            axis.plot(*_columns([found[i] for i in frontier(found)]), color=color, linestyle=line, linewidth=1.2)
        if base is not None:
            axis.axhline(base, color="black", linewidth=0.8, linestyle=":", label="untrained")
        axis.set_xlabel(labels[0])
        axis.set_ylabel(labels[1])
        figure.legend(loc="outside right upper", fontsize=8)  # outside the axes, so that it covers no point


def _staircase(axis: Any, points: Sequence[Point]) -> None:
    """The best ``retained`` of any method with at least this target."""
    x, y = _columns([points[i] for i in frontier(points)])
    axis.step(x, y, where="pre", color="#bbbbbb", linewidth=5, zorder=0, label="frontier of all")


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [target for target, _ in points], [retained for _, retained in points]


def _retained_at(line: Sequence[Point], t: float) -> float:
    """``retained`` interpolated along a frontier, ascending in target; NaN above its end."""
    if not line or t > line[-1][0]:
        return math.nan
    return float(np.interp(t, *_columns(line)))


def _best(candidates: Sequence[tuple[float, Sequence[float]]], within_se: float) -> float:
    """The lowest rate with a mean score that close to the largest; NaN if every rate has a NaN among its scores."""
    means = {lr: round(math.fsum(scores) / len(scores), 12) for lr, scores in candidates}
    known = {lr: mean for lr, mean in means.items() if not math.isnan(mean)}
    if not known:
        return math.nan
    best = max(known, key=lambda lr: known[lr])
    scores = dict(candidates)[best]
    room = within_se * stdev(scores) / math.sqrt(len(scores)) if within_se else 0.0
    return min(lr for lr, mean in known.items() if mean >= known[best] - room)


def _number(value: Any) -> float:
    number = math.nan if value is None or value == "" else float(value)
    return number if math.isfinite(number) else math.nan


def _is_finite(point: Point) -> bool:
    return all(map(math.isfinite, point))


def _point(point: Sequence[float]) -> Point:
    try:
        target, retained = map(float, point)
    except (TypeError, ValueError):
        raise ValueError(f"a point must be (target, retained), two numbers; got {point!r}.") from None
    return target, retained
