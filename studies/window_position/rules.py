"""Sentences derived from the tables by the rules of PROTOCOL.md: those fixed beforehand, and those of its Changes.

For cases that the rules leave open, the sentence states the result and claims nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ipca.lab.sweep.report.words import listed
from studies.window_position.claims import SUPPORTS
from studies.window_position.reanalysis import EDGE, HOLDS, NOT_SHOWN, REVERSED
from studies.window_position.rows import (
    BASE,
    BY_SOURCE,
    FROZEN,
    KNOWN_INPUTS,
    LORA,
    MIDDLE,
    MINOR,
    NEW_INPUTS,
    PRINCIPAL,
    RATE,
    Row,
    Study,
    Table,
    curve_of,
)
from studies.window_position.words import effect, estimate_cell, p_cell, percent, short_name

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
        base: ``{(experiment, metric): mean of the untrained model}``, which is not in ``summary``.
        claims: ``{(claim, method against, place): row of claims.csv}``.
        equal: ``{(experiment, first, second, level): row of equal-target.csv}``.
        rates: ``{(experiment, method): row of rates.csv}``.
    """

    tests: Mapping[str, Row]
    summary: Mapping[tuple[str, str, str, str, str], Row]
    ranks: Mapping[tuple[str, str], Row]
    mechanism: Table
    base: Mapping[tuple[str, str], float] = field(default_factory=dict)
    claims: Mapping[tuple[str, str, str], Row] = field(default_factory=dict)
    equal: Mapping[tuple[str, str, str, str], Row] = field(default_factory=dict)
    rates: Mapping[tuple[str, str], Row] = field(default_factory=dict)

    def verdict(self, claim: str) -> str:
        return self.tests[claim]["verdict"] if claim in self.tests else NOT_RUN

    def untested(self, *claims: str) -> str:
        """The claims without a test, and why; empty if all have one."""
        found = [f"{claim} ({self.verdict(claim)})" for claim in claims if self.verdict(claim) in UNTESTED]
        return listed(found) if found else ""


def read_tables(study: Study) -> Tables:
    """The tables written by ``findings.py`` and ``mechanism.py``."""
    keys, summary = ("experiment", "method", "comparison", "lr", "metric"), study.table("summary")
    return Tables(
        {row["claim"]: row for row in study.table("tests")},
        {tuple(row[key] for key in keys): row for row in summary if row["method"] != BASE},  # type: ignore[misc]
        {(row["experiment"], row["lr"]): row for row in study.table("ranks")},
        study.table("mechanism"),
        {
            (row["experiment"], row["metric"]): float(row["mean"])
            for row in summary
            if row["method"] == BASE and row["mean"]
        },
        {(row["claim"], row["against"], row["place"]): row for row in study.table("claims")},
        {(row["experiment"], row["first"], row["second"], row["level"]): row for row in study.table("equal-target")},
        {(row["experiment"], row["method"]): row for row in study.table("rates")},
    )


def sentences(tables: Tables) -> list[str]:
    """A paragraph for each question."""
    rules: list[Callable[[Tables], str]] = [against_lora, left_arm, right_arm, high_rates, accuracy]
    rules += [sources, magnitude, directions, frozen_factors, input_directions, mechanism, continual, as_fixed]
    return [rule(tables) for rule in rules]


def by_place(tables: Tables, claim: str, against: str, *, numbers: bool = False) -> str:
    """``holds on M1; not shown on M5``, with ``numbers`` the differences; empty if it was not run anywhere."""
    parts = []
    for said in (HOLDS, REVERSED, EDGE, NOT_SHOWN):
        rows = [row for key, row in tables.claims.items() if key[:2] == (claim, against) and row["verdict"] == said]
        places = [f"{row['place']}{_effect(row) * numbers}" for row in rows]
        if places:
            parts.append(f"{_SAID[said]} on {listed(places)}")
    return "; ".join(parts)


