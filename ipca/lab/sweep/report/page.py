"""The HTML report of a sweep: one self-contained file, without scripts or network access."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from ipca._atomic import write_atomic
from ipca.lab.sweep.report.data import Sweep, read_sweep
from ipca.lab.sweep.report.drawing import Panel
from ipca.lab.sweep.report.figures import figures_of
from ipca.lab.sweep.report.style import canvas, inline, legend, styles, variables
from ipca.lab.sweep.report.tables import Table, settings_table, tables_of
from ipca.lab.sweep.report.verdict import Verdict, judge
from ipca.lab.sweep.store import REPORT

_PACKAGES = ("matplotlib", "jinja2")


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
    write_atomic(path, render({"": sweep}).encode())
    return path


def require_packages() -> None:
    """Raise ImportError if a package that the report needs is missing; the message says how to install it."""
    for name in _PACKAGES:
        try:
            import_module(name)
        except ImportError:
            raise ImportError(f"the report needs {name}; run: pip install 'ipca-lora[sweep]'") from None


def is_report(path: Path) -> bool:
    """Whether the file at ``path`` is a report on sweeps."""
    return path.is_file() and b"<title>Window sweep: " in path.read_bytes()[:1000]


def verdict(folder: str | os.PathLike[str]) -> str:
    """The verdict on the sweep in ``folder``, as plain text: the headline, then the further findings.

    Args:
        folder: that a sweep wrote.

    Raises:
        FileNotFoundError, ValueError: as :func:`write_report`.
    """
    return str(judge(read_sweep(Path(folder))))


def render(sweeps: Mapping[str, Sweep]) -> str:
    """The report on one sweep, or on several by label, as HTML."""
    look = styles(next(iter(sweeps.values())))
    parts = [Part(label, judge(sweep), _facts(sweep), settings_table(sweep)) for label, sweep in sweeps.items()]
    drawn = itertools.count()
    return _template().render(
        parts=parts,
        title=parts[0].verdict.headline if len(parts) == 1 else ", ".join(sweeps),
        figures=[
            (figure, legend(figure.methods, look, base=figure.base), [_picture(p, next(drawn)) for p in figure.panels])
            for figure in figures_of(sweeps)
        ],
        tables=tables_of(sweeps),
        light=variables(look, dark=False),
        dark=variables(look, dark=True),
    )


class Part(NamedTuple):
    """What a report says of one sweep in words; ``label`` is empty if it is the only one."""

    label: str
    verdict: Verdict
    facts: list[str]
    settings: Table


def _picture(panel: Panel, number: int) -> tuple[Panel, str]:
    """The panel and its ``<svg>`` element, whose ids are unique by ``number``."""
    with canvas(*panel.size) as (figure, axis):
        words = panel.draw(axis)
        return panel, inline(figure, f"p{number}", " ".join([panel.sweep, words]).strip())


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
