"""Measured rows for a device, shipped in ``kernels/measured/*.json`` and cached on disk; the nearest one is used.

A table holds ``device``, ``capability`` and three lists of rows ``[key, [M, N, K, R], found]``, ``M`` a power of two:

    list        key                                                        found
    configs     kernel, "16-bit" | "tf32" | "float32", dropout             the fastest configuration, a Config
    backends    dtype such as "bfloat16", frozen, dropout, training        milliseconds by name of the backend
    checks      :func:`versions`, and no shape                             the fault in each arithmetic, "" if none

``frozen, dropout, training`` are booleans. Tables of the device itself, its cache and the shipped one, come before
those of another device of the same architecture. A row further than ``FURTHEST`` from a shape says nothing of it.
``checks`` are what ``ipca doctor`` found.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ipca._atomic import write_atomic
from ipca._cache_folder import default_cache_folder
from ipca._version import __version__

SHIPPED = Path(__file__).parent / "measured"
FURTHEST = 4.0  # octaves, such as 16 times as many tokens
LISTS = ("configs", "backends", "checks")


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
        assert all(len(row) == 3 for name in LISTS for row in table.get(name, []))
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{path} is not a tuning table ({error!r}); delete it to measure anew.") from error
    return {**dict.fromkeys(LISTS, ()), **table, "source": path.name, "shipped": path.parent == SHIPPED}


def add_rows(path: Path, device: torch.device, **rows: list[Any]) -> None:
    """Append ``configs``, ``backends`` or ``checks`` to a table, made where it is missing, in one atomic step."""
    table = read(path) if path.exists() else dict.fromkeys(LISTS, ())
    keys = {name: [row[:-1] for row in new] for name, new in rows.items()}
    kept = {name: [row for row in table[name] if row[:-1] not in keys.get(name, ())] for name in LISTS}
    _write(path, device, {name: kept[name] + rows.get(name, []) for name in LISTS})


def drop_rows(path: Path, device: torch.device, shapes: list[list[int]]) -> None:
    """Drop the rows of these shapes from a table, in one atomic step."""
    table = read(path)
    _write(path, device, {name: [row for row in table[name] if row[1] not in shapes] for name in LISTS})


def _write(path: Path, device: torch.device, lists: dict[str, Any]) -> None:
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps({"device": name, "capability": [*capability], **lists}).encode())
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


@cache
def checked(device: torch.device) -> dict[str, str]:
    """The fault of each arithmetic of ``device`` that was checked with these versions, an empty text where it passed.

    A shipped row counts under every driver: what runs was compiled by Triton.
    """
    driver, *others = versions()
    for table in tables_for(device)[0]:
        for (row_driver, *row_others), _, found in table["checks"]:
            if row_others == others and (row_driver == driver or table["shipped"]):
                return dict(found)
    return {}


def versions() -> list[str]:
    """The versions that a check holds for: the driver's, as the CUDA version it supports, torch, triton and ipca."""
    import triton  # not above: a table can be read without it

    return [driver_version(), str(torch.__version__), triton.__version__, __version__]


@cache
def driver_version() -> str:
    """The CUDA version that the driver supports, such as ``"13.0"``."""
    number = ctypes.c_int()
    driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    driver.cuDriverGetVersion(ctypes.byref(number))
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


_forgotten = 0


def readings() -> int:
    """A number that another reading of the tables raises, for what is derived from them."""
    return _forgotten


def forget() -> None:
    """Read the tables anew at the next look-up."""
    global _forgotten
    _forgotten += 1
    for known in (_tables_for, nearest, checked):
        known.cache_clear()


def octaves(one: Any, other: Any) -> float:
    """The distance of two shapes: Euclidean, in powers of two."""
    return math.dist([math.log2(max(1, size)) for size in one], [math.log2(max(1, size)) for size in other])
