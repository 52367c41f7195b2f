"""The spectral cache: decomposed windows on disk, keyed by the hash of their weight.

One checksummed file per entry: ``U (m, r), S (r,), Vh (r, n)`` in the requested dtype, and the report.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from ipca._atomic import LEFT_BEHIND, CorruptFileError, Record, read_checksummed, write_checksummed
from ipca._hashing import tensor_sha256
from ipca.svd.decompose import check_matrix, tolerance, window_svd
from ipca.svd.result import SVDReport, WindowSVD
from ipca.window import Window

VERSION = 1
"""Of the entries' format and of the contract of ``window_svd``; entries of another version are not found."""

_ENDING = ".safetensors"
_ENTRY = re.compile(r"[0-9a-f]{40}\.safetensors")
"""The name of an entry."""
_LARGEST_HEADER = 1 << 20
"""Bytes; that of an entry has some hundred."""
_ABANDONED = 24 * 3600.0
"""Seconds after which a temporary file counts as left behind."""


@dataclass(frozen=True)
class CacheKey:
    """The key of an entry: a weight, a window, and the options of its decomposition.

    Attributes:
        weight: a hash of the matrix, which covers its shape and dtype.
        window: the text of the window's start: an index, or a rule that looks at the spectrum.
        rank: of the window.
        tol: the bound on the residual, as a number.
        dtype: as requested, such as ``"float64"``, or ``"default"``.
        version: of the program that made it.
    """

    weight: str
    window: str
    rank: int
    tol: float
    dtype: str
    version: int = VERSION

    @property
    def file_name(self) -> str:
        """The name of the entry's file: a hash of the whole key."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:40] + _ENDING


@dataclass(frozen=True)
class CacheEntry:
    """One entry in the folder.

    Attributes:
        path: of the file.
        key: what the entry is for.
        report: of its decomposition.
        shape: ``(m, n)`` of the matrix.
        bytes: size of the file.
        used: when it was last used, in seconds since 1970.
    """

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


class SpectralCache:
    """Decomposed windows in ``folder``, which is created with the first entry; any number of processes may share it.

    Args:
        folder: a path; ``~`` is the home folder.

    Attributes:
        hits: the number of entries that :meth:`get` has found.

    Raises:
        ValueError: ``folder`` is empty.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        if isinstance(folder, bool) or not str(folder):
            raise ValueError(f"a cache needs a folder, such as '~/.cache/ipca'; got {folder!r}.")
        self.folder = Path(folder).expanduser()
        self.hits = 0

    def __repr__(self) -> str:
        return f"SpectralCache({str(self.folder)!r})"

    def get(self, key: CacheKey, device: torch.device | str = "cpu") -> WindowSVD | None:
        """The entry of ``key`` with its tensors on ``device``, or None. A damaged one is removed with a warning."""
        path = self.folder / key.file_name
        try:
            _, found = _read_entry(path)
        except FileNotFoundError:
            return None
        except CorruptFileError as error:
            _warn(f"{error}; it is removed and made again")
            with suppress(OSError):
                path.unlink()
            return None
        except OSError as error:
            _warn(f"cannot read the spectral cache {self.folder}: {error.strerror}; its entries are made again")
            return None
        with suppress(OSError):  # a read-only folder keeps no times
            os.utime(path)
        self.hits += 1
        return WindowSVD(found.U.to(device), found.S.to(device), found.Vh.to(device), found.reports)

    def put(self, key: CacheKey, found: WindowSVD) -> None:
        """Write ``found``, the window of one matrix, atomically, as the entry of ``key``.

        Raises:
            OSError: the folder cannot be written or the disk is full; entries are as before.
        """
        _write_entry(self.folder, key, found)

    def entries(self) -> list[CacheEntry]:
        """Every sound entry, of any version, the one used last first."""
        found = []
        for path in self._files():
            with suppress(OSError, CorruptFileError):
                key, window = _read_entry(path)
                shape, status = (window.U.shape[0], window.Vh.shape[1]), path.stat()
                found.append(CacheEntry(path, key, window.report, shape, status.st_size, status.st_mtime))
        return sorted(found, key=lambda entry: (-entry.used, entry.path.name))

    def verify(self, *, remove: bool = False) -> list[tuple[Path, str]]:
        """The damaged entries, each with what is wrong; every file is read and compared with its checksum.

        Args:
            remove: delete them, and return those that are deleted. A file without the header of an entry may be
                somebody's weights: it stays, with a warning that names it.
        """
        damaged = []
        for path in self._files():
            try:
                _read_entry(path)
            except FileNotFoundError:  # another process has deleted it
                continue
            except (OSError, CorruptFileError) as error:
                if remove and not _has_header(path):
                    _warn_foreign(path)
                    continue
                damaged.append((path, str(error)))
                if remove:
                    path.unlink(missing_ok=True)
        return damaged

    def prune(self, *, max_bytes: int | None = None, older_than: float | None = None) -> list[Path]:
        """Delete entries, the least recently used first, and temporary files that killed processes left behind.

        Other files stay; one that has the name of an entry but not its header is named in a warning.

        Args:
            max_bytes: delete until the entries take no more than this.
            older_than: delete what was not used for this many seconds.

        Returns:
            The deleted entries.
        """
        now = time.time()
        for path, status in _by_age(self._files(LEFT_BEHIND)):
            if now - status.st_mtime > _ABANDONED:
                path.unlink(missing_ok=True)
        files = _by_age(self._own_files())
        total, deleted = sum(status.st_size for _, status in files), []
        for path, status in files:
            stale = older_than is not None and now - status.st_mtime > older_than
            if stale or (max_bytes is not None and total > max_bytes):
                path.unlink(missing_ok=True)
                total -= status.st_size
                deleted.append(path)
        return deleted

    def _own_files(self) -> Iterator[Path]:
        """The files that are entries, sound or not; a warning names the others with such a name."""
        for path in self._files():
            if _has_header(path):
                yield path
            else:
                _warn_foreign(path)

    def _files(self, name: re.Pattern[str] = _ENTRY) -> list[Path]:
        """The files in the folder with such a name; it may be a folder that others write in, too."""
        there = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        return [path for path in there if name.fullmatch(path.name) and path.is_file()]


