"""Collect a protocol's runs in the background, for as long as the machine is free.

Runs are added until none is left; killed at any time, the next call goes on. Several runners share a folder: each run
is made by one of them. ``STUDY_THREADS`` sets the threads of a runner.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ipca._atomic import write_atomic
from ipca._hashing import tensor_sha256
from studies.frontier.curve import along_scale
from studies.frontier.design import Design, Run, grid
from studies.frontier.material import Task
from studies.frontier.protocol import Protocol
from studies.frontier.rows import Rows
from studies.frontier.training import Study, train_run


@dataclass(frozen=True)
class Material:
    """A model, and what its tasks are made from.

    Attributes:
        name: of the folder of its rows.
        base: the pretrained model.
        draw: draws sequences ``(M, length)`` from the base; called once, they are kept beside the rows. None if there
            are none.
        tasks: the tasks by name, from those sequences.
    """

    name: str
    base: nn.Module
    draw: Callable[[], Tensor] | None
    tasks: Callable[[Tensor], Mapping[str, Task]]


TOLERANCE = 0.05
"""Relative deviation that other versions and processors may cause in a run that is made again."""
Load = Callable[[Path | None, str], Material]
"""The material of the model in a folder, or of the study's own model, on a device."""


class Runners:
    """What the runners of one folder share: which run is whose, whether they pause, and how long runs took.

    A run belongs to the process that holds the lock of its file, so that it is free again when that process is killed.
    """

    def __init__(self, work: Path) -> None:
        self._claims, self._seconds, self._paused = work / "claims", work / "seconds", work / "paused"
        for folder in (self._claims, self._seconds):
            folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def claim(self, name: str, *, wait: bool = False) -> Iterator[bool]:
        """Within the block, whether ``name`` is this runner's; with ``wait`` it is, sooner or later."""
        with (self._claims / name).open("w") as file:
            yield _lock(file, wait)

    def is_claimed(self, name: str) -> bool:
        """Whether a runner is at work on ``name``."""
        if not (self._claims / name).exists():
            return False
        with self.claim(name) as free:
            return not free

    def pause(self, paused: bool) -> None:
        """Let all runners wait, or go on."""
        if paused:
            self._paused.touch()
        else:
            self._paused.unlink(missing_ok=True)

    def wait(self) -> None:
        """Return when the runners are not paused."""
        if self._paused.exists():
            tqdm.write("paused; go on with --resume")
        while self._paused.exists():
            time.sleep(1)

    def took(self, run: Run, seconds: float) -> None:
        """Note the CPU seconds of a run."""
        write_atomic(self._seconds / run.key, f"{seconds:.1f}".encode())

    def mean_seconds(self, steps: int) -> float | None:
        """The mean CPU seconds of the runs of ``steps`` steps that were made here."""
        found = [float(path.read_text()) for path in self._seconds.glob(f"*-{steps}-*")]
        return sum(found) / len(found) if found else None


@dataclass(frozen=True)
class Part:
    """Which runs are made; of what is empty, all.

    Attributes:
        tasks, steps, arms: those of the runs.
        center: only the first rate of each arm.
    """

    tasks: tuple[str, ...] = ()
    steps: tuple[int, ...] = ()
    arms: tuple[str, ...] = ()
    center: bool = False

    def of(self, runs: Iterable[Run], design: Design) -> Iterator[Run]:
        """Those of ``runs`` that are made, in their order."""
        for run in runs:
            rates = (design.arms[run.arm].rate,) if self.center else ()
            chosen = ((run.task, self.tasks), (run.steps, self.steps), (run.arm, self.arms), (run.rate, rates))
            if all(not wanted or found in wanted for found, wanted in chosen):
                yield run

    def check(self, design: Design) -> None:
        """Raise ValueError if ``design`` has no such task, length or arm."""
        cells = list(design.cells())
        for kind, wanted, place in (("task", self.tasks, 0), ("length", self.steps, 1), ("arm", self.arms, 2)):
            there = list(dict.fromkeys(cell[place] for cell in cells))
            if unknown := [name for name in wanted if name not in there]:
                raise ValueError(f"no {kind} {unknown[0]} in this study; it has {', '.join(map(str, there))}")


ALL = Part()


def collect(study: Study, rows: Rows, runners: Runners, limit: int | None = None, part: Part = ALL) -> int:
    """Make runs in the protocol's order until none is left, or ``limit`` of them; returns their number.

    Raises:
        ValueError: the folder holds rows of another protocol, model or task; or as :meth:`Part.check`.
    """
    part.check(study.design)
    check(study, rows)
    made = 0
    while made != limit and _make_next(study, rows, runners, part):
        made += 1
    return made


