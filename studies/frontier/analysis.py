"""What the rows say: divergence at equal targets, rates chosen on other seeds, paired comparisons, verdicts.

Everything is computed from the rows at hand. Ratios are geometric means over seeds with t intervals on the log scale:
"0.7 [0.6, 0.8]" is a divergence 30 % below that of the other arm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import mean
from typing import NamedTuple

import numpy as np

from ipca.lab.statistics import LEVEL, holm
from studies.frontier.curve import Curve, along_scale, along_training
from studies.frontier.design import Design, Run, Scores, best_rate, grid
from studies.frontier.rows import Line, Rows

_COLLECTING = "collecting: "
EQUIVALENT = 0.1
"""Two arms are equivalent if the 90 % interval of their ratio is within 1 ± this."""


@dataclass(frozen=True)
class Ratio:
    """The geometric mean of a ratio over ``n`` seeds, and its 95 % interval; None for one seed.

    Attributes:
        p: of the paired t-test of "the ratio is 1", NaN for one seed.
        narrow: the 90 % interval, for the equivalence test at the 5 % level (two one-sided tests; Schuirmann, Journal
            of Pharmacokinetics and Biopharmaceutics 15, 1987).
    """

    value: float
    low: float | None
    high: float | None
    n: int
    p: float
    narrow: tuple[float, float] | None

    @staticmethod
    def of(pairs: Sequence[tuple[float, float]]) -> Ratio:
        """Of ``first / second`` for each pair of positive numbers."""
        logs = np.log([first / second for first, second in pairs])
        center, n = float(logs.mean()), len(logs)
        error = float(logs.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0
        if error == 0:
            return Ratio(math.exp(center), None, None, n, math.nan, None)
        from scipy import stats  # takes a second to import

        wide, narrow = (error * float(stats.t.ppf(q, n - 1)) for q in (0.975, 0.95))
        p = 2 * float(stats.t.sf(abs(center) / error, n - 1))
        ends = [math.exp(center + side) for side in (-wide, wide, -narrow, narrow)]
        return Ratio(math.exp(center), ends[0], ends[1], n, p, (ends[2], ends[3]))


@dataclass(frozen=True)
class Comparison:
    """An arm against another one at one target.

    Attributes:
        place: of the target among the three, 0 for the easiest.
        ratio: of the divergences, arm / other; None if no seed has both.
        adjusted: the p-value after Holm's correction over the family.
        obstacle: why there is no verdict; empty if there is one.
    """

    task: str
    steps: int
    place: int
    arm: str
    other: str
    ratio: Ratio | None
    obstacle: str
    adjusted: float = math.nan

    @property
    def verdict(self) -> str:
        """``"equivalent"``, ``"lower"``, ``"higher"``, ``"not shown"``, or the obstacle; equivalence comes first."""
        if self.obstacle or self.ratio is None:
            return self.obstacle
        narrow = self.ratio.narrow
        if narrow is not None and narrow[0] >= 1 - EQUIVALENT and narrow[1] <= 1 + EQUIVALENT:
            return "equivalent"
        return self.direction or "not shown"

    @property
    def direction(self) -> str:
        """``"lower"`` or ``"higher"`` where the ratio is shown to differ from 1; empty otherwise."""
        if self.obstacle or self.ratio is None or not self.adjusted <= LEVEL:
            return ""
        return "lower" if self.ratio.value < 1 else "higher"

    @property
    def words(self) -> str:
        """The verdict, with the direction of an equivalent ratio where it has one: ``"equivalent (lower)"``."""
        return f"equivalent ({self.direction})" if self.verdict == "equivalent" and self.direction else self.verdict


class RateClaim(NamedTuple):
    """ "High rates do no harm along λ": refuted where the spread over rates is larger than plain LoRA's.

    Attributes:
        n: seeds.
        middle, lora: :func:`spread` at the middle target, of the middle window and of plain LoRA.
        why: there is no verdict; empty if there is one.
    """

    task: str
    steps: int
    n: int
    middle: float
    lora: float
    why: str

    @property
    def verdict(self) -> str:
        """``"refuted"``, ``"not refuted"``, or empty."""
        return "" if self.why else "refuted" if self.middle > self.lora else "not refuted"


class Analysis:
    """The rows of one model under one design.

    Args:
        design: the protocol's numbers.
        rows: what was collected.
    """

    def __init__(self, design: Design, rows: Rows) -> None:
        self.design = design
        self.rows = rows
        self._found: dict[tuple[Run, str, bool], list[float | None]] = {}

    @cached_property
    def runs(self) -> dict[Run, list[Line]]:
        """All complete runs of the design's cells with their lines."""
        cells = set(self.design.cells())
        return {run: lines for run, lines in self.rows.runs() if (run.task, run.steps, run.arm) in cells}

    def curve(self, run: Run, metric: str | None = None, *, training: bool = False) -> Curve | None:
        """The curve of ``metric``, the primary one by default, over λ, or over training."""
        lines, metric = self.runs[run], metric or self.design.metric
        root = self.design.root and metric.startswith(("kl_", "cka_"))
        if training:
            return along_training(lines, metric, root=root)
        return along_scale(lines, metric, self.design.scales, root=root)

    def of(self, task: str, steps: int, arm: str) -> list[Run]:
        """The complete runs of a cell."""
        return self._by_cell.get((task, steps, arm), [])

    @cached_property
    def _by_cell(self) -> dict[tuple[str, int, str], list[Run]]:
        found: dict[tuple[str, int, str], list[Run]] = {}
        for run in self.runs:
            found.setdefault((run.task, run.steps, run.arm), []).append(run)
        return found

    def scores(
        self, task: str, steps: int, arm: str, place: int, metric: str | None = None, *, training: bool = False
    ) -> Scores:
        """The metric at a target by rate and seed."""
        metric = metric or self.design.metric
        found: dict[float, dict[int, float | None]] = {}
        for run in self.of(task, steps, arm):
            found.setdefault(run.rate, {})[run.seed] = self._at_targets(run, metric, training)[place]
        return found

    def _at_targets(self, run: Run, metric: str, training: bool) -> list[float | None]:
        """The metric of a run at each target."""
        key = (run, metric, training)
        if key not in self._found:
            curve, targets = self.curve(run, metric, training=training), self.design.targets[run.task, run.steps]
            self._found[key] = [None if curve is None else curve.when(target) for target in targets]
        return self._found[key]

    def grid(self, task: str, steps: int, arm: str) -> tuple[float, ...]:
        """The rates that the rows at hand ask for, ascending."""
        return tuple(sorted(grid(self.design.arms[arm].rate, self.scores(task, steps, arm, 1))))

    def rates(self, task: str, steps: int, arm: str, at: int = 1, *, training: bool = False) -> dict[int, float]:
        """By seed, the rate that is best on the *other* seeds by the primary metric at a target, the middle one.

        The arm's center with one seed, and where the other seeds have no rate in common with it.

        Args:
            training: by the metric at the step that reaches the target, instead of at the smallest λ that does.
        """
        found = self.scores(task, steps, arm, at, training=training)
        chosen = {}
        for seed in sorted({seed for by_seed in found.values() for seed in by_seed}):
            others = {
                rate: {s: score for s, score in by_seed.items() if s != seed}
                for rate, by_seed in found.items()
                if seed in by_seed
            }
            others = {rate: by_seed for rate, by_seed in others.items() if by_seed}
            center = self.design.arms[arm].rate
            chosen[seed] = best_rate(others) if others else min(found, key=lambda rate: abs(math.log(rate / center)))
        return chosen

    def tuned(
        self,
        task: str,
        steps: int,
        arm: str,
        place: int,
        metric: str | None = None,
        *,
        training: bool = False,
        at: int = 1,
    ) -> dict[int, float | None]:
        """The metric at a target by seed; None where the target is not reached.

        Args:
            training: at the step that reaches the target, with the rates that are best for that.
            at: the target by which the rates are chosen.
        """
        found = self.scores(task, steps, arm, place, metric, training=training)
        chosen = self.rates(task, steps, arm, at, training=training)
        return {seed: found[rate].get(seed) for seed, rate in chosen.items()}

    def stops_at_edge(self, task: str, steps: int, *arms: str) -> bool:
        """Whether a rate that stopped runs are taken at is the lowest or the highest that the arm was tried at."""
        for arm in arms:
            tried = self.scores(task, steps, arm, 1)
            if {min(tried), max(tried)}.intersection(self.rates(task, steps, arm, training=True).values()):
                return True
        return False

    def is_early(self, task: str, steps: int, place: int, *arms: str) -> bool:
        """Whether more than half of the runs that are stopped at a target reach it before their first checkpoint.

        There a curve along training rests on the base and that checkpoint, and nothing checks it.
        """
        first, target = self.design.steps_measured(steps)[0], self.design.targets[task, steps][place]
        stops = []
        for arm in arms:
            chosen = self.rates(task, steps, arm, training=True)
            runs = [Run(task, steps, arm, rate, seed) for seed, rate in chosen.items()]
            curves = [self.curve(run, training=True) for run in runs if run in self.runs]
            stops += [curve.where(target) for curve in curves if curve is not None]
        reached = [stop for stop in stops if stop is not None]
        return 2 * sum(stop < first for stop in reached) > len(reached)

    def compare(
        self,
        task: str,
        steps: int,
        place: int,
        arm: str,
        other: str,
        metric: str | None = None,
        *,
        training: bool = False,
        at: int = 1,
    ) -> Comparison:
        """``arm`` against ``other``, each seed at the rates that are best on the other seeds at the target ``at``."""
        first, second = (
            self.tuned(task, steps, each, place, metric, training=training, at=at) for each in (arm, other)
        )
        pairs = _pairs(first, second)
        ratio = Ratio.of(pairs) if pairs else None
        obstacle = self.obstacle(task, steps, (arm, other), len(first.keys() & second.keys()), len(pairs))
        return Comparison(task, steps, place, arm, other, ratio, obstacle)

    def at_first_rates(self, task: str, steps: int, place: int, arm: str, other: str) -> Ratio | None:
        """The ratio that one rate each would have given, the first of each grid; None if no seed reaches the target."""
        first, second = (
            self.scores(task, steps, each, place).get(self.design.arms[each].rate, {}) for each in (arm, other)
        )
        pairs = _pairs(first, second)
        return Ratio.of(pairs) if pairs else None

    def comparisons(self) -> list[Comparison]:
        """The primary comparisons, with Holm's correction in each family over those that have a verdict."""
        return [comparison for pairs in self.design.families for comparison in self._family(pairs)]

    def _family(self, pairs: Iterable[tuple[str, str]]) -> list[Comparison]:
        pairs, cells = tuple(pairs), set(self.design.cells())
        found = (
            self.compare(task, steps, place, arm, other)
            for task, steps in self.design.targets
            for place in range(3)
            for arm, other in pairs
            if {(task, steps, arm), (task, steps, other)} <= cells
        )
        return corrected(found, whole=self.design.whole_family)

    def obstacle(self, task: str, steps: int, arms: Sequence[str], seeds: int, reached: int) -> str:
        """Why a comparison of ``arms`` has no verdict; empty if it has one.

        Args:
            seeds: common to the arms.
            reached: of them, those with which all arms reach the target.
        """
        enough = self.design.enough
        if seeds < enough:
            return f"{_COLLECTING}{seeds} of {enough} seeds"
        if untuned := self.untuned(task, steps, *arms):
            return untuned
        if reached < enough:
            return f"not reached at the chosen rates ({reached} of {seeds} seeds)"
        return ""

    def untuned(self, task: str, steps: int, *arms: str) -> str:
        """Why the best rates of ``arms`` are not known; empty if they are."""
        found = [words for arm in arms if (words := self._untuned(task, steps, arm))]
        return "; ".join(found).replace(f"; {_COLLECTING}", "; ")

    def rate_claims(self) -> Iterator[RateClaim]:
        """Of each new task and length with two such rates of both arms, where the protocol has the claim."""
        if not self.design.claims_rates:
            return
        arm, other, *_ = self.design.main
        for task, steps in self.design.targets:
            middle, lora = (spread(self.scores(task, steps, each, 1)) for each in (arm, other))
            if middle is not None and lora is not None:
                n = min(len({run.seed for run in self.of(task, steps, each)}) for each in (arm, other))
                yield RateClaim(task, steps, n, middle, lora, self.untuned(task, steps, arm, other))

    def _untuned(self, task: str, steps: int, arm: str) -> str:
        found, rates = self.scores(task, steps, arm, 1), self.grid(task, steps, arm)
        lacking = [rate for rate in rates if len(found.get(rate, {})) < self.design.enough]
        if lacking:
            return f"{_COLLECTING}{self.design.arms[arm].title} at {', '.join(f'{rate:g}' for rate in lacking)}"
        taken = {best_rate(found), *self.rates(task, steps, arm).values()}  # those of single seeds count, too
        if edge := taken.intersection((rates[0], rates[-1])):
            return f"{self.design.arms[arm].title} is best at the edge of its rates, {min(edge):g}"
        return ""

    def interpolation_error(self, metric: str) -> tuple[int, float] | None:
        """The number of finer scales measured, and the largest relative error of the interpolation there."""
        errors = []
        for run, lines in self.runs.items():
            finer = [line for line in lines if line["scale"] in self.design.finer]
            curve = self.curve(run, metric) if finer else None
            if curve is None:
                continue
            for line in finer:
                read = float(np.interp(line["scale"], curve.at, curve.new if metric == "ce_new" else curve.other))
                errors.append(abs(read / line[metric] - 1))
        return (len(errors), max(errors)) if errors else None

    def one_standard_error(self, task: str, steps: int, arm: str) -> tuple[float, str] | None:
        """The lowest rate whose mean cross-entropy on the new task at λ = 1 is within one standard error of the best.

        None without a run that did not diverge. With it ``"only rate"``; ``"edge"`` where it is the lowest rate tried,
        or the best is the lowest or the highest; or an empty text.
        """
        found: dict[float, list[float]] = {}
        for run in self.of(task, steps, arm):
            found.setdefault(run.rate, []).append(final(self.runs[run], "ce_new"))
        finite = {rate: values for rate, values in found.items() if all(map(math.isfinite, values))}
        if not finite:
            return None
        top = min(finite, key=lambda rate: mean(finite[rate]))
        best = finite[top]
        error = float(np.std(best, ddof=1)) / math.sqrt(len(best)) if len(best) > 1 else 0.0
        chosen = min(rate for rate, values in finite.items() if mean(values) <= mean(best) + error)
        is_edge = chosen == min(found) or top == max(found)
        return chosen, "only rate" if len(found) == 1 else "edge" if is_edge else ""

    def item_error(self, run: Run, name: str) -> float | None:
        """The standard error of a metric at λ = 1 over the sequences of its text; None if there are none."""
        items = self.rows.items(run)
        if name not in items:
            return None
        by_sequence = items[name].double().nanmean(-1)
        return float(by_sequence.std() / math.sqrt(len(by_sequence)))


