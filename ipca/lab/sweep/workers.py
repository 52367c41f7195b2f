"""Worker processes: each has its own copy of the model, a fixed number of threads and one device."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ipca._error_note import error_note
from ipca._hashing import tensor_sha256
from ipca.lab.sweep.device import see_only, use_device
from ipca.lab.sweep.task import Task, load_task
from ipca.lab.sweep.trial import Row, Trial, build_base, run_trial
from ipca.model.settings import AdapterSettings
from ipca.svd import SpectralCache

Result = tuple[Trial, list[Row], float]
"""A finished trial, its rows and its seconds."""


@dataclass(frozen=True)
class Work:
    """The inputs shared by all workers.

    Attributes:
        task: a task, or the file that defines it.
        spectra: the cache folder.
        model_sha256: of the model that ``build`` must reproduce.
        auto: the settings of the method ``"auto"``, if it is among the methods.
    """

    task: Task | Path
    spectra: Path
    early: int
    checkpoints: tuple[int, ...]
    model_sha256: str
    threads: int
    auto: AdapterSettings | None = None


class Worker:
    """One process's model and task."""

    def __init__(self, work: Work, device: str | None, base: nn.Module | None = None) -> None:
        torch.set_num_threads(work.threads)
        use_device(device)
        self.work = work
        self.task = work.task if isinstance(work.task, Task) else load_task(work.task)
        self.base = build_base(self.task) if base is None else base
        if base is None and model_sha256(self.base) != work.model_sha256:
            raise RuntimeError(
                "build() returned a different model in a second process; it must return the same bits every time."
            )
        self.base = self.base.to(device) if device is not None else self.base
        self.cache = SpectralCache(work.spectra)

    def __call__(self, trial: Trial) -> Result:
        began = time.perf_counter()
        work = self.work
        with error_note(f"In the trial {trial}."):
            rows = run_trial(
                self.task,
                self.base,
                trial,
                cache=self.cache,
                early=work.early,
                checkpoints=work.checkpoints,
                auto=work.auto,
            )
        return trial, rows, time.perf_counter() - began


class WorkerPool:
    """Workers that live until the block ends; a single worker is this process, with ``base`` as its model."""

    def __init__(self, work: Work, workers: int, devices: Sequence[str], base: nn.Module) -> None:
        self.work, self.workers, self.devices, self.base = work, workers, devices, base
        self._here: Worker | None = None
        self._pool: ProcessPoolExecutor | None = None
        self._hold: Connection | None = None

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._hold is not None and kind is not None:
            self._hold.close()  # workers exit at once: nobody would collect their results
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, trials: Sequence[Trial]) -> Iterator[Result]:
        """Yield the result of each of ``trials`` as it finishes.

        Raises:
            RuntimeError: a process was killed.
            Exception: the first error of a trial, with a note that names it; waiting trials do not start.
        """
        if self.workers == 1:
            self._here = self._here or Worker(self.work, self.devices[0] if self.devices else None, self.base)
            yield from map(self._here, trials)
            return
        self._pool = self._pool or self._start()
        try:
            waiting: set[Future[Result]] = {self._pool.submit(_run_one, trial) for trial in trials}
            self._pool.submit(_noop)  # makes the pool watch all processes; the death of the last one could go unseen
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in sorted(done, key=_failed):
                    yield future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker process ended: it was killed, possibly for lack of memory (use fewer workers), or it could "
                "not start, see its output above (a script must start a sweep under `if __name__ == '__main__':`). "
                "Finished trials are kept; run the same sweep again to resume."
            ) from error

    def _start(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        devices = context.SimpleQueue()
        for rank in range(self.workers):
            devices.put(self.devices[rank % len(self.devices)] if self.devices else None)
        held, self._hold = context.Pipe(duplex=False)
        return ProcessPoolExecutor(self.workers, context, _initialize, (self.work, devices, held))


def check_sendable(task: Task) -> None:
    """Raise TypeError if ``task`` cannot be pickled for another process."""
    try:
        pickle.dumps(task)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"the task cannot be sent to another process: {error}. With several workers its functions must be defined "
            "in a module, or be functools.partial of such functions; or use one worker."
        ) from None


def model_sha256(model: nn.Module) -> str:
    """A hash over every tensor of the model's state dict, by name."""
    tensors = (part for name, value in model.state_dict().items() for part in _tensors(name, value))
    parts = [f"{name} {tensor_sha256(tensor)}" for name, tensor in tensors]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors in an entry of a state dict: itself, the components of a quantized one, or none."""
    if hasattr(value, "__tensor_flatten__"):
        for part in value.__tensor_flatten__()[0]:
            yield from _tensors(f"{name}.{part}", getattr(value, part))
    elif isinstance(value, Tensor):
        yield name, value


_assignment: tuple[Work, str | None]
_worker: Worker | None = None


def _initialize(work: Work, devices: multiprocessing.SimpleQueue, held: Connection) -> None:
    global _assignment
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent decides
    tqdm.set_lock(threading.RLock())  # tqdm's own lock is a semaphore, reported as leaked if the process is killed
    _exit_with_parent(held)
    _assignment = work, see_only(devices.get())


def _run_one(trial: Trial) -> Result:
    global _worker
    _worker = _worker or Worker(*_assignment)  # not in the initializer: an error of build() must reach the parent
    return _worker(trial)


def _noop() -> None:
    """Do nothing."""


def _failed(future: Future[Result]) -> bool:
    return future.exception() is not None


def _exit_with_parent(held: Connection) -> None:
    """Exit this process when its parent is killed or closes ``held``."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for([parent.sentinel, held])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
