"""Benchmark of saving and loading an adapter for all linear layers of the shapes of Llama-3.2-1B.

    python -m bench.adapter_load

Writes bench/results/adapter_load.csv. Weights and factors are random, which does not affect the time.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

import ipca
from bench.rows import FACTS, RESULTS, append_rows, facts
from ipca import Window
from ipca._hashing import tensor_sha256
from ipca.io.adapter_folder import read_adapter
from ipca.io.peft_format import WEIGHTS
from ipca.nn import InitCertificate, InitialFactors, LinearPC
from ipca.nn.registry import set_layer

RANK, LAYERS, HIDDEN, INTERMEDIATE, KEYS = 16, 16, 2048, 8192, 8 * 64
SHAPES = {
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (HIDDEN, KEYS),
    "v_proj": (HIDDEN, KEYS),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (HIDDEN, INTERMEDIATE),
    "up_proj": (HIDDEN, INTERMEDIATE),
    "down_proj": (INTERMEDIATE, HIDDEN),
}
COLUMNS = ("op", "layers", "rank", "file_mib", "median_s", "best_s", "runs", *FACTS)


def blocks() -> nn.Module:
    """The linear layers of the model in bfloat16, with their paths; 1.9 GiB."""
    model, decoder = nn.Module(), nn.Module()
    decoder.layers = nn.ModuleList()
    for _ in range(LAYERS):
        block = nn.ModuleDict()
        for name, (inner, out) in SHAPES.items():
            block[name] = nn.Linear(inner, out, bias=False, dtype=torch.bfloat16)
        decoder.layers.append(block)
    model.model = decoder
    return model


def adapted(model: nn.Module) -> nn.Module:
    """A model that shares the weights, with random factors in each layer."""
    exact = InitCertificate("bfloat16", 0.0, 0.0, 0.0)
    for name, linear in linear_layers(model).items():
        A0, B0 = torch.randn(RANK, linear.in_features), torch.randn(linear.out_features, RANK)
        window = Window.middle(RANK).resolve(min(linear.weight.shape))
        initial = InitialFactors(A0, B0, window, tensor_sha256(linear.weight), None, exact)
        set_layer(model, name, LinearPC.from_factors(linear, initial, alpha=float(RANK), form="intact"))
    return model


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The plain layers by path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def fresh(model: nn.Module, plain: dict[str, nn.Linear]) -> nn.Module:
    """``model`` with its plain layers restored, in negligible time."""
    for name, linear in plain.items():
        set_layer(model, name, linear)
    return model


def measure(op: str, run: Callable[[], object], runs: int, file: Path) -> dict[str, object]:
    """One row: the time of ``run``, after one warm-up call."""
    run()
    seconds = []
    for _ in range(runs):
        gc.collect()
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return {
        "op": op,
        "layers": LAYERS * len(SHAPES),
        "rank": RANK,
        "file_mib": f"{file.stat().st_size / 2**20:.1f}" if file.exists() else "",
        "median_s": f"{statistics.median(seconds):.3f}",
        "best_s": f"{min(seconds):.3f}",
        "runs": runs,
        **facts(torch.device("cpu")),
    }


def main() -> int:
    """Measure and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="calls of each operation (default: 5)")
    parser.add_argument("--out", type=Path, default=RESULTS / "adapter_load.csv", help="CSV file, overwritten")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, file = Path(name), Path(name) / WEIGHTS
        model = blocks()
        plain = linear_layers(model)
        adapted(model)
        rows = [
            measure("save_adapter", lambda: ipca.save_adapter(model, folder), args.runs, file),
            measure("safetensors load_file", lambda: load_file(file), args.runs, file),
            measure("read_adapter", lambda: read_adapter(folder), args.runs, file),
            measure("load_adapter, resumed", lambda: ipca.load_adapter(model, folder), args.runs, file),
            measure(
                "load_adapter, on the base, hashed",
                lambda: ipca.load_adapter(fresh(model, plain), folder),
                args.runs,
                file,
            ),
        ]
    for row in rows:
        print(f"{row['op']:54} {row['median_s']} s  ({row['file_mib']} MiB)")
    args.out.unlink(missing_ok=True)
    append_rows(args.out, rows, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
