"""Formatting of numbers, tests and method names in the report."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

from ipca.lab.statistics import LEVEL, Difference, Estimate


class Finding(NamedTuple):
    """A question, its answer, and supporting lines."""

    question: str
    answer: str
    details: tuple[str, ...] = ()


NAMES = {
    "lora": "plain LoRA",
    "full": "full fine-tuning",
    "auto": "auto windows",
    "base": "untrained model",
    "mica": "MiCA",
    "kasa": "KaSA",
    "osf": "OSF",
    "oft": "OFT",
    "corda-ipm": "CorDA, IPM",
    "corda-kpm": "CorDA, KPM",
    "oplora": "OPLoRA",
    "lora-null": "LoRA-Null",
}
CONTROLS = {
    "random-window": "windows at random positions",
    "haar": "the reference's singular values on random directions",
    "frozen-A": "the reference window, A frozen",
    "frozen-B": "the reference window, B frozen",
    "matched-principal": "principal directions with the reference's singular values",
    "matched-minor": "minor directions with the reference's singular values",
}


def name(method: str) -> str:
    """The report's name for a method; windows and controls keep their text form."""
    if method in NAMES or method in CONTROLS:
        return NAMES.get(method, method)
    return f"window {method}"


def number(value: float, scale: float | None = None) -> str:
    """``value`` with three decimals; more if ``scale``, by default the value, is small, fewer if it is large."""
    size = abs(value if scale is None else scale)
    if size >= 100:
        return f"{value:.4g}"
    decimals = 3 if size >= 0.005 or size == 0 else 1 - math.floor(math.log10(size))
    return f"{value:.{decimals}f}"


def signed(value: float, scale: float | None = None) -> str:
    """:func:`number` with an explicit sign."""
    return f"{'−' if value < 0 else '+'}{number(abs(value), value if scale is None else scale)}"


def estimated(found: Estimate, *, sign: bool = False) -> str:
    """``0.853 [0.841, 0.862]``, with signs for a difference; without brackets if there is no interval."""
    write = signed if sign or isinstance(found, Difference) else number
    if found.low is None or found.high is None:
        return write(found.mean)
    scale = max(abs(found.mean), abs(found.low), abs(found.high))
    return f"{write(found.mean, scale)} [{write(found.low, scale)}, {write(found.high, scale)}]"


def p_value(value: float) -> str:
    """``p = 0.031``, two digits."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


def result(found: Difference) -> str:
    """``+0.053 [+0.031, +0.072], p = 0.002, n = 10``, with the corrected p if there is one."""
    p = found.p if found.adjusted is None else found.adjusted
    return f"{estimated(found)}, {p_value(p)}, n = {found.n}"


def too_few(tests: Collection[Difference], correction: int) -> str | None:
    """Why no result of ``tests`` could reach the level when multiplied by ``correction``; None if one could."""
    smallest = min(found.smallest for found in tests) * correction
    if smallest <= LEVEL:
        return None
    n = max(found.n for found in tests)
    needed = n + math.ceil(math.log2(smallest / LEVEL))
    return f"n = {n}; smallest possible {p_value(min(1.0, smallest))}; {needed} seeds are needed"


def seeds(n: int) -> str:
    """``1 seed``, ``2 seeds``."""
    return f"{n} seed" if n == 1 else f"{n} seeds"


def listed(items: list[str]) -> str:
    """``a, b and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
