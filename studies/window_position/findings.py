"""The derived tables of the study: confirmatory tests, means and differences with intervals, what was analyzed anew.

``tests.csv``, ``summary.csv``, ``ranks.csv``, ``rates.csv``, ``equal-target.csv`` and ``claims.csv``. Experiments that
have not been run appear in the first only, as "not run". ``page.py`` writes and checks them.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ipca.lab.statistics import Estimate
from ipca.lab.sweep.report.data import Sweep
from studies.window_position.claims import FRESH_MIDDLE, TEST_COLUMNS, confirm
from studies.window_position.reanalysis import (
    CLAIM_COLUMNS,
    EQUAL_COLUMNS,
    RATE_COLUMNS,
    chosen_rates,
    claims_by_place,
    equal_targets,
)
from studies.window_position.rows import (
    BASE,
    EXTENSIONS,
    MIDDLE,
    Study,
    Table,
    Values,
    curve_of,
    differences,
    estimate,
    is_complete,
    tuned_values,
    values_of,
    write_table,
)

STREAM_METRICS = ("acc", "bwt", "fm", "retained_before", "retained_after", "parameters", "bytes")
SUMMARY_COLUMNS = (
    *("experiment", "method", "comparison", "lr", "metric", "n", "failed", "mean", "low", "high"),
    *("pairs", "difference", "difference_low", "difference_high"),
)
RANK_COLUMNS = ("experiment", "lr", "n", "mean", "low", "high")


def summarize(name: str, sweep: Sweep) -> Iterator[dict[str, Any]]:
    """A row of ``summary.csv`` for each method, comparison, rate and metric.

    ``lr`` is the grid's rate, or ``"best"``: for each seed the one with the best mean target over the other seeds.
    ``difference`` is to the middle window in the same comparison at the same rate, paired by seed; 0 for the middle
    window itself. ``n`` runs and ``pairs`` pairs succeeded, ``failed`` did not. The untrained model comes first.
    """
    for metric, value in sweep.base.items():
        yield _summary((name, BASE, "", "", metric), {0: value}, {})
    for method in sweep.methods:
        for metric in sweep.base:
            for comparison in sweep.comparisons:
                for lr in sweep.lrs:
                    values = values_of(sweep, method, metric, lr, comparison)
                    # Equal updates are relative to the middle window at its own rate.
                    middle = values_of(sweep, MIDDLE, metric, lr, "same" if comparison == "update" else comparison)
                    if values:
                        yield _summary((name, method, comparison, lr, metric), values, middle)
            if len(sweep.lrs) > 1 and is_complete(sweep, method) and is_complete(sweep, MIDDLE):
                best, middle = (tuned_values(sweep, each, metric) for each in (method, MIDDLE))
                yield _summary((name, method, "same", "best", metric), best, middle)


def summarize_streams(rows: Table) -> Iterator[dict[str, Any]]:
    """The rows of ``summary.csv`` of the streams, V2; ``difference`` is to fresh middle windows."""
    methods = dict.fromkeys(row["method"] for row in rows)
    for method in methods:
        for metric in STREAM_METRICS:
            first, fresh = (
                {int(row["seed"]): float(row[metric]) for row in rows if row["method"] == name}
                for name in (method, FRESH_MIDDLE)
            )
            yield _summary(("V2", method, "", "", metric), first, fresh)


def _summary(key: tuple[str, str, str, float | str, str], values: Values, middle: Values) -> dict[str, Any]:
    """``key`` is (experiment, method, comparison, rate, metric)."""
    succeeded = [value for value in values.values() if math.isfinite(value)]
    paired = differences(values, middle)
    counts = len(succeeded), len(values) - len(succeeded)
    cells = (*key, *counts, *_cells(estimate(succeeded)), len(paired), *_cells(estimate(paired)))
    return dict(zip(SUMMARY_COLUMNS, cells, strict=True))


def _cells(found: Estimate | None) -> tuple[float | None, float | None, float | None]:
    """Mean and interval; empty cells without values."""
    return (None, None, None) if found is None else (found.mean, found.low, found.high)


def rank_correlations(study: Study, mechanism: Table) -> Iterator[dict[str, Any]]:
    """A row of ``ranks.csv`` for each sweep and rate: Spearman's ρ between summed sensitivity and drift over windows.

    One ρ per seed that has a drift at every window; ``mean`` with its bootstrap interval over the ``n`` seeds.
    """
    for name in ("M1", "M2-query-value", "M2-all", "V1"):
        sweep, curve = study.sweep(name), curve_of(mechanism, name)
        if sweep is None or not curve:
            continue
        for lr in sweep.lrs:
            drift = {method: values_of(sweep, method, "drift", lr) for method in sweep.methods if method in curve}
            found = _spearman([curve[method] for method in drift], list(drift.values()))
            yield dict(zip(RANK_COLUMNS, (name, lr, len(found), *_clipped(estimate(found))), strict=True))


def _clipped(found: Estimate | None) -> tuple[float | None, ...]:
    """Mean and interval of a correlation, which is within ±1."""
    return tuple(None if value is None else min(max(value, -1.0), 1.0) for value in _cells(found))


def _spearman(sensitivities: Sequence[float], drift: Sequence[Values]) -> list[float]:
    from scipy import stats

    seeds = set.intersection(*(set(values) for values in drift))
    curves = [[values[seed] for values in drift] for seed in sorted(seeds)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)  # its ρ is NaN
        found = [float(stats.spearmanr(sensitivities, curve).statistic) for curve in curves]
    return [rho for rho in found if math.isfinite(rho)]


def write(study: Study, folder: Path | None = None) -> list[Path]:
    """Write the tables from the rows and ``mechanism.csv``, beside them or to ``folder``; returns their paths."""
    tests, equal = confirm(study), list(equal_targets(study))
    more = {name: sweep for name in EXTENSIONS if (sweep := study.sweep(name)) is not None}
    summaries = [row for name, sweep in (study.sweeps | more).items() for row in summarize(name, sweep)]
    wider = {name: sweep for name in study.sweeps if (sweep := study.wider(name)) is not None}
    made: dict[str, tuple[Sequence[str], Iterable[Mapping[str, Any]]]] = {
        "tests": (TEST_COLUMNS, tests),
        "summary": (SUMMARY_COLUMNS, [*summaries, *summarize_streams(study.table("V2"))]),
        "ranks": (RANK_COLUMNS, rank_correlations(study, study.table("mechanism"))),
        "rates": (RATE_COLUMNS, [row for name, sweep in wider.items() for row in chosen_rates(name, sweep)]),
        "equal-target": (EQUAL_COLUMNS, equal),
        "claims": (CLAIM_COLUMNS, claims_by_place(study, equal, tests)),
    }
    paths = [(folder or study.folder) / f"{name}.csv" for name in made]
    for path, table in zip(paths, made.values(), strict=True):
        write_table(path, *table)
    return paths


def outdated(study: Study) -> list[str]:
    """The names of the tables that are missing or not what the rows give."""
    with tempfile.TemporaryDirectory() as folder:
        made = write(study, Path(folder))
        there = (study.folder / path.name for path in made)
        return [a.name for a, b in zip(there, made, strict=True) if not a.exists() or a.read_bytes() != b.read_bytes()]
