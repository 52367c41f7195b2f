"""Markdown tables and sentences from the rows of bench_window_svd.py, also of windows where ours loses."""

from __future__ import annotations

from collections.abc import Sequence

from bench.result_tables import Row
from bench.svd_grid import ARPACK, EXACT, LOWRANK, OURS, PROPACK, RANDOMIZED, SMALL_RANKS

LEGEND = (
    "One matrix of noise with 32 large components, as trained weights have them: time of `window_svd` over that of a "
    "full `torch.linalg.svd` in float32, and over that of the fastest rival that finds any window to full accuracy "
    "(that SVD, `torch.linalg.eigh` of the float64 Gram matrix, SciPy's range solver on it), all timed in turn in one "
    "run; smallest to largest over five windows from principal to minor."
)
FIRST_LEGEND = (
    "Windows that start the spectrum, beside solvers that find only these: the rival's time over ours, and the angle "
    "to the true subspace. None of them proves its indices; an angle near 1.6 says that other components came back."
)
FIRST = (RANDOMIZED, LOWRANK, ARPACK, PROPACK)
FIRST_FROM = 768
PROBLEM = ("op", "m", "n", "batch", "spectrum", "rank", "window")


def problems(rows: Sequence[Row]) -> list[dict[str, Row]]:
    """For each window of each matrix the rows by provider, in the order in which they were measured."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if row["op"] != "initialize":
            found.setdefault(tuple(row[name] for name in PROBLEM), {})[row["provider"]] = row
    return list(found.values())


def window_table(rows: Sequence[Row]) -> str:
    """A line for each size and shape with outliers: ratios to the full SVD and to the fastest exact rival, by rank."""
    timed = [problem for problem in problems(rows) if _compared(problem) and problem[OURS]["spectrum"] == "outliers"]
    ranks = [*map(str, SMALL_RANKS), "d / 4"]
    lines = [
        f"| d | m : d | paths | {' | '.join(f'r = {rank}, svd' for rank in ranks)} "
        f"| {' | '.join(f'r = {rank}, best rival' for rank in ranks)} |",
        "|---" * (3 + 2 * len(ranks)) + "|",
    ]
    shapes = sorted({(_d(problem), int(problem[OURS]["m"]) // int(problem[OURS]["n"])) for problem in timed})
    for d, aspect in shapes:
        own = [p for p in timed if (_d(p), int(p[OURS]["m"]) // int(p[OURS]["n"])) == (d, aspect)]
        by_rank = [[p for p in own if int(p[OURS]["rank"]) == (d // 4 if "/" in rank else int(rank))] for rank in ranks]
        paths = ", ".join(dict.fromkeys(p[OURS]["path"] for p in own))
        cells = [_span([ratio(p) for p in found]) for ratio in (_over_svd, _over_best) for found in by_rank]
        lines.append(f"| {d} | {aspect} | {paths} | {' | '.join(cells)} |")
    return "\n".join(lines)


def first_table(rows: Sequence[Row]) -> str:
    """A line for each window that starts the spectrum: ours beside solvers that find only such windows, uncertified."""
    rivals = " | ".join(f"{name}: time, angle" for name in FIRST)
    lines = [
        f"| matrix | spectrum | rank | window_svd, s | angle | {rivals} |",
        "|---" * (5 + len(FIRST)) + "|",
    ]
    for problem in problems(rows):
        own = problem.get(OURS)
        shown = own is not None and _d(problem) >= FIRST_FROM and int(own["rank"]) in SMALL_RANKS
        if own and own["median_s"] and shown and any(name in problem for name in FIRST):
            about = [own["matrices"], own["spectrum"], own["rank"], _seconds(own), f"{float(own['angle']):.0e}"]
            about += [_time_and_angle(problem.get(name), own) for name in FIRST]
            lines.append(f"| {' | '.join(about)} |")
    return "\n".join(lines)


def _time_and_angle(row: Row | None, own: Row) -> str:
    """The rival's time over ours, and its angle."""
    if row is None or not row["median_s"]:
        return "–"
    return f"{float(row['median_s']) / float(own['median_s']):.2f}×, {float(row['angle']):.0e}"


def _compared(problem: dict[str, Row]) -> bool:
    return bool(problem.get(OURS, {}).get("ratio")) and any(_timed(problem, name) for name in EXACT)


def _timed(problem: dict[str, Row], name: str) -> bool:
    return name in problem and bool(problem[name]["median_s"])


def _over_svd(problem: dict[str, Row]) -> float:
    return float(problem[OURS]["ratio"])


