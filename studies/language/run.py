"""Collect runs of PROTOCOL.md in the background: ``make study-language``, for as long as the machine is free.

    python -m studies.language.run              add runs until none is left; killed at any time, the next call goes on
    python -m studies.language.run --how-far    what is there, and what remains
    python -m studies.language.run --pause      all runners wait before their next step, within seconds
    python -m studies.language.run --resume     they go on

Several runners share a folder: each run is made by one of them. A run takes about 9 minutes of one core with 60 steps
and 18 with 240. ``STUDY_THREADS`` sets the threads of a runner. With ``--gpu`` the model is on a GPU, and ``--model``
names a folder of another causal language model, whose rows go into a folder of their own.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from ipca._atomic import write_atomic
from studies.language import model as models
from studies.language.design import Design, Run, grid
from studies.language.frontier import along_scale
from studies.language.protocol import PLAN, REFERENCE, protocol_sha256, with_targets
from studies.language.rows import RESULTS, Rows
from studies.language.texts import archive_path, draw_samples, task_texts
from studies.language.training import Study, train_run

_SEED_OF_SAMPLES = 0


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
            tqdm.write("paused; go on with: python -m studies.language.run --resume")
        while self._paused.exists():
            time.sleep(1)

    def took(self, run: Run, seconds: float) -> None:
        """Note the CPU seconds of a run."""
        write_atomic(self._seconds / run.key, f"{seconds:.1f}".encode())

    def mean_seconds(self, steps: int) -> float | None:
        """The mean CPU seconds of the runs of ``steps`` steps that were made here."""
        found = [float(path.read_text()) for path in self._seconds.glob(f"*-{steps}-*")]
        return sum(found) / len(found) if found else None


def collect(study: Study, rows: Rows, runners: Runners, limit: int | None = None) -> int:
    """Make runs in the protocol's order until none is left, or ``limit`` of them; returns their number.

    Raises:
        ValueError: the folder holds rows of another protocol or model.
    """
    check(study, rows)
    made = 0
    while made != limit and _make_next(study, rows, runners):
        made += 1
    return made


def _make_next(study: Study, rows: Rows, runners: Runners) -> bool:
    """Make the first run that is neither complete nor another runner's; False if there is none."""
    for run in study.design.order(grids(study.design, rows)):
        if rows.has(run):
            continue
        with runners.claim(run.key) as mine:
            if mine and not rows.has(run):  # it may have been completed since
                began = time.process_time()
                train_run(study, run, rows, runners.wait)
                runners.took(run, time.process_time() - began)
                return True
    return False


def grids(design: Design, rows: Rows) -> dict[tuple[str, int, str], tuple[float, ...]]:
    """The rates of each task, length and arm that the rows at hand ask for."""
    scores: dict[tuple[str, int, str], dict[float, dict[int, float | None]]] = {cell: {} for cell in design.cells()}
    for run, lines in rows.runs():
        cell = (run.task, run.steps, run.arm)
        if cell in scores:
            curve = along_scale(lines, "kl_samples", design.scales)
            score = None if curve is None else curve.when(design.targets[run.task, run.steps][1])
            scores[cell].setdefault(run.rate, {})[run.seed] = score
    return {cell: grid(cell[2], found) for cell, found in scores.items()}


def check(study: Study, rows: Rows) -> None:
    """Raise ValueError if ``rows`` holds a line of another protocol, model or text."""
    texts = {task: texts.sha256()[:12] for task, texts in study.texts.items()}
    for run, lines in rows.runs():
        wanted = {**study.hashes, "text": texts.get(run.task)}
        differ = [name for name, value in wanted.items() if lines[0].get(name) != value]
        if differ:
            raise ValueError(
                f"{rows.folder} holds runs of another {' and '.join(differ)}, such as {run.key}; its rows cannot be "
                "mixed with new ones. Move the folder away, or go back to the version that made it."
            )


