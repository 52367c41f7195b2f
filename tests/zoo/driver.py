"""Run the zoo: each architecture in a process of its own, under a time limit; what is done already is left alone.

    python -m tests.zoo [NAME …]

Rows go to tests/zoo/results, one file an architecture; docs/models.md is made from them. An interrupted run resumes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from tests.zoo.models import ARCHITECTURES
from tests.zoo.page import PAGE, page
from tests.zoo.refusals import faults
from tests.zoo.rows import RESULTS, ROOT, Row, Run, parse, read, reason, source_hash, versions, write

CONTEXT = multiprocessing.get_context("forkserver")
"""Processes are forked from one that has imported the libraries, and nothing of ipca."""
LIBRARIES = ["torch", "transformers", "peft", "tests.zoo.models"]
LIMIT = 600


def main(arguments: Sequence[str] | None = None) -> int:
    """Command-line entry point; 1 if an architecture that was run has a check that is neither right nor refused."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures to run, again if need be; default: all")
    parser.add_argument("--stale", action="store_true", help="run again what was run with other sources or versions")
    parser.add_argument("--faulty", action="store_true", help="run again what has a check that is not as it should be")
    parser.add_argument("--jobs", type=int, default=1, help="architectures side by side")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for an architecture (default %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    args = parser.parse_args(arguments)
    unknown = [name for name in args.names if name not in ARCHITECTURES]
    if unknown:
        parser.error(f"no architecture is called {', '.join(unknown)}; there are {', '.join(ARCHITECTURES)}.")

    def due(name: str) -> bool:
        return name in args.names or is_due(name, args.results, args.stale, args.faulty)

    def work(name: str) -> tuple[Run, list[Row]] | None:
        return run_one(name, args.limit) if due(name) else None  # another driver may have been faster

    names = args.names or [name for name in ARCHITECTURES if due(name)]
    CONTEXT.set_forkserver_preload(LIBRARIES)
    pool, faulty = ThreadPoolExecutor(args.jobs), 0
    futures = [pool.submit(work, name) for name in names]
    try:
        bar = tqdm(as_completed(futures), total=len(names), unit="model", disable=None)
        for future in bar:
            if (found := future.result()) is not None:
                faulty += keep(*found, args.results, bar)
    finally:
        pool.shutdown(cancel_futures=True)
    if args.results == RESULTS:
        PAGE.write_text(page(), encoding="utf-8")
    return int(faulty > 0)


def keep(run: Run, rows: list[Row], results: Path, bar: tqdm) -> int:
    """Write and report the rows of an architecture; the number of faults."""
    bar.set_postfix_str(run.architecture)
    if (rows[0].check, rows[0].outcome) == ("build", "none"):
        bar.write(f"{run.architecture}: skipped, {rows[0].text}")
        return 0
    write(run, rows, results)
    bad = faults(rows)
    bar.write(f"{run.architecture}: {len(rows)} checks in {run.seconds:.0f} s, {len(bad)} not as they should be")
    for row in bad:
        bar.write(f"  {row.check}: {row.outcome}: {row.text[:160]}")
    return len(bad)


def is_due(name: str, results: Path, stale: bool, faulty: bool) -> bool:
    """Whether an architecture has no rows yet, or rows that were asked for again."""
    found = read(name, results)
    if found is None:
        return True
    run, rows = found
    return (stale and (run.source, run.versions) != (source_hash(), versions())) or (faulty and bool(faults(rows)))


def run_one(name: str, limit: float = LIMIT) -> tuple[Run, list[Row]]:
    """Run all checks of an architecture: in one process those with ipca, in the next those of its readers."""
    source, began = source_hash(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"zoo-{name}-") as folder:
        for function in (with_ipca, without_ipca):
            in_process(function, name, Path(folder), limit)
        rows = list(recorded(Path(folder)))
    class_name = ARCHITECTURES[name].class_name
    return Run(name, class_name, round(time.monotonic() - began, 1), source, versions()), rows


def in_process(function: Callable[[str, Path], None], name: str, folder: Path, limit: float) -> None:
    """Call ``function`` in a new process; a row says so if it does not end as it should."""
    process = CONTEXT.Process(target=alone, args=(function, name, folder))
    process.start()
    process.join(limit)
    if process.exitcode == 0:
        return
    outcome, text = "crash", f"the process ended with {process.exitcode}"
    if process.exitcode is None:
        process.kill()
        process.join()
        outcome, text = "timeout", f"more than {limit:.0f} s"
    log = (folder / "log").read_text(errors="replace").strip().splitlines()
    current = folder / "current"
    check = current.read_text() if current.exists() else "build"
    record(folder, Row(name, check, outcome, " ".join([text, *log[-1:]])))


def alone(function: Callable[[str, Path], None], name: str, folder: Path) -> None:
    """What a new process does: be quiet, then work."""
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch
    import transformers

    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    function(name, folder)


def with_ipca(name: str, folder: Path) -> None:
    """The checks of an architecture; first whether its class exists here."""
    import importlib

    architecture = ARCHITECTURES[name]
    try:
        getattr(importlib.import_module(architecture.package), architecture.class_name)
    except (ImportError, AttributeError) as error:
        record(folder, Row(name, "build", "none", reason(error)))
        return
    from tests.zoo.checks import rows

    for row in rows(name, architecture, folder):
        if isinstance(row, str):
            (folder / "current").write_text(row)
        else:
            record(folder, row)


def without_ipca(name: str, folder: Path) -> None:
    """What stock libraries make of the adapters."""
    sys.modules["ipca"] = None
    from tests.zoo.stock import stock_rows

    (folder / "current").write_text("stock")
    for row in stock_rows(name, ARCHITECTURES[name], folder):
        record(folder, row)


def record(folder: Path, row: Row) -> None:
    """Append a row, which then outlives a crash."""
    with (folder / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write(row.line())


def recorded(folder: Path) -> Iterator[Row]:
    """The rows of both processes, without this machine's paths."""
    text = (folder / "rows.jsonl").read_text(encoding="utf-8")
    for path in (str(folder), sys.prefix, str(ROOT)):
        text = text.replace(path, "…")
    return parse(json.loads(line) for line in text.splitlines())
