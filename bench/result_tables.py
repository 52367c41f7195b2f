"""Markdown tables of measured rows, and the cells where we are slower."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

Row = dict[str, str]
CELL = ("M", "N", "K", "rank", "dropout", "dtype")
LEGEND = (
    "`M` tokens, weight `N × K` = out × in; a row is a *cell*, and at most nine are shown. `… / linear`: time over "
    "that of a bare frozen `nn.Linear`, both forms with the backend `auto`. *Faster*: PEFT's time over that of the "
    "residual form."
)
"""Explanation of the terms in :func:`pc_linear_table` and :func:`against`."""
TIE = 1.02
"""Ratios up to this are ties: two runs of the same program differ by as much."""


def latest(rows: Sequence[Row]) -> list[Row]:
    """The rows of the last measured commit."""
    return [row for row in rows if row["commit"] == rows[-1]["commit"]]


def cells(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of full steps without torch.compile, by cell, in the order of measurement."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["mode"] == "full" and row["compiled"] == "0":
            found.setdefault(tuple(row[name] for name in CELL), []).append(row)
    return list(found.values())


def pick(cell: Sequence[Row], provider: str, form: str = "") -> Row | None:
    """The row of a provider if it was timed."""
    found = [row for row in cell if (row["provider"], row["form"]) == (provider, form) and row["status"] == "ok"]
    return found[0] if found else None


def pc_linear_table(rows: Sequence[Row], most: int = 9) -> str:
    """A line for each of the first ``most`` cells: forward plus backward, both forms with the backend auto."""
    lines = [
        "| M | N × K | rank | dropout | nn.Linear, ms | residual / linear | intact / linear | residual faster than "
        "PEFT bf16 | than PEFT autocast | than PEFT default | peak MiB, residual / PEFT default |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [_line(cell) for cell in cells(rows)[:most]])


def against(rows: Sequence[Row], most: int = 1000) -> list[str]:
    """Sentences on the full steps where auto is slower than PEFT or another of our backends, and on failures.

    At most ``most`` cells are listed for each, the worst first.
    """
    lines = []
    for form in ("residual", "intact"):
        for rivals, words in (("peft", "slower than PEFT's fastest arm"), ("ipca", "not the fastest of our backends")):
            ratios = sorted(((over_best(cell, form, rivals), _name(cell)) for cell in cells(rows)), reverse=True)
            lost = [f"{name} ({ratio:.2f})" for ratio, name in ratios if ratio > TIE]
            end = f": {', '.join(lost[:most])}{', …' * (len(lost) > most)}" if lost else ""
            lines.append(f"auto, {form} form, is {words} by over 2 % in {len(lost)} of {len(ratios)} cells{end}")
    bad = [row for row in rows if row["status"].startswith(("wrong", "failed"))]
    return lines + [f"{row['provider']} {row['form']} at {_name([row])}, {row['mode']}: {row['status']}" for row in bad]


def over_best(cell: Sequence[Row], form: str, rivals: str) -> float:
    """The time of auto over that of the fastest of PEFT's arms (``"peft"``) or of our backends (``"ipca"``)."""
    own = pick(cell, "ipca-auto", form)
    if own is None:
        return 0.0
    if rivals == "peft":
        return max(float(own[column] or 0) for column in own if column.startswith("ratio_peft"))
    ours = [row for row in cell if row["provider"].startswith("ipca") and row["form"] == form and row["ratio_linear"]]
    return float(own["ratio_linear"]) / min(float(row["ratio_linear"]) for row in ours)


def goal_line(rows: Sequence[Row]) -> str:
    """The first cell of the grid in one line: both forms over ``nn.Linear``, speed over PEFT's arms, peak memory."""
    found = cells(rows)
    own = pick(found[0], "ipca-auto", "residual") if found else None
    if own is None:
        return "goal: not measured"
    intact = pick(found[0], "ipca-auto", "intact")
    arms = ("bf16", "autocast", "default")
    faster = ", ".join(f"{_speedup(own[f'ratio_peft_{arm}'])} {arm}" for arm in arms if own[f"ratio_peft_{arm}"])
    intact_ratio = _number(intact["ratio_linear"]) if intact else "–"
    return (
        f"goal, {_name(found[0])}, forward + backward: residual {_number(own['ratio_linear'])} of nn.Linear "
        f"({own['backend']}), intact {intact_ratio}; faster than PEFT: {faster}; peak {own['peak_mib'] or '–'} MiB"
    )


