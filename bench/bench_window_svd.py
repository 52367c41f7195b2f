"""Time ``ipca.window_svd`` against full and partial decompositions, and ``apply_pc`` against PEFT; see bench/README.md.

python -m bench.bench_window_svd --out DIR runs the grid of svd_grid.py and continues where an earlier call stopped;
--must-show measures only the cells that the README quotes. Within a quarter of an hour on two cores, which should
have nothing else to do.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import ipca
from bench.pc_linear import DEVICE_LOST, UNFINISHED, DeviceLostError
from bench.rows import FACTS, RESULTS, Row, append_rows, device_name, facts, read_rows, same_run, slug, version
from bench.svd_grid import FORCED, OURS, Cell, Task, grid, must_show, quick_grid, tasks
from bench.svd_initialize import initializer, model_of, worst
from bench.svd_matrices import Accuracy, Found, accuracy, matrix, truth
from bench.svd_providers import Provider, Refused, provider
from bench.svd_race import Lane, clock, first_call, race, times
from bench.svd_tables import against, initialize_table, must_show_lines, window_table
from bench.timing import synchronize

KEY = ("op", "m", "n", "batch", "spectrum", "rank", "window", "provider")
COLUMNS = (
    *("op", "m", "n", "batch", "matrices", "dtype", "spectrum", "rank", "window", "start"),
    *("provider", "path", "status"),
    *("median_s", "p20_s", "p80_s", "best_s", "rounds", "scaled_by", "yardstick", "ratio", "ratio_best", "peak_mib"),
    *("residual", "angle", "index_errors", "certified", "flops", "clock", "waiting", "scipy", *FACTS),
)
ALLOWED = 1e-6 + 4 * torch.finfo(torch.float32).eps
"""Residual of ours: its own tolerance, and the rounding of what it returns to float32."""


class Subject:
    """The subject of a cell: a stack of matrices whose windows are taken, or a model that gets its adapter."""

    def __init__(self, cell: Cell, device: torch.device) -> None:
        self.cell, self.device = cell, device
        self.model: nn.Module | None = model_of(cell, device) if cell.op == "initialize" else None
        self.W = matrix(cell.m, cell.n, cell.spectrum, device, cell.batch)

    def entrant(self, name: str, window: ipca.Window, text: str) -> Provider:
        if self.model is not None:
            return initializer(name, self.cell, self.model, text)
        return provider(name, self.W, window)

    def accuracy(self, found: Found, result: Any, start: int) -> Accuracy:
        """Of the first matrix, its residual the largest that was reported for the stack; of a model, the worst."""
        if self.model is not None:
            return worst(self.cell, self.model, result, start)
        exact = truth(self.cell.m, self.cell.n, self.cell.spectrum, self.device, self.cell.batch)
        measured = accuracy(self.W[0], found, exact, start)
        return replace(measured, residual=max(measured.residual, found.residual))


def bench_cell(cell: Cell, wanted: Sequence[Task], device: torch.device) -> list[Row]:
    """The rows of ``wanted``. Every provider runs once, is judged, and only then all are timed in turn."""
    subject = Subject(cell, device)
    yardstick = next((task for task in wanted if task[1] == cell.yardstick), (cell.windows[0], cell.yardstick))
    lanes: dict[Task, Lane] = {}
    entered: dict[Task, Lane] = {}
    rows: dict[Task, Row] = {}
    for task in dict.fromkeys((yardstick, *wanted)):
        rows[task] = new_row(cell, task)
        if (path := FORCED.get(task[1])) and rows.get((task[0], OURS), {}).get("path") == path:
            rows[task]["status"] = f"refused: {OURS} has chosen this path"
            continue
        lane, found = first_run(subject, task, lanes)
        rows[task] |= found
        if lane is not None:
            entered[task] = lane
    for lane in lanes.values():
        lane.result = None
    race([*{id(lane): (task[1], lane) for task, lane in entered.items()}.values()], cell, device)
    for task, lane in entered.items():
        rows[task] |= times(lane, entered.get(yardstick))
    return [rows[task] for task in wanted]


def first_run(subject: Subject, task: Task, lanes: dict[Task, Lane]) -> tuple[Lane | None, Row]:
    """Run a task once, unless one with the same call has run: its lane if it is to be timed, and columns of its row."""
    cell, (text, name) = subject.cell, task
    window = ipca.Window(text, cell.rank).resolve(cell.d)
    try:
        entrant = subject.entrant(name, window, text)
        key = ("", name) if entrant.whole else task
        if key not in lanes:
            lanes[key] = Lane(entrant, *first_call(entrant.prepare(), subject.device))
        lane = lanes[key]
        found = entrant.cut(lane.result, window)
        right = subject.accuracy(found, lane.result, window.index)
    except Refused as error:
        return None, {"status": f"refused: {error}"}
    except Exception as error:
        return None, {"status": failure(task, subject.device, error)}
    if not entrant.whole:
        lane.result = None
    status = verdict(name, right, cell.components)
    columns = {
        "path": found.path,
        "status": status,
        "clock": clock(subject.device),
        "residual": f"{right.residual:.2e}",
        "angle": f"{right.angle:.2e}",
        "index_errors": right.index_errors,
        "certified": "" if found.certified is None else int(found.certified),
        "flops": _number(found.flops, ".4g"),
        "peak_mib": _number(lane.peak_mib, ".1f"),
    }
    return (None if status.startswith("wrong") else lane), columns


def verdict(name: str, right: Accuracy, count: int) -> str:
    """ "ok"; "wrong: …", for ours, which is not timed then; "inexact: …" for another that returns other components."""
    if not name.startswith(OURS):
        return f"inexact: {right.index_errors} of {count} are other components" if right.index_errors else "ok"
    if not right.residual <= ALLOWED:
        return f"wrong: residual {right.residual:.1e}, allowed {ALLOWED:.1e}"
    return f"wrong: {right.index_errors} of {count} are other components" if right.index_errors else "ok"


def new_row(cell: Cell, task: Task) -> Row:
    """The columns of a row that are known before anything has run."""
    text, name = task
    start = ipca.Window(text, cell.rank).resolve(cell.d).index
    shape = {column: getattr(cell, column) for column in ("op", "m", "n", "batch", "spectrum", "rank", "yardstick")}
    about = {"matrices": cell.matrices, "dtype": "float32", "window": text, "start": start, "provider": name}
    waiting = os.environ.get("OMP_WAIT_POLICY", "default").lower()
    return {**shape, **about, "waiting": waiting, "scipy": version("scipy")}


def failure(task: Task, device: torch.device, error: Exception) -> str:
    """The status of a provider that broke; raises where the GPU answers no more, so that nothing else can be timed."""
    status = f"failed: {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    try:
        synchronize(device)
    except RuntimeError as lost:
        raise DeviceLostError(task, status) from lost
    return status


def run_grid(cells: Iterable[Cell], path: Path, device: torch.device, seconds: float) -> bool:
    """Measure what ``path`` lacks for this device and commit, until the time is up; whether nothing is left."""
    about_run = facts(device)
    done = {row_key(row) for row in same_run(read_rows(path), about_run["device"], about_run["commit"])}
    left = [(cell, wanted) for cell in cells if (wanted := [*missing(cell, device, done)])]
    deadline, rate = time.perf_counter() + seconds, 0.0
    bar = tqdm(left, desc="Cells", unit="cell")
    for cell, wanted in bar:
        began, work = time.perf_counter(), cell.m * cell.n * cell.d * len(wanted)
        if began + rate * work >= deadline:
            bar.write(f"out of time: {len(left) - bar.n} of {len(left)} cells are left for another call")
            return False
        bar.set_postfix_str(cell.name)
        try:
            rows = bench_cell(cell, wanted, device)
        except (ImportError, torch.OutOfMemoryError) as error:
            bar.write(f"{cell.name} is left out: {error}")
            continue
        except DeviceLostError as error:
            task, status = error.args
            append_rows(path, [new_row(cell, task) | {"status": status} | about_run], COLUMNS)
            raise
        append_rows(path, [row | about_run for row in rows], COLUMNS)
        rate = max(rate, (time.perf_counter() - began) / work)
        if cell.batch > 1:
            matrix.cache_clear()  # gigabytes
    return True


def missing(cell: Cell, device: torch.device, done: set[tuple[str, ...]]) -> Iterator[Task]:
    """The tasks of ``cell`` that have no row yet."""
    for window, name in tasks(cell, device.type):
        if row_key({**vars(cell), "window": window, "provider": name}) not in done:
            yield window, name


def row_key(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns that identify a row."""
    return tuple(str(row[name]) for name in KEY)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def warn_of_threads(device: torch.device) -> None:
    """Say what makes a CPU's times those of another setting than the README's, or worthless."""
    cores = os.cpu_count() or 1
    if device.type == "cpu" and torch.get_num_threads() < cores:
        print(f"{torch.get_num_threads()} of {cores} cores are used", file=sys.stderr)
    if device.type == "cpu" and hasattr(os, "getloadavg") and os.getloadavg()[0] > cores / 2:
        print(f"the machine is busy, its load {os.getloadavg()[0]:.1f}: wait until it is not", file=sys.stderr)


