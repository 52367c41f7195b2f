"""The report of one sweep or of several as files for a paper: figures, tables, rows, and the page itself."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ipca._atomic import folder_entries, staged_files
from ipca.io.output_folder import check_output
from ipca.lab.names import PICTURES
from ipca.lab.sweep.report.combined import read_sweeps
from ipca.lab.sweep.report.comparisons import TITLES
from ipca.lab.sweep.report.data import Sweep, read_table
from ipca.lab.sweep.report.figures import figures_of, save_panels
from ipca.lab.sweep.report.page import is_report, render, require_packages
from ipca.lab.sweep.report.tables import Table, tables_of
from ipca.lab.sweep.store import REPORT, ROWS

if TYPE_CHECKING:
    from pandas import DataFrame

_FIGURES, _TABLES = "figures", "tables"
_VIEWS = "|".join(TITLES)
_NAME = re.compile(
    rf"{REPORT}|{ROWS}|"
    rf"{_FIGURES}/(frontier|frontier-paths|equal-target|[^/]+-({_VIEWS})(-controls)?)\.({'|'.join(PICTURES)})|"
    rf"{_TABLES}/(arms|frontier|failed|(means|minus-lora|minus-reference)-({_VIEWS}))\.(tex|md)"
)
"""The names of what :func:`export_report` writes into its folder."""
_WHOLE = ("seed", "step", "trainable")
_TEXT = ("sweep", "method", "kind", "comparison", "status")
_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "…": r"\ldots{}",
    "<": "$<$",
    ">": "$>$",
    "−": "$-$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "±": r"$\pm$",
    "≤": r"$\le$",
    "√": r"$\surd$",
    "‖": r"$\|$",
    "σ": r"$\sigma$",
    "Δ": r"$\Delta$",
}


def export_report(
    folders: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    labels: Sequence[str] | None = None,
    formats: Sequence[str] = PICTURES,
    overwrite: bool = False,
) -> dict[str, list[str]]:
    """Write the report of one sweep, or of several side by side, and its figures and tables as files.

    Several sweeps, such as of several data sets, must have the same methods, rates, comparisons, rank and metrics;
    seeds may differ. Every figure then has a panel, and every table columns, for each.

    Args:
        folders: of sweeps, or of a single one.
        out: gets ``report.html``, ``rows.csv`` (with a column ``sweep`` if there are several), ``figures/`` in each of
            ``formats``, and ``tables/``: LaTeX ``tabular`` for the package booktabs, and Markdown.
        labels: of the sweeps, in figures and tables; by default the names of their folders.
        formats: ``"png"``, ``"svg"``, ``"pdf"``.
        overwrite: write into an ``out`` that holds something else than an earlier report. Files of other names stay.

    Returns:
        The names of the ``"figures"`` and of the ``"tables"``, without extension.

    Raises:
        FileExistsError: ``out`` holds something else.
        FileNotFoundError, ValueError: a folder is not that of a sweep, its table is damaged, the sweeps do not compare
            (the message says in what they differ), or an unknown format.
        ImportError: matplotlib or jinja2 is missing.
        OSError: ``out`` cannot be written, or has a file in place of a folder; nothing in it has changed.
    """
    unknown = [name for name in formats if name not in PICTURES]
    if unknown or not formats:
        raise ValueError(f"formats must be of {', '.join(PICTURES)}; got {', '.join(formats) or 'none'}.")
    require_packages()
    check_report_folder(out, overwrite=overwrite)
    earlier = is_report(Path(out) / REPORT)
    sweeps = read_sweeps(folders, labels)
    tables = [*tables_of(sweeps), *(found.table for found in figures_of(sweeps) if found.table is not None)]
    with staged_files(
        out, replaced=lambda name: earlier and bool(_NAME.fullmatch(name)), merged=(_FIGURES, _TABLES)
    ) as stage:
        (stage / REPORT).write_text(render(sweeps), encoding="utf-8")
        (stage / _FIGURES).mkdir()
        figures = save_panels(sweeps, stage / _FIGURES, tuple(dict.fromkeys(formats)))
        (stage / _TABLES).mkdir()
        for table in tables:
            (stage / _TABLES / f"{table.key}.tex").write_text(latex(table), encoding="utf-8")
            (stage / _TABLES / f"{table.key}.md").write_text(markdown(table), encoding="utf-8")
        _write_rows(sweeps, stage / ROWS)
    return {"figures": figures, "tables": [table.key for table in tables]}


def check_report_folder(
    out: str | os.PathLike[str], *, overwrite: bool = False, option: str = "overwrite=True"
) -> None:
    """Raise now where :func:`export_report` would not write into ``out``; ``option`` is the way to give ``overwrite``.

    Raises:
        FileExistsError: it holds something else than an earlier report.
        OSError: it cannot be written, or has a file in place of a folder.
        ValueError: its name is empty.
    """
    check_output(out, whole=True, overwrite=True)
    target = Path(out).absolute()
    for folder in (target / _FIGURES, target / _TABLES):
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file; a report needs a folder there.")
    names = folder_entries(target, (_FIGURES, _TABLES)) if target.is_dir() else set()
    other = [name for name in names if not _NAME.fullmatch(name)] if is_report(target / REPORT) else names
    if other and not overwrite:
        raise FileExistsError(
            f"{target} holds {min(other)}, which is not of an earlier report; choose a new folder. {option} replaces "
            "files that have the names of a report's files, and no others."
        )


def frame(folder: str | os.PathLike[str]) -> DataFrame:
    """The rows of a sweep's folder, or of one that :func:`export_report` wrote, as a pandas data frame.

    Numbers are those of the table to the bit. Methods are text, also ``"0.5"``; ``seed`` and ``step`` are whole
    numbers, ``step`` missing at the end of training. The untrained model is the row with the method ``"base"``.

    Args:
        folder: that a sweep or :func:`export_report` wrote.

    Raises:
        ImportError: pandas is missing.
        FileNotFoundError: there is no ``rows.csv``.
        ValueError: it is damaged; the message names the line.
    """
    try:
        import pandas
    except ImportError:
        raise ImportError("a data frame needs pandas; run: pip install pandas") from None
    path = Path(folder) / ROWS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} contains no {ROWS}; pass the folder that a sweep wrote.")
    columns, rows = read_table(path)
    found = {name: [_value(name, row[name]) for row in rows.values()] for name in columns}
    return pandas.DataFrame(found).astype(dict.fromkeys(set(_WHOLE) & set(columns), "Int64"))


def _value(column: str, cell: str) -> str | float | None:
    if not cell:
        return None
    return cell if column in _TEXT else float(cell)


def latex(table: Table) -> str:
    """``table`` as a LaTeX ``tabular``, which needs ``\\usepackage{booktabs}``."""
    text = table.keys or len(table.header)
    lines = [f"% {table.title}. {table.note}".strip(), r"% \usepackage{booktabs}"]
    lines += [rf"\begin{{tabular}}{{{'l' * text}{'r' * (len(table.header) - text)}}}", r"\toprule"]
    if table.groups:
        spans, rules, column = [""] * table.keys, [], table.keys + 1
        for label, n in table.groups:
            spans.append(rf"\multicolumn{{{n}}}{{c}}{{{_escaped(label)}}}")
            rules.append(rf"\cmidrule(lr){{{column}-{column + n - 1}}}")
            column += n
        lines += [f"{' & '.join(spans)} \\\\", " ".join(rules)]
    lines += [_line(table.header), r"\midrule", *map(_line, table.rows), r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def markdown(table: Table) -> str:
    """``table`` in Markdown, with its title and note."""
    labels = [label for label, n in table.groups for _ in range(n)]
    keys = len(table.header) - len(labels)
    header = table.header[:keys] + [f"{a}: {b}" for a, b in zip(labels, table.header[keys:], strict=True)]
    rows = [header, ["---"] * len(header), *table.rows]
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    return "\n".join([f"**{table.title}.** {table.note}".strip(), "", *lines]) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"{' & '.join(map(_escaped, cells))} \\\\"


def _escaped(text: str) -> str:
    """``text`` for LaTeX; a bracket at the start of a row would be an option of the line break before it."""
    found = re.sub(r"(?<!\\)\$\$", "", "".join(_LATEX.get(c, c) for c in text))  # one formula, not two in a row
    return re.sub(r"^\[", "{[}", found)


def _write_rows(sweeps: Mapping[str, Sweep], path: Path) -> None:
    """The rows of the sweeps, as they are, with a column of their labels where there are several."""
    columns: dict[str, None] = {"sweep": None} if len(sweeps) > 1 else {}
    rows = []
    for label, sweep in sweeps.items():
        found, table = read_table(sweep.folder / ROWS)
        columns |= dict.fromkeys(found)
        rows += [{"sweep": label, **row} for row in table.values()]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns], lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
