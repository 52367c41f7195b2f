"""Measurement of the table that the backend ``"auto"`` chooses by: our backends at the cells of a grid.

A row: dtype, form, dropout, training or not; ``(M, N, K, R)``; milliseconds of each backend that can run.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.grid import Cell
from bench.pc_linear import bench_modes
from bench.providers import BACKENDS, FORMS, Provider
from bench.rows import Row
from bench.timing import side_stream
from ipca.kernels import tables
from ipca.kernels.tuning import bucket

MODES = {"full": True, "forward": False}
"""Whether a mode is training, by the table's convention."""
SECONDS = 0.3
"""Time for the rounds of one mode of one cell."""


def measure_backends(
    cells: Iterable[Cell], path: Path, device: torch.device, seconds: float, rounds: float = SECONDS
) -> bool:
    """Add the rows of every cell that ``path`` lacks, ``rounds`` seconds a mode; whether all are there.

    None is started after ``seconds``.
    """
    deadline = time.perf_counter() + seconds
    ours = [Provider(f"ipca-{backend}", form) for form in FORMS for backend in BACKENDS if backend != "auto"]
    with side_stream(device):
        for cell in tqdm([cell for cell in cells if not known(cell, path)], desc="Backends", unit="cell"):
            if time.perf_counter() > deadline:
                return False
            rows = bench_modes(cell, device, rounds, ours, tuple(MODES))
            tables.add_rows(path, device, backends=table_rows(cell, rows))
    return True


def table_rows(cell: Cell, rows: Iterable[Row]) -> list[list[Any]]:
    """The table's rows of a cell: one per form and mode; backends without a time are omitted."""
    times: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row["status"] == "ok":
            key = (row["form"], row["mode"])
            times.setdefault(key, {})[row["provider"].removeprefix("ipca-")] = float(row["median_ms"])
    return [
        [[cell.dtype, form == "intact", cell.dropout > 0, MODES[mode]], shape_of(cell), found]
        for (form, mode), found in times.items()
    ]


def known(cell: Cell, path: Path) -> bool:
    """Whether the table has this cell."""
    if not path.exists():
        return False
    of = [cell.dtype, cell.dropout > 0]
    return any([*row[0][::2]] == of and row[1] == shape_of(cell) for row in tables.read(path)["backends"])


def shape_of(cell: Cell) -> list[int]:
    """``M, N, K, R`` with the table's bucketing of ``M``."""
    return [bucket(cell.M), cell.N, cell.K, cell.rank]