_SAID = {HOLDS: "holds", REVERSED: "the opposite", EDGE: "an edge, no verdict,", NOT_SHOWN: "not shown"}


def _effect(row: Row) -> str:
    if not row["mean"]:
        return ""
    floor = ", p at its floor" if row["verdict"] == NOT_SHOWN and row["p"] == row["smallest"] else ""
    return f" ({estimate_cell(row, sign=True)}{floor})"


def _by_comparison(tables: Tables, against: str, claims: Mapping[str, str]) -> str:
    """A sentence for each of ``{claim: how it is introduced}`` that was run."""
    found = {words: by_place(tables, claim, against, numbers=against == LORA) for claim, words in claims.items()}
    text = " ".join(f"{words} {_upper(text)}." for words, text in found.items() if text) or "Not run."
    return f"{text}{_both_targets(tables, against)}"


def _both_targets(tables: Tables, against: str) -> str:
    """Of each verdict at equal target its two comparisons, of which the first one decides."""
    shown = [
        (place, [tables.equal[place, MIDDLE, against, level] for level in ("each seed", "all seeds")])
        for (claim, other, place), row in tables.claims.items()
        if (claim, other) == ("equal target", against) and row["verdict"] in (HOLDS, REVERSED)
        if (place, MIDDLE, against, "all seeds") in tables.equal
    ]
    return "".join(
        f" On {place}, with {own['rates_first']} rates of the middle and {own['rates_second']} of the other, that is "
        f"{_at_equal_target(own)} at each seed's target; at that of all seeds {_at_equal_target(common)}."
        for place, (own, common) in shown
    )


def against_lora(tables: Tables) -> str:
    """Retention of the middle window and plain LoRA; at equal target it decides."""
    verdicts = [row["verdict"] for key, row in tables.claims.items() if key[:2] == ("equal target", LORA)]
    better, worse = HOLDS in verdicts, REVERSED in verdicts
    head = "The middle window and plain LoRA each retain more somewhere, at equal target."
    if not (better and worse):
        head = f"{'The middle window' if better else 'Plain LoRA'} retains more at equal target, in places."
    if not (better or worse):
        head = "No difference to plain LoRA is shown at equal target." if verdicts else "Better than LoRA?"
    if lost := [claim for claim in SUPPORTS if supported(tables, claim) == "below"]:
        places = listed([f"{tables.tests[claim]['where'].partition(',')[0]} ({claim})" for claim in lost])
        head = f"Plain LoRA retained more on {places} by the test fixed beforehand, at best-tuned rates. {head}"
    words = {
        "equal target": "Does the middle retain more at equal target?",
        "same rate": "At the same rate, which asks another question?",
        "equal early updates": "At equal early updates (in the row of M1 those of M3)?",
    }
    return f"**{head}** {_fixed_beforehand(tables)}{_by_comparison(tables, LORA, words)}"


def _fixed_beforehand(tables: Tables) -> str:
    """C6 and C11, the protocol's own tests against plain LoRA."""
    claims = [claim for claim in SUPPORTS if tables.verdict(claim) not in UNTESTED]
    if not claims:
        return ""
    found = listed([f"{claim} {verdict_of(tables.tests[claim])}" for claim in claims])
    return f"The tests fixed beforehand, at best-tuned rates, say: {found} (see the end of this section). "


def left_arm(tables: Tables) -> str:
    """Principal against the middle."""
    wider = {key: row for key, row in tables.equal.items() if key[0].endswith("wider") and key[2] == PRINCIPAL}
    more = [
        f" With {row['rates_second']} rates of the principal window, {name.split(',')[0]}, n = {row['n']}: "
        f"{_at_equal_target(wider[name, MIDDLE, PRINCIPAL, 'each seed'])} at each seed's target, "
        f"{_at_equal_target(row)} at that of all."
        for (name, _, _, level), row in wider.items()
        if level == "all seeds"
    ]
    return f"**The left arm of the U.** {_by_comparison(tables, PRINCIPAL, _end_words('principal'))}{''.join(more)}"