def compiled_lines(rows: Sequence[Row]) -> list[str]:
    """A sentence for each cell measured under torch.compile, full steps; the baseline is not compiled."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["mode"] == "full" and row["compiled"] == "1" and row["status"] == "ok":
            who = f"{row['provider']} {row['form']}".strip()
            found.setdefault(_name([row]), []).append(f"{who} {_number(row['ratio_linear'])}")
    over = "time over that of nn.Linear without torch.compile"
    return [f"under torch.compile at {cell}, {over}: {', '.join(words)}" for cell, words in found.items()]


def versus_peft_table(rows: Sequence[Row]) -> str:
    """Our layers in training and decoding by rank: cells slower than PEFT's default, by threads, and ratios to it.

    A cell whose layer was not timed, because it was wrong or failed, counts as slower.
    """
    groups: dict[tuple[str, str, str], list[tuple[float, str, str]]] = {}
    for row in rows:
        if row["provider"] in ("linear", "peft-default") or row["N"] == "64":
            continue
        what = "decoding" if row["mode"] == "forward" else "training"
        ratio = float(row["ratio_peft_default"]) if row["status"] == "ok" else float("inf")
        where = f"{row['K']} → {row['N']}, M = {row['M']}"
        groups.setdefault((what, row["rank"], _layer_name(row)), []).append((ratio, where, _threads(row)))
    threads = sorted({_threads(row) for row in rows})
    counts = "".join(f" {count} thread{'s' * (count != '1')}: slower by > 2 % |" for count in threads)
    lines = [f"| | rank | layer |{counts} median of time / PEFT's | largest, and where |"]
    lines += [f"|---|---|---|{'---|' * len(threads)}---|---|"]
    for key, found in groups.items():
        of = [[ratio for ratio, _, count in found if count == own] for own in threads]
        slower = [f"{sum(ratio > TIE for ratio in ratios)} of {len(ratios)}" for ratios in of]
        worst, where, count = max(found)
        middle = median(ratio for ratio, *_ in found)
        lines.append(f"| {' | '.join([*key, *slower, f'{middle:.2f}', f'{worst:.2f}, {where}, threads = {count}'])} |")
    return "\n".join(lines)


def overhead_table(rows: Sequence[Row]) -> str:
    """Microseconds of a call of a layer 64 → 64 with one token."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        if row["N"] == "64" and row["status"] == "ok":
            name = row["provider"] if row["provider"] in ("linear", "peft-default") else _layer_name(row)
            microseconds = f"{1e3 * float(row['median_ms']):.0f}"
            found.setdefault((_threads(row), row["mode"]), {})[name] = microseconds
    names = list(next(iter(found.values()), {}))
    lines = [f"| threads | µs of a call | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    modes = {"forward": "without gradients", "graph": "with a graph"}
    lines += [f"| {threads} | {modes[mode]} | {' | '.join(of.values())} |" for (threads, mode), of in found.items()]
    return "\n".join(lines)


def _threads(row: Row) -> str:
    return row["device"].split()[-2]


def _layer_name(row: Row) -> str:
    return "PCConfig" if row["provider"] == "PEFT with PCConfig" else f"LinearPC, {row['form']}"


def training_table(rows: Sequence[Row]) -> str:
    """A line for each provider: median throughput, peak memory, first and last loss, distance from PEFT's losses."""
    lines = [
        "| trained with | tokens/s | faster than PEFT default | peak MiB | loss, first → last "
        "| largest relative loss difference to PEFT default |",
        "|---|---|---|---|---|---|",
    ]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row['provider']} {row['form']}".strip(), []).append(row)
    for name, group in groups.items():
        pairs = zip(groups["peft-default"], group, strict=True)  # of the same step
        over = median(float(theirs["seconds"]) / float(ours["seconds"]) for theirs, ours in pairs)
        speed = median(float(row["tokens_per_s"]) for row in group)
        difference = max(float(row["loss_difference"] or 0) for row in group)
        wrong = " **wrong**" if any(row["status"] != "ok" for row in group) else ""
        losses = f"{float(group[0]['loss']):.3f} → {float(group[-1]['loss']):.3f}"
        peak = group[-1]["peak_mib"] or "–"
        lines.append(f"| {name} | {speed:.0f} | {over:.2f}× | {peak} | {losses} | {difference:.1e}{wrong} |")
    return "\n".join(lines)


def _line(cell: Sequence[Row]) -> str:
    first, linear = cell[0], pick(cell, "linear")
    residual, intact = (pick(cell, "ipca-auto", form) for form in ("residual", "intact"))
    default = pick(cell, "peft-default")
    milliseconds = f"{float(linear['median_ms']):.3f}" if linear else ""
    columns = [
        *(first["M"], f"{first['N']} × {first['K']}", first["rank"], first["dropout"], milliseconds),
        *(_number(row["ratio_linear"]) if row else "–" for row in (residual, intact)),
        *(_speedup(residual[f"ratio_peft_{arm}"]) if residual else "–" for arm in ("bf16", "autocast", "default")),
        " / ".join((row["peak_mib"] if row else "") or "–" for row in (residual, default)),
    ]
    return f"| {' | '.join(columns)} |"


def _name(cell: Sequence[Row]) -> str:
    row = cell[0]
    dropout = f" dropout {row['dropout']}" if float(row["dropout"]) else ""
    return f"M={row['M']} {row['N']}×{row['K']} r={row['rank']}{dropout}"


def _number(text: str) -> str:
    return f"{float(text):.2f}" if text else "–"


def _speedup(ratio: str) -> str:
    return f"{1 / float(ratio):.2f}×" if ratio else "–"
