"""Formatting of table cells, methods and tests on the study's page."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ipca.lab.statistics import Estimate
from ipca.lab.sweep.report.words import estimated, number, signed
from studies.window_position.rows import KNOWN_INPUTS, NEW_INPUTS

_NAMES = {"0.0": "principal, f = 0", "0.5": "middle, f = 0.5", "1.0": "minor, f = 1"}
_NAMES |= {NEW_INPUTS: "most of the new inputs", KNOWN_INPUTS: "least of the known inputs"}
_NAMES |= {"lora": "plain LoRA", "full": "full fine-tuning", "auto": "auto"}


def method_name(method: str) -> str:
    """The page's name for a method: windows by position, controls by their own name."""
    window = method[:1].isdigit()
    return _NAMES.get(method, f"f = {float(method):g}" if window else method)


def short_name(method: str) -> str:
    """:func:`method_name` without a window's position."""
    return method_name(method).split(",")[0]


def number_cell(text: str, *, sign: bool = False) -> str:
    """A number of a table; a dash if the cell is empty."""
    if not text:
        return "–"
    value = float(text)
    if math.isinf(value):
        return f"{'−' if value < 0 else '+' if sign else ''}∞"
    return signed(value) if sign else number(value).replace("-", "−")


def estimate_cell(row: Mapping[str, str], *, sign: bool = False, prefix: str = "", middle: str = "mean") -> str:
    """``0.853 [0.841, 0.862]``; without brackets if there is no interval, a dash if there is no mean."""
    if not row[middle]:
        return "–"
    low, high = (float(row[f"{prefix}{end}"]) if row[f"{prefix}{end}"] else None for end in ("low", "high"))
    return estimated(Estimate(float(row[middle]), low, high, 0), sign=sign).replace("-", "−")


def effect(row: Mapping[str, str]) -> str:
    """The difference to the middle window in a row of ``summary.csv``."""
    return estimate_cell(row, sign=True, prefix="difference_", middle="difference")


def percent(share: float) -> str:
    """``12 %``, without a sign if it rounds to 0."""
    return f"{round(100 * share)} %".replace("-", "−")


def p_cell(text: str) -> str:
    """``0.014``, ``< 0.001``; a dash if the cell is empty."""
    if not text:
        return "–"
    return "< 0.001" if float(text) < 0.001 else f"{float(text):.3f}"
