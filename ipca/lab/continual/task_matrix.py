"""Score matrix of a sequence of tasks: average accuracy, backward and forward transfer, forgetting."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ipca._atomic import staged_files

_BEFORE = "(before)"


class TaskMatrix:
    """``R[i, j]``: the score on task ``j`` after training task ``i``, larger is better; ``str()`` is a table.

    All measures are in the unit of the score, such as accuracy. Both papers count tasks from 1; here ``i`` and ``j``
    count from 0. NaN above the diagonal means that tasks were not scored before they were trained.

    >>> nan = float("nan")
    >>> matrix = ipca.lab.continual.TaskMatrix([[0.9, nan], [0.7, 0.8]], names=["digits", "letters"])
    >>> f"{matrix.acc:.2f} {matrix.bwt:.2f}"
    '0.75 -0.20'

    Args:
        R: ``(T, T)``; finite on and below the diagonal.
        initial: ``(T,)``, the scores before any training, the baseline of forward transfer.
        names: of the tasks; their indices by default.

    Raises:
        ValueError: a wrong shape, no tasks, a missing score, or invalid names; the message says which.
    """

    def __init__(self, R: ArrayLike, *, initial: ArrayLike | None = None, names: Sequence[str] | None = None) -> None:
        try:
            self.R: NDArray[np.float64] = np.array(R, dtype=np.float64)
        except ValueError as error:
            raise ValueError(f"R must be (T, T), numbers in rows of one length ({error}).") from None
        if self.R.ndim != 2 or not self.R.size or self.R.shape[0] != self.R.shape[1]:
            raise ValueError(f"R must be (T, T), a row after each task and a column per task; got {self.R.shape}.")
        T = len(self.R)
        missing = np.argwhere(~np.isfinite(self.R) & np.tri(T, dtype=bool))
        if len(missing):
            i, j = missing[0]
            raise ValueError(f"R[{i}, {j}] is {self.R[i, j]}; scores on already trained tasks must be finite.")
        self.initial = None if initial is None else np.array(initial, dtype=np.float64)
        if self.initial is not None and (self.initial.shape != (T,) or not np.isfinite(self.initial).all()):
            raise ValueError(f"initial must hold {T} finite scores, one per task; got {self.initial}.")
        self.names = tuple(map(str, range(T) if names is None else names))
        if len(self.names) != T or len({*self.names, "after"}) <= T:
            raise ValueError(
                f"names must be {T} distinct names, one per task, other than 'after'; got {', '.join(self.names)}."
            )

    @property
    def acc(self) -> float:
        """Average accuracy at the end: ``ACC = mean_j R[T−1, j]`` (Lopez-Paz & Ranzato, arXiv 1706.08840)."""
        return float(self.R[-1].mean())

    @property
    def bwt(self) -> float:
        """Backward transfer: ``BWT = mean_{j < T−1} R[T−1, j] − R[j, j]`` (arXiv 1706.08840).

        Negative if later tasks made the earlier ones worse. NaN for a single task.
        """
        return _mean(self.R[-1, :-1] - self.R.diagonal()[:-1])

    @property
    def forgetting(self) -> float:
        """``FM = mean_{j < T−1} max_{j ≤ i < T−1} R[i, j] − R[T−1, j]`` (Chaudhry et al., arXiv 1801.10112).

        The drop from a task's best score since it was trained; negative if the last task improved the others.
        ``FM ≥ −BWT``. NaN for a single task. The paper's maximum also runs over ``i < j``, scores from before task
        ``j`` was trained, which need not exist here.
        """
        T = len(self.R)
        return _mean(np.array([self.R[j : T - 1, j].max() - self.R[-1, j] for j in range(T - 1)]))

    @property
    def fwt(self) -> float:
        """Forward transfer: ``FWT = mean_{j ≥ 1} R[j−1, j] − initial[j]`` (arXiv 1706.08840).

        The effect of earlier tasks on task ``j`` before it is trained. NaN for a single task, and if a task was not
        scored before it was trained.

        Raises:
            ValueError: ``initial`` is missing.
        """
        if self.initial is None:
            raise ValueError("forward transfer needs the scores before any training; pass initial.")
        return _mean(self.R.diagonal(1) - self.initial[1:])

    def rows(self) -> list[dict[str, Any]]:
        """A row before training, if ``initial`` was given, and one after each task; a column per task."""
        before = [] if self.initial is None else [(_BEFORE, self.initial)]
        return [
            {"after": after, **dict(zip(self.names, map(float, scores), strict=True))}
            for after, scores in [*before, *zip(self.names, self.R, strict=True)]
        ]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`rows`; numbers read back to the bit, NaN is an empty cell.

        Raises:
            OSError: ``path`` cannot be written; an existing file is intact.
        """
        text, target = io.StringIO(newline=""), Path(path)
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["after", *self.names])
        for row in self.rows():
            writer.writerow([row.pop("after"), *("" if math.isnan(score) else score for score in row.values())])
        with staged_files(target.parent) as stage:
            (stage / target.name).write_text(text.getvalue(), encoding="utf-8", newline="")

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str]) -> TaskMatrix:
        """Read a file written by :meth:`to_csv`; if it has one row more than tasks, the first is ``initial``.

        Raises:
            OSError: ``path`` cannot be read.
            ValueError: it is not such a table; the message says why.
        """
        with Path(path).open(newline="", encoding="utf-8") as file:
            head, *lines = list(csv.reader(file)) or [[]]
        names = head[1:]
        if head[:1] != ["after"] or len(lines) not in (len(names), len(names) + 1):
            raise ValueError(
                f"{path}: expected a header 'after, task, …' and one row per task, or one more; got the header "
                f"{', '.join(head)} and {len(lines)} rows."
            )
        after = [line[0] if line else "" for line in lines]
        if after not in (names, [_BEFORE, *names]):
            raise ValueError(
                f"{path}: the rows must be those after {', '.join(names)}, in the order of the columns; got "
                f"{', '.join(after)}."
            )
        try:
            scores = [[float(cell) if cell else math.nan for cell in line[1:]] for line in lines]
            before = scores.pop(0) if len(scores) > len(names) else None
            return cls(scores, initial=before, names=names)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def __str__(self) -> str:
        wide = max(7, *map(len, self.names))
        lines = ["  ".join(["after".ljust(wide + 1), *(name.rjust(wide) for name in self.names)])]
        for row in self.rows():
            after = str(row.pop("after")).ljust(wide + 1)
            lines.append("  ".join([after, *(_shown(score).rjust(wide) for score in row.values())]))
        sums = [f"ACC {self.acc:.3f}", f"BWT {_shown(self.bwt, '+')}", f"FM {_shown(self.forgetting)}"]
        if self.initial is not None:
            sums.append(f"FWT {_shown(self.fwt, '+')}")
        return "\n".join([*lines, "   ".join(sums)])


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if values.size else math.nan


def _shown(score: float, sign: str = "") -> str:
    return "–" if math.isnan(score) else f"{score:{sign}.3f}"
