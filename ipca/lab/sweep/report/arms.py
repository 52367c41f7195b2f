"""Is forgetting U-shaped over the window's position? Middle windows against the two ends, paired over seeds.

Of each seed the *middle* is the mean over all windows with 0.25 ≤ f ≤ 0.75, the *principal end* the lowest f below
0.25 and the *minor end* the highest above 0.75. An *arm* is middle − end in ``retained``, or end − middle in ``drift``:
positive where the end forgets more. Each arm is tested by the exact sign-flip test, one-sided.

- **U**: both arms have p ≤ 5 %. Both must hold, so the larger p is that of the claim, and needs no correction
  (an intersection–union test: Berger, Technometrics 24, 1982).
- **left** or **right**, one arm alone: p ≤ 5 % after Holm's correction over the two.
- **few**: with so few seeds not even differences that all point the same way would give 5 %.
- **none** otherwise. That is no proof of a flat curve: the intervals say how large an arm can still be.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from statistics import mean

from ipca.lab.sweep.report.comparisons import View
from ipca.lab.sweep.report.statistics import LEVEL, Difference, corrected, difference

_LOW, _HIGH = 0.25, 0.75


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
        """The window at each end that the sweep has: ``{"left": …, "right": …}``."""
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
        middle = self._kept_by_the_middle()
        return corrected({side: difference(middle, self._kept(end), "greater") for side, end in self.ends.items()})

    @cached_property
    def verdict(self) -> str:
        """``"U"``, ``"left"``, ``"right"``, ``"none"``, ``"few"``, or ``"untested"`` where an arm is missing."""
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

    def _kept_by_the_middle(self) -> dict[int, float]:
        """The mean over the middle windows, for the seeds that have them all."""
        kept = [self._kept(method) for method in self.middle]
        seeds = set.intersection(*(set(values) for values in kept)) if kept else set()
        return {seed: mean(values[seed] for values in kept) for seed in seeds}
