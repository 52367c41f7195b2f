"""Patterns: a path, its end, or a regular expression for the whole of it, and which paths they match."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` is the path ``name``, its end, or a regular expression for the whole of it."""
    if name == pattern or name.endswith("." + pattern):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:  # the name of another module, perhaps
        return False


def require_match(pattern: str, names: Iterable[str], otherwise: str) -> None:
    """Raise ValueError where ``pattern`` matches none of ``names``; ``otherwise`` says so of a well-formed one."""
    if any(matches(pattern, name) for name in names):
        return
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is neither a module name nor a regular expression: {error}.") from None
    raise ValueError(otherwise)


def matches_any(patterns: Iterable[str], name: str) -> bool:
    """Whether one of ``patterns`` matches the module ``name`` or a module that contains it."""
    parts = name.split(".")
    parents = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
    return any(matches(pattern, parent) for pattern in patterns for parent in parents)


def lookup(patterns: Mapping[str, T], name: str, default: T) -> T:
    """The value of the first pattern that matches ``name``."""
    return next((value for pattern, value in patterns.items() if matches(pattern, name)), default)
