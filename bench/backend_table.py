"""Measurement of the table that the backend ``"auto"`` chooses by: our backends at the cells of a grid."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ipca.device import tune
from ipca.kernels import tables

SECONDS = 0.02
"""Time for the repetitions of one backend."""


def measure_backends(
    cells: Iterable[Any], path: Path, device: torch.device, seconds: float, rounds: float = SECONDS
) -> bool:
    """Add the rows of every cell that ``path`` lacks, ``rounds`` seconds a backend; whether all are there.

    None is started after ``seconds``.
    """
    os.environ["IPCA_CACHE"] = str(path.parent)
    assert tables.cache_file(device) == path
    shapes = [tune.Cell(cell.M, cell.N, cell.K, cell.rank, cell.dtype, cell.dropout) for cell in cells]
    return tune.measure_backends(shapes, device, seconds=seconds, milliseconds=1e3 * rounds)
