"""All checks and benchmarks that need a GPU, in one command with a time limit; interrupted runs resume.

    python -m bench.gpu --out DIR

Environment, CUDA extension, tests, memory checker, tuning, choice of backends, benchmarks and a summary. Each step is a
process with its own time limit, so that one that hangs or fails does not use up the time of the others. DIR gets at
most eight files: state.json, environment.json, log.txt, summary.txt, the tuning table and three CSV files, from which
bench/report.py draws the figures.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SUMMARY_SECONDS = 15
"""Reserved for the summary."""


@dataclass(frozen=True)
class Step:
    """``arguments`` of the interpreter, with ``{seconds}`` and ``{out}`` filled in.

    ``limit`` is its maximum time in seconds, ``keep`` the time it must leave for later steps. A step that ``resumes``
    is run by every call: it determines itself what is left to do.
    """

    name: str
    arguments: tuple[str, ...]
    limit: float
    keep: float = 0.0
    resumes: bool = False
    before: tuple[str, ...] = ()


SANITIZER = ("compute-sanitizer", "--error-exitcode", "9", "--tool")
SELF = ("-m", "bench.gpu")
GRID, TRAINING = ("-m", "bench.pc_linear"), ("-m", "bench.training")
WINDOWS = ("-m", "bench.bench_window_svd")
PYTEST = ("-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider")
NATIVE_ON_GPU = (*PYTEST, "-k", "on_a_gpu", "tests/svd/test_inner_loops.py")
ON_GPU = ("--device", "cuda", "--out", "{out}", "--seconds", "{seconds}")
SIDE_BY_SIDE = ("-n", "8") if importlib.util.find_spec("xdist") else ()
"""Most of the tests' time is kernel compilation, which pytest-xdist spreads over several cores."""
STEPS = (
    Step("environment", (*SELF, "--environment", "--out", "{out}"), 60),
    # The CUDA extension of the window SVD: compiled for this GPU and loaded, then tested against its references.
    Step("extension", ("-m", "ipca._extension"), 150),
    Step("native", (*PYTEST, "tests/svd/test_inner_loops.py"), 120),
    Step("window_svd", (*WINDOWS, *ON_GPU), 150, resumes=True),
    Step("tests", (*PYTEST, *SIDE_BY_SIDE, "tests"), 300),
    Step("memcheck", (*SELF, "--sanitize-case"), 60, before=(*SANITIZER, "memcheck")),
    Step("tune", (*SELF, "--tune", "--out", "{out}", "--seconds", "{seconds}"), 100, resumes=True),
    Step("backends", (*SELF, "--backends", "--out", "{out}", "--seconds", "{seconds}"), 75, resumes=True),
    Step("pc_linear", (*GRID, *ON_GPU), 10_000, keep=90, resumes=True),
    Step("training", (*TRAINING, *ON_GPU), 150, resumes=True),
    Step("racecheck", (*SELF, "--sanitize-case"), 60, before=(*SANITIZER, "racecheck")),
    Step("native memcheck", NATIVE_ON_GPU, 90, before=(*SANITIZER, "memcheck")),
    Step("native racecheck", NATIVE_ON_GPU, 90, before=(*SANITIZER, "racecheck", "--kernel-regex", "kns=ipca")),
)
START_SECONDS = 15
"""Time a process needs to start and end, in addition to its ``{seconds}``."""
AGAIN = 3
"""The exit status of a benchmark that lost the device and can resume in a new process."""


def run_all(steps: tuple[Step, ...], out: Path, seconds: float) -> int:
    """Run every unfinished step; return 1 if any has failed, now or before."""
    deadline = time.monotonic() + seconds - SUMMARY_SECONDS
    state = read_state(out)
    for step in steps:
        if state.get(step.name, {}).get("status") == "done" and not step.resumes:
            continue
        left = min(step.limit, deadline - time.monotonic() - step.keep)
        state[step.name] = run_step(step, out, left)
        (out / "state.json").write_text(json.dumps(state, indent=1) + "\n")
    return int(any(entry["status"] == "failed" for entry in state.values()))


def read_state(out: Path) -> dict[str, dict[str, str]]:
    """The state left by earlier calls."""
    path = out / "state.json"
    state: dict[str, dict[str, str]] = json.loads(path.read_text()) if path.exists() else {}
    return state


def run_step(step: Step, out: Path, seconds: float) -> dict[str, str]:
    """Run one step with its output in log.txt; if it fails, print the end of the log."""
    if step.before and not shutil.which(step.before[0]):
        return report(step, "skipped", f"{step.before[0]} is not on PATH")
    began = time.monotonic()
    while True:
        left = seconds - (time.monotonic() - began)
        if left < START_SECONDS:
            return report(step, "no time", "left for another call")
        fill = {"out": str(out), "seconds": str(int(left - START_SECONDS))}
        command = [*step.before, sys.executable, *(argument.format(**fill) for argument in step.arguments)]
        code = bounded(command, out, left)
        if code != AGAIN or not step.resumes:
            break
    took = f"{time.monotonic() - began:.0f} s"
    if code == 0:
        return report(step, "done", took)
    print((out / "log.txt").read_text(errors="replace")[-2000:])
    return report(step, "failed", f"stopped after {took}" if code is None else f"exit {code} after {took}")


