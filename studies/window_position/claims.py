"""The confirmatory tests of PROTOCOL.md, C1 to C14: two arms each, paired by seed, corrected over the list."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ipca.lab.statistics import LEVEL, holm, paired_test
from ipca.lab.sweep.report.data import Sweep
from studies.window_position.rows import (
    AUTO,
    LORA,
    MIDDLE,
    MINOR,
    PRINCIPAL,
    RATE,
    Study,
    Values,
    differences,
    estimate,
    tuned_values,
    values_of,
)

SEEDS = 10
"""Number of pairs of every test."""
FRESH_PRINCIPAL, FRESH_MIDDLE, FRESH_LORA = "pissa", "fresh", "lora-fresh"
"""Methods of the streams: ``"pissa"`` is fresh principal windows, ``"fresh"`` in ``stream.py`` fresh middle ones."""
Arm = Callable[[Study], Values]
"""One side of a test, by seed; empty if the experiment was not run."""
_OTHER = {"greater": "less", "less": "greater"}
TEST_COLUMNS = (
    *("claim", "where", "statement", "first", "second", "side", "n", "left_out"),
    *("mean", "low", "high", "dz", "p", "adjusted", "verdict"),
)


@dataclass(frozen=True)
class Claim:
    """One confirmatory test, of ``first − second``.

    Attributes:
        side: ``"greater"``, ``"less"`` or ``"two-sided"``.
        names: of the two arms.
        first, second: the two arms.
    """

    name: str
    where: str
    statement: str
    side: str
    names: tuple[str, str]
    first: Arm
    second: Arm


def at_rate(name: str, method: str, metric: str) -> Arm:
    """A method of a sweep at the rate of the confirmatory tests."""
    return lambda study: _of(study.sweep(name), lambda sweep: values_of(sweep, method, metric, RATE))


def tuned(name: str, method: str, metric: str) -> Arm:
    """A method of a sweep at its best rate, chosen on the other seeds."""
    return lambda study: _of(study.sweep(name), lambda sweep: tuned_values(sweep, method, metric))


def lead_of_lora(name: str) -> Arm:
    """LoRA − middle in ``retained``."""

    def lead(sweep: Sweep) -> Values:
        lora, middle = (values_of(sweep, method, "retained", RATE) for method in (LORA, MIDDLE))
        return {seed: value - middle.get(seed, math.nan) for seed, value in lora.items()}

    return lambda study: _of(study.sweep(name), lead)


def stream_accuracy(method: str) -> Arm:
    """A method's mean accuracy over the tasks at the end of the stream.

    Raises:
        ValueError: the streams have no such method.
    """

    def accuracies(study: Study) -> Values:
        rows = study.table("V2")
        found = {int(row["seed"]): float(row["acc"]) for row in rows if row["method"] == method}
        if rows and not found:
            there = ", ".join(dict.fromkeys(row["method"] for row in rows))
            raise ValueError(f"V2.csv has no rows of the method {method!r}; it has {there}.")
        return found

    return accuracies


def _of(sweep: Sweep | None, values: Callable[[Sweep], Values]) -> Values:
    return values(sweep) if sweep is not None else {}


def _windows(claim: str, name: str, metric: str, end: str, side: str) -> Claim:
    """An end of the spectrum against the middle, at the same rate."""
    words = {"greater": "above", "less": "below", "two-sided": "against"}[side]
    title = {PRINCIPAL: "principal", MINOR: "minor"}[end]
    arms = at_rate(name, end, metric), at_rate(name, MIDDLE, metric)
    return Claim(claim, f"{name}, 2e-3", f"{metric}: {title} {words} middle", side, (title, "middle"), *arms)


def _lora(claim: str, name: str, metric: str) -> Claim:
    """The middle window against plain LoRA, each at its best rate."""
    arms = tuned(name, MIDDLE, metric), tuned(name, LORA, metric)
    names = ("middle", "plain LoRA")
    return Claim(claim, f"{name}, best-tuned", f"{metric}: middle against plain LoRA", "two-sided", names, *arms)


def _lora_at_rate(claim: str, name: str) -> Claim:
    """The middle window against plain LoRA, at the same rate."""
    arms = at_rate(name, MIDDLE, "retained"), at_rate(name, LORA, "retained")
    statement = "retained: middle against plain LoRA"
    return Claim(claim, f"{name}, 2e-3", statement, "two-sided", ("middle", "plain LoRA"), *arms)


def _auto(claim: str, name: str) -> Claim:
    arms = at_rate(name, AUTO, "drift"), at_rate(name, MIDDLE, "drift")
    return Claim(claim, f"{name}, 2e-3", "drift: auto below middle", "less", ("auto", "middle"), *arms)


CLAIMS = (
    _windows("C1", "M1", "drift", PRINCIPAL, "greater"),
    _windows("C2", "M1", "retained", PRINCIPAL, "less"),
    _windows("C3", "M1", "drift", MINOR, "greater"),
    _windows("C4", "M1", "retained", MINOR, "less"),
    _lora("C5", "M1", "target"),
    _lora("C6", "M1", "retained"),
    _auto("C7", "M5"),
    Claim(
        *("C8", "M4 and M1, 2e-3", "retained: LoRA − middle smaller at 320 steps than at 80", "less"),
        *(("LoRA − middle at 320 steps", "at 80 steps"), lead_of_lora("M4"), lead_of_lora("M1")),
    ),
    _windows("C9", "V1", "retained", PRINCIPAL, "less"),
    _windows("C10", "V1", "retained", MINOR, "two-sided"),
    _lora("C11", "V1", "retained"),
    _auto("C12", "V1"),
    Claim(
        *("C13", "V2", "ACC: fresh middle windows above fresh principal windows", "greater"),
        *(("fresh middle", "fresh principal"), stream_accuracy(FRESH_MIDDLE), stream_accuracy(FRESH_PRINCIPAL)),
    ),
    Claim(
        *("C14", "V2", "ACC: fresh middle windows against plain LoRA, fresh for each task", "two-sided"),
        *(("fresh middle", "fresh plain LoRA"), stream_accuracy(FRESH_MIDDLE), stream_accuracy(FRESH_LORA)),
    ),
)


SUPPORTS = {"C6": _lora_at_rate("S6", "M1"), "C11": _lora_at_rate("S11", "V1")}
"""The additional condition of a claim at best-tuned rates (PROTOCOL.md, Changes); outside the corrected list."""


def confirm(study: Study) -> list[dict[str, Any]]:
    """A row of ``tests.csv`` for each of :data:`CLAIMS`.

    ``mean`` is that of ``first − second`` over the ``n`` seeds that succeeded in both arms, ``low`` and ``high`` its
    95 % interval (:func:`ipca.lab.statistics.mean_interval`), ``p`` that of the exact sign-flip test on the claim's
    side, ``adjusted`` after Holm's correction over the claims that were run. The verdict is

    - ``"not run"`` if an arm lacks one of the ten seeds, ``"all diverged"`` if no seed succeeded in both;
    - ``"holds"`` if a one-sided claim has ``adjusted`` ≤ 5 %, ``"the opposite holds"`` if the test of the other side
      has, with its p in this claim's place in the list; two-sided ``"above"`` or ``"below"``;
    - ``"not shown"`` otherwise.

    Raises:
        ValueError: the streams lack a method.
    """
    return [*_tested(study, CLAIMS), *(row for support in SUPPORTS.values() for row in _tested(study, (support,)))]


def _tested(study: Study, claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """A row for each of ``claims``, corrected over those that were run."""
    arms = {claim.name: _paired(claim.first(study), claim.second(study)) for claim in claims}
    p = {}
    for claim in claims:
        found = arms[claim.name]
        if found is not None and found[0]:
            p[claim.name] = paired_test(*found, alternative=claim.side).p
    return [_row(claim, arms[claim.name], p) for claim in claims]


def _row(claim: Claim, arms: tuple[Values, Values] | None, p: Mapping[str, float]) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(TEST_COLUMNS) | {"claim": claim.name, "where": claim.where}
    row |= {"statement": claim.statement, "side": claim.side, "first": claim.names[0], "second": claim.names[1]}
    if claim.name not in p:
        return row | {"verdict": "not run" if arms is None else "all diverged"}
    assert arms is not None
    found = paired_test(*arms, alternative=claim.side)
    effect = estimate(differences(*arms))
    assert effect is not None
    row |= {"n": found.n, "left_out": SEEDS - found.n, "mean": found.mean, "low": effect.low, "high": effect.high}
    row |= {"dz": found.dz}
    return row | {"p": found.p, "adjusted": _adjusted(p)[claim.name], "verdict": _verdict(claim, arms, p)}


def _paired(first: Values, second: Values) -> tuple[Values, Values] | None:
    """Both arms over the seeds that succeeded in both; None if one of the ten was not run."""
    seeds = range(SEEDS)
    if any(seed not in first or seed not in second for seed in seeds):
        return None
    both = [seed for seed in seeds if math.isfinite(first[seed] - second[seed])]
    return {seed: first[seed] for seed in both}, {seed: second[seed] for seed in both}


def _verdict(claim: Claim, arms: tuple[Values, Values], p: Mapping[str, float]) -> str:
    if _adjusted(p)[claim.name] <= LEVEL:
        mean = sum(differences(*arms))
        return "holds" if claim.side != "two-sided" else "above" if mean > 0 else "below"
    if claim.side == "two-sided":
        return "not shown"
    other = paired_test(*arms, alternative=_OTHER[claim.side]).p
    return "the opposite holds" if _adjusted({**p, claim.name: other})[claim.name] <= LEVEL else "not shown"


def _adjusted(p: Mapping[str, float]) -> dict[str, float]:
    return dict(zip(p, holm(list(p.values())), strict=True))
