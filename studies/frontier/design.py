"""A protocol's numbers: arms, rates, lengths, targets, and the order in which runs are made."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
"""Every learning rate is one of these, about a factor of 3 apart; a grid grows along them."""
Scores = Mapping[float, Mapping[int, float | None]]
"""By rate and seed: a metric at a target, None if the run does not reach the target."""


@dataclass(frozen=True)
class Arm:
    """A way to fine-tune.

    Attributes:
        title: for tables and figures.
        method: of :func:`ipca.lab.baselines.apply`.
        rate: center of its first three rates, one of :data:`RATES`.
        reference: the window that a control is made from.
        scaling: α / r.
        pull: AdamW's decoupled decay toward the start: after a step at rate η each parameter moves by ``η · pull`` of
            its distance back to its start.
    """

    title: str
    method: str
    rate: float
    reference: str = "middle"
    scaling: float = 1.0
    pull: float = 0.0
    inputs = ""

    @property
    def options(self) -> dict[str, Any]:
        """More options of :func:`ipca.apply_pc`."""
        return {}


@dataclass(frozen=True)
class OptionArm(Arm):
    """An arm of an addition to a protocol, with options that the first arms do not have.

    Attributes:
        train, magnitude: of :func:`ipca.apply_pc`.
        inputs: what a method that looks at inputs is shown: ``"base"``, sequences drawn from the base that nothing else
            uses, or ``"new"``, training items of the new task.
    """

    train: str = "both"
    magnitude: float | str = "sigma"
    inputs: str = ""

    @property
    def options(self) -> dict[str, Any]:
        return {"train": self.train, "magnitude": self.magnitude}


@dataclass(frozen=True, order=True)
class Run:
    """One training."""

    task: str
    steps: int
    arm: str
    rate: float
    seed: int

    @property
    def key(self) -> str:
        """The name of its file: ``german-60-middle-1e-03-seed0``."""
        return f"{self.task}-{self.steps}-{self.arm}-{self.rate:.0e}-seed{self.seed}"


@dataclass(frozen=True)
class Wave:
    """Runs of one kind, made seed by seed, arms innermost, so that every prefix compares arms on the same seeds.

    Attributes:
        steps: of a run.
        arms: their names.
        seeds: one after the other.
        center: the first rate of each arm; otherwise all others of its grid.
    """

    steps: int
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    center: bool


@dataclass(frozen=True)
class Design:
    """A protocol's numbers.

    Attributes:
        tasks: their names.
        waves: in order.
        targets: by task and steps, three cross-entropies on the new task, in nats a token, descending.
        scales: the shares λ of the final change that are measured.
        finer: further shares, measured for the runs of :meth:`is_checked`.
        checkpoints: number of equally spaced steps that are measured, the last one included.
        rank: of every adapter.
        batch: sequences of a step.
        warm_up: steps.
        arms: by name, in the order of their importance.
        main: the arms that figures show and whose interpolation is checked.
        families: of primary comparisons, arm against arm; Holm's correction is over all cells and targets of a family.
        titles: of tasks and kept texts, for tables and figures; else their names.
        kept: the kept texts in the order of tables.
        metric: the primary one, read at equal cross-entropy on the new task: ``kl_`` and the name of a kept text.
        unit: of a cross-entropy, with its article.
        item: what a measurement is averaged over, in the plural.
        enough: seeds below which there is no verdict.
        autocast: train under bfloat16 autocast; otherwise in the dtype of the weights.
        root: interpolate the root of a divergence, which is nearly linear in λ, instead of the divergence.
        claims_rates: the protocol claims that high rates do the middle window no harm.
        claims_shape: the protocol claims a U over the positions.
        whole_family: Holm's correction counts comparisons without a verdict, too.
        itemized: the seeds of which the values of single tokens are kept; None for all.
    """

    tasks: tuple[str, ...]
    waves: tuple[Wave, ...]
    targets: Mapping[tuple[str, int], tuple[float, float, float]]
    scales: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    finer: tuple[float, ...] = (0.125, 0.375, 0.625, 0.875)
    checkpoints: int = 4
    rank: int = 16
    batch: int = 4
    warm_up: int = 5
    arms: Mapping[str, Arm] = field(kw_only=True, repr=False)
    main: tuple[str, ...] = field(kw_only=True, repr=False)
    families: tuple[tuple[tuple[str, str], ...], ...] = field(kw_only=True, repr=False)
    titles: Mapping[str, str] = field(kw_only=True, repr=False)
    kept: tuple[str, ...] = field(kw_only=True, repr=False)
    metric: str = field(default="kl_samples", kw_only=True, repr=False)
    unit: str = field(default="a token", kw_only=True, repr=False)
    item: str = field(default="sequences", kw_only=True, repr=False)
    enough: int = field(default=5, kw_only=True, repr=False)
    autocast: bool = field(default=True, kw_only=True, repr=False)
    root: bool = field(default=False, kw_only=True, repr=False)
    claims_rates: bool = field(default=False, kw_only=True, repr=False)
    claims_shape: bool = field(default=False, kw_only=True, repr=False)
    whole_family: bool = field(default=False, kw_only=True, repr=False)
    itemized: tuple[int, ...] | None = field(default=None, kw_only=True, repr=False)

    @property
    def positions(self) -> dict[str, float]:
        """The arms that train a window at a given position, with that position, ascending."""
        found = {name: float(arm.method) for name, arm in self.arms.items() if arm.method[:1].isdigit()}
        return dict(sorted(found.items(), key=lambda item: item[1]))

    def title(self, name: str) -> str:
        """The title of a task, a kept text or an arm."""
        return self.arms[name].title if name in self.arms else self.titles.get(name, name)

    def steps_measured(self, steps: int) -> tuple[int, ...]:
        """The steps of the checkpoints, ascending; the last one is ``steps``."""
        return tuple(round(steps * k / self.checkpoints) for k in range(1, self.checkpoints + 1))

    def is_checked(self, run: Run) -> bool:
        """Whether ``run`` is measured at the finer scales too, which checks the interpolation between the others."""
        first = self.waves[0]
        at_center = (run.seed, run.steps, run.rate) == (first.seeds[0], first.steps, self.arms[run.arm].rate)
        return at_center and run.arm in self.main

    def rate_factor(self, step: int, steps: int) -> float:
        """The rate at ``step``, from 1 on, over the run's: warm-up, constant, linear to 0 from half of the steps on."""
        return min(1.0, step / self.warm_up) * min(1.0, 2 * (1 - (step - 1) / steps))

    def order(self, grids: Mapping[tuple[str, int, str], tuple[float, ...]]) -> Iterator[Run]:
        """All runs in the order in which they are made.

        Args:
            grids: by task, steps and arm, its rates as they are now, see :func:`grid`.
        """
        for wave in self.waves:
            for seed in wave.seeds:
                for task in self.tasks:
                    rates = {arm: self._rates(wave, grids[task, wave.steps, arm]) for arm in wave.arms}
                    for place in range(max(map(len, rates.values()))):
                        for arm in wave.arms:
                            if place < len(rates[arm]):
                                yield Run(task, wave.steps, arm, rates[arm][place], seed)

    def _rates(self, wave: Wave, rates: tuple[float, ...]) -> tuple[float, ...]:
        return rates[:1] if wave.center else rates[1:]

    def cells(self) -> Iterator[tuple[str, int, str]]:
        """Every combination of task, steps and arm, once."""
        seen = dict.fromkeys((t, wave.steps, arm) for wave in self.waves for t in self.tasks for arm in wave.arms)
        yield from seen