def _make_next(study: Study, rows: Rows, runners: Runners, part: Part) -> bool:
    """Make the first run of ``part`` that is neither complete nor another runner's; False if there is none."""
    for run in part.of(study.design.order(grids(study.design, rows)), study.design):
        if rows.has(run):
            continue
        with runners.claim(run.key) as mine:
            if mine and not rows.has(run):  # it may have been completed since
                began = time.process_time()
                train_run(study, run, rows, runners.wait)
                runners.took(run, time.process_time() - began)
                return True
    return False


def again(study: Study, rows: Rows, count: int, part: Part = ALL) -> float:
    """Make the first ``count`` recorded runs of ``part`` again; the largest relative deviation.

    Raises:
        ValueError: another protocol, model or task; fewer runs; or cross-entropy or divergence deviate by more than
            :data:`TOLERANCE`.
    """
    check(study, rows)
    known, largest = dict(rows.runs()), 0.0
    planned = part.of(study.design.order(grids(study.design, rows)), study.design)
    fine = [run for run in planned if all(line["status"] == "ok" for line in known.get(run, [{"status": ""}]))]
    if len(fine) < count:
        raise ValueError(f"{rows.folder} holds {len(fine)} runs that can be made again, fewer than {count}.")
    with tempfile.TemporaryDirectory() as folder:
        made = Rows(Path(folder, "rows"))
        for run in fine[:count]:
            train_run(replace(study, work=Path(folder)), run, made)
        for run, lines in made.runs():
            for line, before in zip(lines[1:], known[run][1:], strict=True):
                for metric in ("ce_new", study.design.metric):
                    deviation = abs(line[metric] / before[metric] - 1)
                    largest = max(largest, deviation)
                    if not deviation <= TOLERANCE:
                        raise ValueError(
                            f"{run.key}: {metric} at step {line['step']}, λ = {line['scale']:g} is {line[metric]:.4g}, "
                            f"recorded is {before[metric]:.4g}; at most {TOLERANCE:.0%} are expected of other versions."
                        )
    return largest


def grids(design: Design, rows: Rows) -> dict[tuple[str, int, str], tuple[float, ...]]:
    """The rates of each task, length and arm that the rows at hand ask for."""
    scores: dict[tuple[str, int, str], dict[float, dict[int, float | None]]] = {cell: {} for cell in design.cells()}
    for run, lines in rows.runs():
        cell = (run.task, run.steps, run.arm)
        if cell in scores:
            curve = along_scale(lines, design.metric, design.scales, root=design.root)
            score = None if curve is None else curve.when(design.targets[run.task, run.steps][1])
            scores[cell].setdefault(run.rate, {})[run.seed] = score
    return {cell: grid(design.arms[cell[2]].rate, found) for cell, found in scores.items()}


def check(study: Study, rows: Rows) -> None:
    """Raise ValueError if ``rows`` holds a line of another protocol, model or task."""
    cells = set(study.design.cells())
    for run, lines in rows.runs():
        if (run.task, run.steps, run.arm) not in cells:
            raise ValueError(f"{rows.folder} holds {run.key}, which no protocol here asks for. Move it away.")
        wanted = study.hashes_of(run)
        differ = [name for name, value in wanted.items() if lines[0].get(name) != value]
        if differ:
            raise ValueError(
                f"{rows.folder} holds runs of another {' and '.join(differ)}, such as {run.key}; its rows cannot be "
                "mixed with new ones. Move the folder away, or go back to the version that made it."
            )


def how_far(design: Design, rows: Rows, runners: Runners, seconds: float, part: Part = ALL) -> str:
    """A table of complete and planned runs by length, task and arm, and the hours that remain.

    Args:
        seconds: of a step, for lengths of which no run was made yet.
    """
    planned = list(part.of(design.order(grids(design, rows)), design))
    lines = [f"{'steps':>5}  {'task':10}{'arm':22}{'runs':>9}   rates, each with its complete seeds"]
    for steps, task, arm in dict.fromkeys((run.steps, run.task, run.arm) for run in planned):
        cell = [run for run in planned if (run.steps, run.task, run.arm) == (steps, task, arm)]
        done = [run for run in cell if rows.has(run)]
        seeds = {rate: sum(run.rate == rate for run in done) for rate in sorted({run.rate for run in cell})}
        rates = ", ".join(f"{rate:g}: {count}" for rate, count in seeds.items() if count)
        lines.append(f"{steps:5}  {task:10}{arm:22}{len(done):4}/{len(cell):<4}   {rates}")
    left = [run for run in planned if not rows.has(run)]
    hours = [(runners.mean_seconds(run.steps) or seconds * run.steps) / 3600 for run in left]
    busy = [run.key for run in left if runners.is_claimed(run.key)]
    lines.append(f"{len(planned) - len(left)} of {len(planned)} runs; about {sum(hours):.0f} core hours remain")
    lines.append(f"at work: {', '.join(busy) or 'nobody'}")
    return "\n".join(lines)