def right_arm(tables: Tables) -> str:
    """Minor against the middle."""
    return f"**The right arm.** {_by_comparison(tables, MINOR, _end_words('minor'))}"


def _end_words(end: str) -> dict[str, str]:
    """What each comparison asks of a window at an end."""
    return {
        "same rate": f"Does the {end} window retain less than the middle one at one rate?",
        "equal early updates": "At equal early updates (M1: M3)?",
        "equal target": "At equal target?",
    }


def high_rates(tables: Tables) -> str:
    """Whether the middle loses less from the lowest to the highest rate."""
    parts = [f"against {name}, {by_place(tables, 'high rates', method)}" for method, name in _AGAINST.items()]
    run = any(key[0] == "high rates" for key in tables.claims)
    return f"**Do high rates cost the middle less?** {_upper('; '.join(parts)) + '.' if run else 'Not run.'}"


def accuracy(tables: Tables) -> str:
    """Targets at best rates."""
    parts = [f"against {name}, {by_place(tables, 'accuracy', method)}" for method, name in _AGAINST.items()]
    run = any(key[0] == "accuracy" for key in tables.claims)
    text = f"{_upper('; '.join(parts))}." if run else "Not run."
    return f"**Does the middle learn more,** each at its best rate? {text}"


_AGAINST = {PRINCIPAL: "principal", MINOR: "minor", LORA: "plain LoRA"}


def sources(tables: Tables) -> str:
    """What the frozen probe on M retains of the learned domain and of the others."""
    head, found = "**What `retained` measures on M.**", by_source(tables)
    if not found:
        return f"{head} Not run."
    parts = []
    for method, lr, row, base in found:
        rates = tables.rates.get(("M1", method))
        if rates and lr == rates["one_se"]:
            changes = (row[each] - base[each] for each in ("movie", "others", "refit"))
            numbers = ", ".join(f"{change:+.3f}" for change in changes).replace("-", "−")
            parts.append(f"{short_name(method)} ({float(lr):g}) {numbers}")
    return (
        f"{head} The frozen probe counts sentences of the learned domain, movies. Change of its accuracy on movies, on "
        "the other sources, and of the accuracy of a probe fitted anew, at the lowest rate within one standard error "
        f"of the best: {'; '.join(parts) or 'not run'}. The other rates are in the [table](#what-the-probe-measures)."
    )


Means = dict[str, float]


def by_source(tables: Tables) -> list[tuple[str, str, Means, Means]]:
    """Method, rate, means, and those of the untrained model; ``"others"`` is the mean of all sources but movies.

    What several experiments have is taken from the one with the most seeds.
    """
    found: dict[tuple[str, str], tuple[Means, Means]] = {}
    for name in BY_SOURCE:
        means: dict[tuple[str, str], Means] = {}
        for (experiment, method, _, lr, metric), row in tables.summary.items():
            if experiment == name and lr != "best":
                means.setdefault((method, lr), {"n": float(row["n"])})[metric] = float(row["mean"])
        base = _with_sources({metric: value for (each, metric), value in tables.base.items() if each == name})
        for key, each in means.items():
            if key not in found or each["n"] > found[key][0]["n"]:
                found[key] = _with_sources(each), base
    methods = list(dict.fromkeys(method for method, _ in found))
    keys = sorted(found, key=lambda key: (methods.index(key[0]), float(key[1])))
    return [(*key, *found[key]) for key in keys]


def _with_sources(means: Means) -> Means:
    others = [v for name, v in means.items() if name.startswith("retained_") and name != "retained_movie"]
    if not others:
        return {}
    return {**means, "movie": means["retained_movie"], "others": sum(others) / len(others)}


