"""Peak memory of ``apply_pc`` above the model, in units of the largest layer in float64; one process per case.

    python -m bench.apply_memory

Writes bench/results/apply_memory.csv.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results" / "apply_memory.csv"
CASES = [
    (kind, d, form)
    for kind, d in (("square", 1024), ("square", 2048), ("mlp", 1024), ("wide", 1024))
    for form in ("residual", "intact")
]


def measure(kind: str, d: int, form: str) -> None:
    """Print the peak memory of ``apply_pc`` above the model, over the size of the largest layer in float64.

    ``"square"`` and ``"mlp"`` use rank 16; ``"wide"`` rank d / 2 of one layer.
    """
    import torch
    from torch import nn

    import ipca

    def model(d: int) -> nn.Sequential:
        shapes = [(d, d)] * (1 if kind == "wide" else 4) + ([(d, 3 * d), (3 * d, d)] if kind == "mlp" else [])
        return nn.Sequential(*[nn.Linear(*shape) for shape in shapes])

    rank = d // 2 if kind == "wide" else 16
    ipca.apply_pc(model(1540), rank=16, form=form, progress=False)  # loads libraries and allocates their buffers
    large = model(d)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _status("VmRSS")
    ipca.apply_pc(large, rank=rank, form=form, progress=False)
    largest = max(p.numel() for p in large.parameters()) * 8
    print(f"{(_status('VmHWM') - before) / largest:.2f},{largest / 2**20:.0f},{torch.__version__}")


def main() -> None:
    """Measure every case in its own process."""
    rows = []
    for kind, d, form in CASES:
        # glibc raises this threshold dynamically and then keeps freed blocks, in fragments that differ between runs.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "bench.apply_memory", kind, str(d), form]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        ratio, size, version = done.stdout.strip().split(",")
        rows.append({"layers": kind, "d": d, "form": form, "peak_layers": ratio, "largest_mib": size, "torch": version})
        print(rows[-1])
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


if __name__ == "__main__":
    measure(sys.argv[1], int(sys.argv[2]), sys.argv[3]) if len(sys.argv) > 1 else main()
