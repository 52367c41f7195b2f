"""Run a sweep: schedule its trials, resume from its folder, and write the table and the report."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

from ipca._atomic import locked_folder
from ipca._error_note import error_note
from ipca._version import __version__
from ipca.lab.baselines.adapt import check_layers, check_settings
from ipca.lab.baselines.methods import needs_inputs
from ipca.lab.baselines.peft_methods import PEFT_METHODS, require_peft
from ipca.lab.sweep.decompose import auto_settings, cache_windows, find_windows
from ipca.lab.sweep.device import check_devices, device_name, device_of, num_threads, use_device
from ipca.lab.sweep.plan import (
    COMPARISONS,
    DEFAULT_METHODS,
    WINDOWS,
    Grid,
    count_of,
    require_optuna,
    steps_of,
    tuned_trials,
)
from ipca.lab.sweep.report.page import require_packages, write_report
from ipca.lab.sweep.schedule import Plan, make_plan
from ipca.lab.sweep.store import AUTO, SETTINGS, Store, read_settings
from ipca.lab.sweep.task import Task, load_task
from ipca.lab.sweep.trial import Row, Trial, base_row, build_base, seed_everything
from ipca.lab.sweep.workers import Work, WorkerPool, check_sendable, model_sha256
from ipca.model.settings import AdapterSettings
from ipca.svd import SpectralCache
from ipca.window import Window

_TABLE_SECONDS = 60.0
"""The table is written at least this often while trials run."""


def run(
    task: Task | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    windows: Sequence[Window | str | float] = WINDOWS,
    lrs: Sequence[float] = (5e-4, 1e-3, 2e-3),
    seeds: int | Sequence[int] = 8,
    methods: Sequence[str] = DEFAULT_METHODS,
    comparisons: Sequence[str] = COMPARISONS,
    early: int = 10,
    checkpoints: Sequence[int] = (),
    tune: int = 0,
    workers: int = 1,
    threads: int = 1,
    devices: Sequence[str] = (),
    progress: bool = True,
    report: bool = True,
    accept_task_change: bool = False,
    overwrite: bool = False,
) -> list[Row]:
    """Train and evaluate every window at every rate with every seed, and plain LoRA and controls.

    Writes ``rows.csv``, ``settings.json``, ``seconds.csv`` and ``report.html`` to ``out``. Interrupted sweeps resume;
    results are bit-reproducible: the rows have the same bits for the same task, machine, versions and number of
    threads, in any order of the trials. The table is at most one minute behind. Windows, rates, seeds and methods can
    be added later; finished trials are not run again.

    On a CUDA device, training and evaluation run with ``torch.use_deterministic_algorithms(True)`` and
    ``CUBLAS_WORKSPACE_CONFIG`` set: an operation without a deterministic implementation stops the sweep with torch's
    error. A task that needs such an operation can call ``torch.use_deterministic_algorithms(False)`` in ``train`` and
    ``evaluate``; its rows may then differ in the last digits. If this process has already used cuBLAS, set the variable
    when it starts.

    Args:
        task: a :class:`Task`, or a Python file whose ``task()`` returns one.
        out: the sweep's folder.
        windows: each a :class:`ipca.Window` of the settings' rank, a fraction, or another text form. Each layer is
            decomposed once for all of them.
        lrs: learning rates of the adapter.
        seeds: their number, counted from 0, or a list. Exact tests need enough of them: 5 decide little, 8 suffice for
            every test of the report.
        methods: in addition to the windows, see :func:`ipca.lab.baselines.apply`.
        comparisons: ``"same"`` rate; ``"sqrt-sigma"``, rates of each layer divided by √σ of its window
            (:func:`ipca.param_groups`); ``"update"``, rates at which the first ``early`` steps change the weights as
            much as those of the reference window. The best-tuned rate is chosen among ``lrs`` by the report.
        early: number of optimizer steps after which ``early_update`` is measured.
        checkpoints: optimizer steps after which the model is evaluated during training, for the frontier; runs that
            end earlier have no row for them.
        tune: number of rounds in which Optuna searches for each method's best rate, on separate seeds; 0 for none. The
            rows at the rates found have the comparison ``"tuned"``.
        workers: number of processes; 1 uses this process.
        threads: torch threads of each process.
        devices: such as ``("cuda:0", "cuda:1")``, assigned to the workers in turn; workers may share a device. All of
            one type, since rows differ between types. With several workers each sees only its own GPU, as ``cuda:0``.
            If empty, the model stays on the device ``build`` puts it on.
        progress: show progress bars.
        report: write ``report.html``, which needs the extra ``sweep``.
        accept_task_change: keep the finished trials of another text of the task file. A text that differs only in
            comments and layout needs no permission.
        overwrite: delete the trials of another sweep in ``out``.

    Warns:
        RuntimeWarning: a trial ended before one of the ``checkpoints``.

    Returns:
        The rows as dictionaries: the untrained model's, then each trial's in the order of the grid.

    Raises:
        TypeError, ValueError: an invalid option, task or layer, an untrained model that cannot be evaluated, or ``out``
            belongs to another sweep; ``out`` is unchanged.
        ImportError: a package for the report or for tuning is missing; ``out`` is unchanged.
        RuntimeError: another sweep runs in ``out``, which is unchanged; or a worker process was killed. Finished trials
            are kept.
        Exception: any error raised by the task in a trial. Finished trials are kept.
    """
    made, source = _read_task(task)
    grid = Grid.of(windows, lrs, seeds, methods, comparisons, made.settings.window, made.settings.rank)
    steps = steps_of(checkpoints)
    early, workers, threads = count_of("early", early), count_of("workers", workers), count_of("threads", threads)
    tune = count_of("tune", tune, least=0)
    _check_methods(made, grid)
    _check_environment(made, source, workers, devices, tune, report)
    folder = _folder(out)
    with num_threads(threads), locked_folder(folder, "sweep runs"):
        use_device(devices[0] if devices else None)
        base = build_base(made)
        windows_of = find_windows(base, made.settings, ((trial.method, trial.seed) for trial in grid.direct_trials()))
        check_layers(base, grid.methods, made.settings)
        digest = model_sha256(base)
        base = base.to(devices[0]) if devices else base
        first = base_row(made, base)
        model = {"model_sha256": digest, "device": device_name(device_of(base))}
        fixed = {**_fixed_settings(made, source, early, steps, threads), **model}
        options = {"accept_task_change": accept_task_change, "overwrite": overwrite}
        store = Store(folder, fixed, source=_text(source), **options)
        plan = make_plan(grid, tune, workers, store)
        if progress:
            tqdm.write(plan.line(), file=sys.stderr)
        store.prepare()
        cache_windows(base, made.settings, windows_of, SpectralCache(store.spectra), progress=progress)
        record = {**grid.record(), "labels": dict(made.labels), "rank": made.settings.rank}
        if not (folder / SETTINGS).exists():
            store.describe(record)  # before any other file, by which a sweep that was killed is known
        auto = _auto_settings(base, made, store, progress) if "auto" in grid.methods else None
        store.describe(record)
        work = Work(source or made, store.spectra, early, steps, digest, threads, auto)
        with (
            contextlib.redirect_stdout(DummyTqdmFile(sys.stdout)),  # what the task prints goes above the bar
            WorkerPool(work, workers, devices, base) as pool,
            tqdm(desc="Trainings", total=plan.total, unit="run", smoothing=0, disable=not progress) as bar,
        ):
            runner = _Runner(store, pool, first, bar, steps)
            rows = runner.run(grid.direct_trials())
            runner.run_stage(plan, "update", grid.update_trials(rows))
            if tune:
                runner.run_stage(plan, "tuned", tuned_trials(grid, tune, runner.run_untabled))
        if report:
            write_report(store.folder)
        return runner.rows


def plan_sweep(
    task: Task | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    windows: Sequence[Window | str | float] = WINDOWS,
    lrs: Sequence[float] = (5e-4, 1e-3, 2e-3),
    seeds: int | Sequence[int] = 8,
    methods: Sequence[str] = DEFAULT_METHODS,
    comparisons: Sequence[str] = COMPARISONS,
    early: int = 10,
    checkpoints: Sequence[int] = (),
    tune: int = 0,
    workers: int = 1,
    threads: int = 1,
    accept_task_change: bool = False,
    overwrite: bool = False,
) -> Plan:
    """The trainings that :func:`run` with the same arguments would do, and their time; nothing is built or written.

    Without a model it is not known whether every window fits into every layer, and whether ``build`` gives the model
    of the trainings in ``out``; :func:`run` checks both before it starts.

    Args:
        task, out, windows, lrs, seeds, methods, comparisons, early, checkpoints, tune: as for :func:`run`.
        workers, threads, accept_task_change, overwrite: likewise.

    Returns:
        A table by method and stage. Its time is that of the finished trainings in ``out``; None where there are none.

    Raises:
        TypeError, ValueError: as :func:`run`.
        ImportError: a package for tuning is missing.
    """
    made, source = _read_task(task)
    grid = Grid.of(windows, lrs, seeds, methods, comparisons, made.settings.window, made.settings.rank)
    steps = steps_of(checkpoints)
    early, workers, threads = count_of("early", early), count_of("workers", workers), count_of("threads", threads)
    tune = count_of("tune", tune, least=0)
    _check_methods(made, grid)
    folder = _folder(out)
    then = {} if overwrite else read_settings(folder / SETTINGS).get("fixed", {})
    model = {name: then.get(name) for name in ("model_sha256", "device")}
    fixed = {**_fixed_settings(made, source, early, steps, threads), **model}
    options = {"accept_task_change": accept_task_change, "overwrite": overwrite}
    return make_plan(grid, tune, workers, Store(folder, fixed, source=_text(source), **options))


def _read_task(task: Task | str | os.PathLike[str]) -> tuple[Task, Path | None]:
    """The task, and its file if it has one."""
    if isinstance(task, Task):
        return task, None
    if not isinstance(task, str | os.PathLike):
        raise TypeError(f"task must be an ipca.lab.sweep.Task or a Python file with a function task(), got {task!r}.")
    return load_task(Path(task)), Path(task).absolute()


def _folder(out: str | os.PathLike[str]) -> Path:
    """The sweep's folder, absolute since a task may change the current one."""
    folder = Path(out).absolute()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; a sweep needs a folder.")
    return folder


