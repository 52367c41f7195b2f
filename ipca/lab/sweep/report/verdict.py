"""The verdict of a sweep, by rules fixed beforehand: is forgetting U-shaped over the window's position?

For each seed the *middle* is the mean over all windows with 0.25 ≤ f ≤ 0.75, the *principal end* the lowest f below
0.25 and the *minor end* the highest above 0.75. An *arm* is middle − end in ``retained``, or end − middle in ``drift``:
positive if the end forgets more. Each arm is tested by the exact sign-flip test, one-sided.

- **U**: both arms have p ≤ 5 %. Both must hold, so the claim has the larger p and needs no correction
  (an intersection–union test: Berger, Technometrics 24, 1982).
- **left** or **right**, one arm only: p ≤ 5 % after Holm's correction over the two.
- **few**: with so few seeds not even differences of equal sign would reach 5 %.
- **none** otherwise. This does not prove a flat curve: the intervals bound how large an arm can be.

The headline is the shape of ``retained`` at the same rate, the grid's middle one (the lower of two). The rate is fixed
before any result, since the best one by its own numbers would be biased; where the windows learned nothing there, or
next to nothing (:func:`~ipca.lab.sweep.report.comparisons.learned`), the headline says so. Other comparisons and
``drift`` are reported separately and do not change it. Further findings: :mod:`~ipca.lab.sweep.report.findings`.

Every p is that of a sign-flip test, exact up to 15 seeds, and every correction is stated where it is made; nothing is
corrected over the whole report.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from statistics import mean

from ipca.lab.statistics import LEVEL, Difference, corrected, difference
from ipca.lab.sweep.report.comparisons import View, learned, middle_rate, views, why_this_rate
from ipca.lab.sweep.report.data import Sweep
from ipca.lab.sweep.report.findings import against_lora, controls, suggestion
from ipca.lab.sweep.report.words import Finding, listed, name, p_value, result, too_few

_LOW, _HIGH = 0.25, 0.75
_SIDES = {"left": "principal end (below 0.25)", "right": "minor end (above 0.75)"}
_SHAPES = {"U": "a U", "left": "the left arm only", "right": "the right arm only", "none": "no U-shape detected"}


@dataclass(frozen=True)
class Arms:
    """The two arms of one metric in one view.

    Attributes:
        metric: ``"retained"`` or ``"drift"``.
    """

    view: View
    metric: str

    @cached_property
    def middle(self) -> list[str]:
        return [m for m, f in self.view.sweep.positions.items() if _LOW <= f <= _HIGH]

    @cached_property
    def ends(self) -> dict[str, str]:
        """The window at each end, if the sweep has one: ``{"left": …, "right": …}``."""
        positions = list(self.view.sweep.positions.items())
        found = {}
        if positions and positions[0][1] < _LOW:
            found["left"] = positions[0][0]
        if positions and positions[-1][1] > _HIGH:
            found["right"] = positions[-1][0]
        return found

    @cached_property
    def tests(self) -> dict[str, Difference]:
        """The arms that can be tested, Holm-corrected over them."""
        middle = self._kept_by_middle()
        return corrected({side: difference(middle, self._kept(end), "greater") for side, end in self.ends.items()})

    @cached_property
    def verdict(self) -> str:
        """``"U"``, ``"left"``, ``"right"``, ``"none"``, ``"few"``, or ``"untested"`` if an arm is missing."""
        if len(self.tests) < 2:
            return "untested"
        if all(found.smallest > LEVEL for found in self.tests.values()):
            return "few"
        if all(found.p <= LEVEL for found in self.tests.values()):
            return "U"
        return next((side for side, found in self.tests.items() if found.shown), "none")

    def _kept(self, method: str) -> dict[int, float]:
        sign = -1 if self.metric == "drift" else 1
        return {seed: sign * value for seed, value in self.view.values(method, self.metric).items()}

    def _kept_by_middle(self) -> dict[int, float]:
        """The mean over the middle windows, for the seeds that have all of them."""
        kept = [self._kept(method) for method in self.middle]
        seeds = set.intersection(*(set(values) for values in kept)) if kept else set()
        return {seed: mean(values[seed] for values in kept) for seed in seeds}


@dataclass(frozen=True)
class Verdict:
    """The headline with its supporting lines, further findings, and every tested pair of arms."""

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
    headline, basis = (_no_shape(sweep), ()) if first is None else _shape(first)
    found = [_elsewhere(first, arms), against_lora(sweep, here), *controls(sweep, here), suggestion(sweep)]
    return Verdict(headline, basis, [finding for finding in [*found, _failures(sweep)] if finding is not None], arms)


def _no_shape(sweep: Sweep) -> str:
    """The headline without a value at the rate of the comparison."""
    lr, where = middle_rate(sweep), "Whether forgetting is U-shaped"
    rates = [f"{at:g}" for at in sweep.lrs if any(sweep.values(m, "retained", "same", at) for m in sweep.methods)]
    if lr is None or not rates:
        return f"{where} cannot be determined: no finished run has a value of retained."
    return (
        f"{where} at learning rate {lr:g} cannot be determined: no run at this rate, {why_this_rate(sweep)}, has a "
        f"value of retained. Runs at {listed(rates)} have."
    )


def _shape(arms: Arms) -> tuple[str, tuple[str, ...]]:
    """The headline and its supporting lines."""
    lr = arms.view.lr
    assert lr is not None  # of the same rate
    at = f"at learning rate {lr:g}"
    known = learned(arms.view)
    doubt = f" But {known.doubt}." if known is not None and known.doubt else ""
    rate = f"At {arms.view.title}: {arms.view.note}, {why_this_rate(arms.view.sweep)}."
    where = (rate,) if known is None else (rate, str(known))
    if arms.verdict == "untested":
        return f"Whether forgetting is U-shaped {at} cannot be determined: {_missing(arms)}{doubt}", where
    n = min(found.n for found in arms.tests.values())
    few = too_few(arms.tests.values(), 1)
    words = {
        "U": f"Forgetting is U-shaped {at}: the middle windows keep more than both ends.",
        "left": f"Only the left arm {at}: the principal end forgets more than the middle, the minor is not shown to.",
        "right": f"Only the right arm {at}: the minor end forgets more than the middle, the principal is not shown to.",
        "none": f"No U-shape detected {at}.",
        "few": f"Too few seeds to determine whether forgetting is U-shaped {at} ({few}).",
    }
    return words[arms.verdict] + doubt, _basis(arms, n, where)


def _basis(arms: Arms, n: int, where: tuple[str, ...]) -> tuple[str, ...]:
    left, right = arms.tests["left"], arms.tests["right"]
    lines = [
        f"Retained, middle ({', '.join(arms.middle)}) minus the principal end ({arms.ends['left']}): {result(left)}",
        f"Minus the minor end ({arms.ends['right']}): {result(right)}",
        "Mean difference, 95 % interval from 3 seeds; one-sided p, Holm-adjusted over 2.",
        *where,
    ]
    if arms.verdict == "U":
        worse = max(left.p, right.p)
        lines.append(f"For the U both must hold, so the larger unadjusted p counts: {p_value(worse)}.")
    if arms.verdict == "none" and n == 5:
        lines.append("With 5 seeds only both arms together can be shown, not a single one; 6 seeds suffice for that.")
    if left.mean < 0 and right.mean < 0:
        lines.append("The means are the other way round: the middle keeps less than both ends.")
    return tuple(lines)


def _missing(arms: Arms) -> str:
    if not arms.middle:
        return "no window between 0.25 and 0.75 was swept."
    lacks = [text for side, text in _SIDES.items() if side not in arms.ends]
    if lacks:
        return f"no window at the {listed(lacks)} was swept."
    sides = [text for side, text in _SIDES.items() if side not in arms.tests]
    return f"no seed succeeded both in the middle and at the {listed(sides)} at this rate."


def _elsewhere(first: Arms | None, arms: list[Arms]) -> Finding | None:
    """Whether the other comparisons, and drift, agree."""
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
    return Finding("Do the other comparisons agree?", f"{same} of {len(others)} show the same.", tuple(lines))


def _failures(sweep: Sweep) -> Finding | None:
    failed = [run for run in sweep.ends if not run.ok]
    if not failed:
        return None
    methods = list(dict.fromkeys(name(run.method) for run in failed))
    return Finding(
        "Did all runs succeed?",
        f"No: {len(failed)} of {len(sweep.ends)} failed ({listed(methods)}).",
        ("Means and differences are over the remaining seeds, which favors methods that fail.",),
    )
