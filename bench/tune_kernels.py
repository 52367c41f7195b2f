"""Tuning of all kernels over a grid of shapes, into the table that later runs read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ipca.device.tune import Cell, measure_configs
from ipca.kernels import tables


def tune_grid(cells: Iterable[Mapping[str, Any]], path: Path, device: torch.device, seconds: float) -> bool:
    """Time every candidate of every kernel at each cell, for ``seconds``; whether all of them were reached.

    Args:
        cells: ``M``, ``N``, ``K``, ``rank`` and ``dtype`` (a torch dtype name) of each.
        path: the table, named by :func:`tables.cache_file`; its existing rows are not measured again.
        seconds: no kernel is started after this time.
    """
    os.environ["IPCA_CACHE"] = str(path.parent)
    assert tables.cache_file(device) == path
    shapes = [Cell(cell["M"], cell["N"], cell["K"], cell["rank"], cell["dtype"]) for cell in cells]
    return measure_configs(shapes, device, seconds=seconds)
