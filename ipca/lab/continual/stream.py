"""Streams: train a sequence of tasks and score all of them after each; result, table and figure."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ipca._atomic import staged_files
from ipca.analysis.figures import COLORS, DASHES, MARKS, PALETTE, picture
from ipca.lab.continual.learner import ContinualLearner, TaskRecord
from ipca.lab.continual.method import task_seed
from ipca.lab.continual.task_matrix import TaskMatrix
from ipca.lab.statistics import estimate
from ipca.model.batches import evaluating

Score = Callable[[nn.Module], float]
_KNOWN = "retained"
_PANELS_ACROSS = 4


@dataclass(frozen=True)
class StreamTask:
    """One task of a stream.

    Attributes:
        name: used in tables and figures.
        train: ``train(learner, seed)`` trains ``learner.model`` with any optimizer over the parameters that require
            gradients, and adds ``learner.penalty()`` to the loss. The stream begins and ends the task. While it runs,
            :func:`ipca.save_adapter` may be called if the method supports it. torch's generator is seeded with
            ``seed`` before the call.
        evaluate: ``evaluate(model)`` returns a score, larger is better; called in evaluation mode without gradients.
            Modes and torch's generators are restored afterward.

    Raises:
        TypeError: ``train`` or ``evaluate`` is not callable.
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
    """Scores and costs of a stream; ``str()`` is a table of them.

    Attributes:
        method, seed: of the learner.
        matrix: ``R[i, j]``, the score on task ``j`` after training task ``i``, and the scores before any training;
            summarized by ``matrix.acc``, ``matrix.bwt``, ``matrix.forgetting`` and ``matrix.fwt``.
        retained: the score on what the model knew before the stream: before it, then after each task. Empty if it was
            not requested.
        records: the cost of each task.
    """

    method: str
    seed: int
    matrix: TaskMatrix
    retained: tuple[float, ...]
    records: tuple[TaskRecord, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Task names in the order of training."""
        return self.matrix.names

    @property
    def mean_scores(self) -> list[float]:
        """After each task, the mean score over the tasks trained so far."""
        return [float(row[: i + 1].mean()) for i, row in enumerate(self.matrix.R)]

    def rows(self) -> list[dict[str, Any]]:
        """One row before training (``after`` is empty) and one after each task, for CSV files."""
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
            OSError: it cannot be written; an existing file is intact.
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
    """Train ``tasks`` in order with ``learner``; score all of them before the first task and after each.

    Args:
        learner: a new learner. ``learner.finish()`` makes the model plain afterward.
        tasks: at least two.
        retained: like ``StreamTask.evaluate``, on what the model knew before the stream.

    Raises:
        TypeError: ``tasks`` are not :class:`StreamTask`, or ``evaluate`` or ``retained`` does not return a number.
        ValueError: the learner has begun a task or is for fewer tasks, two tasks share a name, or a score or a trained
            weight is not finite, which stops the stream.
        Exception: any error raised by a task.
    """
    strange = next((task for task in tasks if not isinstance(task, StreamTask)), None)
    if strange is not None:
        raise TypeError(f"tasks must be ipca.lab.continual.StreamTask, got {strange!r}.")
    names = tuple(task.name for task in tasks)
    if learner.records or learner.running:
        begun = len(learner.records) + learner.running
        raise ValueError(f"run_stream needs a new learner; this one has already begun {begun} tasks.")
    if len(names) < 2 or len({*names, "after"}) <= len(names):
        given = ", ".join(names) or "none"
        raise ValueError(f"a stream needs at least two tasks with distinct names other than 'after'; got {given}.")
    if learner.tasks is not None and learner.tasks < len(tasks):
        raise ValueError(f"the learner is for {learner.tasks} tasks, but the stream has {len(tasks)}.")
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
        raise TypeError(f"{name}: evaluate(model) must return a number, got {found!r}.") from None
    if not math.isfinite(value):
        raise ValueError(f"{name}: the score is {value}, not finite; if training diverged, lower the learning rate.")
    return value


def draw_stream(results: StreamResult | Sequence[StreamResult], path: str | os.PathLike[str]) -> None:
    """Draw ``R`` of each method as an annotated heat map, and one panel with the mean score after each task.

    With several seeds of a method, both are means over them; from three on, the mean score has a 95 % interval.
    Scores from 0 to 1 have colors from 0 to 1, others from the smallest to the largest.

    Args:
        results: one stream, or several over the same tasks.
        path: the suffix selects the format: ``.png``, ``.pdf``, ``.svg``.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: there is nothing to draw, the streams have different tasks, or the format is unknown.
        OSError: ``path`` cannot be written; an existing file is intact.
    """
    shown = [results] if isinstance(results, StreamResult) else list(results)
    if not shown or any(result.names != shown[0].names for result in shown):
        raise ValueError("draw_stream needs at least one stream, and the same tasks in all; draw others separately.")
    methods: dict[str, list[StreamResult]] = {}
    for result in shown:
        methods.setdefault(result.method, []).append(result)
    across = min(_PANELS_ACROSS, len(methods) + 1)
    down = -(-(len(methods) + 1) // across)
    with picture(path, (3.4 * across, 3.2 * down)) as figure:
        axes = figure.subplots(down, across, squeeze=False).flatten()
        images = _draw_matrices(axes, list(methods.values()))
        _draw_mean_scores(axes[len(methods)], methods)
        for axis in axes[len(methods) + 1 :]:
            axis.set_visible(False)
        figure.colorbar(images[0], ax=list(axes), location="bottom", shrink=0.4, aspect=40, label="score")


def _draw_matrices(axes: Any, methods: Sequence[Sequence[StreamResult]]) -> list[Any]:
    """A heat map for each method, all on one color scale."""
    means = [np.mean([result.matrix.R for result in results], axis=0) for results in methods]
    low, high = min(R.min() for R in means), max(R.max() for R in means)
    low, high = (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)
    return [_draw_matrix(*each, low, high) for each in zip(axes, methods, means, strict=False)]


def _draw_matrix(axis: Any, results: Sequence[StreamResult], R: Any, low: float, high: float) -> Any:
    names = results[0].names
    ticks = range(len(names))
    image = axis.imshow(R, vmin=low, vmax=high, cmap=COLORS)
    for i in ticks:
        for j in ticks:
            color = "white" if R[i, j] < (low + high) / 2 else "black"
            axis.text(j, i, f"{R[i, j]:.2f}", ha="center", va="center", fontsize=7, color=color)
    axis.grid(visible=False)
    axis.set_xticks(ticks, names, fontsize=7)
    axis.set_yticks(ticks, names, fontsize=7)
    axis.set_xlabel("score on", fontsize=8)
    axis.set_ylabel("after training", fontsize=8)
    seeds = f"seed {results[0].seed}" if len(results) == 1 else f"mean of {len(results)} seeds"
    axis.set_title(f"{results[0].method}, {seeds}", fontsize=9)
    return image


def _draw_mean_scores(axis: Any, methods: Mapping[str, Sequence[StreamResult]]) -> None:
    names = next(iter(methods.values()))[0].names
    for k, (method, results) in enumerate(methods.items()):
        found = [estimate(scores) for scores in zip(*(result.mean_scores for result in results), strict=True)]
        look = {"color": PALETTE[k % len(PALETTE)], "linestyle": DASHES[k % len(DASHES)]}
        means = [each.mean for each in found if each is not None]
        axis.plot(range(len(names)), means, marker=MARKS[k % len(MARKS)], markersize=4, label=method, **look)
        for x, each in enumerate(found):
            if each is not None and each.low is not None:
                axis.plot([x, x], [each.low, each.high], color=look["color"], linewidth=1.2)
    axis.set_xticks(range(len(names)), names, fontsize=7)
    axis.set_xlabel("after training", fontsize=8)
    axis.set_title("mean score over the tasks so far", fontsize=9)
    axis.tick_params(axis="y", labelsize=7)
    if len(methods) > 1:
        axis.legend(fontsize=6)
