"""What PROTOCOL.md adds after the rows were seen: chosen rates, retention at equal target, each claim by model.

Post hoc: two-sided sign-flip tests without correction. The protocol's own tests are in ``claims.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from statistics import mean
from typing import Any

from ipca.lab.compare import Matched, best_rate, target_matched
from ipca.lab.statistics import FEWEST, LEVEL, holm, paired_test
from ipca.lab.sweep.report.data import Sweep
from studies.window_position.claims import FRESH_LORA, FRESH_MIDDLE, FRESH_PRINCIPAL, stream_accuracy
from studies.window_position.rows import (
    FROZEN,
    KNOWN_INPUTS,
    LORA,
    MIDDLE,
    MINOR,
    NEW_INPUTS,
    PRINCIPAL,
    RATE,
    Study,
    Values,
    differences,
    estimate,
    rates_of,
    tuned_values,
    values_of,
)

EDGE, HOLDS, REVERSED, NOT_SHOWN = "edge", "holds", "reversed", "not shown"
"""Verdicts of a claim in one place."""
PLACES = ("M1", "M4", "M5", "M2-query-value", "M2-all", "V1")
"""Sweeps with different models, tasks, layers or lengths; M3 repeats runs of M1."""
_TEST = ("n", "mean", "low", "high", "p", "smallest")
RATE_COLUMNS = (
    *("experiment", "method", "seeds", "rates", "best", "one_se", "edge", "target", "retained", "drift"),
    *("difference", "low", "high"),
)
EQUAL_COLUMNS = (
    *("experiment", "first", "second", "level", "target", "rates_first", "rates_second", "edge"),
    *("retained_first", "retained_second", *_TEST),
)
CLAIM_COLUMNS = ("claim", "against", "place", *_TEST, "verdict", "test")
TESTS = {
    ("same rate, drift", PRINCIPAL, "M1"): "C1",
    ("same rate", PRINCIPAL, "M1"): "C2",
    ("same rate, drift", MINOR, "M1"): "C3",
    ("same rate", MINOR, "M1"): "C4",
    ("same rate", PRINCIPAL, "V1"): "C9",
    ("same rate", MINOR, "V1"): "C10",
    ("continual", FRESH_PRINCIPAL, "V2"): "C13",
    ("continual", FRESH_LORA, "V2"): "C14",
}
"""Confirmatory tests by claim, the method against and place; their corrected verdicts stand."""
Points = Mapping[int, Mapping[float, tuple[float, float]]]
"""``{seed: {rate: (target, retained)}}``."""


def chosen_rates(name: str, sweep: Sweep) -> Iterator[dict[str, Any]]:
    """A row for each method of a sweep that was run at two rates or more, with the same three seeds or more.

    ``best`` has the best mean target over all seeds, ``one_se`` is the lowest within one standard error of it. ``edge``
    names which of the two is an end of the grid (``one_se`` only the lower one). ``target``, ``retained`` and ``drift``
    are means at ``one_se``; ``difference`` is in ``retained`` to the middle window, each at its own ``one_se``.
    """
    chosen = {method: _chosen(sweep, method) for method in sweep.methods if _has_grid(sweep, method)}
    chosen = {method: found for method, found in chosen.items() if math.isfinite(found[0])}  # else all runs failed
    middle = chosen.get(MIDDLE)
    for method, (best, one_se) in chosen.items():
        rates = rates_of(sweep, method)
        edge = ["best"] * (best in (rates[0], rates[-1])) + ["one_se"] * (one_se == rates[0])
        means = [mean(values_of(sweep, method, m, one_se).values()) for m in ("target", "retained", "drift")]
        other = values_of(sweep, MIDDLE, "retained", middle[1]) if middle else {}
        found = estimate(differences(values_of(sweep, method, "retained", one_se), other))
        seeds, tried = len(values_of(sweep, method, "target", one_se)), " ".join(f"{rate:g}" for rate in rates)
        interval = (found.mean, found.low, found.high) if found else (None, None, None)
        cells = (name, method, seeds, tried, best, one_se, " ".join(edge), *means, *interval)
        yield dict(zip(RATE_COLUMNS, cells, strict=True))


def _has_grid(sweep: Sweep, method: str) -> bool:
    seeds = [frozenset(values_of(sweep, method, "target", lr)) for lr in rates_of(sweep, method)]
    return len(seeds) > 1 and len(set(seeds)) == 1 and len(seeds[0]) >= FEWEST


def _chosen(sweep: Sweep, method: str) -> tuple[float, float]:
    """The best rate of ``method`` and that of the one-standard-error rule, over all seeds."""
    rows: list[dict[str, Any]] = []
    for lr in rates_of(sweep, method):
        rows.append({"lr": lr, "seed": None, "target": 0.0})  # best_rate chooses for this seed, on all others
        rows += [{"lr": lr, "seed": s, "target": v} for s, v in values_of(sweep, method, "target", lr).items()]
    best, one_se = (best_rate(rows, within_se=within)[None] for within in (0.0, 1.0))
    return best, one_se


def equal_target(name: str, sweep: Sweep, second: str, first: str = MIDDLE) -> list[dict[str, Any]]:
    """Retention of ``first − second`` at equal target, in two rows: one target for all seeds, and each seed's own.

    ``edge`` names the arms whose lowest rate reaches the target in more than half of the seeds.
    No rows if no seed succeeded in both.
    """
    arms = {method: _points(sweep, method) for method in (first, second)}
    seeds = [s for s in arms[first] if s in arms[second]]
    if not seeds:
        return []
    curves = {method: {s: list(found.values()) for s, found in points.items()} for method, points in arms.items()}
    common = target_matched(curves)
    own = {seed: target_matched({m: {seed: points[seed]} for m, points in curves.items()}) for seed in seeds}
    return [
        _equal(name, sweep, arms, level, matched)
        for level, matched in (("all seeds", dict.fromkeys(seeds, common)), ("each seed", own))
    ]


def _equal(
    name: str, sweep: Sweep, arms: Mapping[str, Points], level: str, matched: Mapping[int, Matched]
) -> dict[str, Any]:
    first, second = arms
    edge = [
        method
        for method, points in arms.items()
        if 2 * sum(points[seed][min(points[seed])][0] >= found.target for seed, found in matched.items()) > len(matched)
    ]
    retained = [{seed: found.retained[m][seed] for seed, found in matched.items()} for m in arms]
    target, rates = mean(found.target for found in matched.values()), (len(rates_of(sweep, m)) for m in arms)
    cells = (name, first, second, level, target, *rates, " ".join(edge), *(mean(each.values()) for each in retained))
    return dict(zip(EQUAL_COLUMNS, (*cells, *tested(*retained).values()), strict=True))


def _points(sweep: Sweep, method: str) -> Points:
    points: dict[int, dict[float, tuple[float, float]]] = {}
    for run in sweep.ends:
        if (run.method, run.comparison) == (method, "same") and run.seed is not None and run.ok and run.lr is not None:
            points.setdefault(run.seed, {})[run.lr] = (run.metrics["target"], run.metrics["retained"])
    return points


def tested(first: Values, second: Values) -> dict[str, Any]:
    """The test of ``first − second``, two-sided; empty without pairs.

    ``n``, ``mean``, its interval ``low`` to ``high``, ``p``, and ``smallest``, the least ``p`` that n pairs can have.
    """
    found = differences(first, second)
    effect = estimate(found)
    if effect is None:
        return dict.fromkeys(_TEST)
    p = paired_test(found, [0.0] * len(found)).p
    return dict(zip(_TEST, (effect.n, effect.mean, effect.low, effect.high, p, 2.0 ** (1 - effect.n)), strict=True))


def equal_targets(study: Study) -> Iterator[dict[str, Any]]:
    """The rows of ``equal-target.csv``: the middle window against others; frozen factors and windows of the layers'
    inputs against plain LoRA and the middle window.

    Where wider grids were run with some of the seeds, these have rows of their own, of the experiment ``"M1, wider"``.
    """
    for name in ("M1", "M2-query-value", "M2-all", "M3", "M4", "V1"):
        sweep = study.wider(name)
        if sweep is None or len(rates_of(sweep, MIDDLE)) < 2:
            continue
        beside = [LORA] if name == "M3" else [LORA, PRINCIPAL, MINOR]
        pairs = [(MIDDLE, other) for other in (*beside, "random-window")]
        pairs += [(arm, other) for arm in (*FROZEN, NEW_INPUTS, KNOWN_INPUTS) for other in (LORA, MIDDLE)]
        for first, second in pairs:
            if {first, second} <= set(sweep.methods):
                yield from equal_target(name, sweep, second, first)
        if part := study.wider(name, partly=True):
            for method in dict.fromkeys(run.method for run in part.runs if run.lr not in sweep.lrs):
                if method in (PRINCIPAL, MINOR, LORA):
                    yield from equal_target(f"{name}, wider", part, method)


def claims_by_place(
    study: Study, equal: Sequence[Mapping[str, Any]], tests: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The rows of ``claims.csv``: for each claim of the paper and each place, whether it holds there.

    Differences are such that a positive mean speaks for the claim; :data:`TESTS` have their corrected verdict.

    Args:
        equal: the rows of :func:`equal_targets`.
        tests: those of :func:`~studies.window_position.claims.confirm`.
    """
    corrected = {row["claim"]: row for row in tests}
    for row in _claims(study, equal):
        name = TESTS.get((row["claim"], row["against"], row["place"]))
        said = _corrected(corrected[name]) if name else None
        yield row | ({"test": name, "verdict": said} if said else {"test": ""})


