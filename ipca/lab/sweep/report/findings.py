"""Further findings of the report: the reference window against plain LoRA and its controls, and a suggestion.

*Plain LoRA*, at each method's best rates (at the same rate if there are none): reference − LoRA in ``target`` and in
``retained``, two-sided, Holm over the two. The window is called better only if ``retained`` favors it and ``target``
does not favor LoRA, and vice versa. A claim on ``retained`` must also hold at the same rate, with p ≤ 5 %: all seeds
share the chosen rates, so if the target hardly depends on the rate, two equal methods get different rates by chance,
and their retention then differs because of the rates.

*Controls*, at the same rate: reference − control in ``retained``, two-sided, Holm over the controls.

*Direction or magnitude*, for each end: if Δ = reference − end in ``retained`` at the same rate has a one-sided p ≤ 5 %,

- ``matched-…`` has the end's directions and the reference's singular values. *Magnitude* if reference − matched has a
  95 % interval within ± Δ / 4: the singular values by themselves undo the loss. *Direction* if matched − end has.
- *Step size* if Δ at equal early updates has a 95 % interval within ± a quarter of Δ at the same rate: a lower rate
  would have the same effect.

An interval counts if it is over at least five seeds, without which no test could reach 5 % either.

*Suggestion*: a *setting* is a method at a comparison and rate; windows, auto windows and plain LoRA are eligible, and
only if no seed failed. Among the settings whose mean ``target`` is within one standard error of the best (Breiman et
al., 1984, section 3.4.3), the one with the largest mean ``retained`` is suggested. It is chosen and evaluated on the
same seeds, so its numbers are biased upward. With fewer than three seeds there is no suggestion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from ipca.lab.baselines import CONTROLS
from ipca.lab.statistics import LEVEL, Difference, corrected, difference
from ipca.lab.sweep.report.comparisons import View, edge_of, middle_rate, why_this_rate
from ipca.lab.sweep.report.data import Sweep
from ipca.lab.sweep.report.words import CONTROLS as MEANING
from ipca.lab.sweep.report.words import Finding, estimated, listed, name, number, result, seeds, too_few

_QUARTER = 0.25
_CAUSES = {
    "magnitude": "Its singular values account for it, not their directions.",
    "direction": "Its directions account for it, not their singular values.",
    "step size": "The size of its steps accounts for it: at equal early updates the difference is gone.",
}
_ELIGIBLE_KINDS = ("window", "auto", "lora")
_SEEDS_FOR_SUGGESTION = 3


def against_lora(sweep: Sweep, views: Sequence[View]) -> Finding | None:
    """The reference window compared to plain LoRA; None if one of the two is missing."""
    reference = sweep.reference
    if reference is None or not {reference, "lora"} <= set(sweep.methods) or not views:
        return None
    same = next((v for v in views if v.key == "same"), None)
    view = next((v for v in views if v.key in ("tuned", "best")), same or views[0])
    tests = corrected(
        {
            metric: difference(view.values(reference, metric), view.values("lora", metric))
            for metric in ("target", "retained")
        }
    )
    if not tests:
        return None
    at_one_rate = None
    if same is not None:
        at_one_rate = difference(same.values(reference, "retained"), same.values("lora", "retained"))
    lines = [f"{metric.capitalize()}, window {reference} minus plain LoRA: {result(f)}" for metric, f in tests.items()]
    lines.append(f"At {view.title}: {view.note}. Two-sided p, Holm-adjusted over {len(tests)}.")
    if same is None:
        lines.append(f"At one rate: no run has a result at {middle_rate(sweep):g}, {why_this_rate(sweep)}.")
    elif view is not same and at_one_rate is not None:
        lines.append(f"Retained at {same.title}, {same.note}: {result(at_one_rate)}")
    return Finding(f"Is window {reference} better than plain LoRA?", _lora_answer(tests, at_one_rate), tuple(lines))


def _lora_answer(tests: dict[str, Difference], at_one_rate: Difference | None) -> str:
    few = too_few(tests.values(), len(tests))
    if few:
        return f"Too few seeds to decide ({few})."
    favors = {m: (1 if found.mean > 0 else -1) if found.shown else 0 for m, found in tests.items()}
    target, retained = favors.get("target", 0), favors.get("retained", 0)
    holds = at_one_rate is not None and at_one_rate.p <= LEVEL and at_one_rate.mean * retained > 0
    if retained and not holds:
        who = "It" if retained > 0 else "Plain LoRA"
        return f"{who} keeps more, but this is not shown at the same rate: the rates may be the cause."
    if retained > 0:
        return "It keeps more, but learns less: a trade-off." if target < 0 else "Yes: it keeps more" + _also(target)
    if retained < 0:
        return (
            "It learns more, but keeps less: a trade-off."
            if target > 0
            else "No: plain LoRA keeps more" + _also(target)
        )
    if target:
        return f"Not shown to keep more or less; {'it' if target > 0 else 'plain LoRA'} learns the target better."
    return "No difference to plain LoRA is shown."


def _also(target: int) -> str:
    return " and learns better." if target else ", and no difference in the target is shown."


def controls(sweep: Sweep, views: Sequence[View]) -> list[Finding]:
    """The findings from controls and matched updates."""
    same = next((view for view in views if view.key == "same"), None)
    reference = sweep.reference
    if same is None or reference is None or "retained" not in sweep.metrics:
        return []
    update = next((view for view in views if view.key == "update"), None)
    found = [_against_controls(same, reference)]
    ends = list(sweep.positions)
    for control, end in (("matched-principal", ends[:1]), ("matched-minor", ends[-1:])):
        if end and end[0] != reference and sweep.positions[end[0]] in (0.0, 1.0):
            found.append(_cause(same, update, reference, end[0], control))
    return [finding for finding in found if finding is not None]


def _against_controls(view: View, reference: str) -> Finding | None:
    """Reference − control for each control that was run, Holm-corrected over them."""
    kept = view.values(reference, "retained")
    tests = corrected({c: difference(kept, view.values(c, "retained")) for c in CONTROLS if c in view.sweep.methods})
    if not tests:
        return None
    question = f"Does window {reference} keep more than its controls?"
    lines = [f"Minus {control}, {MEANING[control]}: {result(found)}" for control, found in tests.items()]
    lines.append(f"Retained at {view.title}: {view.note}. Two-sided p, Holm-adjusted over {len(tests)}.")
    details = tuple(lines)
    few = too_few(tests.values(), len(tests))
    if few:
        return Finding(question, f"Too few seeds to decide ({few}).", details)
    groups = {
        "more than": [c for c, found in tests.items() if found.shown and found.mean > 0],
        "less than": [c for c, found in tests.items() if found.shown and found.mean < 0],
        "no difference is shown to": [c for c, found in tests.items() if not found.shown],
    }
    text = "; ".join(f"{what} {listed(names)}" for what, names in groups.items() if names)
    return Finding(question, text[0].upper() + text[1:] + ".", details)


def _cause(same: View, update: View | None, reference: str, end: str, control: str) -> Finding | None:
    """Whether the end's loss is due to its directions, its singular values or its step size."""
    kept = same.values(reference, "retained")
    lost = same.values(end, "retained")
    matched = same.values(control, "retained")
    total = difference(kept, lost, "greater")
    if total is None or total.p > LEVEL or not (matched or update is not None):
        return None
    side = "principal" if control == "matched-principal" else "minor"
    question = f"Why does the {side} end forget more than window {reference}?"
    parts = {
        "magnitude": difference(kept, matched),
        "direction": difference(matched, lost),
        "step size": None
        if update is None
        else difference(update.values(reference, "retained"), update.values(end, "retained")),
    }
    causes = [_CAUSES[cause] for cause, found in parts.items() if found is not None and _small(found, total.mean)]
    says = {
        "magnitude": f"window {reference} minus {control}",
        "direction": f"{control} minus window {end}",
        "step size": f"window {reference} minus window {end} at equal early updates",
    }
    lines = [f"Retained at the same rate, window {reference} minus window {end}: {result(total)}"]
    lines += [f"{says[c].capitalize()}: {estimated(found)}" for c, found in parts.items() if found is not None]
    return Finding(question, " ".join(causes) or "Undecided: no single cause accounts for it.", tuple(lines))


