"""Evaluation of the protocol's "What would refute": sentences derived from the tables by rules fixed beforehand.

The rules are those of PROTOCOL.md; for cases that they leave open, the sentence states the result and claims nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ipca.lab.sweep.report.words import listed
from studies.window_position.claims import FRESH_MIDDLE, SUPPORTS
from studies.window_position.rows import MIDDLE, MINOR, PRINCIPAL, RATE, Row, Study, Table, curve_of
from studies.window_position.words import claim_result, effect, estimate_cell, percent

NOT_RUN = "not run"
UNTESTED = (NOT_RUN, "all diverged")
"""Verdicts of claims that have no test."""


@dataclass(frozen=True)
class Tables:
    """The derived tables, indexed for the rules.

    Attributes:
        tests: ``{claim: row of tests.csv}``; empty before ``findings.py`` has run.
        summary: ``{(experiment, method, comparison, rate, metric): row of summary.csv}``, the rate as text.
        ranks: ``{(experiment, rate): row of ranks.csv}``.
        mechanism: the rows of mechanism.csv.
    """

    tests: Mapping[str, Row]
    summary: Mapping[tuple[str, str, str, str, str], Row]
    ranks: Mapping[tuple[str, str], Row]
    mechanism: Table

    def verdict(self, claim: str) -> str:
        return self.tests[claim]["verdict"] if claim in self.tests else NOT_RUN

    def untested(self, *claims: str) -> str:
        """The claims without a test, and why; empty if all have one."""
        found = [f"{claim} ({self.verdict(claim)})" for claim in claims if self.verdict(claim) in UNTESTED]
        return listed(found) if found else ""


def read_tables(study: Study) -> Tables:
    """The tables written by ``findings.py`` and ``mechanism.py``."""
    keys = ("experiment", "method", "comparison", "lr", "metric")
    return Tables(
        {row["claim"]: row for row in study.table("tests")},
        {tuple(row[key] for key in keys): row for row in study.table("summary")},  # type: ignore[misc]
        {(row["experiment"], row["lr"]): row for row in study.table("ranks")},
        study.table("mechanism"),
    )


def sentences(tables: Tables) -> list[str]:
    """A paragraph for each rule; if plain LoRA is better, that comes first."""
    rules: list[Callable[[Tables], str]] = [shape, better_than_lora, magnitude, mechanism, others]
    if where_lora_is_better(tables):
        rules = [better_than_lora, shape, magnitude, mechanism, others]
    return [rule(tables) for rule in rules]


def shape(tables: Tables) -> str:
    """The U: C1 to C4 of M1."""
    found = {claim: tables.verdict(claim) for claim in ("C1", "C2", "C3", "C4")}
    hold = [claim for claim, verdict in found.items() if verdict == "holds"]
    missing = tables.untested(*found)
    opposite = [claim for claim, verdict in found.items() if verdict == "the opposite holds"]
    if missing:
        said = f"not tested: {missing}."
    elif len(hold) == 4:
        said = "it stands on M: C1 to C4 hold, both ends of the spectrum drift further and retain less than the middle."
    elif hold == ["C1", "C2"]:
        said = "a left arm only: the principal end forgets (C1 and C2 hold), nothing is shown against the minor end."
    elif not hold:
        said = "none of C1 to C4 holds"
        said += "." if opposite else "; by the rule fixed beforehand the position of the window does not matter here."
    else:
        fail = [claim for claim in found if claim not in hold]
        said = f"it does not stand: {listed(hold)} hold{'s' * (len(hold) == 1)}, {listed(fail)} not shown."
    if opposite and not missing:
        said += f" For {listed(opposite)} the opposite was found."
    return f"**The U.** {said[0].upper()}{said[1:]}"


def where_lora_is_better(tables: Tables) -> list[str]:
    """The experiments in which C5, or C6 or C11 with its support, all of middle − LoRA, favors LoRA."""
    on_m = "below" in (tables.verdict("C5"), supported(tables, "C6"))
    return ["M1"] * on_m + ["V1"] * (supported(tables, "C11") == "below")


def supported(tables: Tables, claim: str) -> str:
    """The verdict of a claim at best-tuned rates; ``"unsupported"`` if the same rate does not agree."""
    verdict = tables.verdict(claim)
    agrees = verdict not in ("above", "below") or tables.verdict(SUPPORTS[claim].name) == verdict
    return verdict if agrees else "unsupported"


def better_than_lora(tables: Tables) -> str:
    """C6 (M) and C11 (V) on ``retained``, C5 on ``target``."""
    missing = tables.untested("C5", "C6", "C11")
    parts = [_retention(tables, claim, where) for claim, where in (("C6", "M1"), ("C11", "V1"))]
    if tables.verdict("C5") == "below":
        parts.insert(0, f"on M1 the target of plain LoRA is higher ({claim_result(tables.tests['C5'])})")
    text = "; ".join(parts) + "."
    better = where_lora_is_better(tables)
    headline = f"Plain LoRA is better on {listed(better)}:" if better else "Better than LoRA?"
    note = f" Not tested: {missing}." if missing else ""
    return f"**{headline}** {text[0].upper()}{text[1:]}{note}"


def _retention(tables: Tables, claim: str, where: str) -> str:
    verdict = supported(tables, claim)
    if verdict in UNTESTED:
        return f"on {where} nothing was tested"
    test = claim_result(tables.tests[claim])
    if verdict == "unsupported":
        return f"on {where} what is retained differs at best rates ({test}) but not alike at the same rate: no claim"
    if verdict == "below":
        return f"on {where} plain LoRA retains more, each at its best rate ({test})"
    if verdict == "above" and tables.verdict("C5") in ("above", "not shown"):
        return f"on {where} the middle window retains more, each at its best rate ({test}), and C5 does not favor LoRA"
    if verdict == "above":
        return f"on {where} the middle window retains more ({test}), which without C5 in its favor is no claim"
    return f"on {where} neither is shown to retain more, each at its best rate ({test})"


def magnitude(tables: Tables) -> str:
    """M3: the remainder of principal − middle at matched updates, at the rate of the confirmatory tests."""
    parts = [_remainder(tables, metric) for metric in ("drift", "retained")]
    kinds = {kind for kind, _ in parts}
    if kinds == {NOT_RUN}:
        return "**Magnitude, not direction.** Not run, or all diverged (M3)."
    said = _MAGNITUDE[kinds.pop()] if len(kinds) == 1 else "Undecided, drift and retained do not say the same"
    return f"**Magnitude, not direction.** {said}. {' '.join(text for _, text in parts)}"


_MAGNITUDE = {
    "vanishes": "Yes: the place of the window acts through the size of the steps, and a lower rate would do the same",
    "stays": "No, not only magnitude: at equal early updates a difference remains",
    "open": "Undecided, the intervals are too wide",
    "nothing": "Nothing to explain, no difference is seen at the same rate",
}


def _remainder(tables: Tables, metric: str) -> tuple[str, str]:
    """The outcome for one metric's difference, and the sentence."""
    same, matched = (
        tables.summary.get(("M3", PRINCIPAL, comparison, f"{RATE:g}", metric)) for comparison in ("same", "update")
    )
    if same is None or matched is None or not (same["difference_low"] and matched["difference_low"]):
        return NOT_RUN, f"{metric[0].upper()}{metric[1:]}: not run, or all diverged."
    whole, low, high = (float(same[f"difference{end}"]) for end in ("", "_low", "_high"))
    left, right = (float(matched[f"difference_{end}"]) for end in ("low", "high"))
    share = float(matched["difference"]) / whole if whole else 0.0
    says = f"{metric[0].upper()}{metric[1:]} on M3, principal − middle, n = {same['pairs']}: "
    says += f"{effect(same)} at the same rate, {effect(matched)}"
    says += f" at matched updates, {percent(share)} of it"
    if low <= 0 <= high:
        return "nothing", f"{says}; at the same rate the interval holds 0, so there is nothing to explain."
    if max(abs(left), abs(right)) <= abs(whole) / 4:
        return "vanishes", f"{says}; the interval lies within a quarter of the first difference: it vanishes."
    if left <= 0 <= right:
        return "open", f"{says}; the interval holds 0 and reaches beyond a quarter: not decided."
    return "stays", f"{says}; the interval excludes 0 and reaches beyond a quarter: it does not vanish."


