"""The generated sections of the study's page, from the tables in ``results``.

Accuracies and drift with their 95 % bootstrap interval over seeds; sections without data say "Not run."
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ipca.lab.sweep.report.data import Sweep
from ipca.lab.sweep.report.words import listed
from studies.page import markdown
from studies.window_position.claims import SUPPORTS
from studies.window_position.rows import (
    AUTO,
    EXPLORATORY,
    LORA,
    MIDDLE,
    MINOR,
    PRINCIPAL,
    RATE,
    RESULTS,
    SWEEPS,
    Row,
    Study,
    curve_of,
)
from studies.window_position.rules import UNTESTED, Tables, arms_of, read_tables, sentences, supported, verdict_of
from studies.window_position.words import effect, estimate_cell, method_name, number_cell, p_cell, percent

NOT_RUN = "Not run."
CURVES = ("M1", "M2-query-value", "M2-all", "V1", *EXPLORATORY)
"""Experiments with every window of the protocol."""
RATES = ("0.0005", "0.001", "0.002", "0.004")
"""The protocol's rates."""
COMPARISONS = {"same": "the same rate", "sqrt-sigma": "√σ-matched rates", "update": "equal early updates"}


def sections(folder: Path = RESULTS) -> dict[str, str]:
    """The text between the markers of the page, by marker."""
    study = Study(folder)
    tables = read_tables(study)
    return {
        "findings": "\n\n".join(sentences(tables)),
        "tests": tests_section(tables),
        "positions": pictured(folder, "positions", positions_section(tables)),
        "comparisons": pictured(folder, "comparisons", comparisons_section(tables)),
        "rates": pictured(folder, "rates", rates_section(tables)),
        "frontier": pictured(folder, "frontier", ""),
        "lengths": pictured(folder, "lengths", lengths_section(tables)),
        "mechanism": pictured(folder, "mechanism", mechanism_section(tables)),
        "streams": pictured(folder, "streams", streams_section(tables)),
        "paper": paper_section(tables),
        "runs": runs_section(study),
        "all": all_section(study, tables),
    }


def pictured(folder: Path, name: str, text: str) -> str:
    """``text`` with the figure of that name below it, if it was drawn."""
    if not (folder / f"{name}.png").exists():
        return text or NOT_RUN
    return "\n\n".join([*([text] if text else []), f"![{name}](../../studies/window_position/results/{name}.png)"])


def tests_section(tables: Tables) -> str:
    """C1 to C14, and the additional conditions of C6 and C11."""
    if not tables.tests:
        return NOT_RUN
    head = ["", "where", "claim", "n", "mean difference [95 % interval]", "dz", "p", "adjusted p", "verdict"]
    rows = []
    for name, test in tables.tests.items():
        if test["verdict"] in UNTESTED:
            rows.append([name, test["where"], test["statement"], *["–"] * 5, test["verdict"]])
            continue
        p = [p_cell(test["p"]), p_cell(test["adjusted"])]
        numbers = [test["n"], estimate_cell(test, sign=True), number_cell(test["dz"], sign=True), *p]
        verdict = f"**{verdict_of(test)}**"
        if name in SUPPORTS and supported(tables, name) == "unsupported":
            verdict = f"{verdict_of(test)}; no claim, as {SUPPORTS[name].name} does not agree"
        rows.append([name, test["where"], test["statement"], *numbers, verdict])
    claims = [test for name, test in tables.tests.items() if name not in {each.name for each in SUPPORTS.values()}]
    ran = sum(test["verdict"] not in UNTESTED for test in claims)
    note = f"Holm's correction is over those tested, {ran} of {len(claims)}. S6 and S11 are outside of that list, "
    note += "uncorrected: C6 and C11 count only if these agree."
    lost = [f"{name} {test['left_out']}" for name, test in tables.tests.items() if test["left_out"] not in ("", "0")]
    if lost:
        note += f" Pairs left out, as a run diverged: {', '.join(lost)}."
    return f"{markdown(head, rows)}\n\n{note}"


