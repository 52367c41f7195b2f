"""The folder of a sweep: settings, one file per finished trial, and the table of all rows."""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from ipca._atomic import LEFT_BEHIND, write_atomic
from ipca.lab.sweep.trial import COLUMNS, Row, Trial

SETTINGS, ROWS, SECONDS, AUTO, REPORT = "settings.json", "rows.csv", "seconds.csv", "auto.json", "report.html"


class TaskChangedError(ValueError):
    """Finished trials are of another text of the task file; ``fact`` is the message without the way out."""

    def __init__(self, fact: str) -> None:
        super().__init__(fact)
        self.fact = fact

    def __str__(self) -> str:
        return f"{self.fact}; pass accept_task_change=True to keep them, or use a new folder."


class Store:
    """The folder of one sweep; every file in it is written atomically, so a kill leaves no partial files.

    Nothing is written before :meth:`prepare`. Each trial's file has a hash of ``fixed``; one without, of an earlier
    version, counts as one of the settings that the folder's file says.

    Args:
        folder: created by :meth:`prepare` if missing.
        fixed: what all trials share; a folder with trials of different values is refused.
        source: the text of the task file, whose hash is ``fixed["task_sha256"]``; None for a task without a file.
        accept_task_change: go on with the trials of another text of the task file.
        overwrite: delete the trials of another sweep.

    Raises:
        TaskChangedError: the trials were run by another text of the task file.
        ValueError: the folder belongs to another sweep (the message names the differences), its settings are damaged,
            it holds files with the names of a sweep's files or a folder of trials that is not empty but no settings,
            or a trial of other settings.
        OSError: it cannot be read or written, or its trials are a file.
    """

    def __init__(
        self,
        folder: Path,
        fixed: Mapping[str, Any],
        *,
        source: str | None = None,
        accept_task_change: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.folder, self.source, self.overwrite = folder, source, overwrite
        self.trials, self.spectra = folder / "trials", folder / "spectra"
        self.fixed = json.loads(json.dumps(fixed))
        self.earlier_tasks: list[str] = []
        if self.trials.exists() and not self.trials.is_dir():
            raise NotADirectoryError(f"{self.trials} is a file; a sweep needs a folder there.")
        if not overwrite:
            _check_overwrite(folder)
        self.stale = False
        then = {} if overwrite and not _is_settings(folder / SETTINGS) else read_settings(folder / SETTINGS)
        if then.get("fixed") == self.fixed:
            self.earlier_tasks = then.get("earlier_tasks", [])
        elif self._finished() and not overwrite:
            self._go_on(then, accept_task_change)
        else:
            self.stale = True  # no trial was run with these settings
        tasks = self.fixed.get("task_sha256"), *self.earlier_tasks
        self.digests = [_digest({**self.fixed, "task_sha256": task}) for task in tasks]
        for path in self._finished():
            self.read(path.stem)  # raises now, and not between trainings

    def prepare(self) -> None:
        """Create the folder, and delete what another sweep has left in it; files that no sweep wrote stay."""
        self.trials.mkdir(parents=True, exist_ok=True)
        for path in self._finished() if self.stale or self.overwrite else ():
            if self.read(path.stem) is None:
                path.unlink()
        if self.stale:
            for path in self.trials.iterdir():
                if LEFT_BEHIND.fullmatch(path.name):
                    path.unlink()
            for name in (AUTO, ROWS, SECONDS, REPORT, SETTINGS):
                (self.folder / name).unlink(missing_ok=True)
        self.stale = False

    def _finished(self) -> list[Path]:
        """The files of finished trials, of these settings or of others."""
        return [path for path in self.trials.glob("*.json") if _read_trial(path) is not None]

    def _go_on(self, then: Mapping[str, Any], accept_task_change: bool) -> None:
        """Go on with trials of other settings, ``then``, or raise: only the task file may differ."""
        if _differences(then["fixed"], self.fixed) != ["task_sha256"]:
            _refuse_other_sweep(self.folder, then["fixed"], self.fixed)
        before = then.get("task_source")
        if not accept_task_change and not _same_program(before, self.source):
            count = len(self._finished())
            raise TaskChangedError(
                f"the task file has changed since {count} trials in {self.folder} were finished"
                f"{_first_change(before, self.source)}. Their rows would stand beside those of the changed file"
            )
        self.earlier_tasks = [*then.get("earlier_tasks", []), then["fixed"]["task_sha256"]]

    def describe(self, grid: Mapping[str, Any]) -> None:
        """Write the settings: the fixed ones, the task file's text, and the grid of this run."""
        task = {"task_source": self.source, "earlier_tasks": self.earlier_tasks}
        text = json.dumps({**grid, **task, "fixed": self.fixed}, indent=2)
        write_atomic(self.folder / SETTINGS, text.encode())

    def get(self, key: str) -> list[Row] | None:
        """The rows of a finished trial, else None; a damaged file counts as not finished."""
        found = self.read(key)
        return None if found is None else found["rows"]

    def read(self, key: str) -> dict[str, Any] | None:
        """``rows`` and ``seconds`` of a finished trial, else None; raises ValueError if it is of other settings."""
        if self.stale:
            return None
        path = self.trials / f"{key}.json"
        found = _read_trial(path)
        if found is None:
            return None
        if found.get("fixed_sha256", self.digests[0]) not in self.digests:
            if self.overwrite:
                return None
            raise ValueError(
                f"{path} is a run of other settings than those in {self.folder / SETTINGS}, such as of another sweep "
                "that worked in the folder; delete the file, and the run is made again, or use a new folder."
            )
        return found

    def put(self, key: str, rows: Sequence[Row], seconds: float) -> None:
        """Store the rows of a trial that took ``seconds``."""
        record = {"rows": rows, "seconds": seconds, "fixed_sha256": self.digests[0]}
        write_atomic(self.trials / f"{key}.json", json.dumps(record).encode())

    def table(self, base: Row, trials: Iterable[Trial]) -> list[Row]:
        """Write and return the rows of the untrained model and of the finished ``trials``, in their order."""
        rows, times = [base], []
        for trial in trials:
            found = self.read(trial.key)
            if found is not None:
                rows += found["rows"]
                times.append({"trial": str(trial), "seconds": f"{found['seconds']:.2f}"})
        extra = sorted({name for row in rows for name in row} - set(COLUMNS))
        write_atomic(self.folder / ROWS, _csv(rows, [*COLUMNS, *extra]))
        write_atomic(self.folder / SECONDS, _csv(times, ["trial", "seconds"]))
        return rows


def _read_trial(path: Path) -> dict[str, Any] | None:
    """What :meth:`Store.put` wrote; None where it is not there, damaged, or something else."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, IsADirectoryError, ValueError):
        return None
    return found if isinstance(found, dict) and {"rows", "seconds"} <= set(found) else None


def _csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> bytes:
    """``rows`` as CSV; numbers read back to the bit, None is empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def read_settings(path: Path) -> dict[str, Any]:
    """The settings as written; empty where there are none."""
    if not path.exists():
        return {}
    if not _is_settings(path):
        raise ValueError(f"{path} was not written by a sweep, or is damaged; use a new folder.")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _is_settings(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text())["fixed"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _digest(fixed: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def _same_program(before: str | None, after: str | None) -> bool:
    """Whether two texts of a task file differ in no more than comments and layout."""
    if before is None or after is None:
        return False
    try:
        return ast.dump(ast.parse(before)) == ast.dump(ast.parse(after))
    except SyntaxError:
        return False


def _first_change(before: str | None, after: str | None) -> str:
    """The first lines that differ, as the end of a sentence; nothing where the old text is not known."""
    if before is None or after is None:
        return ""
    old, new = before.splitlines(), after.splitlines()
    changes = [op for op in SequenceMatcher(None, old, new, autojunk=False).get_opcodes() if op[0] != "equal"]
    _, i, i_end, j, j_end = changes[0]
    was, now = (repr(lines[0].strip()) if lines else "nothing" for lines in (old[i:i_end], new[j:j_end]))
    more = f", and {len(changes) - 1} more" if len(changes) > 1 else ""
    return f" (line {j + 1} was {was}, is now {now}{more})"


def _check_overwrite(folder: Path) -> None:
    """Raise if a sweep in ``folder`` would overwrite files that no sweep has written."""
    found = [name for name in (AUTO, ROWS, SECONDS, REPORT) if (folder / name).exists()]
    trials = folder / "trials"
    if trials.is_dir() and any(trials.iterdir()):
        found.append("folder 'trials' that is not empty")
    if found and not (folder / SETTINGS).exists():
        raise ValueError(f"{folder} contains a {found[0]} but no {SETTINGS} of a sweep; use a new folder.")


def _refuse_other_sweep(folder: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    old, new, differ = _flat(then), _flat(now), _differences(then, now)
    name = differ[0]
    raise ValueError(
        f"{folder} contains another sweep: {', '.join(differ)} differ ({name} was {old.get(name)!r}, is now "
        f"{new.get(name)!r}); use a new folder."
    )


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names of the settings that differ."""
    old, new = _flat(then), _flat(now)
    return [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]


def _flat(fixed: Mapping[str, Any]) -> dict[str, Any]:
    """``fixed`` with nested mappings flattened: ``settings.rank``, ``versions.torch``."""
    found: dict[str, Any] = {}
    for name, value in fixed.items():
        inner = value.items() if isinstance(value, Mapping) and value else ()
        found |= {f"{name}.{key}": each for key, each in inner} or {name: value}
    return found
