"""Every small layer on a CPU beside PEFT's default LoRA: training, decoding, and the time of a call itself.

    python -m bench.versus_peft --out bench/results          resumes an interrupted run

Both forms of ``LinearPC`` and a ``PCConfig`` at each of these, float32, with one thread and with two; correctness,
pairing and columns as in :mod:`bench.pc_linear`:

    layers      256 → 256, 1024 → 1024, 1024 → 2816, ranks 8, 16 and 64
    training    forward and backward of 64, 128, 512 and 1024 tokens, dropout 0 and 0.05
    decoding    forward of 1 and 8 tokens without gradients
    overhead    one token through 64 → 64, without gradients and with a graph
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.grid import Cell
from bench.pc_linear import COLUMNS, bench_modes
from bench.providers import IN_PEFT, Provider
from bench.result_tables import versus_peft_table
from bench.rows import RESULTS, append_rows, facts, read_rows, same_run

PROVIDERS = (
    *(Provider("linear"), Provider("peft-default")),
    *(Provider("ipca-auto", "residual"), Provider("ipca-auto", "intact"), IN_PEFT),
)
SHAPES = ((256, 256), (1024, 1024), (2816, 1024))
"""``N, K``."""
RANKS = (8, 16, 64)
SECONDS = 1.5
"""For the rounds of one cell."""


def cells() -> list[tuple[Cell, str]]:
    """Each cell with its mode."""
    layers = [(N, K, rank) for (N, K), rank in product(SHAPES, RANKS)]
    found = [(Cell(1, 64, 64, 8, dtype="float32"), mode) for mode in ("forward", "graph")]
    found += [(Cell(M, *layer, dtype="float32"), "forward") for layer in layers for M in (1, 8)]
    training = product(layers, (64, 128, 512, 1024), (0.0, 0.05))
    return found + [(Cell(M, *layer, dropout, "float32"), "full") for layer, M, dropout in training]


def main() -> None:
    """Measure every cell that the file lacks for this device and commit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file (default: bench/results)")
    path = parser.parse_args().out / "versus_peft_cpu.csv"
    device = torch.device("cpu")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        about = facts(device)
        done = {key_of(row) for row in same_run(read_rows(path), about["device"], about["commit"])}
        for cell, mode in tqdm(cells(), desc=f"Cells, threads={threads}", unit="cell"):
            if key_of({**vars(cell), "mode": mode}) not in done:
                rows = bench_modes(cell, device, SECONDS, PROVIDERS, (mode,))
                append_rows(path, [row | about for row in rows], COLUMNS)
    print(f"{versus_peft_table(read_rows(path))}\n{path}")


def key_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The identity of a cell and its mode, from a row or from the cell's fields."""
    return tuple(str(row[name]) for name in ("mode", "M", "N", "K", "rank", "dropout"))


if __name__ == "__main__":
    main()