def _over_best(problem: dict[str, Row]) -> float:
    best = min(float(problem[name]["ratio"]) for name in EXACT if _timed(problem, name))
    return float(problem[OURS]["ratio"]) / best


def _span(ratios: Sequence[float]) -> str:
    if not ratios:
        return "–"
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    return low if low == high else f"{low}–{high}"


def initialize_table(rows: Sequence[Row]) -> str:
    """A line for each way to initialize the adapter of a whole model."""
    lines = [
        "| layers | adapter by | window | seconds | faster than PEFT pissa | wrong | largest angle |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["op"] == "initialize" and row["median_s"]:
            who = "ipca.apply_pc" if row["provider"] == OURS else f"PEFT {row['provider'].removeprefix('peft-')}"
            seconds, angle = _seconds(row), float(row["angle"])
            lines.append(
                f"| {row['matrices']} | {who} | {row['window']} | {seconds} | {_faster(row)} | {row['index_errors']} "
                f"| {angle:.0e} |"
            )
    return "\n".join(lines)


def must_show_lines(rows: Sequence[Row]) -> list[str]:
    """Each claim in a line: times of ours and of the yardstick, their ratios, indices."""
    by_problem: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        by_problem.setdefault(tuple(row[name] for name in PROBLEM[:-1]), []).append(row)
    lines = []
    for group in by_problem.values():
        bases = [row for row in group if row["provider"] == row["yardstick"] and row["median_s"]]
        for row in group:
            base = [other for other in bases if other["window"] == row["window"]] or bases
            if row["provider"] == OURS and row["median_s"] and base:
                lines.append(
                    f"{row['op']} {row['matrices']}, {row['window']}, r={row['rank']}, {row['path']}: "
                    f"{row['median_s']} s, best {row['best_s']}; {base[0]['provider']} {base[0]['median_s']} s, best "
                    f"{base[0]['best_s']}; ratio {row['ratio']}, of the best {row['ratio_best']}; "
                    f"{row['index_errors']} indices wrong, angle {row['angle']}, residual {row['residual']}"
                )
    return lines


def against(rows: Sequence[Row], most: int = 1000) -> list[str]:
    """Sentences on where ours is slower than a full float32 SVD or than another of our paths, and on what went wrong.

    At most ``most`` windows are named for each, the worst first.
    """
    timed = [problem for problem in problems(rows) if problem.get(OURS, {}).get("ratio")]
    slower = [(float(problem[OURS]["ratio"]), _name(problem[OURS])) for problem in timed]
    rival = [(_over_best(problem), _name(problem[OURS])) for problem in timed if _compared(problem)]
    other = []
    for problem in timed:
        forced = {
            name: float(problem[OURS]["median_s"]) / float(row["median_s"])
            for name, row in problem.items()
            if name.startswith(f"{OURS}-") and row["median_s"]
        }
        best = max(forced, key=lambda name: forced[name], default=None)
        if best is not None:
            other.append((forced[best], f"{_name(problem[OURS])}: {problem[OURS]['path']}, not {best.split('-')[1]}"))
    lines = [
        _sentence("slower than torch.linalg.svd by over 10 %", slower, 1.1, most),
        _sentence("slower than the fastest exact rival by over 50 %", rival, 1.5, most),
        _sentence("on a path that is slower than another by over 10 %", other, 1.1, most),
    ]
    uncertified = [_name(problem[OURS]) for problem in timed if problem[OURS]["certified"] == "0"]
    lines += [f"indices not proven: {', '.join(uncertified)}"] * bool(uncertified)
    bad = [row for row in rows if row["status"].startswith(("wrong", "failed"))]
    return lines + [f"{row['provider']} at {_name(row)}: {row['status']}" for row in bad]


def _sentence(what: str, ratios: Sequence[tuple[float, str]], bound: float, most: int) -> str:
    lost = [f"{name} ({ratio:.2f})" for ratio, name in sorted(ratios, reverse=True) if ratio > bound]
    end = f": {', '.join(lost[:most])}{', …' * (len(lost) > most)}" if lost else ""
    return f"window_svd is {what} in {len(lost)} of {len(ratios)} windows{end}"


def _d(problem: dict[str, Row]) -> int:
    return min(int(problem[OURS]["m"]), int(problem[OURS]["n"]))


def _seconds(row: Row) -> str:
    return f"{float(row['median_s']):.3g}"


def _faster(row: Row) -> str:
    return f"{1 / float(row['ratio']):.2f}×" if row["ratio"] else "–"


def _name(row: Row) -> str:
    return f"{row['matrices']} {row['spectrum']} {row['window']} r={row['rank']}"