def _small(found: Difference, total: float) -> bool:
    """Whether the interval lies within a quarter of ``total`` around 0, and is over enough seeds."""
    if found.low is None or found.high is None or 2.0**-found.n > LEVEL:
        return False
    bound = _QUARTER * abs(total)
    return -bound <= found.low and found.high <= bound


@dataclass(frozen=True)
class Setting:
    """A method at one rate, with its metrics by seed, in the same order."""

    method: str
    comparison: str
    lr: float
    lr_used: float
    target: list[float]
    retained: list[float]

    def __str__(self) -> str:
        how = {
            "sqrt-sigma": ', divided by √σ in each layer (ipca.param_groups with match="sqrt-sigma")',
            "update": f", fully trained modules at {self.lr:g}",
        }
        return f"{name(self.method)}, learning rate {self.lr_used:g}{how.get(self.comparison, '')}"

    @property
    def means(self) -> str:
        """``target …, retained …``."""
        return f"target {number(mean(self.target))}, retained {number(mean(self.retained))}"


def suggestion(sweep: Sweep) -> Finding | None:
    """The suggested setting; None if a metric is missing."""
    question = "Which window and rate to use?"
    if not {"target", "retained"} <= set(sweep.metrics):
        return None
    if len(sweep.seeds) < _SEEDS_FOR_SUGGESTION:
        return Finding(question, f"No suggestion from {seeds(len(sweep.seeds))}; {_SEEDS_FOR_SUGGESTION} are needed.")
    found = eligible_settings(sweep)
    if not found:
        return Finding(question, "None: no setting succeeded with every seed.")
    chosen = choose(found)
    n = seeds(len(chosen.target))
    lines = [f"Of the settings that learn as well as the best, it keeps most: {chosen.means}, {n}."]
    rivals = [setting for setting in found if setting.method == "lora"]
    shown = [chosen]
    if chosen.method != "lora" and rivals:
        shown.append(choose(rivals))
        lines.append(f"By the same rule {shown[1]}: {shown[1].means}.")
    lines += dict.fromkeys(text for setting in shown if (text := _edge(sweep, setting)))
    lines.append("Chosen and evaluated on the same seeds: confirm it on others.")
    return Finding(question, f"{str(chosen)[0].upper()}{str(chosen)[1:]}.", tuple(lines))


