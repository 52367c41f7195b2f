"""Tables of the report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean

from ipca.lab.statistics import Difference, corrected, difference, estimate
from ipca.lab.sweep.report.comparisons import TITLES, View, views
from ipca.lab.sweep.report.data import Run, Sweep
from ipca.lab.sweep.report.frontier import best_spots
from ipca.lab.sweep.report.verdict import Arms, judge
from ipca.lab.sweep.report.words import estimated, name, number, p_value


@dataclass(frozen=True)
class Table:
    """A title, a note, and cells.

    Attributes:
        key: its name among the tables of a report.
        keys: number of columns at the left that tell a row from the others; 0 if the rows are a list.
        groups: label and number of columns of each sweep to the right of these, where there are several.
    """

    key: str
    title: str
    note: str
    header: list[str]
    rows: list[list[str]]
    keys: int = 1
    groups: tuple[tuple[str, int], ...] = ()


def side_by_side(found: Mapping[str, Table]) -> Table:
    """The same table of several sweeps, by label, as one: equal rows on one line, lists below each other."""
    first = next(iter(found.values()))
    notes = {table.note: None for table in found.values()}
    note = first.note if len(notes) == 1 else " ".join(f"{label}: {table.note}" for label, table in found.items())
    if not first.keys:
        rows = [[label, *row] for label, table in found.items() for row in table.rows]
        return replace(first, note=note, header=["sweep", *first.header], rows=rows)
    k = first.keys
    cells = {label: {tuple(row[:k]): row[k:] for row in table.rows} for label, table in found.items()}
    order = {tuple(row[:k]): None for table in found.values() for row in table.rows}
    width = len(first.header) - k
    rows = [[*at, *(cell for label in found for cell in cells[label].get(at, ["–"] * width))] for at in order]
    header = [*first.header[:k], *(cell for table in found.values() for cell in table.header[k:])]
    return replace(first, note=note, header=header, rows=rows, groups=tuple((label, width) for label in found))


def tables_of(sweeps: Mapping[str, Sweep]) -> list[Table]:
    """The tables of the sweeps by label, side by side where there are several."""
    each = {label: {table.key: table for table in _tables(sweep)} for label, sweep in sweeps.items()}
    keys = {key: None for found in each.values() for key in found}
    same = [{label: found[key] for label, found in each.items() if key in found} for key in keys]
    return [next(iter(found.values())) if len(sweeps) == 1 else side_by_side(found) for found in same]


def _tables(sweep: Sweep) -> list[Table]:
    arms = judge(sweep).arms
    found = [arm_table(arms)] if arms else []
    found += [*difference_tables(sweep, views(sweep)), *mean_tables(sweep), failure_table(sweep)]
    return [table for table in found if table.rows]


def arm_table(arms: Sequence[Arms]) -> Table:
    """Both arms in every comparison, for retained and drift."""
    says = {"U": "U", "left": "left arm only", "right": "right arm only", "none": "none detected"}
    says |= {"few": "too few seeds", "untested": "an arm is missing"}
    rows = [
        [
            f"{a.metric} at {a.view.title}",
            *(cell for side in ("left", "right") for cell in _cells(a.tests.get(side))),
            says[a.verdict],
        ]
        for a in arms
    ]
    note = (
        "How much more the principal and the minor end forget than the middle windows (0.25 to 0.75): mean difference, "
        "95 % interval, one-sided p, Holm-adjusted over the two arms of a line. A U needs both at an unadjusted 5 %."
    )
    return Table("arms", "Both arms of the curve", note, ["", "principal end", "p", "minor end", "p", "shape"], rows)


def mean_tables(sweep: Sweep) -> list[Table]:
    """A table for each comparison: every method at every rate."""
    tables = []
    for key in sweep.comparisons:
        runs = [run for run in sweep.ends if run.comparison == key]
        header = ["method", "rate", "used", "seeds", *sweep.metrics, "‖ΔW‖ / ‖W‖", "trained"]
        groups = ((method, lr) for method in sweep.methods for lr in sorted({r.lr for r in runs if r.lr is not None}))
        rows = [
            _mean_row(sweep, group)
            for method, lr in groups
            if (group := [run for run in runs if (run.method, run.lr) == (method, lr)])
        ]
        if key == "same" and sweep.base:
            values = [number(sweep.base[m]) if m in sweep.base else "–" for m in sweep.metrics]
            rows.insert(0, [name("base"), *"–––", *values, "–", "–"])
        if all(row[1] == row[2] for row in rows):
            header, *rows = (cells[:2] + cells[3:] for cells in (header, *rows))
        title = f"Means at {TITLES.get(key, key)}"
        note = "Mean and 95 % bootstrap interval, from 3 seeds, over the successful seeds."
        tables.append(Table(f"means-{key}", title, note, header, rows, keys=1 if key == "tuned" else 2))
    return tables


def _mean_row(sweep: Sweep, group: Sequence[Run]) -> list[str]:
    first, successful = group[0], [run for run in group if run.ok]
    cells = []
    for metric in sweep.metrics:
        found = estimate(run.metrics[metric] for run in successful if metric in run.metrics)
        cells.append("–" if found is None else estimated(found))
    used = next((run.lr_used for run in group if run.lr_used is not None), first.lr)
    updates = [run.update for run in successful if run.update is not None]
    moved = number(mean(updates)) if updates else "–"
    trained = f"{first.trainable:,}" if first.trainable is not None else "–"
    count = f"{len(successful)}" if len(successful) == len(group) else f"{len(successful)} of {len(group)}"
    return [name(first.method), f"{first.lr:g}", f"{used:g}", count, *cells, moved, trained]


def difference_tables(sweep: Sweep, views: Iterable[View]) -> list[Table]:
    """Every method minus plain LoRA, and minus the reference window, at the same rate and at the best ones."""
    tables = []
    for view in views:
        if view.key in ("sqrt-sigma", "update"):
            continue
        for rival in dict.fromkeys(("lora", sweep.reference)):
            if rival is not None and rival in sweep.methods:
                tables.append(_differences(sweep, view, rival))
    return [table for table in tables if table.rows]


def _differences(sweep: Sweep, view: View, rival: str) -> Table:
    others = [method for method in sweep.methods if method != rival]
    columns = {
        metric: corrected({m: difference(view.values(m, metric), view.values(rival, metric)) for m in others})
        for metric in sweep.metrics
    }
    rows = [
        [name(m), *(cell for found in columns.values() for cell in _cells(found.get(m)))]
        for m in others
        if any(m in found for found in columns.values())
    ]
    note = (
        f"{view.note[0].upper()}{view.note[1:]}. Mean difference over shared seeds, 95 % bootstrap interval, "
        "two-sided p of the sign-flip test, Holm-adjusted over the methods of a column."
    )
    if view.lr is None:
        note += " The p-values are conditional on these rates, which all seeds share, and ignore how they were chosen."
    return Table(
        f"minus-{'lora' if rival == 'lora' else 'reference'}-{view.key}",
        f"Minus {name(rival)}, at {view.title}",
        note,
        ["method", *(part for metric in sweep.metrics for part in (metric, "p"))],
        rows,
    )


def frontier_table(sweep: Sweep) -> Table | None:
    """The numbered marks of the frontier."""
    if not {"target", "retained"} <= set(sweep.metrics):
        return None
    rows = [
        [str(k + 1), name(spot.method), f"{spot.lr:g}", number(spot.target), number(spot.retained), str(spot.n)]
        for k, spot in enumerate(best_spots(sweep))
    ]
    note = "No other method and rate has both a higher mean target and a higher mean retained."
    return Table("frontier", "On the line", note, ["", "method", "rate", "target", "retained", "seeds"], rows, keys=0)


def failure_table(sweep: Sweep) -> Table:
    """Every run that failed, with its reason."""
    rows = [
        [
            name(run.method),
            TITLES.get(run.comparison, run.comparison),
            "–" if run.lr_used is None else f"{run.lr_used:g}",
            "–" if run.seed is None else str(run.seed),
            run.status.removeprefix("failed:").strip(),
        ]
        for run in sweep.ends
        if not run.ok
    ]
    return Table("failed", "Failed runs", "", ["method", "compared at", "rate", "seed", "why"], rows, keys=0)


def settings_table(sweep: Sweep) -> Table:
    """The content of ``settings.json``."""
    rows = [[key, _text(value)] for key, value in sweep.settings.items()]
    return Table("settings", "Settings", "", ["", ""], rows)


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items() if item not in (None, {}, [])) or "none"
    return value if isinstance(value, str) else json.dumps(value)


def _cells(found: Difference | None) -> tuple[str, str]:
    if found is None:
        return "–", "–"
    p = found.p if found.adjusted is None else found.adjusted
    return estimated(found), p_value(p).removeprefix("p ").removeprefix("= ")