def grid(center: float, scores: Scores) -> tuple[float, ...]:
    """The rates of an arm in one task at one length, ``center`` first.

    Three rates at first. When all of them have two seeds or more and the best is the lowest or the highest, the next
    one of :data:`RATES` on that side is added, again and again.

    Args:
        scores: the divergence on samples at the middle target.
    """
    start = RATES.index(center)
    low, high = start - 1, start + 1
    while all(len(scores.get(RATES[i], {})) > 1 for i in range(low, high + 1)):
        best = RATES.index(best_rate({rate: scores[rate] for rate in RATES[low : high + 1]}))
        if best not in (low, high) or (best == low == 0) or (best == high == len(RATES) - 1):
            break
        low, high = (low - 1, high) if best == low else (low, high + 1)
    rest = sorted(set(range(low, high + 1)) - {start}, key=lambda i: (abs(i - start), i))
    return tuple(RATES[i] for i in (start, *rest))


def best_rate(scores: Scores) -> float:
    """The rate of the lowest mean score; one that fewer runs reach the target with is worse than any with more."""

    def badness(rate: float) -> tuple[float, float]:
        found = [score for score in scores[rate].values() if score is not None]
        share = len(found) / len(scores[rate])
        return -share, sum(found) / len(found) if found else math.inf

    return min(scores, key=badness)
