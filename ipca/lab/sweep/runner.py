"""Have trials done and keep the table of their rows up to date."""

from __future__ import annotations

import time
from collections.abc import Sequence

from tqdm import tqdm

from ipca.lab.sweep.store import Store
from ipca.lab.sweep.trial import Row, Trial
from ipca.lab.sweep.workers import WorkerPool

TABLE_SECONDS = 60.0
"""How far the table may be behind the trials."""


class Runner:
    """Has trials done, each at most once in the life of the folder, and keeps the table."""

    def __init__(self, store: Store, crew: WorkerPool, first: Row, bar: tqdm) -> None:
        self.store, self.crew, self.first, self.bar = store, crew, first, bar
        self.trials: list[Trial] = []
        self.rows: list[Row] = []
        self.written = 0.0

    def run(self, trials: Sequence[Trial]) -> list[Row]:
        """The rows of all trials so far, with ``trials`` among them; also in the table."""
        self.trials += trials
        self._write()
        try:
            self.aside(trials)
        finally:
            self._write()
        return self.rows

    def aside(self, trials: Sequence[Trial]) -> list[Row]:
        """The rows of ``trials``, which do not go into the table."""
        todo = sorted((t for t in trials if self.store.get(t.key) is None), key=_seed)
        self.bar.total = (self.bar.total or 0) + len(trials)
        self.bar.update(len(trials) - len(todo))
        for trial, rows, seconds in self.crew.run(todo) if todo else ():
            self.store.put(trial.key, rows, seconds)
            self.bar.update()
            if time.monotonic() - self.written > TABLE_SECONDS:
                self._write()
        return [row for trial in trials for row in self.store.get(trial.key) or ()]

    def _write(self) -> None:
        self.rows = self.store.table(self.first, self.trials)
        self.written = time.monotonic()


def _seed(trial: Trial) -> int:
    """Seed by seed, so that what there is so far can be compared within seeds."""
    return trial.seed
