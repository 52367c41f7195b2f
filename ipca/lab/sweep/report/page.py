"""Write ``report.html`` of a sweep's folder: one file with its pictures in it, without scripts or network."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ipca._atomic import write_atomic
from ipca.lab.sweep.report.comparisons import View, views
from ipca.lab.sweep.report.curves import curves
from ipca.lab.sweep.report.data import Sweep, read_sweep
from ipca.lab.sweep.report.drawing import Panel
from ipca.lab.sweep.report.front import front_panels
from ipca.lab.sweep.report.legend import legend
from ipca.lab.sweep.report.matched import matched_panels
from ipca.lab.sweep.report.rates import rate_panels
from ipca.lab.sweep.report.style import Style, styles, variables
from ipca.lab.sweep.report.tables import (
    Table,
    arm_table,
    difference_tables,
    failure_table,
    frontier_table,
    mean_tables,
    settings_table,
)
from ipca.lab.sweep.report.verdict import judge
from ipca.lab.sweep.store import REPORT

_PACKAGES = ("matplotlib", "jinja2")


@dataclass(frozen=True)
class Figure:
    """Panels under one heading, with what to know before reading them."""

    title: str
    text: str
    legend: list[tuple[Any, str]]
    panels: list[Panel]
    table: Table | None = None


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Make ``report.html`` of the ``rows.csv`` and ``settings.json`` in ``folder``; no model is needed.

    The verdict's rules are in :mod:`ipca.lab.sweep.report.verdict`. The same files give the same bytes.

    Returns:
        The report's path.

    Raises:
        FileNotFoundError, ValueError: the folder is no sweep's, or its table is damaged; an old report stays.
        ImportError: as :func:`require_packages`.
        OSError: the report cannot be written; an old one stays.
    """
    require_packages()
    sweep = read_sweep(Path(folder))
    path = Path(folder) / REPORT
    write_atomic(path, render(sweep).encode())
    return path


def require_packages() -> None:
    """Raise ImportError where a package that the report needs is missing; the message says how to install it."""
    for name in _PACKAGES:
        try:
            import_module(name)
        except ImportError:
            raise ImportError(f"the report needs {name}; run: pip install 'ipca-lora[sweep]'") from None


def verdict(folder: str | os.PathLike[str]) -> str:
    """What the sweep in ``folder`` found, as plain text: the headline, then a line for each further question.

    Raises:
        FileNotFoundError, ValueError: as :func:`write_report`.
    """
    return str(judge(read_sweep(Path(folder))))


def render(sweep: Sweep) -> str:
    """The page as text."""
    look, here = styles(sweep), views(sweep)
    found = judge(sweep)
    return _template().render(
        sweep=sweep,
        verdict=found,
        figures=_figures(sweep, here, look),
        arms=arm_table(found.arms) if found.arms else None,
        means=mean_tables(sweep),
        differences=difference_tables(sweep, here),
        failures=failure_table(sweep),
        settings=settings_table(sweep),
        facts=_facts(sweep),
        light=variables(look, dark=False),
        dark=variables(look, dark=True),
    )


def _figures(sweep: Sweep, here: Sequence[View], look: dict[str, Style]) -> list[Figure]:
    dots = "Marks are means, bars 95 % bootstrap intervals, which few seeds make too narrow; small dots are seeds."
    lines = [m for m in ("lora", "full", "auto") if m in sweep.methods]
    all_methods = list(sweep.methods)
    shown = [
        Figure(
            f"{title} over the window's position",
            f"{dots} Bands: methods without a position. Thin lines: the grid's other rates, means alone; "
            "they may leave the panel. The untrained model is left out where it lies far off.",
            legend([*sweep.positions, *lines], look, base=metric in sweep.base),
            curves(here, metric, look),
        )
        for metric, title in (("retained", "What is kept"), ("target", "What is learned"), ("drift", "Drift"))
        if metric in sweep.metrics
    ]
    crosses = f"{dots} A cross counts runs that failed; a hollow mark is the mean of the runs that did not."
    learned = "Up is less forgotten, right is more learned; a hollow mark is a mean without its failed runs."
    shown += [
        Figure(
            "Robustness to the learning rate",
            f"At the same rate for every method; moved apart sideways to be seen. {crosses}",
            legend(all_methods, look, base=bool(sweep.base)),
            rate_panels(sweep, look),
        ),
        Figure(
            "Learning and forgetting",
            learned,
            legend(all_methods, look, base="retained" in sweep.base),
            front_panels(sweep, look),
            frontier_table(sweep),
        ),
        Figure(
            "Forgetting where all have learned as much",
            "Along each seed's best points over rates and checkpoints, interpolated. Dots are seeds.",
            [],
            matched_panels(sweep, look),
        ),
    ]
    return [figure for figure in shown if figure.panels]


def _facts(sweep: Sweep) -> list[str]:
    """The line under the heading."""
    n = len(sweep.ends)
    facts = [f"{n} runs", f"{len(sweep.methods)} methods", f"{len(sweep.lrs)} rates", f"{len(sweep.seeds)} seeds"]
    if "rank" in sweep.settings:
        facts.append(f"rank {sweep.settings['rank']}")
    if "device" in sweep.settings:
        facts.append(str(sweep.settings["device"]))
    return facts


def _template() -> Any:
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("ipca.lab.sweep.report", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["whole"] = _whole
    return environment.get_template("page.html")


def _whole(text: str) -> str:
    """``text`` whose intervals and ``n = …`` do not break over two lines."""
    return re.sub(r"\[[^\]]*\]|\b[np] [=<] \S+", lambda found: found[0].replace(" ", "\u00a0"), text)
