"""``ipca cache list | verify | prune``."""

from __future__ import annotations

import argparse
import time

from ipca._cache_folder import default_cache_folder
from ipca.svd.cache import CacheEntry, SpectralCache

Record = dict[str, object]


def cache(args: argparse.Namespace) -> tuple[Record, str]:
    """List, verify or prune the cache in a folder."""
    held = SpectralCache(args.cache or default_cache_folder())
    if held.folder.exists() and not held.folder.is_dir():
        raise NotADirectoryError(f"{held.folder} is not a folder; give the folder of a cache.")
    return {"list": _list, "verify": _verify, "prune": _prune}[args.action](held, args)


def _list(held: SpectralCache, args: argparse.Namespace) -> tuple[Record, str]:
    entries = held.entries()
    total = sum(entry.bytes for entry in entries)
    lines = [f"{'weight':22} {'shape':>14} {'window':>16} {'tol':>7} {'dtype':>9} {'path':>6} {'MiB':>7} {'used':>7}"]
    lines += [_line(entry) for entry in entries]
    lines.append(f"{len(entries)} entries, {total / 2**20:.1f} MiB in {held.folder}")
    record: Record = {"folder": str(held.folder), "bytes": total, "entries": [_record(entry) for entry in entries]}
    return record, "\n".join(lines[1:] if not entries else lines)


def _verify(held: SpectralCache, args: argparse.Namespace) -> tuple[Record, str]:
    damaged = held.verify(remove=args.remove)
    if damaged and not args.remove:
        words = "; ".join(words for _, words in damaged)
        raise ValueError(f"{len(damaged)} entries are damaged ({words}); ipca cache verify --remove deletes them.")
    names = [path.name for path, _ in damaged]
    text = f"removed {len(names)} damaged entries from" if names else "no damaged entry in"
    return {"folder": str(held.folder), "removed": names}, f"{text} {held.folder}"


def _prune(held: SpectralCache, args: argparse.Namespace) -> tuple[Record, str]:
    names = [path.name for path in held.prune(max_bytes=args.max_bytes, older_than=args.older_than)]
    return {"folder": str(held.folder), "removed": names}, f"removed {len(names)} entries from {held.folder}"


def _record(entry: CacheEntry) -> Record:
    key, report = entry.key, entry.report
    return {
        "file": entry.path.name,
        "weight": key.weight,
        "shape": list(entry.shape),
        "window": key.window,
        "start": report.window.index,
        "rank": key.rank,
        "tol": key.tol,
        "dtype": key.dtype,
        "version": key.version,
        "path": report.path,
        "residual": report.residual,
        "certified": report.certified,
        "seconds": report.seconds,
        "bytes": entry.bytes,
        "used": entry.used,
    }


def _line(entry: CacheEntry) -> str:
    key, window = entry.key, entry.report.window
    shape, span = " × ".join(map(str, entry.shape)), f"[{window.index}, {window.index + window.rank})"
    days = (time.time() - entry.used) / 86400
    return (
        f"{key.weight[:22]:22} {shape:>14} {span:>16} {key.tol:7.0e} {key.dtype:>9} {entry.report.path:>6} "
        f"{entry.bytes / 2**20:7.2f} {days:5.1f} d"
    )
