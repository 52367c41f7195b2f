"""Names of methods: parsing, normalization, kind and position."""

from __future__ import annotations

from ipca.lab.names import BASELINES as BASELINES
from ipca.lab.names import CONTROLS as CONTROLS
from ipca.window import Window

_REVERSE = "matched-middle"
"""A control of the ends: with an end as its reference, only the directions differ from that end."""
_OTHERS = {"lora": "lora", "full": "full", "auto": "auto"}
_NEED_INPUTS = ("auto", "corda-ipm", "corda-kpm", "lora-null")


def kind_of(method: str) -> str:
    """``"window"``, ``"lora"``, ``"full"``, ``"auto"``, ``"control"`` or ``"baseline"``, a method of another paper.

    Args:
        method: a window such as ``"0.25"``, or a name of :func:`apply`'s table.

    Raises:
        ValueError: an unknown method; the message lists the choices.
    """
    if method in (*CONTROLS, _REVERSE):
        return "control"
    if method in BASELINES:
        return "baseline"
    if method in _OTHERS:
        return _OTHERS[method]
    try:
        Window(method, 1)
    except (TypeError, ValueError):
        raise ValueError(
            f"unknown method {method!r}: use a window such as 'middle', '0.25' or 'start=256', "
            f"{', '.join(map(repr, _OTHERS))}, a baseline: {', '.join(map(repr, BASELINES))}, or a control: "
            f"{', '.join(map(repr, (*CONTROLS, _REVERSE)))}."
        ) from None
    return "window"


def needs_inputs(method: str) -> bool:
    """Whether a method looks at inputs of the model before it adapts it.

    Args:
        method: as for :func:`kind_of`.

    Raises:
        ValueError: as :func:`kind_of`.
    """
    return method in _NEED_INPUTS or (kind_of(method) == "window" and Window(method, 1).needs_calibration)


def check_method(method: str) -> str:
    """The canonical name of ``method``: ``"middle"`` and ``"0.50"`` are both ``"0.5"``.

    Args:
        method: as for :func:`kind_of`.

    Raises:
        ValueError: as :func:`kind_of`.
    """
    position = position_of(method)
    if position is not None:
        return str(position)
    return Window(method, 1).text if kind_of(method) == "window" else method


def position_of(method: str) -> float | None:
    """The fraction ``f = start / (d − rank)`` of a window that is given by one, else None.

    Args:
        method: as for :func:`kind_of`.

    Raises:
        ValueError: as :func:`kind_of`.
    """
    if kind_of(method) != "window":
        return None
    named = {"principal": 0.0, "middle": 0.5, "minor": 1.0}
    text = Window(method, 1).text
    try:
        return named[text] if text in named else float(text)
    except ValueError:
        return None
