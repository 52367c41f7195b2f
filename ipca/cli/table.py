"""Words of the tables that people read."""

from __future__ import annotations


def short(name: str, width: int) -> str:
    """``name``, its beginning replaced by … where it is longer than ``width``."""
    return name if len(name) <= width else "…" + name[-(width - 1) :]


def mib(size: object) -> str:
    """A number of bytes as MiB, a small one as KiB."""
    assert isinstance(size, int)
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"