def positions_section(tables: Tables) -> str:
    """Both ends and plain LoRA minus the middle, for every set of layers."""
    rows = []
    for name in CURVES:
        for metric in ("drift", "kl", "retained", "target"):
            cells = [_find(tables, name, method, metric) for method in (PRINCIPAL, MINOR, LORA, AUTO)]
            if cells[0] is not None:
                pairs = cells[0]["pairs"]
                rows.append([SWEEPS[name], metric, pairs, *(effect(cell) if cell else "–" for cell in cells)])
    head = ["at 2e-3", "", "n", "principal − middle", "minor − middle", "plain LoRA − middle", "auto − middle"]
    return markdown(head, rows) if rows else NOT_RUN


def comparisons_section(tables: Tables) -> str:
    """The remainders of principal − middle and minor − middle at matched rates."""
    rows = []
    for name in ("M3", "V1"):
        for lr in _rates(tables, name):
            for metric in ("drift", "retained"):
                for method in (PRINCIPAL, MINOR):
                    found = [_find(tables, name, method, metric, lr, comparison) for comparison in COMPARISONS]
                    if found[0] is not None:
                        first = [name, lr, metric, f"{method_name(method).split(',')[0]} − middle", found[0]["pairs"]]
                        rows.append([*first, *(_remainder(cell, found[0]) for cell in found)])
    head = ["", "rate", "", "", "n", *(f"at {title}" for title in COMPARISONS.values())]
    return f"{markdown(head, rows)}\n\n{_minor_end(tables)}".strip() if rows else NOT_RUN


def _minor_end(tables: Tables) -> str:
    """Whether the minor end drifts further than the middle, at the same rate and at equal early updates."""
    parts = []
    for name in ("M3", "V1"):
        found = {COMPARISONS[c]: _find(tables, name, MINOR, "drift", comparison=c) for c in ("same", "update")}
        said = [f"{_than_middle(cell)} at {title}" for title, cell in found.items() if cell and cell["difference_low"]]
        if len(said) == len(found):
            parts.append(f"on {name} {listed(said)}")
    return f"Models drift with the minor window at {RATE:g}: {'; '.join(parts)}." if parts else ""


def _than_middle(found: Row) -> str:
    low, high = float(found["difference_low"]), float(found["difference_high"])
    if low <= 0 <= high:
        return "not clearly apart from the middle"
    return f"{'further' if low > 0 else 'less'} than with the middle"


def _remainder(found: Row | None, same: Row) -> str:
    """A difference, and its share of that at the same rate."""
    if found is None or not found["difference"]:
        return "–"
    whole = float(same["difference"] or 0)
    share = f", {percent(float(found['difference']) / whole)}" if found is not same and whole else ""
    return f"{effect(found)}{share}"


def rates_section(tables: Tables) -> str:
    """Target and retention of windows, LoRA, full fine-tuning and auto at each rate, and at the best one."""
    rows = []
    for name in ("M1", "V1"):
        rates = _rates(tables, name)
        for method in (PRINCIPAL, MIDDLE, MINOR, LORA, "full", AUTO):
            for metric in ("target", "retained") if rates else ():
                cells = [_find(tables, name, method, metric, lr) for lr in (*RATES, "best")]
                shown = [estimate_cell(cell) if cell else "–" for cell in cells]
                rows.append([name, method_name(method), metric, *shown])
    head = ["", "trained", "", *RATES, "best-tuned"]
    return markdown(head, rows) if rows else NOT_RUN


def lengths_section(tables: Tables) -> str:
    """Plain LoRA − middle after 80 and after 320 steps."""
    rows = []
    for metric in ("retained", "drift", "target"):
        for lr in _rates(tables, "M4"):
            cells = [_find(tables, name, LORA, metric, lr) for name in ("M1", "M4")]
            if all(cells):
                pairs = cells[0]["pairs"] if cells[0] else ""
                rows.append([metric, lr, pairs, *(effect(cell) for cell in cells if cell)])
    return markdown(["plain LoRA − middle", "rate", "n", "80 steps", "320 steps"], rows) if rows else NOT_RUN