def cached_window_svd(
    W: Tensor,
    window: Window,
    *,
    tol: float | str = "default",
    dtype: torch.dtype | None = None,
    cache: SpectralCache | None = None,
    digests: Sequence[str] | None = None,
) -> WindowSVD:
    """:func:`ipca.window_svd` through ``cache``: known entries are read, the others decomposed together and written.

    An entry is returned as it was written: the same bits, and the report with the seconds of that time. A folder that
    cannot be read or written gives a warning, and the result all the same.

    Args:
        W, window, tol, dtype: as for :func:`ipca.window_svd`, a matrix or a stack.
        cache: None for no cache.
        digests: ``tensor_sha256`` of each matrix, where they are known already.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`ipca.window_svd`.
    """
    if not isinstance(window, Window):
        raise TypeError(f"window must be a Window, for example Window.middle(16); got {window!r}.")
    if cache is None:
        return window_svd(W, window, tol=tol, dtype=dtype)
    check_matrix(W, dims=(2, 3))
    stack = W if W.ndim == 3 else W[None]
    hashes: Sequence[str | None] = digests or [None] * len(stack)
    keys = [cache_key(M, window, tol=tol, dtype=dtype, digest=h) for M, h in zip(stack, hashes, strict=True)]
    found = {i: one for i, key in enumerate(keys) if (one := cache.get(key, W.device)) is not None}
    missing = [i for i in range(len(keys)) if i not in found]
    if missing:
        made = window_svd(W if len(missing) == len(keys) else stack[missing], window, tol=tol, dtype=dtype)
        for i, one in zip(missing, _singles(made), strict=True):
            found[i] = one
            _put(cache, keys[i], one)
    parts = [found[i] for i in range(len(keys))]
    if W.ndim == 2:
        return parts[0]
    U, S, Vh = (torch.stack([getattr(part, name) for part in parts]) for name in ("U", "S", "Vh"))
    return WindowSVD(U, S, Vh, tuple(part.report for part in parts))


def _singles(found: WindowSVD) -> list[WindowSVD]:
    """The window of each matrix by itself."""
    if found.U.ndim == 2:
        return [found]
    parts = zip(found.U, found.S, found.Vh, found.reports, strict=True)
    return [WindowSVD(U, S, Vh, (report,)) for U, S, Vh, report in parts]


def _write_entry(folder: Path, key: CacheKey, found: WindowSVD) -> None:
    """Write the window of one matrix atomically; raises OSError as :func:`ipca._atomic.write_checksummed` does."""
    (report,) = found.reports
    record = {"key": asdict(key), "report": asdict(report)}
    write_checksummed(folder / key.file_name, record, {"U": found.U, "S": found.S, "Vh": found.Vh})


def _read_entry(path: Path) -> tuple[CacheKey, WindowSVD]:
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


def _has_header(path: Path) -> bool:
    """Whether the file at ``path`` has the header of an entry, though perhaps a damaged one's, or is empty or gone."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
            size = int.from_bytes(start, "little")
            header = file.read(size) if size <= _LARGEST_HEADER else b""
        return not start or {"record", "sha256"} <= json.loads(header)["__metadata__"].keys()
    except FileNotFoundError:  # another process has deleted it
        return True
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _report(values: Record) -> SVDReport:
    """The report from its record; fields of a later version are left out."""
    known = {field.name for field in fields(SVDReport)} - {"window"}
    window = Window(values["window"]["start"], values["window"]["rank"])
    return SVDReport(window=window, **{name: value for name, value in values.items() if name in known})


def _put(cache: SpectralCache, key: CacheKey, found: WindowSVD) -> None:
    try:
        cache.put(key, found)
    except OSError as error:
        _warn(f"cannot write the spectral cache {cache.folder}: {error.strerror}; results are used but not kept")


def _by_age(paths: Iterable[Path]) -> list[tuple[Path, os.stat_result]]:
    """Each file with its status, the least recently used first."""
    found = []
    for path in paths:
        with suppress(FileNotFoundError):  # another process deletes too
            found.append((path, path.stat()))
    return sorted(found, key=lambda item: (item[1].st_mtime, item[0].name))


def _warn_foreign(path: Path) -> None:
    _warn(f"{path} has the name of an entry but not its header, and is not deleted; if nobody needs it, delete it")


def _warn(message: str) -> None:
    warnings.warn(f"{message}.", RuntimeWarning, stacklevel=3)
