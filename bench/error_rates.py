"""Error rates of our statistics on simulated data; writes bench/results/error_rates.csv, from fixed seeds.

    python -m bench.error_rates

``coverage``: the share of 95 % intervals of :func:`ipca.lab.statistics.bootstrap_interval` that contain the mean, for
``n`` normally distributed values. Ideal is 0.95.

``called different``: two equal methods, each at its best rate as chosen by :func:`ipca.lab.compare.best_rate` (three
rates; the target does not depend on them, retention falls by 0.03 from one to the next; noise of 0.01 per run, and
noise of the seed common to both methods). The share of pairs in which :func:`ipca.lab.statistics.paired_test` finds
p ≤ 5 % in retention; and that in which it also does at the same rate, with the same sign. Ideal is at most 0.05.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench.rows import RESULTS, append_rows
from ipca.lab.compare import best_rate
from ipca.lab.statistics import LEVEL, bootstrap_interval, paired_test

COLUMNS = ("what", "n", "repeats", "share", "error")
PATH = RESULTS / "error_rates.csv"
SIZES = (3, 5, 10, 20)
SEEDS = 10
LRS = (5e-4, 1e-3, 2e-3)
FALL, NOISE = 0.03, 0.01
Scores = dict[int, float]
Row = dict[str, object]


def coverage(n: int, repeats: int) -> Row:
    """The row of intervals of ``n`` values."""
    generator = np.random.default_rng(n)
    intervals = [bootstrap_interval(generator.standard_normal(n)) for _ in range(repeats)]
    return _row("coverage", n, [low <= 0 <= high for low, high in intervals])


def called_different(repeats: int) -> Iterator[Row]:
    """The rows of tests at best rates, and of tests at best rates and at the same rate."""
    generator, tuned, both = np.random.default_rng(0), [], []
    for _ in range(repeats):
        shared = generator.normal(0, NOISE, SEEDS)
        first, second = _method(generator, shared), _method(generator, shared)
        best, same = (paired_test(a, b) for a, b in zip(first, second, strict=True))
        tuned.append(best.p <= LEVEL)
        both.append(best.p <= LEVEL and same.p <= LEVEL and best.mean * same.mean > 0)
    yield _row("called different: best rates", SEEDS, tuned)
    yield _row("called different: best rates and same rate", SEEDS, both)


def _method(generator: np.random.Generator, shared: np.ndarray) -> tuple[Scores, Scores]:
    """Retention of a method, ``{seed: retained}``: at the rate chosen by the other seeds, and at the middle one."""
    target = generator.normal(0, NOISE, (len(LRS), SEEDS)) + shared
    kept = generator.normal(0, NOISE, (len(LRS), SEEDS)) + shared - FALL * np.arange(len(LRS))[:, None]
    runs = [{"lr": lr, "seed": s, "target": target[k, s]} for k, lr in enumerate(LRS) for s in range(SEEDS)]
    best = {seed: float(kept[LRS.index(lr), seed]) for seed, lr in best_rate(runs).items()}
    return best, dict(enumerate(map(float, kept[1])))


def _row(what: str, n: int, hits: list[bool]) -> Row:
    """``error`` is the standard error of the share."""
    share = sum(hits) / len(hits)
    error = math.sqrt(share * (1 - share) / len(hits))
    return {"what": what, "n": n, "repeats": len(hits), "share": f"{share:.4g}", "error": f"{error:.2g}"}


def measure(path: Path = PATH, repeats: int = 10_000) -> None:
    """Measure and overwrite the table."""
    rows = [*(coverage(n, repeats) for n in SIZES), *called_different(repeats)]
    path.unlink(missing_ok=True)
    append_rows(path, rows, COLUMNS)


if __name__ == "__main__":
    measure()
