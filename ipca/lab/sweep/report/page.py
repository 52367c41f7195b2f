"""The HTML report of a sweep: one self-contained file, without scripts or network access."""

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
from ipca.lab.sweep.report.curves import position_panels, rate_panels
from ipca.lab.sweep.report.data import Sweep, read_sweep
from ipca.lab.sweep.report.drawing import Panel
from ipca.lab.sweep.report.frontier import frontier_panels, matched_panels
from ipca.lab.sweep.report.style import Style, legend, styles, variables
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
    """Panels under one heading, with an explanation."""

    title: str
    text: str
    legend: list[tuple[str, str]]
    panels: list[Panel]
    table: Table | None = None


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` from the ``rows.csv`` and ``settings.json`` in ``folder``; no model is needed.

    The rules of the verdict stand in ``ipca/lab/sweep/report/verdict.py`` and ``findings.py``. The same files give the
    same bytes.

    Args:
        folder: that a sweep wrote.

    Returns:
        The path of the report.

    Raises:
        FileNotFoundError, ValueError: the folder is not that of a sweep, or its table is damaged; an existing report is
            intact.
        ImportError: Jinja2 or matplotlib is not installed.
        OSError: the report cannot be written; an existing report is intact.
    """
    require_packages()
    sweep = read_sweep(Path(folder))
    path = Path(folder) / REPORT
    write_atomic(path, render(sweep).encode())
    return path


def require_packages() -> None:
    """Raise ImportError if a package that the report needs is missing; the message says how to install it."""
    for name in _PACKAGES:
        try:
            import_module(name)
        except ImportError:
            raise ImportError(f"the report needs {name}; run: pip install 'ipca-lora[sweep]'") from None


def verdict(folder: str | os.PathLike[str]) -> str:
    """The verdict on the sweep in ``folder``, as plain text: the headline, then the further findings.

    Args:
        folder: that a sweep wrote.

    Raises:
        FileNotFoundError, ValueError: as :func:`write_report`.
    """
    return str(judge(read_sweep(Path(folder))))


def render(sweep: Sweep) -> str:
    """The report as HTML."""
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
    dots = "Marks are means, bars 95 % bootstrap intervals, too narrow for few seeds; small dots are seeds."
    lines = [m for m in ("lora", "full", "auto") if m in sweep.methods]
    all_methods = list(sweep.methods)
    shown = [
        Figure(
            f"{title} over the window's position",
            f"{dots} Bands: methods without a position. Thin lines: means at the grid's other rates, which may leave "
            "the panel. The untrained model is omitted if it is far from all others.",
            legend([*sweep.positions, *lines], look, base=metric in sweep.base),
            position_panels(here, metric, look),
        )
        for metric, title in (("retained", "Retention"), ("target", "Target"), ("drift", "Drift"))
        if metric in sweep.metrics
    ]
    crosses = f"{dots} A cross counts failed runs; a hollow mark is the mean of the others."
    learned = "Up is less forgetting, right is more learning; a hollow mark is a mean without its failed runs."
    shown += [
        Figure(
            "Robustness to the learning rate",
            f"At the same rate for every method; marks are offset sideways for visibility. {crosses}",
            legend(all_methods, look, base=bool(sweep.base)),
            rate_panels(sweep, look),
        ),
        Figure(
            "Learning and forgetting",
            learned,
            legend(all_methods, look, base="retained" in sweep.base),
            frontier_panels(sweep, look),
            frontier_table(sweep),
        ),
        Figure(
            "Forgetting at equal learning",
            "Interpolated along each seed's best points over rates and checkpoints. Dots are seeds.",
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
    environment.filters["unbroken"] = _unbroken
    return environment.get_template("page.html")


def _unbroken(text: str) -> str:
    """``text`` with non-breaking spaces in intervals and ``n = …``."""
    return re.sub(r"\[[^\]]*\]|\b[np] [=<] \S+", lambda found: found[0].replace(" ", "\u00a0"), text)
