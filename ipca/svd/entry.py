"""One entry of the spectral cache: what it belongs to, and its file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from ipca._atomic import CorruptFileError, Record, read_checksummed, write_checksummed
from ipca._hashing import tensor_sha256
from ipca.svd.decompose import tolerance
from ipca.svd.result import SVDReport, WindowSVD
from ipca.window import Window

VERSION = 1
"""Of the entries and of what ``window_svd`` promises; a change of either makes every older entry unknown."""

ENDING = ".safetensors"


@dataclass(frozen=True)
class CacheKey:
    """What an entry belongs to.

    Attributes:
        weight: :func:`ipca._hashing.tensor_sha256` of the matrix, which covers its shape and dtype.
        window: the text of the window's start: an index, or a rule that looks at the spectrum.
        rank: of the window.
        tol: the bound on the residual, as a number.
        dtype: that was asked for, such as ``"float64"``, or ``"default"``.
        version: :data:`VERSION` of the program that made it.
    """

    weight: str
    window: str
    rank: int
    tol: float
    dtype: str
    version: int = VERSION

    @property
    def file_name(self) -> str:
        """The entry's file: a hash of all of the key."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:40] + ENDING


@dataclass(frozen=True)
class CacheEntry:
    """One entry as it lies in the folder: ``bytes`` of the file, ``used`` in seconds since 1970."""

    path: Path
    key: CacheKey
    report: SVDReport
    shape: tuple[int, int]
    bytes: int
    used: float


def cache_key(
    W: Tensor,
    window: Window,
    *,
    tol: float | str = "default",
    dtype: torch.dtype | None = None,
    digest: str | None = None,
) -> CacheKey:
    """The key of ``window_svd(W, window, tol=tol, dtype=dtype)`` for one matrix ``W (m, n)``.

    Rules that need no spectrum are resolved first, so that ``"middle"`` and its index share an entry.

    Args:
        digest: ``tensor_sha256(W)``, where it is known already.

    Raises:
        ValueError: ``W`` is no matrix, the window does not fit, or ``tol`` is out of range.
    """
    if W.ndim != 2:
        raise ValueError(f"an entry holds one matrix (m, n), got shape {tuple(W.shape)}; ask for one at a time.")
    resolved = window if window.needs_spectrum else window.resolve(min(W.shape))
    name = "default" if dtype is None else str(dtype).removeprefix("torch.")
    return CacheKey(digest or tensor_sha256(W), resolved.text, resolved.rank, tolerance(tol), name)


def write_entry(folder: Path, key: CacheKey, found: WindowSVD) -> None:
    """Keep the window of one matrix, in one go; raises OSError as :func:`ipca._atomic.write_checksummed` does."""
    (report,) = found.reports
    record = {"key": asdict(key), "report": asdict(report)}
    write_checksummed(folder / key.file_name, record, {"U": found.U, "S": found.S, "Vh": found.Vh})


def read_entry(path: Path) -> tuple[CacheKey, WindowSVD]:
    """The key and the window in the file at ``path``, on the CPU.

    Raises:
        OSError: the file is not there or cannot be read.
        CorruptFileError: it is not what was written, or its name is that of another entry.
    """
    record, tensors = read_checksummed(path)
    try:
        key = CacheKey(**record["key"])
        found = WindowSVD(tensors["U"], tensors["S"], tensors["Vh"], (_report(record["report"]),))
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    if key.file_name != path.name:
        raise CorruptFileError(f"{path} is damaged: it holds another entry than its name says")
    return key, found


def _report(values: Record) -> SVDReport:
    """The report from its record; what a later version reports besides is left out."""
    known = {field.name for field in fields(SVDReport)} - {"window"}
    window = Window(values["window"]["start"], values["window"]["rank"])
    return SVDReport(window=window, **{name: value for name, value in values.items() if name in known})
