"""The folder of a sweep: settings, one file per finished trial, and the table of all rows."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ipca._atomic import write_atomic
from ipca.lab.sweep.trial import COLUMNS, Row, Trial

SETTINGS, ROWS, SECONDS, AUTO, REPORT = "settings.json", "rows.csv", "seconds.csv", "auto.json", "report.html"


class Store:
    """The folder of one sweep; every file in it is written atomically, so a kill leaves no partial files.

    Args:
        folder: created if missing.
        fixed: what all trials share; a folder with trials of different values is refused.

    Raises:
        ValueError: the folder belongs to another sweep (the message names the differences), its settings are damaged,
            or it holds files with the names of a sweep's files but no settings.
        OSError: it cannot be read or written.
    """

    def __init__(self, folder: Path, fixed: Mapping[str, Any]) -> None:
        self.folder = folder
        self.trials, self.spectra = folder / "trials", folder / "spectra"
        self.fixed = json.loads(json.dumps(fixed))
        _check_overwrite(folder)
        self.trials.mkdir(parents=True, exist_ok=True)
        path = folder / SETTINGS
        then = _read_fixed(path) if path.exists() else None
        if then != self.fixed:
            if then is not None and any(self.trials.glob("*.json")):
                _refuse_other_sweep(folder, then, self.fixed)
            for name in (AUTO, ROWS, SECONDS, REPORT, SETTINGS):  # stale: no trial was run with these settings
                (folder / name).unlink(missing_ok=True)

    def describe(self, grid: Mapping[str, Any]) -> None:
        """Write the settings: the fixed ones and the grid of this run."""
        text = json.dumps({**grid, "fixed": self.fixed}, indent=2)
        write_atomic(self.folder / SETTINGS, text.encode())

    def get(self, key: str) -> list[Row] | None:
        """The rows of a finished trial, else None; a damaged file counts as not finished."""
        found = self._read(key)
        return None if found is None else found["rows"]

    def _read(self, key: str) -> dict[str, Any] | None:
        try:
            found = json.loads((self.trials / f"{key}.json").read_text())
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) and {"rows", "seconds"} <= set(found) else None

    def put(self, key: str, rows: Sequence[Row], seconds: float) -> None:
        """Store the rows of a trial that took ``seconds``."""
        write_atomic(self.trials / f"{key}.json", json.dumps({"rows": rows, "seconds": seconds}).encode())

    def table(self, base: Row, trials: Iterable[Trial]) -> list[Row]:
        """Write and return the rows of the untrained model and of the finished ``trials``, in their order."""
        rows, times = [base], []
        for trial in trials:
            found = self._read(trial.key)
            if found is not None:
                rows += found["rows"]
                times.append({"trial": str(trial), "seconds": f"{found['seconds']:.2f}"})
        extra = sorted({name for row in rows for name in row} - set(COLUMNS))
        write_atomic(self.folder / ROWS, _csv(rows, [*COLUMNS, *extra]))
        write_atomic(self.folder / SECONDS, _csv(times, ["trial", "seconds"]))
        return rows


def _csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> bytes:
    """``rows`` as CSV; numbers read back to the bit, None is empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _read_fixed(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())["fixed"]
    except (ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} was not written by a sweep, or is damaged; use a new folder.")
    return found


def _check_overwrite(folder: Path) -> None:
    """Raise if a sweep in ``folder`` would overwrite files that no sweep has written."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; a sweep needs a folder.")
    found = [name for name in (ROWS, SECONDS, REPORT) if (folder / name).exists()]
    if found and not (folder / SETTINGS).exists():
        raise ValueError(f"{folder} contains a {found[0]} but no {SETTINGS} of a sweep; use a new folder.")


def _refuse_other_sweep(folder: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    old, new = _flat(then), _flat(now)
    differ = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    name = differ[0]
    raise ValueError(
        f"{folder} contains another sweep: {', '.join(differ)} differ ({name} was {old.get(name)!r}, is now "
        f"{new.get(name)!r}); use a new folder."
    )


def _flat(fixed: Mapping[str, Any]) -> dict[str, Any]:
    """``fixed`` with nested mappings flattened: ``settings.rank``, ``versions.torch``."""
    found: dict[str, Any] = {}
    for name, value in fixed.items():
        inner = value.items() if isinstance(value, Mapping) and value else ()
        found |= {f"{name}.{key}": each for key, each in inner} or {name: value}
    return found
