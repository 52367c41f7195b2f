"""Error of the initial weights on a quantized base; writes bench/results/quantized_start.csv.

    python -m bench.quantized_start

    ‖W − Q(W)‖ / ‖W‖                      quantize W: the base of the intact form, of QLoRA and of PEFT's LoRA
    ‖W − (Q(W_res) + B0 A0)‖ / ‖W‖        quantize W_res = W − B0 A0, QPiSSA's order, for a window

in the Frobenius norm, on weights of the demo's model and on noise with 32 large components. Compared with windows:
PEFT's ``"pissa"``, its residual quantized as PEFT's documentation describes, and its ``"loftq"``. Also the overlap of
the window of ``W`` with that of ``Q(W)``: ``‖V_wᵀ V'_w‖_F² / rank`` of their right vectors, 1 if they span the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ipca
from bench.rows import FACTS, RESULTS, append_rows, facts, version
from bench.svd_matrices import MINILM, matrix, minilm
from ipca.nn.quantization import dequantize, quantize_like

MATRICES = {
    "minilm query": (384, 384),
    "minilm intermediate": (1536, 384),
    "outliers": (1024, 1024),
}
WINDOWS, RANKS = ("principal", "middle", "minor"), (16, 64)
QUANTIZERS = ("nf4", "int8", "int4")
COLUMNS = (
    *(
        "matrix",
        "m",
        "n",
        "quantizer",
        "provider",
        "window",
        "rank",
        "quantized",
        "start",
        "ratio",
        "overlap",
        "status",
    ),
    *FACTS,
    *("bitsandbytes", "torchao"),
)
PATH = RESULTS / "quantized_start.csv"
_INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]
Row = dict[str, str]


def quantizer(name: str, m: int, n: int) -> Callable[[Tensor], Tensor]:
    """``W (m, n)`` quantized and dequantized: bitsandbytes' NF4 in blocks of 64 with 8-bit scales, its int8 by rows, or
    torchao's int4 in groups of 32.
    """
    like = _layer(name, m, n)
    return lambda W: dequantize(quantize_like(like, W))


def _layer(name: str, m: int, n: int) -> nn.Module:
    if name == "int4":
        from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

        linear = nn.Linear(n, m, bias=False)
        quantize_(linear, IntxWeightOnlyConfig(weight_dtype=_INT4, granularity=PerGroup(32)))
        return linear
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    if name == "int8":
        return Linear8bitLt(n, m, bias=False, has_fp16_weights=False).to("cpu")
    return Linear4bit(n, m, bias=False, quant_type="nf4", compress_statistics=True).to("cpu")


def distance(W: Tensor, other: Tensor) -> float:
    """``‖W − other‖_F / ‖W‖_F``, in float64."""
    return float((W.double() - other.double()).norm() / W.double().norm())


def overlap(W: Tensor, Q: Tensor, window: str, rank: int) -> float:
    """``‖V_wᵀ V'_w‖_F² / rank`` of the windows of ``W`` and ``Q``."""
    ours, theirs = (ipca.window_svd(M.double(), ipca.Window(window, rank)).Vh for M in (W, Q))
    return float((ours @ theirs.mT).square().sum() / rank)


def window_weight(W: Tensor, quantize: Callable[[Tensor], Tensor], window: str, rank: int) -> Tensor:
    """``Q(W − B0 A0) + B0 A0``."""
    found = ipca.window_svd(W, ipca.Window(window, rank))
    part = (found.U * found.S) @ found.Vh
    return quantize(W - part) + part


def pissa_weight(W: Tensor, quantize: Callable[[Tensor], Tensor], rank: int) -> Tensor:
    """The same with PEFT: its ``"pissa"`` on the float layer, then its residual weight quantized."""
    from peft import LoraConfig, get_peft_model

    linear = nn.Linear(W.shape[1], W.shape[0], bias=False)
    linear.weight = nn.Parameter(W.clone())
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="pissa", target_modules=["layer"])
    layer: Any = get_peft_model(nn.ModuleDict({"layer": linear}), config).get_submodule("base_model.model.layer")
    part = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    return (quantize(layer.get_base_layer().weight.detach()) + part).detach()


def loftq_weight(W: Tensor, name: str, rank: int) -> Tensor:
    """PEFT's ``"loftq"``, one step: ``Q(W)`` plus the largest components of its error."""
    from peft.utils.loftq_utils import loftq_init

    base, A, B = loftq_init(W, num_bits={"nf4": 4, "int8": 8}[name], reduced_rank=rank)
    return base + (B @ A).to(base)