def measure_cells(cells: Iterable[Cell], out: Path, device: torch.device, seconds: float, claims: bool = False) -> int:
    """Run the cells into the CSV file of ``device`` in ``out``, print its tables or its ``claims``; the exit status.

    1 where one of ours was wrong or anything failed, else that of :mod:`bench.pc_linear`.
    """
    path, about_run = out / f"window_svd_{slug(device_name(device))}.csv", facts(device)
    try:
        complete = run_grid(cells, path, device, seconds)
    except DeviceLostError as error:
        print(f"the device answers no more after {error}; call again to go on with what is left", file=sys.stderr)
        return DEVICE_LOST
    rows = same_run(read_rows(path), about_run["device"], about_run["commit"])
    tables = [window_table(rows), "", initialize_table(rows), "", *against(rows)]
    print("\n".join([*(must_show_lines(rows) if claims else tables), str(path)]))
    bad = [row for row in rows if row["status"].startswith(("wrong", "failed"))]
    for row in bad:
        print(" ".join(row[name] for name in (*KEY, "status")), file=sys.stderr)
    return 1 if bad else 0 if complete else UNFINISHED


def main() -> int:
    """Run the grid; the exit status of :func:`measure_cells`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file; default bench/results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop before the first cell past this")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="three small cells")
    which.add_argument("--must-show", action="store_true", help="only the README's cells, by ours and the yardstick")
    parser.add_argument(
        "--only", nargs="+", default=[], help="cells whose names hold all of these: 2048x2048 gaussian r=64"
    )
    args = parser.parse_args()
    device = torch.device(args.device)
    warn_of_threads(device)
    cells = quick_grid() if args.quick else must_show() if args.must_show else grid(args.device)
    wanted = [cell for cell in cells if all(word in cell.name for word in args.only)]
    return measure_cells(wanted, args.out, device, args.seconds, claims=args.must_show)


if __name__ == "__main__":
    sys.exit(main())
