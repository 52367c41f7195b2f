"""The study's tables from its rows: the confirmatory tests, means and differences with intervals, rank correlations.

    python -m studies.window_position.findings

Writes `tests.csv`, `summary.csv` and `ranks.csv` into `results`. What has not been run is in none of them but
the first, which says so.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from studies.window_position.claims import FRESH_MIDDLE, TEST_COLUMNS, confirm
from studies.window_position.rows import MIDDLE, Study, Sweep, Table, Values, curve_of, number, write_table
from studies.window_position.statistics import differences, interval, mean

STREAM_METRICS = ("acc", "bwt", "fm", "retained_before", "retained_after", "parameters", "bytes")
SUMMARY_COLUMNS = (
    *("experiment", "method", "comparison", "lr", "metric", "n", "failed", "mean", "low", "high"),
    *("pairs", "difference", "difference_low", "difference_high"),
)
RANK_COLUMNS = ("experiment", "lr", "n", "mean", "low", "high")


def summarize(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """A row of ``summary.csv`` for each method, comparison, rate and metric.

    ``lr`` is the grid's rate, or ``"best"``: for each seed the one with the best mean target over the other seeds.
    ``difference`` is that to the middle window in the same comparison at the same rate, paired over seeds; 0 for the
    middle window itself. ``n`` runs and ``pairs`` pairs ended well, ``failed`` did not.
    """
    for method in sweep.methods:
        for metric in sweep.metrics:
            for comparison in sweep.comparisons:
                for lr in sweep.rates:
                    values = sweep.values(method, metric, lr, comparison)
                    middle = sweep.values(MIDDLE, metric, lr, sweep.reference(comparison))
                    if values:
                        yield _summary((sweep.name, method, comparison, lr, metric), values, middle)
            if len(sweep.rates) > 1 and sweep.complete(method) and sweep.complete(MIDDLE):
                best, middle = (sweep.tuned(name, metric) for name in (method, MIDDLE))
                yield _summary((sweep.name, method, "same", "best", metric), best, middle)


def summarize_streams(rows: Table) -> Iterator[dict[str, Any]]:
    """The rows of ``summary.csv`` of the streams, V2; ``difference`` is that to fresh middle windows."""
    methods = dict.fromkeys(row["method"] for row in rows)
    for method in methods:
        for metric in STREAM_METRICS:
            first, fresh = (
                {int(row["seed"]): number(row[metric]) for row in rows if row["method"] == name}
                for name in (method, FRESH_MIDDLE)
            )
            yield _summary(("V2", method, "", "", metric), first, fresh)


def _summary(key: tuple[str, str, str, float | str, str], values: Values, middle: Values) -> dict[str, Any]:
    """``key`` is (experiment, method, comparison, rate, metric)."""
    well = [value for value in values.values() if math.isfinite(value)]
    apart = differences(values, middle)
    numbers = (len(well), len(values) - len(well), mean(well), *interval(well))
    return dict(zip(SUMMARY_COLUMNS, (*key, *numbers, len(apart), mean(apart), *interval(apart)), strict=True))


def rank_correlations(study: Study, mechanism: Table) -> Iterator[dict[str, Any]]:
    """A row of ``ranks.csv`` for each sweep and rate: Spearman's ρ between summed sensitivity and drift over windows.

    One ρ for each seed with a drift at every window; ``mean`` with its bootstrap interval over the ``n`` seeds.
    """
    for name in ("M1", "M2-query-value", "M2-all", "V1"):
        sweep, curve = study.sweep(name), curve_of(mechanism, name)
        if sweep is None or not curve:
            continue
        for lr in sweep.rates:
            drift = {method: sweep.values(method, "drift", lr) for method in sweep.methods if method in curve}
            found = _spearman([curve[method] for method in drift], list(drift.values()))
            low, high = interval(found)
            yield dict(zip(RANK_COLUMNS, (name, lr, len(found), mean(found), low, high), strict=True))


def _spearman(sensitivities: Sequence[float], drift: Sequence[Values]) -> list[float]:
    from scipy import stats

    seeds = set.intersection(*(set(values) for values in drift))
    curves = [[values[seed] for values in drift] for seed in sorted(seeds)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)  # its ρ is NaN
        found = [float(stats.spearmanr(sensitivities, curve).statistic) for curve in curves]
    return [rho for rho in found if math.isfinite(rho)]


def write(study: Study) -> None:
    """Make the three tables from the rows and ``mechanism.csv``."""
    write_table(study.folder / "tests.csv", TEST_COLUMNS, confirm(study))
    summaries = [row for sweep in study.sweeps for row in summarize(sweep)]
    summaries += summarize_streams(study.table("V2"))
    write_table(study.folder / "summary.csv", SUMMARY_COLUMNS, summaries)
    ranks = rank_correlations(study, study.table("mechanism"))
    write_table(study.folder / "ranks.csv", RANK_COLUMNS, ranks)


if __name__ == "__main__":
    write(Study())
