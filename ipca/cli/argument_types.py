"""Types of command-line values: functions that turn a text into a value, or say what is wrong with it."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from ipca.svd.decompose import TOLERANCES, tolerance
from ipca.window import Window


def positive_int(text: str) -> int:
    """``"3"`` as an int of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def positive_number(text: str) -> float:
    """``"1e-3"`` as a finite float above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def window_start(text: str) -> str:
    """A text form of :class:`ipca.Window` that needs no inputs of the model."""
    try:
        window = Window(text, 1)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from None
    if window.needs_calibration:
        raise argparse.ArgumentTypeError(f"{text!r} needs inputs of the model, which commands do not take; use another")
    return window.text


def svd_tolerance(text: str) -> float | str:
    """``"fast"``, ``"default"``, ``"exact"``, or a number."""
    try:
        value: float | str = text if text in TOLERANCES else float(text)
        tolerance(value)
    except ValueError:
        names = ", ".join(TOLERANCES)
        raise argparse.ArgumentTypeError(f"must be {names} or a number from 1e-12 to below 1, got {text!r}") from None
    return value


def picture_path(text: str) -> Path:
    """The path of a picture, in a format that can be drawn."""
    path = Path(text)
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"{text} must end in .png, .pdf or .svg")
    return path


def byte_count(text: str) -> int:
    """``"500M"`` as bytes; K, M, G and T are powers of 1024."""
    return int(_with_unit(text, {"": 1, **{unit: 1024**k for k, unit in enumerate("KMGT", start=1)}}))


def seconds(text: str) -> float:
    """``"30d"`` as seconds; the units are s, m, h and d."""
    return _with_unit(text, {"s": 1, "m": 60, "h": 3600, "d": 86400})


def _with_unit(text: str, units: dict[str, int]) -> float:
    unit = next((u for u in units if u and text.upper().endswith(u.upper())), "")
    try:
        value = float(text[: len(text) - len(unit)]) * units[unit]
        if not 0 <= value < float("inf"):
            raise ValueError
    except (ValueError, KeyError):
        known = ", ".join(unit for unit in units if unit)
        raise argparse.ArgumentTypeError(f"{text!r} is not a number with one of the units {known}") from None
    return value
