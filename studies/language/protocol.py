"""PROTOCOL.md in code: its numbers, the runs that fix its targets, and the hash that ties rows to it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from studies.language.design import ARMS, RATES, Design, Run, waves
from studies.language.frontier import along_scale
from studies.language.rows import Rows
from studies.page import markdown

TEXT = Path(__file__).resolve().parent / "PROTOCOL.md"
_CHANGES = "\n## Changes"
_LENGTHS = (60, 240)
PLAN = Design(tasks=("german", "cpp"), waves=waves(*_LENGTHS, others=tuple(ARMS)[4:]), targets={})
"""Everything but the targets."""
REFERENCE = tuple(Run(task, steps, "lora", ARMS["lora"].rate, 1000) for steps in _LENGTHS for task in PLAN.tasks)
"""Runs that fix the targets and count for nothing else."""
SHARES = (0.5, 0.7, 0.85)
"""Of the improvement of a reference run."""


def with_targets(reference: Rows) -> Design | None:
    """:data:`PLAN` with the targets that the rows of :data:`REFERENCE` fix; None where a run of them is missing.

    A target is the base's cross-entropy minus a share of the reference run's improvement at its best λ, to 0.01.
    """
    lines = dict(reference.runs())
    if not set(REFERENCE) <= set(lines):
        return None
    targets = {}
    for run in REFERENCE:
        curve = along_scale(lines[run], "kl_samples", PLAN.scales)
        if curve is None:
            raise ValueError(f"{run.key} diverged and fixes no target")
        first, second, third = (round(curve.new[0] - share * (curve.new[0] - curve.lowest), 2) for share in SHARES)
        targets[run.task, run.steps] = (first, second, third)
    return replace(PLAN, targets=targets)


def protocol_sha256() -> str:
    """A hash of the protocol's text but for its list of changes, and of the numbers in code."""
    text = TEXT.read_text(encoding="utf-8").partition(_CHANGES)[0]
    return hashlib.sha256(f"{text}\n{PLAN!r}\n{ARMS!r}\n{RATES!r}\n{REFERENCE!r}\n{SHARES!r}".encode()).hexdigest()


def arms_table() -> str:
    """The protocol's table of arms."""
    rows = []
    for name, arm in ARMS.items():
        place = RATES.index(arm.rate)
        first = ", ".join(f"{rate:g}" for rate in RATES[place - 1 : place + 2])
        extra = [f"α / r = {arm.scaling:g}"] if arm.scaling != 1 else []
        extra += [f"decoupled decay toward the start, {arm.pull:g}"] if arm.pull else []
        rows.append([f"`{name}`", arm.title, first, ", ".join(extra)])
    return markdown(["arm", "what it trains", "first rates", ""], rows)


def targets_table(design: Design) -> str:
    """The protocol's table of targets."""
    rows = [[task, str(steps), *(f"{value:g}" for value in found)] for (task, steps), found in design.targets.items()]
    return markdown(["new task", "steps", "easiest", "middle", "hardest"], rows)