def mechanism(tables: Tables) -> str:
    """The arms of Σ S_i · energy_i, and whether it ranks windows as drift does."""
    if not tables.mechanism:
        return "**The mechanism.** Not run."
    text, holds = [], []
    for name, title, predicted in (
        ("M1", "feed-forward input layers", ("principal", "minor")),
        ("M2-query-value", "query and value layers", ("principal",)),
    ):
        arms = arms_of(curve_of(tables.mechanism, name))
        holds.append(set(predicted) <= set(arms))
        found = "there is no arm"
        if arms:
            found = f"Σ S_i · energy_i is larger at the {listed(arms)} end{'s' * (len(arms) > 1)} than in the middle"
        wanted = f"predicted: {listed(list(predicted))}{'' if len(predicted) > 1 else ' only'}"
        surplus = set(arms) - set(predicted)
        match = "a predicted arm is missing" if not holds[-1] else "one arm too many" if surplus else "as predicted"
        text.append(f"In {title} {found} ({wanted}; {match}).")
    rank = tables.ranks.get(("M1", f"{RATE:g}"))
    if rank is None or not rank["mean"]:
        said = "not decided, as M1 was not run"
    else:
        holds.append(float(rank["mean"]) > 0)
        text.append(f"Over the windows of M1 Spearman's ρ with drift is {estimate_cell(rank)}, n = {rank['n']}.")
        said = "it does not fail" if all(holds) else "it fails"
        if all(holds) and rank["low"] and float(rank["low"]) <= 0:
            said = "not shown, as the interval of ρ holds 0"
    return f"**The mechanism.** {said[0].upper()}{said[1:]}. {' '.join(text)}"


def others(tables: Tables) -> str:
    """The tests that no rule above uses, and the best stream."""
    lines = []
    for claim in ("C7", "C8", "C9", "C10", "C12", "C13", "C14"):
        if tables.verdict(claim) not in UNTESTED:
            test = tables.tests[claim]
            lines.append(f"- {claim}, {test['where']}, {test['statement']}: {verdict_of(test)} ({claim_result(test)}).")
    accuracies = {key[1]: row for key, row in tables.summary.items() if (key[0], key[4]) == ("V2", "acc")}
    if accuracies:
        best = max(accuracies, key=lambda method: float(accuracies[method]["mean"]))
        first, ours = (estimate_cell(accuracies[method]) for method in (best, FRESH_MIDDLE))
        lines.append(f"- Of all streams {best} has the highest ACC, {first}; fresh middle windows have {ours}.")
    return "\n".join(["**The other tests.**\n", *(lines or ["- Not run."])])


def verdict_of(test: Row) -> str:
    """``holds``, ``not shown``, …; for a two-sided test which arm is above."""
    if test["verdict"] in ("above", "below"):
        return f"{test['first']} {test['verdict']} {test['second']}"
    return test["verdict"]


def arms_of(curve: Mapping[str, float]) -> list[str]:
    """The ends of a curve over windows that are above its middle."""
    ends = {"principal": PRINCIPAL, "minor": MINOR}
    return [name for name, window in ends.items() if curve[window] > curve[MIDDLE]]
