"""Rounding errors of the intact form after small steps; writes bench/results/change_error.csv.

    python -m bench.change_error

    two products     y = x Wᵀ + x Aᵀ Bᵀ − x A0ᵀ B0ᵀ, as it is written
    LinearPC         one product of the factors' differences, in every backend that a CPU runs

on a weight 768 × 768 with 24 large components, its principal window at rank 16, 64 rows, factors moved at random by a
share of their standard deviation. Against float64, relative, Frobenius: the error of the output; of the change that it
shows, ``y − base``; of the gradients of ``x, A, B``. ``bits``: whether the layer gave the base's bits before it moved.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ipca
from bench.rows import FACTS, RESULTS, Row, append_rows, facts
from ipca.nn import LinearPC

COLUMNS = ("dtype", "moved", "computed", "output", "change", "dx", "dA", "dB", "bits", *FACTS)
PATH = RESULTS / "change_error.csv"
SIZE, ROWS, RANK = 768, 64, 16
BACKENDS = ("reference", "addmm", "merged")
Layer = Callable[[Tensor], Tensor]


def weight(generator: torch.Generator) -> Tensor:
    """Noise with 24 large components."""
    U, V = (torch.linalg.qr(torch.randn(SIZE, 24, generator=generator))[0] for _ in range(2))
    return torch.randn(SIZE, SIZE, generator=generator) * 0.02 + (U * torch.linspace(6, 1.3, 24)) @ V.mT


def two_products(layer: LinearPC, x: Tensor) -> Tensor:
    """The formula as it is written, in the dtype of ``x``."""
    pairs = ((layer.lora_A, layer.lora_B), (layer.lora_A0, layer.lora_B0))
    trained, frozen = (F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)) for A, B in pairs)
    return F.linear(x, layer.base_weight, layer.bias) + trained - frozen


def error(found: Tensor, exact: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())


def rows_of(dtype: torch.dtype) -> list[Row]:
    """The rows of one dtype of the weight; the factors are float32."""
    generator = torch.Generator().manual_seed(1)
    plain = nn.Linear(SIZE, SIZE)
    with torch.no_grad():
        plain.weight.copy_(weight(generator))
    plain.to(dtype).requires_grad_(False)
    layer = LinearPC.from_linear(plain, ipca.Window.principal(RANK))
    x, dy = (torch.randn(ROWS, SIZE, generator=generator).to(dtype) for _ in range(2))
    x.requires_grad_()
    wanted = [x, layer.lora_A, layer.lora_B]
    start: dict[str, bool] = {}
    found = []
    for moved in (0.0, 1e-4, 1e-3, 1e-2):
        with torch.no_grad():
            for factor, initial in ((layer.lora_A, layer.lora_A0), (layer.lora_B, layer.lora_B0)):
                noise = torch.randn(factor.shape, generator=generator)
                factor.copy_(initial + moved * initial.std() * noise)
        base = plain(x).detach().double()
        exact = [t.detach().double().requires_grad_() for t in wanted]
        change = exact[0] @ exact[1].mT @ exact[2].mT - exact[0] @ layer.lora_A0.double().mT @ layer.lora_B0.double().mT
        y = F.linear(exact[0], plain.weight.double(), plain.bias.double()) + change
        truth = torch.autograd.grad(y, exact, dy.double())
        ways: dict[str, Layer] = {"two products": lambda x: two_products(layer, x), **dict.fromkeys(BACKENDS, layer)}
        for name, call in ways.items():
            before = ipca.set_backend(name) if name in BACKENDS else None
            out = call(x)
            gradients = torch.autograd.grad(out, wanted, dy)
            if before is not None:
                ipca.set_backend(before)
            if moved == 0:
                start[name] = torch.equal(out, plain(x))
                continue
            computed = name if name == "two products" else f"LinearPC, {name}"
            errors = (f"{error(one, other):.1e}" for one, other in zip(gradients, truth, strict=True))
            seen = error(out.double() - base, change)
            found.append(
                {"dtype": str(dtype).removeprefix("torch."), "moved": f"{moved:g}", "computed": computed}
                | {"output": f"{error(out, y):.1e}", "change": f"{seen:.1e}"}
                | dict(zip(("dx", "dA", "dB"), errors, strict=True))
                | {"bits": "yes" if start[name] else "no", **facts(torch.device("cpu"))}
            )
    return found


def main(path: Path = PATH) -> None:
    """Compute and write the file anew."""
    torch.set_num_threads(1)
    path.unlink(missing_ok=True)
    for dtype in (torch.float32, torch.bfloat16):
        append_rows(path, rows_of(dtype), COLUMNS)


if __name__ == "__main__":
    main()