def _pairs(first: Mapping[int, float | None], second: Mapping[int, float | None]) -> list[tuple[float, float]]:
    """The values of the seeds with which both arms reach the target."""
    seeds = sorted(first.keys() & second.keys())
    return [(a, b) for s in seeds if (a := first[s]) is not None and (b := second[s]) is not None]


def corrected(comparisons: Iterable[Comparison], *, whole: bool = False) -> list[Comparison]:
    """A family of comparisons with Holm's correction over those that have a verdict.

    Args:
        whole: over all of them; one without a verdict counts as if its p were 1.
    """
    found = list(comparisons)
    ready = [c for c in found if not c.obstacle and c.ratio is not None and not math.isnan(c.ratio.p)]
    rest = [1.0] * (len(found) - len(ready)) if whole else []
    values = holm([*(c.ratio.p for c in ready if c.ratio), *rest])[: len(ready)]
    adjusted = dict(zip(map(id, ready), values, strict=True))
    return [replace(c, adjusted=adjusted.get(id(c), math.nan)) for c in found]


def final(lines: Sequence[Line], metric: str) -> float:
    """The metric of a run's final model; NaN if it diverged."""
    last = next(line for line in lines if line["scale"] == 1.0 and line["step"] == max(each["step"] for each in lines))
    return math.nan if last.get(metric) is None else float(last[metric])


def base(lines: Sequence[Line], metric: str) -> float:
    """The metric of the base."""
    return float(lines[0][metric])


def spread(scores: Scores) -> float | None:
    """The highest over the lowest mean divergence among the rates at which every seed reaches the target, from two on.

    A rate that misses the target is in no ratio, however far it moves the model.
    """
    means = [
        mean(score for score in by_seed.values() if score is not None)
        for by_seed in scores.values()
        if None not in by_seed.values()
    ]
    return max(means) / min(means) if len(means) > 1 else None