def _corrected(test: Mapping[str, Any]) -> str | None:
    """The verdict of a confirmatory test as one of a claim; None without a test."""
    found = {"holds": HOLDS, "the opposite holds": REVERSED, "not shown": NOT_SHOWN}.get(test["verdict"])
    if test["verdict"] in ("above", "below"):
        found = HOLDS if (test["verdict"] == "above") == test["first"].endswith("middle") else REVERSED
    return found


def _claims(study: Study, equal: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    kinds = {
        "same rate": _at_rate("retained"),
        "same rate, drift": _at_rate("drift"),
        "equal early updates": _at_early_updates,
        "high rates": _robust,
        "accuracy": _accurate,
    }
    for (claim, arms), other, name in product(kinds.items(), (PRINCIPAL, MINOR, LORA), PLACES):
        yield from _row(study, claim, other, name, arms)
    levels: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for row in equal:
        levels.setdefault((row["experiment"], row["first"], row["second"]), {})[row["level"]] = row
    for (name, first, other), rows in levels.items():
        if first == MIDDLE and other in (PRINCIPAL, MINOR, LORA) and name in PLACES:
            yield _claim("equal target", other, name, rows["each seed"], _equal_verdict(rows))
    fresh = stream_accuracy(FRESH_MIDDLE)(study)
    if fresh:
        others = (FRESH_PRINCIPAL, "milora", FRESH_LORA, "o-lora", "osf")
        streams = [tested(fresh, stream_accuracy(other)(study)) for other in others]
        for other, found, adjusted in zip(others, streams, holm([found["p"] for found in streams]), strict=True):
            yield _claim("continual", other, "V2", found, verdict({**found, "p": adjusted}))


Arms = Callable[[Sweep, str], tuple[Values, Values] | str | None]
"""Both sides of a claim against a method; a verdict that needs no test; None if it was not run."""


def _row(study: Study, claim: str, other: str, name: str, arms: Arms) -> Iterator[dict[str, Any]]:
    sweep = study.wider("M3" if claim == "equal early updates" and name == "M1" else name)
    found = arms(sweep, other) if sweep is not None and {other, MIDDLE} <= set(sweep.methods) else None
    if isinstance(found, str):
        yield _claim(claim, other, name, dict.fromkeys(_TEST), found)
    elif found is not None and (row := tested(*found))["n"]:
        yield _claim(claim, other, name, row, verdict(row))


def _claim(claim: str, other: str, place: str, found: Mapping[str, Any], said: str) -> dict[str, Any]:
    numbers = {column: found[column] for column in _TEST}
    return {"claim": claim, "against": other, "place": place, **numbers, "verdict": said}


def verdict(found: Mapping[str, Any]) -> str:
    """Of a test of ``first − second`` whose positive side is the claim."""
    if found["p"] is None or found["p"] > LEVEL:
        return NOT_SHOWN
    return HOLDS if found["mean"] > 0 else REVERSED


def _equal_verdict(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Each seed's comparison decides, if the common one has the same sign; an edge if the worse arm is at one."""
    own, common = rows["each seed"], rows["all seeds"]
    if (own["second"] if own["mean"] > 0 else own["first"]) in own["edge"].split():
        return EDGE
    return verdict(own) if own["mean"] * common["mean"] > 0 else NOT_SHOWN


def _at_rate(metric: str) -> Arms:
    def arms(sweep: Sweep, other: str) -> tuple[Values, Values]:
        first, second = (values_of(sweep, method, metric, RATE) for method in (MIDDLE, other))
        return (second, first) if metric == "drift" else (first, second)

    return arms


def _at_early_updates(sweep: Sweep, other: str) -> tuple[Values, Values]:
    return values_of(sweep, MIDDLE, "retained", RATE), values_of(sweep, other, "retained", RATE, "update")


def _robust(sweep: Sweep, other: str) -> tuple[Values, Values] | None:
    """The change of ``retained`` from the lowest to the highest rate that both were run at."""
    rates = sorted(set(rates_of(sweep, MIDDLE)) & set(rates_of(sweep, other)))
    if len(rates) < 2:
        return None
    changes = []
    for method in (MIDDLE, other):
        low, high = (values_of(sweep, method, "retained", rate) for rate in (rates[0], rates[-1]))
        changes.append({seed: high[seed] - low[seed] for seed in low.keys() & high.keys()})
    return changes[0], changes[1]


def _accurate(sweep: Sweep, other: str) -> tuple[Values, Values] | str | None:
    """The target of each at its best rate; an edge where one of them has it at an end of its grid."""
    rates = {method: rates_of(sweep, method) for method in (MIDDLE, other)}
    if not all(_has_grid(sweep, method) for method in rates):
        return None
    if any(_chosen(sweep, method)[0] in (each[0], each[-1]) for method, each in rates.items()):
        return EDGE
    return tuned_values(sweep, MIDDLE, "target"), tuned_values(sweep, other, "target")
