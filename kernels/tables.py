"""Measured rows for a device, shipped in ``kernels/measured/*.json`` and cached on disk; the nearest one is used.

A table holds ``device``, ``capability`` and two lists of rows ``[key, [M, N, K, R], found]``, ``M`` a power of two:

    list        key                                                        found
    configs     kernel, "16-bit" | "tf32" | "float32", dropout             the fastest configuration, a Config
    backends    dtype such as "bfloat16", frozen, dropout, training        milliseconds by name of the backend

``frozen, dropout, training`` are booleans. Tables of the device itself, its cache and the shipped one, come before
those of another device of the same architecture. A row further than ``FURTHEST`` from a shape says nothing of it.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ipca._cache_folder import default_cache_folder

SHIPPED = Path(__file__).parent / "measured"
FURTHEST = 4.0  # octaves, such as 16 times as many tokens


class Row(NamedTuple):
    """A measurement at one shape; ``of`` names its subject, as a tuple that must match exactly."""

    of: tuple[Any, ...]
    shape: tuple[int, int, int, int]
    found: Any
    source: str


def cache_file(device: torch.device) -> Path:
    """The file of what is measured on ``device``."""
    return (
        default_cache_folder()
        / f"{torch.cuda.get_device_name(device).lower().replace(' ', '-').replace('/', '-')}.json"
    )


Tables = tuple[dict[str, Any], ...]


def tables_for(device: torch.device) -> tuple[Tables, Tables]:
    """The tables of ``device`` itself, its own cache first, and those of other devices of its architecture."""
    if device.type != "cuda":
        return (), ()
    return _tables_for(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device), cache_file(device))


@cache
def _tables_for(name: str, capability: tuple[int, int], own: Path) -> tuple[Tables, Tables]:
    shipped = [read(path) for path in sorted(SHIPPED.glob("*.json"))]
    same = [table for table in shipped if table["device"] == name]
    related = [t for t in shipped if t["device"] != name and t["capability"][0] == capability[0]]
    return (*([read(own)] if own.exists() else []), *same), tuple(related)


def read(path: Path) -> dict[str, Any]:
    """One table; ``ValueError`` where the file is none."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(table["device"], str)
        assert isinstance(table["capability"], list)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{path} is not a tuning table ({error!r}); delete it to measure anew.") from error
    return {"configs": [], "backends": [], **table, "source": path.name}


def add_rows(path: Path, device: torch.device, **rows: list[Any]) -> None:
    """Append ``configs`` or ``backends`` rows to a table, made where it is missing, in one atomic step."""
    table = read(path) if path.exists() else {"configs": [], "backends": []}
    table |= {"device": torch.cuda.get_device_name(device), "capability": [*torch.cuda.get_device_capability(device)]}
    for name, new in rows.items():
        keys = [row[:-1] for row in new]
        table[name] = [row for row in table[name] if row[:-1] not in keys] + new
    table.pop("source", None)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        json.dump(table, file)
    os.replace(file.name, path)
    forget()


@cache
def nearest(kind: str, of: tuple[Any, ...], shape: tuple[int, int, int, int], device: torch.device) -> Row | None:
    """The row of ``kind`` about ``of`` whose shape is closest, at most ``FURTHEST`` octaves away, or None.

    Of another device only if this one has none as close.
    """
    for tables in tables_for(device):
        rows = [
            Row(of, tuple(row[1]), row[2], table["source"])
            for table in tables
            for row in table[kind]
            if tuple(row[0]) == of and octaves(row[1], shape) <= FURTHEST
        ]
        if rows:
            return min(rows, key=lambda row: octaves(row.shape, shape))
    return None


def forget() -> None:
    """Read the tables anew at the next look-up."""
    _tables_for.cache_clear()
    nearest.cache_clear()


def octaves(one: Any, other: Any) -> float:
    """The distance of two shapes: Euclidean, in powers of two."""
    return math.dist([math.log2(max(1, size)) for size in one], [math.log2(max(1, size)) for size in other])
