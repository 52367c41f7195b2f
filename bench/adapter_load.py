"""Benchmark of loading an adapter of all linear layers of the shapes of Llama-3.2-1B, beside stock PEFT.

    python -m bench.adapter_load

Writes bench/results/adapter_load.csv. All operations take part in every round, on one model whose plain layers are put
back in between. Weights and factors are random, which does not affect the time. PEFT reads the same folders, as LoRAs
of twice the rank; it checks neither its file nor the base.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

import ipca
from bench.rows import FACTS, RESULTS, Row, append_rows, facts
from ipca import Window
from ipca.io.adapter_folder import read_adapter
from ipca.io.peft_format import WEIGHTS
from ipca.nn import InitialFactors, LinearPC
from ipca.nn.initialization import certify_init
from ipca.nn.layer_kinds import base_sha256
from ipca.nn.registry import set_layer

RANK, HIDDEN, INTERMEDIATE, KEYS = 16, 2048, 8192, 8 * 64
SHAPES = {
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (HIDDEN, KEYS),
    "v_proj": (HIDDEN, KEYS),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (HIDDEN, INTERMEDIATE),
    "up_proj": (HIDDEN, INTERMEDIATE),
    "down_proj": (INTERMEDIATE, HIDDEN),
}
DTYPES = (torch.bfloat16, torch.float32)
THREADS = (1, 2)
BASELINE = "PeftModel.from_pretrained"
COLUMNS = ("op", "dtype", "matrices", "rank", "file_mib", "median_s", "q25_s", "q75_s", "ratio", "rounds", *FACTS)
Operations = dict[str, Callable[[], object]]


def blocks(dtype: torch.dtype, layers: int) -> nn.Module:
    """The linear layers of ``layers`` layers of the model, with their paths; of all 16 1.9 GiB in bfloat16."""
    model, decoder = nn.Module(), nn.Module()
    decoder.layers = nn.ModuleList()
    for _ in range(layers):
        block = nn.ModuleDict()
        for name, (inner, out) in SHAPES.items():
            block[name] = nn.Linear(inner, out, bias=False, dtype=dtype)
        decoder.layers.append(block)
    model.model = decoder
    return model.requires_grad_(False)


def adapt(model: nn.Module, form: str) -> None:
    """Put random factors, of the size that a window's have, into each layer."""
    for name, linear in linear_layers(model).items():
        out, inner = linear.weight.shape
        A0, B0 = (torch.randn(shape).div(max(shape) ** 0.5) for shape in ((RANK, inner), (out, RANK)))
        A0, B0 = (factor.to(linear.weight.dtype).float() for factor in (A0, B0))
        certificate = certify_init(linear.weight, A0, B0, scaling=1.0, form=form)
        window = Window.middle(RANK).resolve(min(out, inner))
        initial = InitialFactors(A0, B0, window, base_sha256(linear), None, certificate)
        set_layer(model, name, LinearPC.from_factors(linear, initial, alpha=float(RANK), form=form))


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The plain layers by path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def put_back(model: nn.Module, plain: dict[str, nn.Linear]) -> None:
    """Restore the plain layers of ``model``."""
    for name, linear in plain.items():
        set_layer(model, name, linear)


def operations(model: nn.Module, folders: dict[str, Path]) -> Operations:
    """What is timed, each on the plain model; ``folders`` are an adapter's, by form."""
    intact, residual = folders["intact"], folders["residual"]
    return {
        BASELINE: lambda: PeftModel.from_pretrained(model, intact),
        "load_adapter, intact": lambda: ipca.load_adapter(model, intact),
        "load_adapter, residual": lambda: ipca.load_adapter(model, residual),
        "read_adapter": lambda: read_adapter(intact),
        "safetensors load_file": lambda: load_file(intact / WEIGHTS),
    }


def measure(model: nn.Module, found: Operations, rounds: int) -> dict[str, list[float]]:
    """Seconds of each operation by round; the first round is discarded."""
    plain = linear_layers(model)
    seconds: dict[str, list[float]] = {op: [] for op in found}
    for _ in range(rounds + 1):
        for op, run in found.items():
            put_back(model, plain)
            gc.collect()
            began = time.perf_counter()
            run()
            seconds[op].append(time.perf_counter() - began)
    put_back(model, plain)
    return {op: taken[1:] for op, taken in seconds.items()}


def rows_of(dtype: torch.dtype, layers: int, rounds: int) -> list[Row]:
    """The rows of a model of ``dtype``, for every number of threads."""
    rows: list[Row] = []
    model = blocks(dtype, layers)
    plain = linear_layers(model)
    with tempfile.TemporaryDirectory() as name:
        folders = {form: Path(name) / form for form in ("intact", "residual")}
        for form, folder in folders.items():
            adapt(model, form)
            ipca.save_adapter(model, folder)
            put_back(model, plain)
        size = (folders["intact"] / WEIGHTS).stat().st_size / 2**20
        for threads in THREADS:
            torch.set_num_threads(threads)
            seconds = measure(model, operations(model, folders), rounds)
            for op, taken in seconds.items():
                low, median, high = np.quantile(taken, (0.25, 0.5, 0.75))
                row = {"op": op, "dtype": str(dtype).removeprefix("torch."), "matrices": len(plain), "rank": RANK}
                row |= {"file_mib": f"{size:.1f}", "rounds": rounds}
                row |= {"median_s": f"{median:.3f}", "q25_s": f"{low:.3f}", "q75_s": f"{high:.3f}"}
                row["ratio"] = f"{np.median(np.divide(taken, seconds[BASELINE])):.2f}"
                rows.append(row | facts(torch.device("cpu")))
                print(f"{row['dtype']:9} {threads} {op:34} {row['median_s']} s  {row['ratio']}")
    return rows


def main() -> int:
    """Measure and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16, help="of the model (default: all 16)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--out", type=Path, default=RESULTS / "adapter_load.csv", help="CSV file, overwritten")
    args = parser.parse_args()
    rows = [row for dtype in DTYPES for row in rows_of(dtype, args.layers, args.rounds)]
    args.out.unlink(missing_ok=True)
    append_rows(args.out, rows, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
