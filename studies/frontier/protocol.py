"""A protocol in code: its numbers, the runs that fix its targets, and the hash that ties rows to it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from studies.frontier.curve import along_scale
from studies.frontier.design import RATES, Arm, Design, Run, Wave
from studies.frontier.rows import Rows
from studies.page import markdown

_CHANGES = "\n## Changes"


@dataclass(frozen=True)
class Addition:
    """Arms that are added when rows exist already: a protocol of their own, which changes no hash of other rows.

    Attributes:
        text: its file, with what is claimed of the new arms and what would refute it.
        arms: by name.
        waves: their runs, made after all others, of lengths that have targets.
        families: of primary comparisons, also with arms that are there already.
    """

    text: Path
    arms: Mapping[str, Arm]
    waves: tuple[Wave, ...]
    families: tuple[tuple[tuple[str, str], ...], ...] = ()


@dataclass(frozen=True)
class Protocol:
    """What a study fixes before its first row.

    Attributes:
        text: its file; what follows the headline "Changes" may grow.
        plan: everything but the targets, without additions.
        reference: runs that fix the targets and count for nothing else.
        shares: of the improvement of a reference run; they are the targets, from the easiest on.
        model: the folder of the default model's rows.
        results: the folder of all rows.
        seconds: CPU seconds of a step, for the estimate of what remains before a run was made.
        additions: in the order in which they were made.
        digits: of a target.
        changed: attributes of the plan that the text's list of changes names, with their new values; in no hash.
    """

    text: Path
    plan: Design
    reference: tuple[Run, ...]
    shares: tuple[float, float, float]
    model: str
    results: Path
    seconds: float
    additions: tuple[Addition, ...] = ()
    digits: int = 2
    changed: Mapping[str, Any] = field(default_factory=dict)

    def with_targets(self, reference: Rows) -> Design | None:
        """The plan with additions and the targets that the rows of ``reference`` fix; None where a run is missing.

        A target is the base's cross-entropy minus a share of the reference run's improvement at its best λ, rounded.
        """
        lines = dict(reference.runs())
        if not set(self.reference) <= set(lines):
            return None
        targets = {}
        for run in self.reference:
            curve = along_scale(lines[run], self.plan.metric, self.plan.scales)
            if curve is None:
                raise ValueError(f"{run.key} diverged and fixes no target")
            gain = curve.new[0] - curve.lowest
            first, second, third = (round(curve.new[0] - share * gain, self.digits) for share in self.shares)
            targets[run.task, run.steps] = (first, second, third)
        return replace(self.extended(), targets=targets)

    def extended(self) -> Design:
        """The plan with its changes and the additions' arms, runs and comparisons."""
        plan = replace(self.plan, **self.changed)
        for added in self.additions:
            arms, waves = {**plan.arms, **added.arms}, plan.waves + added.waves
            plan = replace(plan, arms=arms, waves=waves, families=plan.families + added.families)
        return plan

    def sha256(self) -> str:
        """A hash of the protocol's text but for its list of changes, and of the numbers in code."""
        plan = self.plan
        numbers = [plan, plan.arms, RATES, self.reference, self.shares]
        parts = [_fixed(self.text), *map(repr, numbers)]
        parts += ["no autocast"] * (not plan.autocast) + ["root"] * plan.root
        parts += [plan.metric] * (plan.metric != "kl_samples") + [str(self.digits)] * (self.digits != 2)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def added_sha256(self) -> dict[str, str]:
        """By arm of an addition, a hash of the protocol, and of the addition's text, arms and runs."""
        found = {}
        for added in self.additions:
            parts = [self.sha256(), _fixed(added.text), repr(added.arms), repr(added.waves), repr(added.families)]
            found.update(dict.fromkeys(added.arms, hashlib.sha256("\n".join(parts).encode()).hexdigest()))
        return found


def arms_table(arms: Mapping[str, Arm]) -> str:
    """A protocol's table of arms."""
    rows = []
    for name, arm in arms.items():
        place = RATES.index(arm.rate)
        first = ", ".join(f"{rate:g}" for rate in RATES[place - 1 : place + 2])
        extra = [f"α / r = {arm.scaling:g}"] if arm.scaling != 1 else []
        extra += [f"decoupled decay toward the start, {arm.pull:g}"] if arm.pull else []
        rows.append([f"`{name}`", arm.title, first, ", ".join(extra)])
    return markdown(["arm", "what it trains", "first rates", ""], rows)


def targets_table(design: Design) -> str:
    """A protocol's table of targets."""
    rows = [[task, str(steps), *(f"{value:g}" for value in found)] for (task, steps), found in design.targets.items()]
    return markdown(["new task", "steps", "easiest", "middle", "hardest"], rows)


def _fixed(text: Path) -> str:
    return text.read_text(encoding="utf-8").partition(_CHANGES)[0]