def mechanism_section(tables: Tables) -> str:
    """The curve of Σ S_i · energy_i relative to its middle, its arms, and its rank correlation with drift."""
    windows = [f"{f:g}" for f in (0, 0.125, 0.25, 0.5, 0.75, 0.875, 1)]
    rows, ranks = [], []
    for name in CURVES:
        curve = {f"{float(window):g}": value for window, value in curve_of(tables.mechanism, name).items()}
        if curve:
            cells = [f"{curve[f] / curve['0.5']:.3g}" if f in curve else "–" for f in windows]
            arms = listed(arms_of(curve_of(tables.mechanism, name)) or ["none"])
            rows.append([SWEEPS[name], *cells, arms, *(_layers_with(tables, name, end) for end in (PRINCIPAL, MINOR))])
        found = {lr: rank for (experiment, lr), rank in tables.ranks.items() if experiment == name}
        ranks += [[SWEEPS[name], lr, rank["n"], estimate_cell(rank, sign=True)] for lr, rank in found.items()]
    if not rows:
        return NOT_RUN
    head = ["Σ S_i · energy_i, that of the middle = 1", *(f"f = {f}" for f in windows)]
    head += ["ends above the middle", "in layers, principal", "minor"]
    parts = [markdown(head, rows)]
    if ranks:
        parts.append(markdown(["Spearman's ρ with drift over windows", "rate", "n", "mean [95 % interval]"], ranks))
    return "\n\n".join(parts)


def _layers_with(tables: Tables, name: str, end: str) -> str:
    """The number of individual layers in which a window is above the middle one."""
    by_layer: dict[str, dict[str, float]] = {}
    for row in tables.mechanism:
        if row["experiment"] == name:
            by_layer.setdefault(row["layer"], {})[row["window"]] = float(row["sensitivity"])
    return f"{sum(curve[end] > curve[MIDDLE] for curve in by_layer.values())} of {len(by_layer)}"


def streams_section(tables: Tables) -> str:
    """ACC, BWT, FM, retention and memory of every method of the streams."""
    rows = []
    for method in _methods(tables, "V2"):
        cells = {metric: row for (name, m, _, _, metric), row in tables.summary.items() if (name, m) == ("V2", method)}
        scores = [estimate_cell(cells[metric], sign=metric != "acc") for metric in ("acc", "bwt", "fm")]
        kept = [f"{float(cells[metric]['mean']):,.0f}" for metric in ("parameters", "bytes")]
        rows.append([method, cells["acc"]["n"], *scores, estimate_cell(cells["retained_after"]), *kept])
    if not rows:
        return NOT_RUN
    first = next(row for key, row in tables.summary.items() if key[0] == "V2" and key[4] == "retained_before")
    head = ["method", "n", "ACC", "BWT", "FM", "retained", "parameters", "bytes"]
    return f"{markdown(head, rows)}\n\nRetained before the stream: {number_cell(first['mean'])}."


def paper_section(tables: Tables) -> str:
    """The paper's findings, and ours on the same questions."""
    shape = sentences(tables)
    u = next(text for text in shape if text.startswith("**The U.**")).removeprefix("**The U.** ")
    rows = [
        ["forgetting is U-shaped over the window's start, most is lost at the two ends", u],
        ["intermediate components stand high learning rates better than the first and the last", _robust(tables)],
        ["fine-tuning them improves accuracy", _more_accurate(tables)],
    ]
    return markdown(["the paper", "here"], rows)


def _robust(tables: Tables) -> str:
    """The change of ``retained`` from the lowest to the highest rate of M1."""
    rates = _rates(tables, "M1")
    if not rates:
        return NOT_RUN
    parts = []
    for method in (PRINCIPAL, MIDDLE, MINOR, LORA):
        low, high = (_find(tables, "M1", method, "retained", lr) for lr in (rates[0], rates[-1]))
        if low and high and low["mean"] and high["mean"]:
            change = str(float(high["mean"]) - float(low["mean"]))
            parts.append(f"{method_name(method).split(',')[0]} {number_cell(change, sign=True)}")
    return f"change of `retained` on M1 from {rates[0]} to {rates[-1]}: {', '.join(parts)}"


