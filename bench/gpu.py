"""All checks and benchmarks that need a GPU, in one command with a time limit; interrupted runs resume.

    python -m bench.gpu --out DIR
    python -m bench.gpu --dry-run --out DIR    without a GPU: every step, at tiny shapes, by Triton's interpreter

The most important figures come first: correctness, then the goal cell of the fused linear, then what varies around it,
then the rest. Each step is a process with its own time limit, so that one that hangs or fails does not use up the time
of the others; a step that is done is not run again, one that is not gets its time once a call. See bench/README.md.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipca._atomic import write_atomic

ROOT = Path(__file__).resolve().parent.parent
DRY_RUN = "dry run"
"""The name of the device in every row and file of a dry run."""
SUMMARY_SECONDS = 15
"""Reserved for the summary."""
START_SECONDS = 15
"""Time a process needs to start and end, in addition to its ``{seconds}``."""
AGAIN, UNFINISHED = 3, 4
"""Exit statuses of a step: the device was lost, and a new process can resume; or time is up, and rows are left."""
Entry = dict[str, str]


@dataclass(frozen=True)
class Step:
    """``arguments`` of the interpreter, with ``{seconds}`` and ``{out}`` filled in, and its maximum time in seconds.

    ``before`` are the words before the interpreter; without the program that they name the step is skipped.
    """

    name: str
    arguments: tuple[str, ...]
    limit: float
    before: tuple[str, ...] = ()


SANITIZER = ("compute-sanitizer", "--error-exitcode", "9", "--tool")


def body(name: str, limit: float, tool: str = "") -> Step:
    """A step of bench/gpu_steps.py, under a ``tool`` of compute-sanitizer."""
    before = (*SANITIZER, tool) if tool else ()
    arguments = ("-m", "bench.gpu_steps", name, "--out", "{out}", "--seconds", "{seconds}")
    return Step(tool or name, arguments, limit, before)


NATIVE = "tests/svd/test_inner_loops.py"
PYTEST = ("-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider")
SIDE_BY_SIDE = ("-n", "8") if importlib.util.find_spec("xdist") else ()
"""Most of the tests' time is kernel compilation, which pytest-xdist spreads over several cores."""
STEPS = (
    body("environment", 60),
    Step("doctor", ("-m", "ipca", "doctor", "--json"), 100),
    body("goal-tune", 75),
    body("goal-backends", 60),
    body("goal-cell", 60),
    body("eager", 60),
    body("compile", 75),
    body("sizes", 120),
    body("tests", 120),
    Step("extension", ("-m", "ipca._extension"), 90),
    Step("native", (*PYTEST, NATIVE), 60),
    body("training", 90),
    body("window-svd", 90),
    body("sanitized", 60),
    body("sanitized", 60, "memcheck"),
    body("sanitized", 60, "racecheck"),
    Step("native memcheck", (*PYTEST, "-k", "on_a_gpu", NATIVE), 90, (*SANITIZER, "memcheck")),
    Step(
        "native racecheck",
        (*PYTEST, "-k", "on_a_gpu", NATIVE),
        90,
        (*SANITIZER, "racecheck", "--kernel-regex", "kns=ipca"),
    ),
    Step("other tests", (*PYTEST, *SIDE_BY_SIDE, "tests", "--ignore=tests/kernels", "--ignore=tests/ops"), 200),
    body("grid", 10_000),
)
DRY = {
    "extension": ("-m", "pytest", "-p", "no:cacheprovider", "tests/csrc/test_extension.py"),
    "native": ("-m", "pytest", "-p", "no:cacheprovider", "-k", "not on_a_gpu and not slow", NATIVE),
    "other tests": ("-m", "pytest", "-p", "no:cacheprovider", "tests/test_window.py"),
}
"""Arguments in a dry run, where those of the step need a GPU."""


def steps_of(dry_run: bool) -> tuple[Step, ...]:
    """All steps; in a dry run those of this package at a tiny scale."""
    if not dry_run:
        return STEPS
    return tuple(
        Step(
            step.name,
            DRY.get(step.name, (*step.arguments, *["--dry-run"] * ("bench.gpu_steps" in step.arguments))),
            max(step.limit, 300),
            step.before,
        )
        for step in STEPS
    )


def run_all(steps: tuple[Step, ...], out: Path, seconds: float, environment: dict[str, str] | None = None) -> int:
    """Run every step that is not done, once; return 1 if any has failed, now or before."""
    deadline = time.monotonic() + seconds - SUMMARY_SECONDS
    state = read_state(out)
    for step in steps:
        if state.get(step.name, {}).get("status") == "done":
            continue
        state[step.name] = run_step(step, out, min(step.limit, deadline - time.monotonic()), environment or {})
        write_atomic(out / "state.json", json.dumps(state, indent=1).encode())
        summarize(out)
    return int(any(entry["status"] == "failed" for entry in state.values()))