def _text(source: Path | None) -> str | None:
    return None if source is None else source.read_text(encoding="utf-8", errors="replace")


class _Runner:
    """Runs trials, each at most once in the life of the folder, and keeps the table up to date."""

    def __init__(self, store: Store, pool: WorkerPool, first: Row, bar: tqdm, checkpoints: Sequence[int]) -> None:
        self.store, self.pool, self.first, self.bar = store, pool, first, bar
        self.unreached = set(checkpoints)
        self.trials: list[Trial] = []
        self.rows: list[Row] = []
        self.written = 0.0

    def run(self, trials: Sequence[Trial]) -> list[Row]:
        """Run ``trials``, add them to the table, and return the rows of all trials so far."""
        self.trials += trials
        self._write_table()
        try:
            self.run_untabled(trials)
        finally:
            self._write_table()
        return self.rows

    def run_stage(self, plan: Plan, stage: str, trials: Sequence[Trial]) -> None:
        """:meth:`run` the trials of a stage whose number was an upper bound in ``plan``."""
        self.bar.total -= sum(plan.counts.get(stage, {}).values()) - len(trials)
        self.run(trials)

    def run_untabled(self, trials: Sequence[Trial]) -> list[Row]:
        """Run ``trials`` and return their rows, without adding them to the table."""
        # Seed by seed, so that unfinished sweeps can be compared within seeds.
        todo = sorted((t for t in trials if self.store.get(t.key) is None), key=lambda trial: trial.seed)
        self._count_finished(len(trials) - len(todo))
        for trial, rows, seconds in self.pool.run(todo) if todo else ():
            self.store.put(trial.key, rows, seconds)
            self.bar.update()
            self._warn_unreached(trial, rows)
            if time.monotonic() - self.written > _TABLE_SECONDS:
                self._write_table()
        return [row for trial in trials for row in self.store.get(trial.key) or ()]

    def _count_finished(self, trials: int) -> None:
        """Move the bar on without a change of its speed, which is that of the trials of this run."""
        if trials and not self.bar.disable:
            self.bar.initial += trials
            self.bar.n += trials
            self.bar.refresh()

    def _warn_unreached(self, trial: Trial, rows: Sequence[Row]) -> None:
        """Warn, once for each, of checkpoints that ``trial`` has not reached."""
        missing = sorted(self.unreached - {row["step"] for row in rows})
        if missing and rows[-1]["early_update"] is not None:
            self.unreached -= set(missing)
            warnings.warn(
                f"checkpoints {', '.join(map(str, missing))} are beyond the last optimizer step of {trial}, which has "
                "no rows for them; choose smaller ones, or train longer.",
                RuntimeWarning,
                stacklevel=5,
            )

    def _write_table(self) -> None:
        self.rows = self.store.table(self.first, self.trials)
        self.written = time.monotonic()