def how_far(design: Design, rows: Rows, runners: Runners) -> str:
    """A table of complete and planned runs by length, task and arm, and the hours that remain."""
    planned = list(design.order(grids(design, rows)))
    lines = [f"{'steps':>5}  {'task':8}{'arm':22}{'runs':>9}   rates, each with its complete seeds"]
    for steps, task, arm in dict.fromkeys((run.steps, run.task, run.arm) for run in planned):
        cell = [run for run in planned if (run.steps, run.task, run.arm) == (steps, task, arm)]
        done = [run for run in cell if rows.has(run)]
        seeds = {rate: sum(run.rate == rate for run in done) for rate in sorted({run.rate for run in cell})}
        rates = ", ".join(f"{rate:g}: {count}" for rate, count in seeds.items() if count)
        lines.append(f"{steps:5}  {task:8}{arm:22}{len(done):4}/{len(cell):<4}   {rates}")
    left = [run for run in planned if not rows.has(run)]
    hours = [(runners.mean_seconds(run.steps) or 9.0 * run.steps) / 3600 for run in left]
    busy = [run.key for run in left if runners.is_claimed(run.key)]
    lines.append(f"{len(planned) - len(left)} of {len(planned)} runs; about {sum(hours):.0f} core hours remain")
    lines.append(f"at work: {', '.join(busy) or 'nobody'}")
    return "\n".join(lines)


def open_study(folder: Path | None, results: Path, work: Path, device: str) -> tuple[Study, Rows]:
    """The study of the model in ``folder``, SmolLM2 by default, with the folder of its rows.

    For another model the runs that fix its targets are made first.

    Raises:
        FileNotFoundError, ValueError, OSError, ImportError: the model or a text cannot be loaded.
    """
    name = models.NAME if folder is None else folder.name
    folder = folder or models.model_folder()
    base, tokenizer = models.load_model(folder, device), models.load_tokenizer(folder)
    model_hash = models.weights_sha256(base)[:12]
    work, rows = work / name, Rows(results / name)
    samples = rows.folder / "samples.json"
    runners = Runners(work)
    with runners.claim("samples", wait=True):
        if not samples.exists():
            found = {"model": model_hash, "ids": draw_samples(base, _SEED_OF_SAMPLES).tolist()}
            rows.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(samples, json.dumps(found).encode())
    drawn: dict[str, Any] = json.loads(samples.read_text())

    def tokenize(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids

    texts = task_texts(tokenize, archive_path(), torch.tensor(drawn["ids"]))
    study = Study(PLAN, base, texts, work, {"model": model_hash})
    reference = reference_of(rows)
    for wait in (False, True):  # first what nobody makes, then what others make
        for run in REFERENCE:
            with runners.claim(run.key, wait=wait) as mine:
                if mine and not reference.has(run):
                    train_run(study, run, reference, runners.wait)
    design = with_targets(reference)
    assert design is not None
    return replace(study, design=design, hashes={"protocol": protocol_sha256()[:12], **study.hashes}), rows


def reference_of(rows: Rows) -> Rows:
    """The rows of the runs that fix the targets of the same model."""
    return Rows(rows.folder / "reference")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command-line entry point."""
    args = _parser().parse_args(arguments)
    name = models.NAME if args.model is None else args.model.name
    runners = Runners(args.work / name)
    if args.pause or args.resume:
        runners.pause(args.pause)
        return
    if args.how_far:
        rows = Rows(args.results / name)
        design = with_targets(reference_of(rows))
        print("the runs that fix the targets come first" if design is None else how_far(design, rows, runners))
        return
    torch.set_num_threads(int(os.environ.get("STUDY_THREADS") or 1))
    try:
        study, rows = open_study(args.model, args.results, args.work, "cuda" if args.gpu else "cpu")
        made = collect(study, rows, runners, args.limit)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(f"{made} runs made; report them with: make study-page")


def _lock(file: TextIO, wait: bool) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--results", type=Path, default=RESULTS, help="folder of the rows (default: results beside this file)")
    add("--work", type=Path, default=Path("study-out/language"), help="folder of caches and unfinished runs")
    add("--model", type=Path, help="folder of another causal language model (default: SmolLM2-135M)")
    add("--gpu", action="store_true", help="train on a GPU")
    add("--limit", type=int, help="stop after this many runs")
    does = parser.add_mutually_exclusive_group()
    does.add_argument("--how-far", action="store_true", help="print what is complete and what remains")
    does.add_argument("--pause", action="store_true", help="let all runners wait")
    does.add_argument("--resume", action="store_true", help="let them go on")
    return parser


if __name__ == "__main__":
    main()
