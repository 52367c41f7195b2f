"""Markdown tables and sentences from the rows of bench_window_svd.py, also of windows where ours loses."""

from __future__ import annotations

from collections.abc import Sequence

from bench.result_tables import TIE, Row
from bench.svd_grid import EIGH, OURS, RANGE, YARDSTICK

LEGEND = (
    "One matrix, noise with 32 large components as trained weights have them; *faster*: the rival's time over ours, "
    "all timed in turn in one run. *Angle*: to the true subspace, from a float64 SVD. *Wrong*: components that are "
    "not those whose index they claim. Beside ours `torch.linalg.svd` in float32."
)
LARGE = 2048
"""Smallest d in the table, unless nothing as large was measured."""
TITLES = {"window_svd": "", "llama-2-7b": "LLaMA-2-7B, "}
PROBLEM = ("op", "m", "n", "batch", "spectrum", "rank", "window")


def problems(rows: Sequence[Row]) -> list[dict[str, Row]]:
    """For each window of each matrix the rows by provider, in the order in which they were measured."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if row["op"] != "initialize":
            found.setdefault(tuple(row[name] for name in PROBLEM), {})[row["provider"]] = row
    return list(found.values())


def window_table(rows: Sequence[Row]) -> str:
    """A line for each window that is shown: path, times, accuracy."""
    lines = [
        "| matrix | window | rank | path | seconds | faster than torch.linalg.svd | than eigh of the float64 Gram "
        "| than SciPy's range of it | angle, ours / svd | wrong, ours / svd |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    timed = [problem for problem in problems(rows) if problem.get(OURS, {}).get("ratio")]
    least = min(LARGE, max((_d(problem) for problem in timed), default=0))
    return "\n".join(lines + [_line(problem) for problem in timed if _d(problem) >= least and _shown(problem[OURS])])


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
        _sentence("slower than torch.linalg.svd by over 2 %", slower, TIE, most),
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


def _shown(row: Row) -> bool:
    """Middle windows of rank 64, and of square matrices those at the ends, the first of rank 16, too."""
    square = row["m"] == row["n"] and row["batch"] == "1"
    ends = square and (row["rank"], row["window"]) in {("64", "principal"), ("64", "minor"), ("16", "principal")}
    return row["spectrum"] == "outliers" and (ends or (row["rank"], row["window"]) == ("64", "middle"))


def _d(problem: dict[str, Row]) -> int:
    return min(int(problem[OURS]["m"]), int(problem[OURS]["n"]))


def _line(problem: dict[str, Row]) -> str:
    own, base = problem[OURS], problem.get(YARDSTICK)
    columns = [
        *(TITLES[own["op"]] + own["matrices"], own["window"], own["rank"], own["path"], _seconds(own), _faster(own)),
        *(_over(problem.get(rival), own) for rival in (EIGH, RANGE)),
        " / ".join(f"{float(row['angle']):.0e}" if row and row["angle"] else "–" for row in (own, base)),
        " / ".join(row["index_errors"] if row else "–" for row in (own, base)),
    ]
    return f"| {' | '.join(columns)} |"


def _seconds(row: Row) -> str:
    return f"{float(row['median_s']):.3g}"


def _faster(row: Row) -> str:
    return f"{1 / float(row['ratio']):.2f}×" if row["ratio"] else "–"


def _over(rival: Row | None, own: Row) -> str:
    return f"{float(rival['ratio']) / float(own['ratio']):.2f}×" if rival and rival["ratio"] else "–"


def _name(row: Row) -> str:
    return f"{row['matrices']} {row['spectrum']} {row['window']} r={row['rank']}"