def _check_methods(task: Task, grid: Grid) -> None:
    needing = [method for method in grid.all_methods() if needs_inputs(method)]
    if needing and task.calibration is None:
        raise ValueError(f"the method {needing[0]!r} needs the task's `calibration`, which returns unlabeled batches.")
    for method in grid.methods:
        check_settings(method, task.settings)
        if method in PEFT_METHODS:
            require_peft(method)


def _check_environment(
    task: Task, source: Path | None, workers: int, devices: Sequence[str], tune: int, report: bool
) -> None:
    """Raise if this machine lacks a device or a package, or the task cannot be sent to other processes."""
    check_devices(devices)
    if source is None and workers > 1:
        check_sendable(task)
    if report:
        require_packages()
    if tune:
        require_optuna()


def _auto_settings(base: nn.Module, task: Task, store: Store, progress: bool) -> AdapterSettings:
    """The settings of the method ``"auto"``."""
    assert task.calibration is not None  # checked by _check_methods
    cache = SpectralCache(store.spectra)
    seed_everything(0)
    with error_note("While choosing the windows of 'auto'."):
        return auto_settings(base, task.settings, task.calibration, store.folder / AUTO, cache, progress=progress)


def _fixed_settings(
    task: Task, source: Path | None, early: int, checkpoints: Sequence[int], threads: int
) -> dict[str, Any]:
    """The settings that all rows of a sweep share, besides its model and device; rows of others are of other sweeps."""
    return {
        "settings": asdict(task.settings),
        "task_sha256": None if source is None else hashlib.sha256(source.read_bytes()).hexdigest(),
        "early": early,
        "checkpoints": list(checkpoints),
        "threads": threads,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "ipca": __version__},
    }
