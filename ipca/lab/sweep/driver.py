"""sweep.run: windows × learning rates × seeds beside plain LoRA and controls, into one table and one report."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ipca._version import __version__
from ipca.lab.sweep.decompose import auto_config, decompose, find_windows
from ipca.lab.sweep.device import check_devices, device_name, device_of, num_threads, use_device
from ipca.lab.sweep.plan import COMPARISONS, DEFAULT_METHODS, WINDOWS, Grid, steps_of
from ipca.lab.sweep.report import write_report
from ipca.lab.sweep.report.page import require_packages
from ipca.lab.sweep.runner import Runner
from ipca.lab.sweep.store import AUTO, Store
from ipca.lab.sweep.task import Task, load_task
from ipca.lab.sweep.trial import Row, base_row, build_base, seed_everything
from ipca.lab.sweep.tune import require_optuna, tuned_trials
from ipca.lab.sweep.workers import Work, WorkerPool, check_sendable, model_sha256
from ipca.model.settings import AdapterSettings
from ipca.svd import SpectralCache
from ipca.window import Window


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
) -> list[Row]:
    """Train every window at every rate with every seed, beside plain LoRA and controls, and judge each.

    Writes ``rows.csv``, ``settings.json``, ``seconds.csv`` and ``report.html`` below ``out``. A sweep that was stopped
    or killed goes on where it was when it is run again, and its table holds all but the last minute; a complete one
    only makes its table and report again. More windows, rates, seeds or methods may be asked for later: what is done is
    not run again. The rows have the same bits for the same task, machine, versions and number of threads, in whatever
    order the trials ran.

    On a CUDA device training and judging run with ``torch.use_deterministic_algorithms(True)`` and
    ``CUBLAS_WORKSPACE_CONFIG`` set: an operation that has no such implementation stops the sweep with torch's words. A
    task that cannot do without it says ``torch.use_deterministic_algorithms(False)`` in ``train`` and ``evaluate``, and
    its rows may differ in their last digits. Where this process has used cuBLAS before, set the variable at its start.

    Args:
        task: a :class:`Task`, or a Python file whose ``task()`` returns one.
        out: the sweep's folder.
        windows: each a :class:`ipca.Window` of the config's rank, a fraction, or another text form. Each layer is
            decomposed once for all.
        lrs: learning rates of the adapter.
        seeds: how many, counted from 0, or which. Exact tests over 5 cannot decide much; 8 serve all the questions.
        methods: besides the windows, see :func:`ipca.lab.baselines.apply`.
        comparisons: ``"same"`` rate; ``"sqrt-sigma"``, rates of each layer divided by √σ of its window
            (:func:`ipca.param_groups`); ``"update"``, rates at which the first ``early`` steps change the weights as
            much as the reference window's do. The best-tuned rate is chosen among ``lrs`` when the report is made.
        early: optimizer steps after which ``early_update`` is measured.
        checkpoints: optimizer steps after which a model is judged on the way, for the frontier; a run that is over
            before has no row for them.
        tune: rounds in which Optuna looks for each method's best rate, on seeds of its own; 0 for none. The rows at the
            rates it finds have the comparison ``"tuned"``.
        workers: processes side by side; 1 is this one.
        threads: of each process.
        devices: such as ``("cuda:0", "cuda:1")``, handed to the workers in turn, so that several may share one; of one
            type, as rows of another differ. Each of several workers sees its GPU alone, as ``cuda:0``. Empty: where
            ``build`` puts the model.
        progress: show progress bars.
        report: write ``report.html``, which needs the extra ``plot``.

    Returns:
        The rows as dictionaries: the untrained model's, then each trial's in the grid's order.

    Raises:
        TypeError, ValueError: a bad option, task or layer, an untrained model that cannot be judged, or ``out`` holds
            another sweep; what it holds stays.
        ImportError: a package for the report or for tuning is missing; what ``out`` holds stays.
        RuntimeError: a worker process was killed. Trials that are done stay done.
        Exception: what the task raises in a trial. Trials that are done stay done.
    """
    if not isinstance(task, Task | str | os.PathLike):
        raise TypeError(f"task must be an ipca.lab.sweep.Task or a Python file with a function task(), got {task!r}.")
    made = task if isinstance(task, Task) else load_task(Path(task))
    source = None if isinstance(task, Task) else Path(task).absolute()
    grid = Grid.of(windows, lrs, seeds, methods, comparisons, made.config.window, made.config.rank)
    judged_at = steps_of(checkpoints)
    _check({"early": early, "workers": workers, "threads": threads}, made, grid)
    _check_here(made, source, workers, devices, tune, report)
    with num_threads(threads):
        use_device(devices[0] if devices else None)
        base = build_base(made)
        windows_of = find_windows(base, made.config, ((trial.method, trial.seed) for trial in grid.direct_trials()))
        digest = model_sha256(base)
        base = base.to(devices[0]) if devices else base
        first = base_row(made, base)
        store = Store(Path(out), _fixed(made, source, digest, early, judged_at, threads, device_of(base)))
        decompose(base, made.config, windows_of, SpectralCache(store.spectra), progress=progress)
        auto = _find_auto(base, made, store, progress) if "auto" in grid.methods else None
        store.describe({**grid.record(), "labels": dict(made.labels), "rank": made.config.rank})
        work = Work(source or made, store.spectra, early, judged_at, digest, threads, auto)
        with (
            WorkerPool(work, workers, devices, base) as crew,
            tqdm(desc="Trials", unit="trial", disable=not progress) as bar,
        ):
            runner = Runner(store, crew, first, bar)
            rows = runner.run(grid.direct_trials())
            runner.run(grid.update_trials(rows))
            if tune:
                runner.run(tuned_trials(grid, tune, runner.aside))
        if report:
            write_report(store.folder)
        return runner.rows


def _check(counts: dict[str, int], task: Task, grid: Grid) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if "auto" in grid.methods and task.calibration is None:
        raise ValueError("the method 'auto' needs the task's `calibration`, which gives unlabeled batches.")


def _check_here(task: Task, source: Path | None, workers: int, devices: Sequence[str], tune: int, report: bool) -> None:
    """Raise where this machine lacks a device or a package, or other processes could not be told the task."""
    check_devices(devices)
    if source is None and workers > 1:
        check_sendable(task)
    if report:
        require_packages()
    if tune:
        require_optuna()


def _find_auto(base: nn.Module, task: Task, store: Store, progress: bool) -> AdapterSettings:
    """The configuration that ``"auto"`` stands for."""
    assert task.calibration is not None  # which `_check` has seen to
    cache = SpectralCache(store.spectra)
    seed_everything(0)
    return auto_config(base, task.config, task.calibration, store.folder / AUTO, cache, progress=progress)


def _fixed(
    task: Task,
    source: Path | None,
    digest: str,
    early: int,
    checkpoints: Sequence[int],
    threads: int,
    device: torch.device,
) -> dict[str, Any]:
    """What every row of a sweep shares; rows that differ in any of it are no rows of one sweep."""
    return {
        "config": asdict(task.config),
        "model_sha256": digest,
        "task_sha256": None if source is None else hashlib.sha256(source.read_bytes()).hexdigest(),
        "early": early,
        "checkpoints": list(checkpoints),
        "threads": threads,
        "device": device_name(device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "ipca": __version__},
    }