def _edge(sweep: Sweep, setting: Setting) -> str | None:
    """A warning where the rate of ``setting`` is the last that was tried on its side."""
    which = edge_of(sweep, setting.lr, setting.comparison)
    if which is None:
        return None
    if len(sweep.lrs) == 1 and setting.comparison != "tuned":
        return "It is the only rate that was tried: another may be better."
    return f"The rate of {name(setting.method)} is {which}, at the edge of the rates tried: others may be better."


def choose(found: list[Setting]) -> Setting:
    """The setting with the largest mean ``retained`` within one standard error of the best mean ``target``."""
    best = max(found, key=lambda setting: mean(setting.target))
    floor = mean(best.target) - stdev(best.target) / math.sqrt(len(best.target))
    return max((s for s in found if mean(s.target) >= floor), key=lambda setting: mean(setting.retained))


def eligible_settings(sweep: Sweep) -> list[Setting]:
    """The settings that succeeded with every seed of the sweep."""
    runs: dict[tuple[str, str, float, float], list[tuple[float, float]]] = {}
    for run in sweep.ends:
        if run.kind in _ELIGIBLE_KINDS and run.lr is not None and {"target", "retained"} <= set(run.metrics):
            key = (run.method, run.comparison, run.lr, run.lr_used or run.lr)
            runs.setdefault(key, []).append((run.metrics["target"], run.metrics["retained"]))
    return [
        Setting(*key, [target for target, _ in found], [retained for _, retained in found])
        for key, found in runs.items()
        if len(found) == len(sweep.seeds)
    ]
