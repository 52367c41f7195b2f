"""The steps of bench/gpu.py that are no command of their own, each in a process of its own.

    python -m bench.gpu_steps NAME --out DIR [--seconds N] [--dry-run]

Every step resumes: rows that DIR has for this device and commit are not measured again. The exit status is 1 where
something was wrong or failed, else that of :mod:`bench.pc_linear`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.gpu import ROOT, UNFINISHED

if TYPE_CHECKING:  # a step imports what it needs: a process starts in a second without PEFT and transformers
    import torch

    from bench.grid import Cell
    from ipca.device import tune

TEST_COLUMNS = ("file", "status", "seconds", "words", "commit")
WORKERS = 4
"""Processes that share a file of tests."""


@dataclass(frozen=True)
class Run:
    """Where the rows go, and when the step must end."""

    out: Path
    deadline: float
    dry: bool

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device("cpu" if self.dry else "cuda")

    @property
    def seconds(self) -> float:
        """What is left."""
        return self.deadline - time.monotonic()

    def csv(self, name: str) -> Path:
        from bench.rows import device_name, slug

        return self.out / f"{name}_{slug(device_name(self.device))}.csv"


def goal(run: Run) -> Cell:
    """The most important cell of the fused linear."""
    from bench.grid import Cell, cells_for

    return Cell(32, 48, 64, rank=4, dtype="float16") if run.dry else cells_for("cuda")[0]


def sizes(run: Run) -> list[Cell]:
    """Ranks and numbers of tokens around the goal."""
    ranks, tokens = ((8,), (16,)) if run.dry else ((64, 128), (1024, 4096, 16384))
    return [replace(goal(run), rank=r) for r in ranks] + [replace(goal(run), M=M) for M in tokens]


def grid(run: Run) -> list[Cell]:
    """All cells."""
    from bench.grid import cells_for

    return [replace(goal(run), dropout=0.05)] if run.dry else cells_for("cuda")


def environment(run: Run) -> int:
    """Device, driver, versions, commit, and the first launch of a kernel, into environment.json."""
    import torch

    from bench.rows import facts

    found: dict[str, Any] = {**facts(run.device), "cuda": torch.version.cuda or "", "platform": platform.platform()}
    found["capability"] = "" if run.dry else list(torch.cuda.get_device_capability())
    query = ["nvidia-smi", "--query-gpu=driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
    if shutil.which(query[0]):
        found["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    found |= first_launch(run)
    (run.out / "environment.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


def first_launch(run: Run) -> dict[str, Any]:
    """Seconds of the first launch of a kernel of the goal cell, and how many kernels had to be compiled for it."""
    import torch
    from triton import knobs

    from ipca.kernels.project import project

    def kernels() -> int:
        return sum(1 for _ in Path(knobs.cache.dir).rglob("*.cubin"))

    cell = goal(run)
    x = torch.zeros(cell.M, cell.K, dtype=cell.torch_dtype, device=run.device)
    D = torch.zeros(cell.rank, cell.K, device=run.device)
    before, began = kernels(), time.perf_counter()
    project(x, D)
    if x.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return {"first_launch_s": round(seconds, 3), "kernels_in_cache": before, "kernels_compiled": kernels() - before}


def problems(cells: Sequence[Cell]) -> list[tune.Cell]:
    """The cells as the measurement of tables takes them."""
    from ipca.device.tune import Cell

    found = [Cell(cell.M, cell.N, cell.K, cell.rank, cell.dtype, cell.dropout) for cell in cells]
    return list(dict.fromkeys(found))


def configurations(run: Run, cells: Sequence[Cell]) -> int:
    """Measure the kernels' configurations into the table."""
    from ipca.device.tune import measure_configs

    return 0 if measure_configs(problems(cells), run.device, seconds=run.seconds) else UNFINISHED


def choose_backends(run: Run, cells: Sequence[Cell]) -> int:
    """Time our backends against each other, which is the table of the backend ``"auto"``."""
    from ipca.device.tune import measure_backends

    return 0 if measure_backends(problems(cells), run.device, seconds=run.seconds) else UNFINISHED


def measure_cells(run: Run, cells: Sequence[Cell]) -> int:
    """The fused linear against a bare layer and PEFT's."""
    from bench.pc_linear import measure_cells

    return measure_cells(cells, run.out, run.device, run.seconds, **({"rounds": 0.01} if run.dry else {}))


def whole_cells(run: Run, cells: Sequence[Cell]) -> int:
    """Tuning, backends and benchmark, cell by cell until time would run out; ends with a cell that is not complete."""
    worst, longest = 0, 0.0
    for cell in cells:
        began = time.monotonic()
        if run.seconds < longest:
            return UNFINISHED
        for part in (configurations, choose_backends, measure_cells):
            code = part(run, [cell])
            if code not in (0, 1):
                return code
            worst = max(worst, code)
        longest = max(longest, time.monotonic() - began)
    return worst


def eager(run: Run) -> int:
    """The goal cell as a training loop runs it."""
    from bench import single_layer

    count = 1 if run.dry else single_layer.CALLS
    return single_layer.eager(goal(run), run.csv("single_layer"), run.device, run.seconds, count)


def compiled(run: Run) -> int:
    """The goal cell under torch.compile, between two activations."""
    from bench import single_layer

    most = 2 if run.dry else None
    return single_layer.compiled(goal(run), run.csv("single_layer"), run.device, run.seconds, most)


