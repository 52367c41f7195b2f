"""The study's rows: one JSON file a stream, written when it is complete."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ipca._atomic import write_atomic
from studies.continual.design import CENTERS, Run, Scores, protocol_sha256

RESULTS = Path(__file__).resolve().parent / "results"
Row = Mapping[str, Any]


class Rows:
    """The complete streams in a folder."""

    def __init__(self, folder: Path = RESULTS) -> None:
        self.folder = folder
        self._read: dict[Path, Row] = {}

    def put(self, run: Run, row: Row) -> None:
        """Store a complete stream."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path(run), (json.dumps(row) + "\n").encode())

    def has(self, run: Run) -> bool:
        """Whether ``run`` is complete."""
        return self._path(run).exists()

    def all(self) -> dict[Run, Row]:
        """By run.

        Raises:
            ValueError: a file is damaged, or of another protocol or base model than others; the message names it.
        """
        for path in sorted(self.folder.glob("*.json")):
            if path not in self._read:
                try:
                    row = json.loads(path.read_text(encoding="utf-8"))
                    run, model = Run(row["seed"], row["method"], row["rate"]), row["model"]
                    known = row["protocol"] == protocol_sha256() and run.method in CENTERS and run.key == path.stem
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{path} is damaged: {error}; delete it, and the run is made again") from None
                if not known:
                    raise ValueError(f"{path} is a run of another protocol; its rows cannot be mixed with new ones")
                if any(model != each["model"] for each in self._read.values()):
                    raise ValueError(f"{path} started from another base model than others in the folder")
                self._read[path] = row
        return {Run(row["seed"], row["method"], row["rate"]): row for row in self._read.values()}

    def scores(self) -> dict[str, Scores]:
        """ACC by method, rate and seed; NaN of a stream that diverged."""
        found: dict[str, dict[float, dict[int, float]]] = {}
        for run, row in self.all().items():
            found.setdefault(run.method, {}).setdefault(run.rate, {})[run.seed] = row.get("acc", math.nan)
        return {**found}

    def model(self) -> str | None:
        """A hash of the weights that all streams started from."""
        return next((row["model"] for row in self.all().values()), None)

    def _path(self, run: Run) -> Path:
        return self.folder / f"{run.key}.json"