def _more_accurate(tables: Tables) -> str:
    """Differences in ``target`` on M1, each method at its best rate."""
    methods = (PRINCIPAL, MINOR, LORA)
    found = {method: _find(tables, "M1", method, "target", "best") for method in methods}
    parts = [f"{method_name(m).split(',')[0]} − middle {effect(row)}" for m, row in found.items() if row]
    return f"`target` on M1, each at its best rate: {'; '.join(parts)}" if parts else NOT_RUN


def runs_section(study: Study) -> str:
    """Numbers of runs and of diverged runs, devices and versions."""
    sweeps = study.sweeps
    if not sweeps:
        return NOT_RUN
    rows = [[SWEEPS[name], str(len(sweep.ends)), _diverged(sweep)] for name, sweep in sweeps.items()]
    streams = study.table("V2")
    if streams:
        rows.append(["V2: digits ViT, five tasks in a row", str(len(streams)), "none: one that does ends `run.py`"])
    settings = [sweep.settings for sweep in sweeps.values()]
    versions = (", ".join(f"{name} {value}" for name, value in each["versions"].items()) for each in settings)
    machines = dict.fromkeys(f"{each['device']}; {v}" for each, v in zip(settings, versions, strict=True))
    missing = [name for name in SWEEPS if study.sweep(name) is None] + ["V2"] * (not study.table("V2"))
    for_gpu = [name for name in missing if name in EXPLORATORY]
    missing = [name for name in missing if name not in EXPLORATORY]
    note = f"Not run: {', '.join(missing)}." if missing else "Everything in the protocol's grid was run."
    note += f" Not run either, as they need a GPU and no test uses them: {listed(for_gpu)}." if for_gpu else ""
    return f"{markdown(['', 'runs', 'diverged'], rows)}\n\n{note} Measured on {'; and on '.join(machines)}."


def _diverged(sweep: Sweep) -> str:
    lost = Counter((run.method, run.comparison, run.lr) for run in sweep.ends if not run.ok)
    parts = (f"{method_name(m)} ({comparison}, {lr:g}): {count}" for (m, comparison, lr), count in lost.items())
    return "; ".join(parts) or "none"


def all_section(study: Study, tables: Tables) -> str:
    """Every mean of every sweep, collapsed."""
    parts = []
    for name, sweep in study.sweeps.items():
        rows = []
        for (experiment, method, comparison, lr, metric), row in tables.summary.items():
            if (experiment, metric) == (name, "target"):
                cells = [tables.summary[name, method, comparison, lr, m] for m in sweep.base]
                where = [method_name(method), COMPARISONS[comparison], lr, row["n"]]
                rows.append([*where, *map(estimate_cell, cells)])
        before = ", ".join(f"{metric} {value:.3f}" for metric, value in sweep.base.items())
        table = markdown(["trained", "compared at", "rate", "n", *sweep.base], rows)
        title = f"<summary>{SWEEPS[name]}</summary>"
        parts.append(f"<details>{title}\n\nBefore training: {before}.\n\n{table}\n\n</details>")
    return "\n\n".join(parts) or NOT_RUN


def _find(
    tables: Tables, name: str, method: str, metric: str, lr: str = f"{RATE:g}", comparison: str = "same"
) -> Row | None:
    return tables.summary.get((name, method, comparison, lr, metric))


def _rates(tables: Tables, name: str) -> list[str]:
    """The grid's rates of a sweep, ascending, as the tables write them."""
    return sorted({lr for experiment, _, _, lr, _ in tables.summary if experiment == name and lr != "best"}, key=float)


def _methods(tables: Tables, name: str) -> Iterable[str]:
    """The methods of an experiment in their order."""
    return dict.fromkeys(method for experiment, method, *_ in tables.summary if experiment == name)