def directions(tables: Tables) -> str:
    """The controls: directions of the ends, random windows and random directions, all at the middle's magnitudes."""
    names = {"matched-principal": "the principal window's directions", "matched-minor": "the minor window's"}
    names |= {"random-window": "a random window", "haar": "random directions"}
    parts = []
    for place in ("M3", "V1"):
        rows = {name: tables.summary.get((place, m, "same", f"{RATE:g}", "retained")) for m, name in names.items()}
        said = [f"{name} {effect(row)}" for name, row in rows.items() if row and row["difference"]]
        parts += [f"{listed(said)} on {place}"] if said else []
    return (
        f"**Directions at the middle's magnitudes.** Retained at {RATE:g}, minus the middle: {'; '.join(parts)}."
        if parts
        else "**Directions at the middle's magnitudes.** Not run."
    )


def frozen_factors(tables: Tables) -> str:
    """Windows with a frozen factor, at equal target of each seed."""
    return f"**One factor frozen,** retained at equal target: {_each_pair(tables, FROZEN)}."


def input_directions(tables: Tables) -> str:
    """Windows of directions of the layers' inputs, at equal target of each seed."""
    found = _each_pair(tables, (NEW_INPUTS, KNOWN_INPUTS))
    return f"**Directions of the layers' inputs,** retained at equal target: {found}."


def _each_pair(tables: Tables, arms: Sequence[str]) -> str:
    """The differences of ``arms`` to plain LoRA and to the middle window, at each seed's target."""
    parts = []
    for (place, first, second, level), row in tables.equal.items():
        if first in arms and level == "each seed":
            pair = " − ".join(short_name(method) for method in (first, second))
            parts.append(f"{pair} on {place} {_at_equal_target(row)}, n = {row['n']}")
    return "; ".join(parts) or "not run"


def _at_equal_target(row: Row) -> str:
    edge = [short_name(method) for method in row["edge"].split()]
    note = f", {listed(edge)} at an edge" if edge else ""
    return f"{estimate_cell(row, sign=True)}, p {p_cell(row['p'])}{note}"


def continual(tables: Tables) -> str:
    """The streams: fresh middle windows against other methods."""
    names = {"pissa": "fresh principal", "milora": "fresh minor", "lora-fresh": "fresh plain LoRA"}
    rows = {names.get(key[1], key[1]): row for key, row in tables.claims.items() if key[0] == "continual"}
    if not rows:
        return "**Five tasks in a row.** Not run."
    parts = []
    for said in (HOLDS, NOT_SHOWN, REVERSED):
        found = [f"{name} {estimate_cell(row, sign=True)}" for name, row in rows.items() if row["verdict"] == said]
        if found:
            parts.append(f"{_STREAM[said]} {listed(found)}")
    return f"**Five tasks in a row,** one rate, tuned for none: fresh middle windows end {'; '.join(parts)}."


_STREAM = {HOLDS: "above", NOT_SHOWN: "not clearly apart from", REVERSED: "below"}


def as_fixed(tables: Tables) -> str:
    """What the rules fixed beforehand say, where this page no longer rests on them."""
    return f"**By the rules fixed beforehand,** of the tests below: {_shape(tables)} {_best_tuned(tables)}"


def _shape(tables: Tables) -> str:
    found = {claim: tables.verdict(claim) for claim in ("C1", "C2", "C3", "C4")}
    hold = [claim for claim, verdict in found.items() if verdict == "holds"]
    missing = tables.untested(*found)
    opposite = [claim for claim, verdict in found.items() if verdict == "the opposite holds"]
    if missing:
        said = f"the U was not tested: {missing}."
    elif len(hold) == 4:
        said = "the U stands on M (C1 to C4 hold), at one rate, with the layers and the task of the pilot."
    elif hold == ["C1", "C2"]:
        said = "a left arm only: the principal end forgets (C1 and C2 hold), nothing is shown against the minor end."
    elif not hold:
        said = "none of C1 to C4 holds"
        said += "." if opposite else "; the position of the window does not matter on M."
    else:
        fail = [claim for claim in found if claim not in hold]
        said = f"the U does not stand: {listed(hold)} hold{'s' * (len(hold) == 1)}, {listed(fail)} not shown."
    return f"{said} For {listed(opposite)} the opposite was found." if opposite and not missing else said


