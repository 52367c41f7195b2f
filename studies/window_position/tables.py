"""The generated sections of the study's page, from the tables in ``results``; without data, that it was not run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path

from ipca.lab.sweep.report.data import Sweep
from ipca.lab.sweep.report.words import listed
from studies.page import markdown
from studies.window_position.claims import SUPPORTS
from studies.window_position.reanalysis import EDGE, HOLDS, NOT_SHOWN, REVERSED
from studies.window_position.rows import (
    EXPLORATORY,
    EXTENSIONS,
    FROZEN,
    KNOWN_INPUTS,
    LORA,
    MIDDLE,
    MINOR,
    NEW_INPUTS,
    PRINCIPAL,
    RATE,
    RESULTS,
    SWEEPS,
    Row,
    Study,
    curve_of,
)
from studies.window_position.rules import (
    UNTESTED,
    Tables,
    arms_of,
    by_source,
    read_tables,
    sentences,
    supported,
    verdict_of,
)
from studies.window_position.run import EXTENSIONS as PLANNED
from studies.window_position.words import effect, estimate_cell, method_name, number_cell, p_cell, percent, short_name

NOT_RUN = "Not run."
CURVES = ("M1", "M2-query-value", "M2-all", "V1", *EXPLORATORY)
"""Experiments with every window of the protocol."""
COMPARISONS = {"same": "the same rate", "sqrt-sigma": "√σ-matched rates", "update": "equal early updates"}


def sections(folder: Path = RESULTS) -> dict[str, str]:
    """The text between the markers of the page, by marker."""
    study = Study(folder)
    tables = read_tables(study)
    return {
        "findings": "\n\n".join(sentences(tables)),
        "claims": claims_section(tables),
        "runs": runs_section(study),
        "equal": equal_section(tables),
        "rates": pictured(folder, "rates", rates_section(tables)),
        "sources": sources_section(tables),
        "positions": pictured(folder, "positions", ""),
        "comparisons": pictured(folder, "comparisons", comparisons_section(tables)),
        "frontier": pictured(folder, "frontier", ""),
        "lengths": pictured(folder, "lengths", lengths_section(tables)),
        "mechanism": pictured(folder, "mechanism", mechanism_section(tables)),
        "streams": pictured(folder, "streams", streams_section(tables)),
        "tests": tests_section(tables),
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
    note = (
        f"Holm's correction is over those tested, {ran} of {len(claims)}. Ten pairs give no p below {2.0**-10:.3f} "
        f"one-sided or {2.0**-9:.3f} two-sided, adjusted {ran * 2.0**-10:.3f}: claims at that floor are not ranked. "
        "S6 and S11 are outside of that list, uncorrected: C6 and C11 count only if these agree."
    )
    lost = [f"{name} {test['left_out']}" for name, test in tables.tests.items() if test["left_out"] not in ("", "0")]
    if lost:
        note += f" Pairs left out, as a run diverged: {', '.join(lost)}."
    return f"{markdown(head, rows)}\n\n{note}"


def claims_section(tables: Tables) -> str:
    """Each claim, against each method, in each place."""
    places = [place for place in PLACE_NAMES if any(key[2] == place for key in tables.claims)]
    if not places:
        return NOT_RUN
    pairs = {
        place: max(int(row["n"]) for key, row in tables.claims.items() if key[2] == place and row["n"])
        for place in places
    }
    rows = []
    for claim, title in CLAIMS.items():
        for method in (PRINCIPAL, MINOR, LORA):
            found = {place: tables.claims.get((claim, method, place)) for place in places}
            cells = [_claim_cell(row, pairs[place]) if row else "–" for place, row in found.items()]
            if any(found.values()):
                rows.append([title, short_name(method), *cells])
    head = ["the middle window", "than", *(f"{place}, n = {pairs[place]}" for place in places)]
    return markdown(head, rows)


CLAIMS = {
    "same rate": f"retains more at the same rate, {RATE:g}",
    "equal early updates": "retains more at equal early updates",
    "equal target": "retains more at equal target, each seed's",
    "high rates": "loses less from the lowest to the highest rate",
    "accuracy": "learns more, each at its best rate",
}
"""What the page says of each claim of ``claims.csv``."""


def begin_section(tables: Tables) -> str:
    """The decision page's table: where the middle window retains more than another method, in words."""
    if not tables.claims:
        return NOT_RUN
    claims = {"same rate": f"at one rate, {RATE:g}", "equal target": "at equal target"}
    rows = [
        [title, *(_in_words(tables, claim, method) for claim in claims)]
        for method, title in ((PRINCIPAL, '`"principal"`'), (MINOR, '`"minor"`'), (LORA, "plain LoRA"))
    ]
    return markdown(["against", *claims.values()], rows)


