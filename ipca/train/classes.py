"""The classes of a run: their names, and their order, which is the base model's where that has the same ones."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ipca.io.hub import config_file
from ipca.io.labels import are_placeholders
from ipca.model.targets import few
from ipca.train.sources import DataError, Row

log = logging.getLogger("ipca.train")
_FEW = 10
"""Rows below which each may have a class of its own."""


def find_classes(rows: Sequence[Row], role: str, column: str) -> tuple[str, ...]:
    """The names of the classes in ``rows``, numbers in their order; at least two.

    Raises:
        DataError: there is one, or ``column`` holds no classes.
    """
    counts = Counter(str(value) for row in rows for value in as_list(row[role]))
    found = sorted(counts, key=int if all(map(_is_integer, counts)) else None)
    if len(found) < 2:
        raise DataError(f"column {column!r}: expected at least two classes, got only {', '.join(map(repr, found))}.")
    fractions, single = _fractions(found), sum(count == 1 for count in counts.values())
    got = f"numbers with fractions, such as {fractions[0]}" if fractions else ""
    if len(rows) >= _FEW and single > len(rows) / 2:
        got = f"{single} rows of {len(rows)} with a class of their own"
    if role == "label" and got:
        raise DataError(
            f"column {column!r}: expected classes that rows have in common, got {got}. Group the rows into classes, or "
            "name the column of the classes: --columns label=NAME."
        )
    return tuple(found)


def base_classes(model: str) -> tuple[str, ...]:
    """The names of the classes of a base model, by index; empty where its ``config.json`` has none.

    Of a repository on the Hub only that file is downloaded: the weights come after the data is checked.

    Raises:
        FileNotFoundError: there is no such model.
    """
    path = config_file(model)
    if not path.is_file():  # loading the model says so
        return ()
    try:
        known = json.loads(path.read_text(encoding="utf-8")).get("id2label") or {}
        return tuple(str(known[str(k)]) for k in range(len(known)))
    except (ValueError, KeyError, TypeError, AttributeError):  # loading the model says what is wrong
        return ()


def in_order_of_base(found: Sequence[str], base: Sequence[str], source: str) -> tuple[str, ...]:
    """The classes of a run on data with those ``found``: in the order of ``base``, and all of it, where it has them.

    The head of the base is kept then, whose outputs are in that order. Names may differ in case. Numbers are places in
    ``base`` where all of its places are found. Other classes than the base's have their own order; a warning says so.

    Args:
        source: the name of the data, for the log.
    """
    for same in (str, str.casefold):
        ours, theirs = [same(name) for name in found], [same(name) for name in base]
        if set(ours) <= set(theirs) and len(set(ours)) == len(ours) and len(set(theirs)) == len(theirs):
            if absent := [name for name, key in zip(base, theirs, strict=True) if key not in ours]:
                log.info("%s: no rows of the class %s, which the base model's head keeps", source, few(absent))
            spelled = dict(zip(ours, found, strict=True))
            return tuple(spelled.get(key, name) for name, key in zip(base, theirs, strict=True))
    if not base or are_placeholders(base):
        return tuple(found)
    if {*found} == {str(k) for k in range(len(base))} and len(set(base)) == len(base):
        log.info("%s: numbers are places among the classes of the base model: %s", source, few(_places(base), 8))
        return tuple(base)
    log.warning(
        "%s: its classes take the place of the base model's, %s; PEFT names outputs by the base, so load it with the "
        "classes of the adapter as its README.md shows",
        source,
        few([*base]),
    )
    return tuple(found)


def _places(names: Sequence[str]) -> list[str]:
    return [f"{k} {name}" for k, name in enumerate(names)]


def place_of(value: Any, labels: Sequence[str]) -> int | None:
    """The place of a class in ``labels``, by its name or, where no name is a number, by itself; None elsewhere."""
    if str(value) in labels:
        return labels.index(str(value))
    if _is_integer(str(value)) and 0 <= int(value) < len(labels) and not any(map(_is_integer, labels)):
        return int(value)
    return None


def as_list(value: Any) -> list[Any]:
    """``value`` where it is a list, else a list of it, or of nothing."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _is_integer(name: str) -> bool:
    return re.fullmatch(r"-?\d+", name) is not None


def _fractions(names: list[str]) -> list[str]:
    """The names that are numbers with fractions, where all are numbers."""
    try:
        return [name for name in names if not float(name).is_integer()]
    except ValueError:
        return []
