"""Rows of the zoo: what each check of each architecture gave, one JSON line each, one file an architecture.

A file is written at once when its architecture is complete, so that several drivers may share a folder and an
interrupted run resumes. Its first line says what was run: the model's class, versions, a hash of the sources, seconds.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "peft", "diffusers")
SOURCES = ("ipca/**/*.py", "kernels/*.py", "tests/zoo/models/*.py", "tests/zoo/checks/*.py")
MOST = 1000
"""Characters of a text that are kept."""


class Row(NamedTuple):
    """What a check gave.

    Attributes:
        architecture: its name in the zoo.
        check: ``selection.form.name``, see :mod:`tests.zoo.checks`.
        outcome: ``"ok"``; ``"wrong"``, another result than the right one; ``"error"``, an exception; ``"crash"``, the
            process ended; ``"timeout"``; ``"needs"``, what the check begins with failed; ``"none"``, nothing to check.
        text: what came, or a remark.
    """

    architecture: str
    check: str
    outcome: str
    text: str = ""

    def line(self) -> str:
        """The row as JSON."""
        return json.dumps({name: value for name, value in self._asdict().items() if value}) + "\n"


class Run(NamedTuple):
    """What was run: the first line of a file."""

    architecture: str
    class_name: str
    seconds: float
    source: str
    versions: dict[str, str]


def reason(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= MOST else f"{text[:MOST]} …"


def source_hash() -> str:
    """Of everything that a row depends on: the package, the kernels, the zoo's models and checks."""
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def versions() -> dict[str, str]:
    """Python and the libraries that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write(run: Run, rows: Iterable[Row], results: Path = RESULTS) -> None:
    """Write an architecture's file, in the place of an older one."""
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{run.architecture}.jsonl"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(run._asdict()) + "\n" + "".join(row.line() for row in rows), encoding="utf-8")
    temporary.replace(path)


def read(name: str, results: Path = RESULTS) -> tuple[Run, list[Row]] | None:
    """An architecture's rows, or None where it was not run."""
    path = results / f"{name}.jsonl"
    if not path.exists():
        return None
    first, *lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return Run(**first), list(parse(lines))


def parse(lines: Iterable[dict[str, Any]]) -> Iterator[Row]:
    """Rows from their JSON."""
    return (Row(**line) for line in lines)