def measure(spectrum: str) -> Iterator[dict[str, object]]:
    """The rows of one matrix."""
    m, n = minilm()[MINILM[spectrum]].shape if spectrum in MINILM else MATRICES[spectrum]
    W = matrix(m, n, spectrum, torch.device("cpu"), 1)[0]
    for name in QUANTIZERS:
        quantize = quantizer(name, m, n)
        Q = quantize(W)
        lost = distance(W, Q)
        arms = [*(("ipca", window) for window in WINDOWS), ("peft-pissa", "principal")]
        arms += [("peft-loftq", "")] * (name != "int4")  # LoftQ is for bitsandbytes
        for rank, (provider, window) in product(RANKS, arms):
            shared = {"matrix": spectrum, "m": m, "n": n, "quantizer": name, "quantized": f"{lost:.6g}"}
            shared |= {"provider": provider, "window": window, "rank": rank}
            if provider == "ipca":
                shared |= {"overlap": f"{overlap(W, Q, window, rank):.4f}"}
            try:
                error = distance(W, _initial_weight(provider, window, rank, W, name, quantize))
            except (AssertionError, RuntimeError, ValueError) as problem:  # PEFT may not support this machine
                yield shared | {"status": f"failed: {str(problem).splitlines()[0]}"}
            else:
                yield shared | {"start": f"{error:.6g}", "ratio": f"{error / lost:.4f}", "status": "ok"}


def _initial_weight(
    provider: str, window: str, rank: int, W: Tensor, name: str, quantize: Callable[[Tensor], Tensor]
) -> Tensor:
    if provider == "ipca":
        return window_weight(W, quantize, window, rank)
    return pissa_weight(W, quantize, rank) if provider == "peft-pissa" else loftq_weight(W, name, rank)


def start_section(rows: list[Row]) -> str:
    """The table of errors of quantizing, and the ratio of each initialization to it."""
    columns = [("ipca", window, str(rank)) for rank in RANKS for window in WINDOWS]
    columns += [("peft-pissa", "principal", str(rank)) for rank in RANKS]
    lines = _table(rows, columns, "ratio", "‖W − Q(W)‖ / ‖W‖")
    failed = sorted(
        {f"{row['provider']}, {row['quantizer']}: {row['status']}" for row in rows if row["status"] != "ok"}
    )
    first = rows[0]
    versions = ", ".join(f"{name} {first[name]}" for name in ("bitsandbytes", "torchao", "torch", "peft"))
    about = [f"{first['device']}; {versions}. Rows: `bench/results/{PATH.name}`."]
    return "\n\n".join(["\n".join(lines), *(["\n".join(f"- {line}" for line in failed)] if failed else []), *about])


def overlap_section(rows: list[Row]) -> str:
    """The table of overlaps of the window of ``W`` with that of ``Q(W)``."""
    columns = [("ipca", window, str(rank)) for rank in RANKS for window in WINDOWS]
    return "\n".join(_table(rows, columns, "overlap", "‖W − Q(W)‖ / ‖W‖")) + f"\n\nRows: `bench/results/{PATH.name}`."


def _table(rows: list[Row], columns: list[tuple[str, str, str]], value: str, lost: str) -> list[str]:
    """A line for each matrix and quantizer; a column for each ``(provider, window, rank)``."""
    heads = [f"{'PEFT pissa' if provider != 'ipca' else window} {rank}" for provider, window, rank in columns]
    lines = [f"| matrix | Q | {lost} | {' | '.join(heads)} |", "|---" * (len(columns) + 3) + "|"]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["matrix"], row["quantizer"]), []).append(row)
    for (name, Q), group in groups.items():
        cells = {(row["provider"], row["window"], row["rank"]): row[value] for row in group}
        values = [f"{float(cells[key]):.2f}" if cells[key] else "–" for key in columns]
        title = f"{name} {group[0]['m']} × {group[0]['n']}"
        lines.append(f"| {title} | {Q} | {float(group[0]['quantized']):.4f} | {' | '.join(values)} |")
    return lines


def main() -> int:
    """Measure everything again."""
    shared = facts(torch.device("cpu")) | {name: version(name) for name in ("bitsandbytes", "torchao")}
    rows = [row | shared for spectrum in MATRICES for row in measure(spectrum)]
    new = Path(f"{PATH}.new")
    new.unlink(missing_ok=True)
    append_rows(new, rows, COLUMNS)
    new.replace(PATH)
    return 0


if __name__ == "__main__":
    sys.exit(main())