def report(step: Step, status: str, words: str) -> dict[str, str]:
    """The entry for state.json; also printed."""
    print(f"{step.name}: {status}, {words}", flush=True)
    return {"status": status, "words": words}


def bounded(command: list[str], out: Path, seconds: float) -> int | None:
    """The exit status; None if the command and all of its children had to be killed."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    environment |= {"PYTHONUNBUFFERED": "1", "IPCA_CACHE": str(out), "TQDM_MININTERVAL": "10"}
    with (out / "log.txt").open("a") as log:
        log.write(f"\n===== {' '.join(command)}\n")
        log.flush()
        options: Any = {"cwd": ROOT, "env": environment, "stdout": log, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, start_new_session=True, **options)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


def write_environment(out: Path) -> None:
    """Write device, driver, versions and commit to environment.json."""
    import torch

    from bench.rows import facts

    found = {**facts(torch.device("cuda")), "cuda": torch.version.cuda or "", "platform": platform.platform()}
    query = ["nvidia-smi", "--query-gpu=driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
    found["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    (out / "environment.json").write_text(json.dumps(found, indent=1) + "\n")


def sanitize_case() -> None:
    """Forward and backward of the Triton kernels at odd shapes, small enough for a memory checker."""
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # otherwise an overrun could stay within a larger cached block
    import torch

    from bench.checks import results
    from bench.providers import FORMS, Cell, Provider, Sample, active, layer_call, trained

    cells = [Cell(33, 65, 97, rank=5, dropout=0.1), Cell(1, 128, 72), Cell(130, 64, 256, rank=24, dropout=0.1)]
    for cell in cells:
        sample = Sample(cell, torch.device("cuda"), seed=0)
        for provider in (Provider("ipca-triton", form) for form in FORMS):
            parameters = trained(sample.layer(provider))
            with active(provider):
                found = results(layer_call(provider, sample), sample.x, sample.dy, parameters)
            assert all(torch.isfinite(value).all() for value in found.values()), (cell, provider)


def tune(out: Path, seconds: float) -> None:
    """Measure the configurations for every shape of the grid, in its order, into the table that the benchmarks use."""
    import torch

    from bench.grid import cells_for
    from bench.tune_kernels import tune_grid
    from ipca.kernels.tables import cache_file

    names = ("M", "N", "K", "rank", "dtype")
    cells = list(dict.fromkeys(tuple(getattr(cell, name) for name in names) for cell in cells_for("cuda")))
    device = torch.device("cuda")
    path = out / cache_file(device).name
    tune_grid([dict(zip(names, cell, strict=True)) for cell in cells], path, device, seconds)


def choose_backends(out: Path, seconds: float) -> None:
    """Time our backends against each other, so that the benchmarks have a table for the backend "auto"."""
    import torch

    from bench.backend_table import measure_backends
    from bench.grid import cells_for
    from ipca.kernels.tables import cache_file

    cells = [cell for cell in cells_for("cuda") if not cell.compiled]
    device = torch.device("cuda")
    measure_backends(cells, out / cache_file(device).name, device, seconds)


def summarize(out: Path) -> None:
    """Print and write the tables."""
    from bench import svd_tables
    from bench.result_tables import against, compiled_lines, goal_line, latest, pc_linear_table, training_table
    from bench.rows import read_rows

    lines = [f"{name}: {entry['status']}, {entry['words']}" for name, entry in read_state(out).items()]
    for path in out.glob("window_svd_*.csv"):
        rows = latest(read_rows(path))
        lines += ["", svd_tables.window_table(rows), "", *svd_tables.against(rows)]
    for path in out.glob("training_*.csv"):
        lines += ["", training_table(read_rows(path))]
    for path in out.glob("pc_linear_*.csv"):
        rows = latest(read_rows(path))
        lines += ["", pc_linear_table(rows), "", *against(rows), *compiled_lines(rows), "", goal_line(rows)]
    text = "\n".join(lines)
    (out / "summary.txt").write_text(text + "\n")
    print(f"\n{text}")


def main() -> int:
    """Run all steps, or a single one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-out"), help="folder of the results (default: gpu-out)")
    parser.add_argument("--seconds", type=float, default=520, help="limit for all steps together (default: 520)")
    for name in ("environment", "sanitize-case", "tune", "backends"):
        parser.add_argument(f"--{name}", action="store_true", help="run only this step, in this process")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.environment:
        write_environment(out)
    elif args.sanitize_case:
        sanitize_case()
    elif args.tune:
        tune(out, args.seconds)
    elif args.backends:
        choose_backends(out, args.seconds)
    else:
        import torch

        if not torch.cuda.is_available():
            sys.exit("bench.gpu needs a CUDA device, and torch sees none here.")
        failed = run_all(STEPS, out, args.seconds)
        summarize(out)
        return failed
    return 0


if __name__ == "__main__":
    sys.exit(main())