def _best_tuned(tables: Tables) -> str:
    """C6 and C11, which compare at rates chosen by target."""
    parts = []
    for claim in ("C6", "C11"):
        support, verdict = SUPPORTS[claim].name, tables.verdict(claim)
        if verdict in UNTESTED:
            continue
        words = verdict_of(tables.tests[claim])
        if verdict in ("above", "below") and supported(tables, claim) == "unsupported":
            words += f", which {support} does not support"
        elif verdict in ("above", "below") and _same_test(tables, claim):
            words += f"; {support} is the same comparison, as every seed picks {RATE:g}: at that rate it holds"
        parts.append(f"{claim}: {words}")
    return f"At best-tuned rates {'; '.join(parts)}." if parts else ""


def _same_test(tables: Tables, claim: str) -> bool:
    return all(tables.tests[claim][cell] == tables.tests[SUPPORTS[claim].name][cell] for cell in ("mean", "dz", "p"))


def supported(tables: Tables, claim: str) -> str:
    """The verdict of a claim at best-tuned rates; ``"unsupported"`` if the same rate does not agree."""
    verdict = tables.verdict(claim)
    agrees = verdict not in ("above", "below") or tables.verdict(SUPPORTS[claim].name) == verdict
    return verdict if agrees else "unsupported"


def _upper(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"


def magnitude(tables: Tables) -> str:
    """M3: the remainder of principal − middle at matched updates, at the rate of the confirmatory tests."""
    parts = [_remainder(tables, metric) for metric in ("drift", "retained")]
    kinds = {kind for kind, _ in parts}
    if kinds == {NOT_RUN}:
        return "**Is it only the size of the steps?** Not run, or all diverged (M3)."
    said = _MAGNITUDE[kinds.pop()] if len(kinds) == 1 else "Undecided, drift and retained do not say the same"
    text = " ".join(text for _, text in parts)
    if row := tables.claims.get(("equal early updates", PRINCIPAL, "V1")):
        text += f" On V1, n = {row['n']}, middle − principal in retained at equal early updates: "
        text += f"{_SAID[row['verdict']]}{_effect(row)}."
    return f"**Is it only the size of the steps?** {said} (the rule fixed beforehand, with t intervals). {text}"


_MAGNITUDE = {
    "vanishes": "Yes: the place of the window acts through the size of the steps, and a lower rate would do the same",
    "stays": "No: at equal early updates a difference remains",
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
        return "**Does the predicted mechanism hold?** Not run."
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
        windows = len(curve_of(tables.mechanism, "M1"))
        over = f"Over {windows} windows of M1 Spearman's ρ with drift is {estimate_cell(rank)}, n = {rank['n']}"
        text.append(f"{over}; the interval is over seeds, not over windows.")
        said = "it is not refuted" if all(holds) else "it is refuted"
        if all(holds) and rank["low"] and float(rank["low"]) <= 0:
            said = "not shown, as the interval of ρ holds 0"
    return f"**Does the predicted mechanism hold?** {said[0].upper()}{said[1:]}. {' '.join(text)}"


def verdict_of(test: Row) -> str:
    """``holds``, ``not shown``, …; for a two-sided test which arm is above."""
    if test["verdict"] in ("above", "below"):
        return f"{test['first']} {test['verdict']} {test['second']}"
    return test["verdict"]


def arms_of(curve: Mapping[str, float]) -> list[str]:
    """The ends of a curve over windows that are above its middle."""
    ends = {"principal": PRINCIPAL, "minor": MINOR}
    return [name for name, window in ends.items() if curve[window] > curve[MIDDLE]]