def open_study(protocol: Protocol, material: Material, results: Path, work: Path) -> tuple[Study, Rows]:
    """The study of a model, with the folder of its rows; runs that fix its targets and are missing are made first.

    Raises:
        FileNotFoundError, ValueError, OSError, ImportError: a task cannot be made.
    """
    hashes = {"model": weights_sha256(material.base)[:12]}
    work, rows = work / material.name, Rows(results / material.name)
    runners = Runners(work)
    study = Study(protocol.plan, material.base, material.tasks(_drawn(material, rows, runners, hashes)), work, hashes)
    reference = reference_of(rows)
    for wait in (False, True):  # first what nobody makes, then what others make
        for run in protocol.reference:
            with runners.claim(run.key, wait=wait) as mine:
                if mine and not reference.has(run):
                    train_run(study, run, reference, runners.wait)
    design = protocol.with_targets(reference)
    assert design is not None
    added = {arm: sha256[:12] for arm, sha256 in protocol.added_sha256().items()}
    return replace(study, design=design, hashes={"protocol": protocol.sha256()[:12], **hashes}, added=added), rows


def _drawn(material: Material, rows: Rows, runners: Runners, hashes: Mapping[str, str]) -> Tensor:
    """The sequences drawn from the base, ``(0,)`` if there are none."""
    if material.draw is None:
        return torch.empty(0)
    samples = rows.folder / "samples.json"
    with runners.claim("samples", wait=True):
        if not samples.exists():
            rows.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(samples, json.dumps({**hashes, "ids": material.draw().tolist()}).encode())
    found: dict[str, Any] = json.loads(samples.read_text())
    return torch.tensor(found["ids"])


def weights_sha256(model: nn.Module) -> str:
    """A hash of all weights."""
    parts = [f"{name} {tensor_sha256(tensor)}" for name, tensor in sorted(model.state_dict().items())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def reference_of(rows: Rows) -> Rows:
    """The rows of the runs that fix the targets of the same model."""
    return Rows(rows.folder / "reference")


def main(
    protocol: Protocol,
    load: Load,
    doc: str | None,
    arguments: Sequence[str] | None = None,
    *,
    others: Protocol | None = None,
) -> None:
    """Command-line entry point of a study.

    Args:
        load: called when runs are made.
        doc: description of the command.
        others: the protocol for other models than the study's own, if it is another one.
    """
    args = _parser(protocol, doc).parse_args(arguments)
    if args.model is not None and others is not None:
        protocol = others
    name = protocol.model if args.model is None else args.model.name
    runners = Runners(args.work / name)
    part = Part(tuple(args.tasks), tuple(args.steps), tuple(args.arms), args.first_rates)
    if args.pause or args.resume:
        runners.pause(args.pause)
        return
    try:
        part.check(protocol.extended())
    except ValueError as error:
        sys.exit(f"error: {error}")
    if args.how_far:
        rows = Rows(args.results / name)
        design = protocol.with_targets(reference_of(rows))
        far = "the runs that fix the targets come first"
        print(far if design is None else how_far(design, rows, runners, protocol.seconds, part))
        return
    torch.set_num_threads(int(os.environ.get("STUDY_THREADS") or 1))
    try:
        material = load(args.model, "cuda" if args.gpu else "cpu")
        study, rows = open_study(protocol, material, args.results, args.work)
        if args.again:
            print(f"{args.again} runs made again; largest deviation {again(study, rows, args.again, part):.2%}")
            return
        made = collect(study, rows, runners, args.limit, part)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(f"{made} runs made; report them with: make study-page")


def _lock(file: TextIO, wait: bool) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _parser(protocol: Protocol, doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    work = Path("study-out", protocol.results.parent.name)
    add("--results", type=Path, default=protocol.results, help="folder of the rows (default: the study's results)")
    add("--work", type=Path, default=work, help=f"folder of caches and unfinished runs (default: {work})")
    add("--model", type=Path, help=f"folder of another model (default: {protocol.model})")
    add("--gpu", action="store_true", help="train on a GPU")
    add("--limit", type=int, help="stop after this many runs")
    add("--again", type=int, metavar="N", help="make N recorded runs again, and compare; nothing is recorded")
    for name, kind in (("tasks", str), ("steps", int), ("arms", str)):
        add(f"--{name}", nargs="+", type=kind, default=(), help=f"only runs of these {name}, in the same order")
    add("--first-rates", action="store_true", help="only runs at the first rate of each arm")
    does = parser.add_mutually_exclusive_group()
    does.add_argument("--how-far", action="store_true", help="print what is complete and what remains")
    does.add_argument("--pause", action="store_true", help="let all runners wait before their next step")
    does.add_argument("--resume", action="store_true", help="let them go on")
    return parser
