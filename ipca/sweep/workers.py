"""Run trials side by side, each process with its own copy of the model, a fixed number of threads and one device."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for
from pathlib import Path

import torch
from torch import nn

from ipca.fingerprint import tensor_sha256
from ipca.svd import SpectralCache
from ipca.sweep.task import Task, load_task
from ipca.sweep.trial import Row, Trial, run_trial

Result = tuple[Trial, list[Row], float]
"""A trial that is done, its rows and its seconds."""


@dataclass(frozen=True)
class Work:
    """What every worker must know.

    Attributes:
        task: a task, or the file that defines it.
        spectra: the folder of the cache.
        model_sha256: of the model that ``build`` must make again.
    """

    task: Task | Path
    spectra: Path
    early: int
    checkpoints: tuple[int, ...]
    model_sha256: str
    threads: int


class Worker:
    """One process's model and task."""

    def __init__(self, work: Work, device: str | None, base: nn.Module | None = None) -> None:
        torch.set_num_threads(work.threads)
        if device is not None and device.startswith("cuda"):
            torch.cuda.set_device(device)
        self.work = work
        self.task = work.task if isinstance(work.task, Task) else load_task(work.task)
        self.base = self.task.build() if base is None else base
        if model_sha256(self.base) != work.model_sha256:
            raise RuntimeError("build() made another model in a second process; it must make the same bits every time.")
        self.base = self.base.to(device) if device is not None else self.base
        self.cache = SpectralCache(work.spectra)

    def __call__(self, trial: Trial) -> Result:
        began = time.perf_counter()
        work = self.work
        rows = run_trial(self.task, self.base, trial, cache=self.cache, early=work.early, checkpoints=work.checkpoints)
        return trial, rows, time.perf_counter() - began


class Crew:
    """Workers that stay until the block ends; one worker is this process itself, with ``base`` as its model."""

    def __init__(self, work: Work, workers: int, devices: Sequence[str], base: nn.Module) -> None:
        self.work, self.workers, self.devices, self.base = work, workers, devices, base
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, trials: Sequence[Trial]) -> Iterator[Result]:
        """The result of each of ``trials`` as it is done.

        Raises:
            Exception: the first error of a trial; those that wait do not begin.
        """
        if self.workers == 1:
            yield from map(Worker(self.work, self.devices[0] if self.devices else None, self.base), trials)
            return
        pool = self._pool = self._pool or self._start()
        waiting: set[Future[Result]] = {pool.submit(_one, trial) for trial in trials}
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()

    def _start(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        devices = context.SimpleQueue()
        for rank in range(self.workers):
            devices.put(self.devices[rank % len(self.devices)] if self.devices else None)
        return ProcessPoolExecutor(self.workers, context, _begin, (self.work, devices))


def model_sha256(model: nn.Module) -> str:
    """A hash over every tensor of the model's state dict, by name."""
    parts = [f"{name} {tensor_sha256(value)}" for name, value in model.state_dict().items()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


_worker: Worker | None = None


def _begin(work: Work, devices: multiprocessing.SimpleQueue) -> None:
    global _worker
    _end_with_parent()
    _worker = Worker(work, devices.get())


def _one(trial: Trial) -> Result:
    assert _worker is not None
    return _worker(trial)


def _end_with_parent() -> None:
    """End this process when its parent is killed: a worker must not go on for nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
