"""Several sweeps side by side: read, and refused with the reason where they do not compare."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ipca.lab.sweep.report.data import Sweep, read_sweep


def read_sweeps(
    folders: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], labels: Sequence[str] | None = None
) -> dict[str, Sweep]:
    """The sweeps in ``folders`` by label, by default the folders' names; a single one has the label ``""``.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_sweep`; there is no folder, the labels are not one for each and
            distinct, or two sweeps differ in what a comparison needs.
    """
    paths = [Path(folder) for folder in ([folders] if isinstance(folders, str | os.PathLike) else folders)]
    if not paths:
        raise ValueError("there is no sweep to report; give at least one folder.")
    given = [path.absolute().name for path in paths] if labels is None else list(labels)
    if len(given) != len(paths) or len(set(given)) < len(given):
        raise ValueError(
            f"labels must be one for each of the {len(paths)} sweeps, and distinct; got {', '.join(given)}."
        )
    found = {label: read_sweep(path) for label, path in zip(given, paths, strict=True)}
    first, *others = found
    for other in others:
        _check(first, found[first], other, found[other])
    return found if others or labels is not None else {"": found[first]}


def _check(a: str, one: Sweep, b: str, other: Sweep) -> None:
    """Raise ValueError unless the same arms were trained in the same ways."""
    for what, mine, its in zip(_SAME, _same(one), _same(other), strict=True):
        if mine != its:
            raise ValueError(
                f"the sweeps {a} and {b} cannot be put side by side: their {what} differ, "
                f"{_difference(a, mine, b, its)}. Give `ipca sweep` the same options for both."
            )


_SAME = ("methods", "learning rates", "comparisons", "reference windows", "ranks", "metrics", "early steps")


def _same(sweep: Sweep) -> tuple[Any, ...]:
    early = sweep.settings.get("early") if "update" in sweep.comparisons else None
    rank = sweep.settings.get("rank")
    return sweep.methods, sweep.lrs, tuple(sorted(sweep.comparisons)), sweep.reference, rank, sweep.metrics, early


def _difference(a: str, mine: Any, b: str, its: Any) -> str:
    if not isinstance(mine, tuple):
        return f"{mine} in {a} and {its} in {b}"
    only = {a: [x for x in mine if x not in its], b: [x for x in its if x not in mine]}
    parts = [f"only {label} has {', '.join(map(str, values))}" for label, values in only.items() if values]
    return "; ".join(parts) or "in their order"