def _in_words(tables: Tables, claim: str, method: str) -> str:
    found: dict[str, list[str]] = {}
    for verdict in _IN_WORDS:
        for (each, against, place), row in tables.claims.items():
            if (each, against, row["verdict"]) == (claim, method, verdict):
                found.setdefault(_words(row), []).append(PLACE_NAMES[place])
    return "; ".join(f"{words}: {', '.join(places)}" for words, places in found.items()) or NOT_RUN


def _words(row: Row) -> str:
    if row["verdict"] == NOT_SHOWN and row["p"] == row["smallest"]:
        return f"{'more' if float(row['mean']) > 0 else 'less'} with each of {row['n']} seeds, too few to show it"
    return _IN_WORDS[row["verdict"]]


_IN_WORDS = {
    HOLDS: '`"middle"` retains more',
    REVERSED: '`"middle"` retains less',
    NOT_SHOWN: "no difference shown",
    EDGE: "no verdict, an arm's lowest rate is still too high",
}
PLACE_NAMES = {
    "M1": "MiniLM feed-forward",
    "M4": "MiniLM feed-forward (320 steps)",
    "M5": "MiniLM feed-forward (tweets)",
    "M2-query-value": "MiniLM query and value",
    "M2-all": "MiniLM all linear",
    "V1": "ViT",
}
"""Models and layers on the decision page."""


def _claim_cell(row: Row, pairs: int) -> str:
    test = f" ({row['test']})" if row["test"] else ""
    verdict = row["verdict"] if row["verdict"] == NOT_SHOWN else f"**{row['verdict']}**"
    if not row["mean"]:
        return verdict
    notes = [f"n = {row['n']}"] * (int(row["n"]) != pairs)
    notes += ["p at its floor"] * (row["verdict"] == NOT_SHOWN and row["p"] == row["smallest"])
    return f"{verdict}{test} {estimate_cell(row, sign=True)}{''.join(f', {note}' for note in notes)}"


def equal_section(tables: Tables) -> str:
    """Retention at equal target, each seed's own and the common one of all seeds."""
    rows = []
    for name, first, second in dict.fromkeys(key[:3] for key in tables.equal):
        own, common = (tables.equal[name, first, second, level] for level in ("each seed", "all seeds"))
        arms = " − ".join(short_name(method) for method in (first, second))
        cells = [cell for row in (own, common) for cell in (f"{float(row['target']):.3f}", _with_edges(row))]
        rows.append([name, arms, f"{own['rates_first']}, {own['rates_second']}", own["n"], *cells])
    head = ["", "retained", "rates", "n", "each seed's target", "mean difference, p", "all seeds' target"]
    return markdown([*head, "mean difference, p"], rows) if rows else NOT_RUN


def _with_edges(row: Row) -> str:
    edges = [short_name(method) for method in row["edge"].split()]
    note = f"; edge: {listed(edges)}" if edges else ""
    return f"{estimate_cell(row, sign=True)}, {p_cell(row['p'])}{note}"


def sources_section(tables: Tables) -> str:
    """Retention on M by source, a refitted probe, and CKA."""
    names = {"target": "target", "retained": "retained", "movie": "movies", "others": "other sources"}
    names |= {"refit": "probe fitted anew", "cka": "CKA", "drift": "drift"}
    found = by_source(tables)
    if not found:
        return NOT_RUN
    rows = [["untrained", "", "", *(f"{found[0][3][m]:.3f}" for m in names)]]
    rows += [
        [short_name(method), f"{float(lr):g}", f"{row['n']:.0f}", *(f"{row[m]:.3f}" for m in names)]
        for method, lr, row, _ in found
    ]
    return markdown(["", "rate", "n", *names.values()], rows)


