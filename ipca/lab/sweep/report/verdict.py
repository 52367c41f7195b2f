"""What a sweep found, in words, by rules that were written before it was looked at.

1. Shape: :mod:`~ipca.lab.sweep.report.arms`, on ``retained`` at the same rate, the grid's middle one. Other
   comparisons and ``drift`` answer the same question beside it and do not change the headline.
2. Plain LoRA, direction or magnitude: :mod:`~ipca.lab.sweep.report.rivals`.
3. What to use: :mod:`~ipca.lab.sweep.report.choice`.

Every p is that of a sign-flip test, exact up to 15 seeds, and every correction is named where it is made; nothing is
corrected over the whole report.
"""

from __future__ import annotations

from dataclasses import dataclass

from ipca.lab.sweep.report.arms import Arms
from ipca.lab.sweep.report.choice import suggestion
from ipca.lab.sweep.report.comparisons import views
from ipca.lab.sweep.report.data import Sweep
from ipca.lab.sweep.report.rivals import against_lora, controls
from ipca.lab.sweep.report.words import Finding, listed, name, p_value, result, too_few


@dataclass(frozen=True)
class Verdict:
    """The headline with the lines it rests on, further findings, and every pair of arms that was looked at."""

    headline: str
    basis: tuple[str, ...]
    findings: list[Finding]
    arms: list[Arms]

    def __str__(self) -> str:
        lines = [self.headline, *(f"  {line}" for line in self.basis)]
        for finding in self.findings:
            lines += [f"{finding.question} {finding.answer}", *(f"  {line}" for line in finding.details)]
        return "\n".join(lines)


def judge(sweep: Sweep) -> Verdict:
    """Apply the rules to ``sweep``."""
    here = views(sweep)
    metrics = [metric for metric in ("retained", "drift") if metric in sweep.metrics]
    arms = [Arms(view, metric) for view in here for metric in metrics]
    first = next((a for a in arms if (a.view.key, a.metric) == ("same", "retained")), None)
    headline, basis = _shape(first)
    found = [_elsewhere(first, arms), against_lora(sweep, here), *controls(sweep, here), suggestion(sweep)]
    return Verdict(headline, basis, [finding for finding in [*found, _failures(sweep)] if finding is not None], arms)


def _shape(arms: Arms | None) -> tuple[str, tuple[str, ...]]:
    """The headline and what it rests on."""
    if arms is None:
        return "Whether forgetting is U-shaped cannot be said: no finished run has a value of retained.", ()
    if arms.verdict == "untested":
        return "Whether forgetting is U-shaped cannot be said: " + _missing(arms), ()
    n = min(found.n for found in arms.tests.values())
    few = too_few(arms.tests.values(), 1)
    words = {
        "U": "Forgetting is U-shaped: the middle windows keep more than both ends.",
        "left": "Only the left arm: the principal end forgets more than the middle; the minor end is not shown to.",
        "right": "Only the right arm: the minor end forgets more than the middle; the principal end is not shown to.",
        "none": "No U-shape detected.",
        "few": f"Too few seeds to say whether forgetting is U-shaped ({few}).",
    }
    return words[arms.verdict], _basis(arms, n)


def _basis(arms: Arms, n: int) -> tuple[str, ...]:
    left, right = arms.tests["left"], arms.tests["right"]
    lines = [
        f"Retained, middle ({', '.join(arms.middle)}) minus the principal end ({arms.ends['left']}): {result(left)}",
        f"Minus the minor end ({arms.ends['right']}): {result(right)}",
        f"At {arms.view.title}: {arms.view.note}. Mean difference, 95 % interval; one-sided p, Holm-adjusted over 2.",
    ]
    if arms.verdict == "U":
        worse = max(left.p, right.p)
        lines.append(f"For the U both must hold, so the larger unadjusted p counts: {p_value(worse)}.")
    if arms.verdict == "none" and n == 5:
        lines.append("With 5 seeds both arms can be shown together, one alone cannot; 6 seeds can.")
    if left.mean < 0 and right.mean < 0:
        lines.append("In the means it is the other way round: the middle keeps less than both ends.")
    return tuple(lines)


def _missing(arms: Arms) -> str:
    if not arms.middle:
        return "no window between 0.25 and 0.75 was swept."
    lacks = [text for side, text in _SIDES.items() if side not in arms.ends]
    if lacks:
        return f"no window at the {listed(lacks)} was swept."
    sides = [text for side, text in _SIDES.items() if side not in arms.tests]
    return f"no seed ended well both in the middle and at the {listed(sides)} at this rate."


_SIDES = {"left": "principal end (below 0.25)", "right": "minor end (above 0.75)"}


def _elsewhere(first: Arms | None, arms: list[Arms]) -> Finding | None:
    """Whether the other comparisons, and drift, say the same."""
    others = [a for a in arms if a is not first and a.verdict not in ("untested", "few")]
    if first is None or not others:
        return None
    same = sum(a.verdict == first.verdict for a in others)
    lines = []
    for metric in dict.fromkeys(a.metric for a in others):
        places: dict[str, list[str]] = {}
        for a in others:
            if a.metric == metric:
                places.setdefault(_SHAPES[a.verdict], []).append(a.view.title)
        found = "; ".join(f"{shape} at {listed(where)}" for shape, where in places.items())
        lines.append(f"{metric.capitalize()}: {found}")
    return Finding("And in other comparisons?", f"{same} of {len(others)} show the same.", tuple(lines))


_SHAPES = {"U": "a U", "left": "the left arm alone", "right": "the right arm alone", "none": "no U-shape detected"}


def _failures(sweep: Sweep) -> Finding | None:
    failed = [run for run in sweep.ends if not run.ok]
    if not failed:
        return None
    methods = list(dict.fromkeys(name(run.method) for run in failed))
    return Finding(
        "Did all runs end well?",
        f"No: {len(failed)} of {len(sweep.ends)} failed ({listed(methods)}).",
        ("Means and differences are over the seeds that are left, which flatters a method that fails.",),
    )