def test_files(run: Run) -> int:
    """The tests of kernels and ops, file by file, several at once; a file that has passed is not run again."""
    from bench.rows import commit, read_rows

    path = run.out / "tests.csv"
    folders = ("tests/kernels", "tests/ops")
    files = sorted(str(file.relative_to(ROOT)) for folder in folders for file in (ROOT / folder).glob("test_*.py"))
    files = ["tests/ops/test_transforms.py"] if run.dry else files
    passed = {row["file"] for row in read_rows(path) if (row["status"], row["commit"]) == ("passed", commit())}
    at_once = max(1, (os.cpu_count() or 1) // WORKERS)
    with ThreadPoolExecutor(at_once) as pool:
        codes = list(pool.map(lambda file: run_tests(run, file, path), [file for file in files if file not in passed]))
    return max(codes, default=0)


def run_tests(run: Run, file: str, path: Path) -> int:
    """Run one file of tests and append its row; 1 if it failed."""
    from bench.rows import append_rows, commit

    words = ["-p", "no:cacheprovider", *([] if run.dry else ["-m", "gpu"])]
    words += ["-n", str(WORKERS)] if importlib.util.find_spec("xdist") and not run.dry else []
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "pytest", *words, file], cwd=ROOT, capture_output=True, text=True)
    seconds, no_tests = time.monotonic() - began, 5
    status = "passed" if done.returncode in (0, no_tests) else f"exit {done.returncode}"
    said = (done.stdout.strip() or done.stderr.strip()).splitlines()
    print(f"----- {file}: {status}\n{done.stdout}{done.stderr}", flush=True)
    row = {"file": file, "status": status, "seconds": f"{seconds:.1f}", "words": said[-1] if said else ""}
    append_rows(path, [row | {"commit": commit()}], TEST_COLUMNS)
    return int(status != "passed")


def training(run: Run) -> int:
    """A few training steps of TinyLlama's shape: PEFT's default, ours, and ours within PEFT."""
    from bench.providers import IN_PEFT, Provider
    from bench.result_tables import training_table
    from bench.training import BILLION, SMALL, providers_of, run_training

    settings = replace(SMALL, hidden=32, intermediate=48, layers=1, vocabulary=64, length=8, steps=2)
    settings = settings if run.dry else replace(BILLION, steps=8)
    arms = [
        who
        for who in providers_of(settings)
        if who in (Provider("peft-default"), Provider("ipca-auto", "residual"), IN_PEFT)
    ]
    rows = run_training(settings, run.csv("training"), run.device, run.seconds, arms)
    if not rows or int(rows[-1]["step"]) < settings.steps - 1:
        return UNFINISHED
    print(training_table(rows))
    return int(any(row["status"] != "ok" for row in rows))


def windows(run: Run) -> int:
    """The window search of one matrix, of a stack of 8 and of 32."""
    from bench.bench_window_svd import measure_cells
    from bench.svd_grid import stacks

    return measure_cells(stacks(64, 4, (1, 2)) if run.dry else stacks(), run.out, run.device, run.seconds)


def sanitized(run: Run) -> int:
    """Forward and backward of the kernels at two odd shapes, small enough for a memory checker.

    Run without it first: compiling within it takes many times as long.
    """
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # otherwise an overrun could stay within a larger cached block
    import torch

    from bench.checks import results
    from bench.grid import Cell
    from bench.providers import FORMS, Provider, Sample, active, layer_call, trained

    for cell in (Cell(33, 65, 97, rank=5, dropout=0.1), Cell(130, 64, 256, rank=24, dropout=0.1)):
        sample = Sample(cell, run.device, seed=0)
        for provider in (Provider("ipca-triton", form) for form in FORMS):
            parameters = trained(sample.layer(provider))
            with active(provider):
                found = results(layer_call(provider, sample), sample.x, sample.dy, parameters)
            assert all(torch.isfinite(value).all() for value in found.values()), (cell, provider)
    return 0


def rest(run: Run) -> int:
    """What is left of the benchmarks: every cell of the fused linear, then of the window search."""
    from bench import bench_window_svd, svd_grid

    code = whole_cells(run, grid(run))
    if code not in (0, 1):
        return code
    cells = svd_grid.stacks(48, 4, (1,)) if run.dry else svd_grid.gpu_grid()
    return max(code, bench_window_svd.measure_cells(cells, run.out, run.device, run.seconds))


BODIES: dict[str, Callable[[Run], int]] = {
    "environment": environment,
    "goal-tune": lambda run: configurations(run, [goal(run)]),
    "goal-backends": lambda run: choose_backends(run, [goal(run)]),
    "goal-cell": lambda run: measure_cells(run, [goal(run)]),
    "eager": eager,
    "compile": compiled,
    "sizes": lambda run: whole_cells(run, sizes(run)),
    "tests": test_files,
    "training": training,
    "window-svd": windows,
    "sanitized": sanitized,
    "grid": rest,
}


def main() -> int:
    """Run one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=BODIES)
    parser.add_argument("--out", type=Path, required=True, help="folder of the rows")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after this")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on a CPU, by Triton's interpreter")
    args = parser.parse_args()
    os.environ["IPCA_CACHE"] = str(args.out.resolve())  # the tables
    if args.dry_run:
        from bench.dry_run import pretend

        pretend()
    return BODIES[args.name](Run(args.out.resolve(), time.monotonic() + args.seconds, args.dry_run))


if __name__ == "__main__":
    sys.exit(main())