def comparisons_section(tables: Tables) -> str:
    """The remainders of principal − middle and minor − middle at matched rates."""
    rows = []
    for name in ("M3", "V1"):
        for metric in ("drift", "retained"):
            for method in (PRINCIPAL, MINOR, LORA):
                found = [_find(tables, name, method, metric, comparison=comparison) for comparison in COMPARISONS]
                if found[0] is not None:
                    first = [name, metric, f"{method_name(method).split(',')[0]} − middle", found[0]["pairs"]]
                    rows.append([*first, *(_remainder(cell, found[0]) for cell in found)])
    head = [f"at {RATE:g}", "", "", "n", *(f"at {title}" for title in COMPARISONS.values())]
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
    """For each method the best rate and that of the one-standard-error rule, or that they are an edge."""
    rows = []
    for (name, method), row in tables.rates.items():
        if name in CURVES and method in _TUNED:
            edge = row["edge"].split()
            best, one_se = (f"{row[r]}{', edge' * (r in edge)}" for r in ("best", "one_se"))
            numbers = [f"{float(row[m]):.3f}" if row[m] else "–" for m in ("target", "retained", "drift")]
            difference = estimate_cell(row, sign=True, middle="difference") if method != MIDDLE else ""
            tried = row["rates"].split()
            rows.append([name, method_name(method), f"{tried[0]} … {tried[-1]}", best, one_se, *numbers, difference])
    head = ["", "trained", "rates", "best target at", "lowest within 1 SE", "there: target", "retained", "drift"]
    return markdown([*head, "retained − middle's"], rows) if rows else NOT_RUN


_TUNED = (PRINCIPAL, MIDDLE, MINOR, LORA, "full", *FROZEN, NEW_INPUTS, KNOWN_INPUTS)


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
        ranks += [
            [SWEEPS[name], f"{float(lr):g}", rank["n"], estimate_cell(rank, sign=True)]
            for (each, lr), rank in tables.ranks.items()
            if each == name
        ]
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


def runs_section(study: Study) -> str:
    """Numbers of runs and of diverged runs, devices and versions."""
    sweeps = study.sweeps
    if not sweeps:
        return NOT_RUN
    rows = [[SWEEPS[name], str(len(sweep.ends)), _diverged(sweep)] for name, sweep in sweeps.items()]
    more = {name: sweep for name in EXTENSIONS if (sweep := study.sweep(name)) is not None}
    rows += [[EXTENSIONS[name], str(len(sweep.ends)), _diverged(sweep)] for name, sweep in more.items()]
    streams = study.table("V2")
    if streams:
        rows.append(["V2: digits ViT, five tasks in a row", str(len(streams)), "none: one that does ends `run.py`"])
    settings = [sweep.settings for sweep in (*sweeps.values(), *more.values())]
    versions = (", ".join(f"{name} {value}" for name, value in each["versions"].items()) for each in settings)
    machines = dict.fromkeys(f"{each['device']}; {v}" for each, v in zip(settings, versions, strict=True))
    missing = [name for name in SWEEPS if study.sweep(name) is None] + ["V2"] * (not study.table("V2"))
    for_gpu = [name for name in missing if name in EXPLORATORY]
    missing = [name for name in missing if name not in EXPLORATORY]
    note = f"Not run: {', '.join(missing)}." if missing else "All of the protocol's grid was run."
    note += f" Added later and not run, as they need a GPU and no test uses them: {listed(for_gpu)}." if for_gpu else ""
    parts = [f"{name} ({there} of {planned} seeds)" if there else name for name, there, planned in _unfinished(study)]
    note += f" Announced in the protocol's changes and not complete: {listed(parts)}." if parts else ""
    return f"{markdown(['', 'runs', 'diverged'], rows)}\n\n{note} Measured on {'; and on '.join(machines)}."


def _unfinished(study: Study) -> Iterator[tuple[str, int, int]]:
    """Name, complete seeds and planned seeds of the extensions that lack runs."""
    for planned in PLANNED:
        sweep, seeds = study.sweep(planned.name), planned.grid["seeds"]
        arms = product((*planned.grid["windows"], *planned.grid["methods"]), planned.grid["lrs"])
        keys = [(str(method), lr) for method, lr in arms]
        made = {(run.method, run.lr, run.seed) for run in sweep.ends} if sweep else set()
        there = sum(all((*key, seed) in made for key in keys) for seed in range(seeds))
        if there < seeds:
            yield planned.name, there, seeds


def _diverged(sweep: Sweep) -> str:
    lost = Counter((run.method, run.comparison, run.lr) for run in sweep.ends if not run.ok)
    parts = (f"{method_name(m)} ({comparison}, {lr:g}): {count}" for (m, comparison, lr), count in lost.items())
    return "; ".join(parts) or "none"


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
