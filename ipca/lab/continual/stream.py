"""run_stream: train a sequence of tasks and score all of them after each, with what the model remembers and costs."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ipca._atomic import staged_files
from ipca.lab.continual.learner import ContinualLearner, TaskRecord
from ipca.lab.continual.method import task_seed
from ipca.lab.task_matrix import TaskMatrix
from ipca.model.batches import evaluating

Score = Callable[[nn.Module], float]
_KNOWN = "retained"


@dataclass(frozen=True)
class StreamTask:
    """One task of a stream.

    Attributes:
        name: for tables and pictures.
        train: ``train(learner, seed)`` trains ``learner.model`` with any optimizer over the parameters that require
            gradients, and adds ``learner.penalty()`` to the loss. The stream begins and ends the task around it. While
            it runs :func:`ipca.save_adapter` may be called, where the method allows. torch's generator is seeded with
            ``seed`` before.
        evaluate: ``evaluate(model)`` gives a score, larger is better; called in evaluation mode without gradients; the
            modes and torch's generators are as before afterward.

    Raises:
        TypeError: ``train`` or ``evaluate`` is no function.
    """

    name: str
    train: Callable[[ContinualLearner, int], object]
    evaluate: Score

    def __post_init__(self) -> None:
        for each in ("train", "evaluate"):
            if not callable(getattr(self, each)):
                raise TypeError(f"the task {self.name!r}: {each} must be a function, got {getattr(self, each)!r}.")


@dataclass(frozen=True)
class StreamResult:
    """What a stream gave; ``str()`` is its table.

    Attributes:
        method, seed: of the learner.
        matrix: ``R[i, j]``, the score on task ``j`` after training task ``i``, and the scores before any training;
            ``matrix.acc``, ``matrix.bwt``, ``matrix.forgetting`` and ``matrix.fwt`` sum it up.
        retained: the score on what the model knew before the stream: before it, then after each task. Empty where it
            was not asked for.
        records: what each task trained, and what is kept since.
    """

    method: str
    seed: int
    matrix: TaskMatrix
    retained: tuple[float, ...]
    records: tuple[TaskRecord, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tasks, in the order of training."""
        return self.matrix.names

    @property
    def mean_scores(self) -> list[float]:
        """After each task the mean score over the tasks trained so far."""
        return [float(row[: i + 1].mean()) for i, row in enumerate(self.matrix.R)]

    def rows(self) -> list[dict[str, Any]]:
        """A row before training (``after`` is empty) and one after each task, for CSV files."""
        assert self.matrix.initial is not None
        scores = [self.matrix.initial, *self.matrix.R]
        rows = []
        for i, row in enumerate(scores):
            record = self.records[i - 1] if i else TaskRecord(0, 0, 0)
            rows.append(
                {
                    "method": self.method,
                    "seed": self.seed,
                    "after": self.names[i - 1] if i else None,
                    "mean": self.mean_scores[i - 1] if i else None,
                    "retained": self.retained[i] if self.retained else None,
                    "trained": record.trained,
                    "kept_parameters": record.kept_parameters,
                    "kept_bytes": record.kept_bytes,
                    **{f"score {name}": float(score) for name, score in zip(self.names, row, strict=True)},
                }
            )
        return rows

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`rows` to ``path``.

        Raises:
            OSError: it cannot be written; what was there is intact.
        """
        rows, target = self.rows(), Path(path)
        with staged_files(target.parent) as stage, (stage / target.name).open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    def __str__(self) -> str:
        wide = max(8, *map(len, self.names))
        head = ["after".ljust(wide), *(name.rjust(wide) for name in self.names), "    mean", "retained", "  trained"]
        lines = [f"{self.method}, seed {self.seed}", "  ".join([*head, "kept parameters", "kept bytes"])]
        for row in self.rows():
            scores = [f"{row[f'score {name}']:.3f}".rjust(wide) for name in self.names]
            mean, retained = (_shown(row[name]) for name in ("mean", "retained"))
            cells = [str(row["after"] or "(before)").ljust(wide), *scores, mean, retained, f"{row['trained']:>9,}"]
            lines.append("  ".join([*cells, f"{row['kept_parameters']:>15,}", f"{row['kept_bytes']:>10,}"]))
        R = self.matrix
        lines.append(f"ACC {R.acc:.3f}   BWT {R.bwt:+.3f}   FM {R.forgetting:.3f}   FWT {R.fwt:+.3f}")
        return "\n".join(lines)


def _shown(value: float | None) -> str:
    return " " * 8 if value is None else f"{value:8.3f}"


def run_stream(
    learner: ContinualLearner, tasks: Sequence[StreamTask], *, retained: Score | None = None
) -> StreamResult:
    """Train ``tasks`` in order with ``learner``; before the first and after each, score all of them.

    Args:
        learner: of no task yet. ``learner.finish()`` makes the model plain afterward.
        tasks: at least two, between which there is something to forget.
        retained: as ``StreamTask.evaluate``, on what the model knew before.

    Raises:
        TypeError: ``tasks`` are no :class:`StreamTask`, or ``evaluate`` or ``retained`` gives no number.
        ValueError: the learner has begun a task or is for fewer tasks, two tasks share a name, or a score or a trained
            weight is no finite number, which stops the stream.
        Exception: whatever a task raises.
    """
    strange = next((task for task in tasks if not isinstance(task, StreamTask)), None)
    if strange is not None:
        raise TypeError(f"tasks must be ipca.lab.continual.StreamTask, got {strange!r}.")
    names = tuple(task.name for task in tasks)
    if learner.records or learner.running:
        raise ValueError(
            f"this learner has begun {len(learner.records) + learner.running} tasks already; make a new one."
        )
    if len(names) < 2 or len({*names, "after"}) <= len(names):
        given = ", ".join(names) or "none"
        raise ValueError(f"a stream has at least two tasks, each with its own name, which is not 'after'; got {given}.")
    if learner.tasks is not None and learner.tasks < len(tasks):
        raise ValueError(f"the learner is for {learner.tasks} tasks, the stream has {len(tasks)}.")
    scores, known = [_scores(learner.model, tasks)], [_score(learner.model, _KNOWN, retained)] if retained else []
    for index, task in enumerate(tasks):
        learner.begin_task()
        seed = task_seed(learner.seed, index)
        torch.manual_seed(seed)
        task.train(learner, seed)
        learner.end_task()
        scores.append(_scores(learner.model, tasks))
        if retained:
            known.append(_score(learner.model, _KNOWN, retained))
    matrix = TaskMatrix(scores[1:], initial=scores[0], names=names)
    return StreamResult(learner.method, learner.seed, matrix, tuple(known), tuple(learner.records))


def _scores(model: nn.Module, tasks: Sequence[StreamTask]) -> list[float]:
    return [_score(model, task.name, task.evaluate) for task in tasks]


def _score(model: nn.Module, name: str, evaluate: Score) -> float:
    with evaluating(model):
        found = evaluate(model)
    try:
        value = float(found)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: evaluate(model) must give a number, it gave {found!r}.") from None
    if not math.isfinite(value):
        raise ValueError(f"{name}: the score is {value}, no finite number; if training diverged, lower its rate.")
    return value
