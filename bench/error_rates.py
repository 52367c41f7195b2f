"""Error rates of our statistics on simulated data; writes bench/results/error_rates.csv, from fixed seeds.

    python -m bench.error_rates

``coverage``: the share of 95 % intervals of :func:`ipca.lab.statistics.bootstrap_interval`, and of
:func:`~ipca.lab.statistics.mean_interval`, that contain the mean, for ``n`` normally distributed values. Ideal is 0.95.

``called different``: two equal methods at three rates; the target does not depend on them, retention falls by 0.03 from
one to the next; noise of 0.01 per run, and noise of the seed common to both methods. The share of pairs in which
:func:`ipca.lab.statistics.paired_test` finds p ≤ 5 % in retention, ideal is at most 0.05:

- each at its best rate, as chosen by :func:`ipca.lab.compare.best_rate`;
- there, and at the same rate with the same sign;
- each at the lowest rate within one standard error of its best;
- at equal target, :func:`ipca.lab.compare.target_matched`, at the largest that both reach with every seed;
- at equal target, for each seed at the largest that both reach with it.

``shifted grids``: two equal methods at six rates each, a factor of 2 apart, whose target is nearly flat below the best
rate and whose retention falls with the rate, about as those of the middle window in MiniLM's feed-forward layers
(:data:`CURVE`, noise of 0.02 and 0.015 a run). Both methods' rates go from 2⁻⁴ to 2 times the best one, or the second's
from 2⁻¹ to 2⁴ times. The share of pairs that the study of the window's position calls different at equal target: p ≤
5 % at each seed's target, the same sign at that of all seeds, and the lowest rate of the method that retains less below
the target in half of the seeds or more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.rows import RESULTS, append_rows
from ipca.lab.compare import best_rate, target_matched
from ipca.lab.statistics import LEVEL, Interval, bootstrap_interval, mean_interval, paired_test

COLUMNS = ("what", "n", "repeats", "share", "error")
PATH = RESULTS / "error_rates.csv"
SIZES = (3, 5, 10, 20)
SEEDS = 10
LRS = (5e-4, 1e-3, 2e-3)
FALL, NOISE = 0.03, 0.01
CURVE = {
    -4: (-0.04, 0.075),
    -3: (-0.014, 0.075),
    -2: (-0.005, 0.067),
    -1: (-0.002, 0.04),
    0: (0.0, 0.0),
    1: (-0.026, -0.09),
    2: (-0.06, -0.2),
    3: (-0.15, -0.35),
    4: (-0.25, -0.5),
}
"""Target and retention, relative to those at the best rate, by the logarithm of the rate to base 2."""
GRID, SHIFT = range(-4, 2), 3
Runs = list[dict[str, Any]]
Scores = dict[int, float]
Row = dict[str, object]


def coverage(n: int, repeats: int, interval: Callable[[np.ndarray], Interval] = bootstrap_interval) -> Row:
    """The row of intervals of ``n`` values."""
    generator = np.random.default_rng(n)
    intervals = [interval(generator.standard_normal(n)) for _ in range(repeats)]
    what = "coverage" if interval is bootstrap_interval else "coverage: inverted test"
    return _row(what, n, [low <= 0 <= high for low, high in intervals])


def called_different(repeats: int) -> Iterator[Row]:
    """A row for each way to choose where to compare."""
    generator = np.random.default_rng(0)
    hits: dict[str, list[bool]] = {}
    for _ in range(repeats):
        shared = generator.normal(0, NOISE, SEEDS)
        pair = _method(generator, shared), _method(generator, shared)
        best, same, one_se = (paired_test(*(choose(runs) for runs in pair)) for choose in (_best, _middle, _one_se))
        found = {
            "best rates": best.p <= LEVEL,
            "best rates and same rate": best.p <= LEVEL and same.p <= LEVEL and best.mean * same.mean > 0,
            "one standard error": one_se.p <= LEVEL,
            "equal target of all seeds": paired_test(*_at_equal_target(pair)).p <= LEVEL,
            "equal target of each seed": paired_test(*_by_seed(pair)).p <= LEVEL,
        }
        for name, hit in found.items():
            hits.setdefault(name, []).append(hit)
    yield from (_row(f"called different: {name}", SEEDS, found) for name, found in hits.items())


def shifted_grids(repeats: int) -> Iterator[Row]:
    """A row for two methods at the same rates, relative to their best one, and one for rates that differ by a shift."""
    for name, shift in (("alike", 0), ("one shifted", SHIFT)):
        generator = np.random.default_rng(shift)
        hits = [_is_called(generator, (GRID, [place + shift for place in GRID])) for _ in range(repeats)]
        yield _row(f"shifted grids: {name}", SEEDS, hits)


def _is_called(generator: np.random.Generator, grids: Sequence[Sequence[int]]) -> bool:
    """Whether two equal methods at these rates, in factors of 2 from their best, are called different."""
    shared = generator.normal(0, NOISE, (2, SEEDS))
    pair = []
    for places in grids:
        means = np.array([CURVE[place] for place in places]).T[:, :, None]
        noise = generator.normal(0, 1, (2, len(places), SEEDS)) * np.array([0.02, 0.015])[:, None, None]
        target, kept = means + shared[:, None] + noise
        pair.append(
            [
                {"seed": s, "target": float(target[i, s]), "retained": float(kept[i, s])}
                for i in range(len(places))
                for s in range(SEEDS)
            ]
        )
    own, common = (paired_test(*find(pair)) for find in (_by_seed, _at_equal_target))
    if own.p > LEVEL or own.mean * common.mean <= 0:
        return False
    best = [{s: max(run["target"] for run in runs if run["seed"] == s) for s in range(SEEDS)} for runs in pair]
    worse = pair[1 if own.mean > 0 else 0][:SEEDS]  # its lowest rate
    reached = sum(run["target"] >= min(each[s] for each in best) for s, run in enumerate(worse))
    return 2 * reached <= SEEDS


def _method(generator: np.random.Generator, shared: np.ndarray) -> Runs:
    """The runs of a method: every rate with every seed."""
    target = generator.normal(0, NOISE, (len(LRS), SEEDS)) + shared
    kept = generator.normal(0, NOISE, (len(LRS), SEEDS)) + shared - FALL * np.arange(len(LRS))[:, None]
    return [
        {"lr": lr, "seed": seed, "target": target[k, seed], "retained": float(kept[k, seed])}
        for k, lr in enumerate(LRS)
        for seed in range(SEEDS)
    ]


def _best(runs: Runs, within_se: float = 0.0) -> Scores:
    rates = best_rate(runs, within_se=within_se)
    return {run["seed"]: run["retained"] for run in runs if run["lr"] == rates[run["seed"]]}


def _one_se(runs: Runs) -> Scores:
    return _best(runs, within_se=1)


def _middle(runs: Runs) -> Scores:
    return {run["seed"]: run["retained"] for run in runs if run["lr"] == LRS[1]}


def _at_equal_target(pair: Sequence[Runs], seeds: Iterable[int] = range(SEEDS)) -> list[Scores]:
    curves = {
        str(k): {s: [(run["target"], run["retained"]) for run in runs if run["seed"] == s] for s in seeds}
        for k, runs in enumerate(pair)
    }
    return list(target_matched(curves).retained.values())


def _by_seed(pair: Sequence[Runs]) -> list[Scores]:
    found = [_at_equal_target(pair, (seed,)) for seed in range(SEEDS)]
    return [{seed: each[k][seed] for seed, each in enumerate(found)} for k in range(2)]


def _row(what: str, n: int, hits: list[bool]) -> Row:
    """``error`` is the standard error of the share."""
    share = sum(hits) / len(hits)
    error = math.sqrt(share * (1 - share) / len(hits))
    return {"what": what, "n": n, "repeats": len(hits), "share": f"{share:.4g}", "error": f"{error:.2g}"}


def measure(path: Path = PATH, repeats: int = 10_000) -> None:
    """Measure and overwrite the table."""
    exact = (coverage(n, repeats, mean_interval) for n in SIZES if n <= SEEDS)
    rows = [*(coverage(n, repeats) for n in SIZES), *exact, *called_different(repeats), *shifted_grids(repeats)]
    path.unlink(missing_ok=True)
    append_rows(path, rows, COLUMNS)


if __name__ == "__main__":
    measure()
