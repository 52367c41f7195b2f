"""Patterns of module paths: the path, its end, or a regular expression for all of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` is the path ``name``, its end, or a regular expression for all of it."""
    if name == pattern or name.endswith("." + pattern):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:  # the name of another module, perhaps
        return False


def lookup(patterns: Mapping[str, T], name: str, default: T) -> T:
    """The value of the first pattern that matches ``name``."""
    return next((value for pattern, value in patterns.items() if matches(pattern, name)), default)


def matches_any(patterns: Iterable[str], name: str) -> bool:
    """Whether one of ``patterns`` matches the module ``name`` or a module that contains it."""
    parts = name.split(".")
    parents = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
    return any(matches(pattern, parent) for pattern in patterns for parent in parents)


def hint(pattern: str, names: Iterable[str]) -> str:
    """A sentence on what may be meant by ``pattern``, which matches none of ``names``; empty where nothing is near."""
    known = [name for name in names if name]
    parts = [part for part in re.split(r"[,;\s]+", pattern) if part]
    if len(parts) > 1 and any(matches(part, name) for part in parts for name in known):
        return f" It is one pattern; give {' and '.join(map(repr, parts))} as separate ones."
    written = re.split(r"[^\w.]", pattern.replace("\\.", "."))[-1].strip(".")  # of a regular expression, its plain end
    length = written.count(".") + 1
    ends = sorted({".".join(name.split(".")[-length:]) for name in known})
    found = get_close_matches(written, ends)
    return f" Did you mean {' or '.join(map(repr, found))}?" if found else ""
