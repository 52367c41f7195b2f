"""The servers, where they are installed, and how far what they compute is from the live models."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from tests.servers.cases import WANTED

ROOT = Path(__file__).parents[2]
INSTALLED = ROOT / ".servers"
"""``make servers`` makes an environment for each server in this folder."""
RESULTS = Path(__file__).with_name("results.csv")
PAGE = ROOT / "docs" / "results" / "servers.md"
SERVERS = {"mlx": "mlx-lm", "llama_cpp": "llama-cpp-python", "vllm": "vLLM"}
"""Names as in the commands and files, and as users know them."""
TOLERANCE = 2e-5
"""How far a log-probability in float32 may be off; the servers' own base models are off by up to 1e-5."""


@dataclass(frozen=True)
class Row:
    """One adapter in one server.

    Attributes:
        server: of :data:`SERVERS`.
        version: of the server's package.
        adapter: a name of :mod:`tests.servers.cases`, or ``"base"`` for none.
        moved: largest change of a log-probability by the adapter.
        difference: largest difference between the server's log-probability and the live model's, in float32.
    """

    server: str
    version: str
    adapter: str
    moved: float
    difference: float


def python_of(server: str) -> Path | None:
    """The interpreter of the server's environment; None if the server is not installed."""
    ready = INSTALLED / server / ".ready"
    return INSTALLED / server / "bin" / "python" if ready.exists() else None


def measure(server: str, cases: Path) -> list[Row]:
    """Let ``server`` compute all adapters in the folder ``cases``.

    Raises:
        RuntimeError: it failed; the message ends with what it said.
    """
    python = python_of(server)
    assert python is not None
    script = Path(__file__).with_name(f"in_{server}.py")
    paths = str(INSTALLED / server / "converter")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "found.npz"
        commands = [[python, script, cases, out]]
        if server == "llama_cpp":  # its converters need torch and transformers, which this environment has
            commands.insert(0, [sys.executable, script, cases, "--convert", INSTALLED / server / "source"])
        for command in commands:
            done = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{SERVERS[server]} failed: {done.stderr[-3000:]}")
        found, wanted = dict(np.load(out)), dict(np.load(cases / WANTED))
    version = str(found.pop("version"))
    moved = {name: _off(wanted["base"], values) for name, values in wanted.items()}
    return [Row(server, version, name, moved[name], _off(found[name], wanted[name])) for name in wanted]


def _off(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference where both have a value; every position but the last has one."""
    known = np.isfinite(found).all(-1)
    assert known[:-1].all()
    return float(np.abs(found - wanted)[known].max())


def read_rows() -> list[Row]:
    """The rows of the last run of each server."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        _, *lines = csv.reader(file)
    return [Row(server, version, adapter, float(x), float(y)) for server, version, adapter, x, y in lines]


def write_rows(rows: Iterable[Row]) -> None:
    """Put ``rows`` in the place of earlier ones of the same servers."""
    rows = list(rows)
    new = {row.server for row in rows}
    kept = [row for row in read_rows() if row.server not in new]
    order = list(SERVERS)
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(Row)])
        for row in sorted([*kept, *rows], key=lambda row: order.index(row.server)):
            writer.writerow([row.server, row.version, row.adapter, f"{row.moved:.3g}", f"{row.difference:.1e}"])
