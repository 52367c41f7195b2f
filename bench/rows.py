"""Rows of measurements: provenance columns (device, versions, commit), and CSV files."""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
SOURCES = ("ipca", "kernels", "csrc", "bench")
FACTS = ("device", "torch", "triton", "peft", "transformers", "python", "commit")

Row = dict[str, Any]


def facts(device: torch.device) -> dict[str, str]:
    """The provenance columns ``FACTS`` of a row measured on ``device``."""
    versions = {name: version(name) for name in ("triton", "peft", "transformers")}
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        **versions,
        "python": platform.python_version(),
        "commit": commit(),
    }


def device_name(device: torch.device) -> str:
    """The name of the GPU, or the type of the processor and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {platform.machine()}, {torch.get_num_threads()} threads"


def slug(name: str) -> str:
    """The device in file names: ``"h100"`` for "NVIDIA H100 80GB HBM3", ``"cpu"`` for any CPU."""
    words = re.split(r"[^a-z0-9]+", name.lower().removeprefix("nvidia "))
    if words[0] == "cpu":
        return "cpu"
    numbered = next((i for i, word in enumerate(words) if any(c.isdigit() for c in word)), len(words) - 1)
    return "-".join(words[: numbered + 1])


def version(package: str) -> str:
    """The installed version, empty if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@cache
def commit() -> str:
    """HEAD, followed by ``+`` and a hash of the sources if they differ from it; only the hash without git.

    The variable ``IPCA_COMMIT`` overrides it, for a copy of the sources without their history.
    """
    if named := os.environ.get("IPCA_COMMIT"):
        return named
    head = _git("rev-parse", "--short=10", "HEAD")
    if head is None:
        return f"sources-{_hash_of_sources()}"
    return f"{head}+{_hash_of_sources()}" if _git("status", "--porcelain", "--", *SOURCES, ":!bench/results") else head


def append_rows(path: Path, rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Append ``rows`` to the CSV file, created with its header if missing; synced to disk on return."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict[str, str]]:
    """All rows of a CSV file; empty if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def same_run(rows: Iterable[dict[str, str]], device: str, commit: str) -> list[dict[str, str]]:
    """The rows of one device and commit, which need not be measured again."""
    return [row for row in rows if (row["device"], row["commit"]) == (device, commit)]


def _git(*arguments: str) -> str | None:
    """The output of git, None if it fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _hash_of_sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*")):
        if path.suffix in (".py", ".cu", ".cuh", ".cpp", ".json"):
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:8]