def read_state(out: Path) -> dict[str, Entry]:
    """The state left by earlier calls."""
    path = out / "state.json"
    state: dict[str, Entry] = json.loads(path.read_text()) if path.exists() else {}
    return state


def run_step(step: Step, out: Path, seconds: float, environment: dict[str, str]) -> Entry:
    """Run one step with its output in log.txt; if it fails, print the end of the log."""
    if step.before and not shutil.which(step.before[0]):
        return report(step, "skipped", 0.0, f"{step.before[0]} is not on PATH")
    began = time.monotonic()
    while True:
        left = seconds - (time.monotonic() - began)
        if left < START_SECONDS:
            return report(step, "no time", time.monotonic() - began, "left for another call")
        fill = {"out": str(out), "seconds": str(int(left - START_SECONDS))}
        command = [*step.before, sys.executable, *(argument.format(**fill) for argument in step.arguments)]
        code = bounded(command, out, left, environment)
        if code != AGAIN:
            break
    took = time.monotonic() - began
    if code in (0, UNFINISHED):
        return report(step, "unfinished" if code else "done", took, "the rest is left for another call" if code else "")
    print((out / "log.txt").read_text(errors="replace")[-2000:])
    return report(step, "failed", took, "out of time" if code is None else f"exit {code}")


def report(step: Step, status: str, seconds: float, words: str) -> Entry:
    """The entry for state.json; also printed."""
    entry = {"status": status, "seconds": f"{seconds:.1f}", "words": words}
    print(line(step.name, entry), flush=True)
    return entry


def line(name: str, entry: Entry) -> str:
    """A line of the table of steps."""
    return f"{name:<18}{entry['status']:<12}{entry['seconds']:>7} s  {entry['words']}".rstrip()


def bounded(command: list[str], out: Path, seconds: float, environment: dict[str, str]) -> int | None:
    """The exit status; None if the command and all of its children had to be killed."""
    given = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    given |= {"PYTHONUNBUFFERED": "1", "IPCA_CACHE": str(out), "TQDM_MININTERVAL": "10"}
    if (out / "triton-cache").is_dir():
        given["TRITON_CACHE_DIR"] = str(out / "triton-cache")
    with (out / "log.txt").open("a") as log:
        log.write(f"\n===== {' '.join(command)}\n")
        log.flush()
        options: Any = {"cwd": ROOT, "env": given | environment, "stdout": log, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, start_new_session=True, preexec_fn=die_with_parent, **options)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def die_with_parent() -> None:
    """On Linux, have the kernel kill this process when its parent is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def summarize(out: Path) -> str:
    """The tables; also written to summary.txt."""
    from bench import single_layer, svd_tables
    from bench.result_tables import against, compiled_lines, goal_line, latest, pc_linear_table, training_table
    from bench.rows import read_rows

    lines = ["A dry run: no figure below is a measurement.", ""] if any(out.glob("*_dry-run.csv")) else []
    lines += [line(name, entry) for name, entry in read_state(out).items()]
    for path in out.glob("pc_linear_*.csv"):
        rows = latest(read_rows(path))
        lines += ["", goal_line(rows), "", pc_linear_table(rows), "", *against(rows), *compiled_lines(rows)]
    for path in out.glob("single_layer_*.csv"):
        lines += ["", *single_layer.table(latest(read_rows(path)))]
    for path in out.glob("training_*.csv"):
        lines += ["", training_table(read_rows(path))]
    for path in out.glob("window_svd_*.csv"):
        rows = latest(read_rows(path))
        lines += ["", svd_tables.window_table(rows), "", *svd_tables.against(rows)]
    text = "\n".join(lines)
    write_atomic(out / "summary.txt", f"{text}\n".encode())
    return text


def main() -> int:
    """Run all steps; return 1 if any has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-out"), help="folder of the results (default: gpu-out)")
    parser.add_argument("--seconds", type=float, help="limit for all steps together (default: 520; none for a dry run)")
    parser.add_argument("--dry-run", action="store_true", help="every step, tiny and without a GPU; no measurements")
    args = parser.parse_args()
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        sys.exit("bench.gpu needs a CUDA device, and torch sees none here; --dry-run needs none.")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    found = out / "environment.json"
    if found.exists() and ((device := json.loads(found.read_text())["device"]) == DRY_RUN) != args.dry_run:
        sys.exit(f"{out} holds the results of {device}; name another folder with --out.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    seconds = args.seconds or (float("inf") if args.dry_run else 520)
    environment = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"} if args.dry_run else {}
    try:
        return run_all(steps_of(args.dry_run), out, seconds, environment)
    finally:
        print(f"\n{summarize(out)}")


if __name__ == "__main__":
    sys.exit(main())
