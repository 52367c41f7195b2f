"""Rows of a study: one JSON line a measurement, one file a run, written when the run is complete."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from ipca._atomic import write_atomic
from studies.frontier.design import Run

Line = dict[str, Any]
"""A measurement: the run, hashes, ``step``, ``scale``, ``status``, ``update`` and the metrics in nats a token."""
_RUN = ("task", "steps", "arm", "rate", "seed")


class Rows:
    """A folder of rows: ``runs/<key>.jsonl``, and values of single tokens at λ = 1 in ``tokens/<key>.safetensors``.

    Each file is written at once when its run is complete. A run that is killed leaves nothing here, and none is written
    twice: two runners that make the same run write the same bytes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._cached: dict[Path, list[Line]] = {}

    def put(self, run: Run, lines: list[Line], items: Mapping[str, Tensor]) -> None:
        """Store a complete run."""
        for kind in ("tokens", "runs"):
            (self.folder / kind).mkdir(parents=True, exist_ok=True)
        if items:
            write_atomic(self._tokens(run), safetensors.torch.save(dict(items)))
        write_atomic(self._path(run), "".join(json.dumps(line) + "\n" for line in lines).encode())

    def has(self, run: Run) -> bool:
        """Whether ``run`` is complete."""
        return self._path(run).exists()

    def runs(self) -> Iterator[tuple[Run, list[Line]]]:
        """The complete runs with their lines, in the order of their names.

        Raises:
            ValueError: a file is not what was written; the message names it.
        """
        for path in sorted((self.folder / "runs").glob("*.jsonl")):
            if path not in self._cached:
                try:
                    lines = [json.loads(line) for line in path.read_text().splitlines()]
                    run = Run(*(lines[0][name] for name in _RUN))
                except (ValueError, KeyError, IndexError, TypeError) as error:
                    raise ValueError(f"{path} is damaged: {error}; delete it, and the run is made again") from None
                if run.key != path.stem:
                    raise ValueError(f"{path} holds the run {run.key}; delete it, and both are made again")
                self._cached[path] = lines
            lines = self._cached[path]
            yield Run(*(lines[0][name] for name in _RUN)), lines

    def items(self, run: Run) -> dict[str, Tensor]:
        """The values of single tokens ``(M, length − 1)``; empty for a run that diverged, or if they were not kept."""
        return safetensors.torch.load_file(self._tokens(run)) if self._tokens(run).exists() else {}

    def _path(self, run: Run) -> Path:
        return self.folder / "runs" / f"{run.key}.jsonl"

    def _tokens(self, run: Run) -> Path:
        return self.folder / "tokens" / f"{run.key}.safetensors"
