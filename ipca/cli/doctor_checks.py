"""What ``ipca doctor`` checks on every machine: one small example of each thing that users rely on."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import ipca
from ipca.io.peft_reader import has_peft, output_in_peft
from ipca.nn import LinearPC
from ipca.ops import pc_linear, reference


class Check(NamedTuple):
    """A check that ran; ``problem`` is empty where it passed."""

    name: str
    seconds: float
    problem: str


def run_checks(*, progress: bool) -> list[Check]:
    """Run every check that this machine can run, each from the same random numbers and with the default backend."""
    found = []
    checks = {**CHECKS, **({STOCK_PEFT: _stock_peft} if has_peft() else {})}
    before = ipca.set_backend("auto")
    try:
        for name, check in tqdm(checks.items(), desc="Checks", unit="check", disable=not progress):
            began = time.perf_counter()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                try:
                    problem = check()
                except Exception as error:  # whatever is raised here is what a user would see
                    problem = " ".join(f"{type(error).__name__}: {error}".split())
            found.append(Check(name, time.perf_counter() - began, problem))
    finally:
        ipca.set_backend(before)
    return found


def _start() -> str:
    for dtype in (torch.float32, torch.bfloat16):
        linear = nn.Linear(96, 80, dtype=dtype)
        x = torch.randn(7, 96, dtype=dtype)
        layer = LinearPC.from_linear(linear, ipca.Window("middle", 8))
        if not torch.equal(layer(x), linear(x)):
            return f"in {dtype} the adapted layer differs from nn.Linear"
    return ""


def _gradients() -> str:
    M, N, K, R = 37, 70, 133, 5
    given = [torch.randn(size) for size in ((M, K), (N, K), (R, K), (N, R), (N,))]
    A0, B0, dy = torch.randn(R, K), torch.randn(N, R), torch.randn(M, N)

    def results(function: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in given]
        y = function(*leaves, A0=A0.to(dtype), B0=B0.to(dtype), scaling=0.7)
        return (y, *torch.autograd.grad(y, leaves, dy.to(dtype)))

    found, exact = results(pc_linear, torch.float32), results(reference.pc_linear, torch.float64)
    for name, got, want in zip(("y", "dx", "dW", "dA", "dB", "dbias"), found, exact, strict=True):
        error = relative_error(got.double(), want)
        if not error <= 1e-5:
            return f"{name} is off by {error:.1e} of its norm in float32"
    return ""


def _window() -> str:
    W = torch.randn(320, 256)
    found = ipca.window_svd(W, ipca.Window("middle", 8))
    S = torch.linalg.svdvals(W.double())
    start = found.report.window.index
    error = float((found.S.double() - S[start : start + 8]).abs().max() / S[0])
    if not found.report.certified:
        return f"the window is not certified: {found.report.certificate}"
    return "" if error <= 1e-6 else f"singular values are off by {error:.1e} of the largest one from LAPACK's"


def _adapter() -> str:
    base, x = _base(), torch.randn(5, 24)
    with tempfile.TemporaryDirectory() as folder:
        y = _save_trained(base, Path(folder), x)
        model = ipca.load_adapter(copy.deepcopy(base), folder)
    return "" if torch.equal(model(x), y) else "the loaded model computes other bits than the saved one"


def _stock_peft() -> str:
    base, x = _base(), torch.randn(5, 24)
    with tempfile.TemporaryDirectory() as folder:
        y = _save_trained(base, Path(folder), x)
        error = relative_error(output_in_peft(copy.deepcopy(base), Path(folder), x), y)
    return "" if error <= 1e-5 else f"PEFT's output is off by {error:.1e} of its norm"


def _base() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16)).eval()


@torch.no_grad()
def _save_trained(base: nn.Module, folder: Path, x: Tensor) -> Tensor:
    """Save an adapter whose factors have moved; the model's output."""
    model = ipca.apply_pc(copy.deepcopy(base), rank=4, progress=False)
    for parameter in ipca.adapter_parameters(model):
        parameter.add_(0.1 * torch.randn_like(parameter))
    ipca.save_adapter(model, folder)
    y: Tensor = model(x)
    return y


def relative_error(got: Tensor, want: Tensor) -> float:
    """``‖got − want‖ / ‖want‖``."""
    return ((got - want).norm() / want.norm()).item()


CHECKS: dict[str, Callable[[], str]] = {
    "before training the layer computes nn.Linear to the bit": _start,
    "output and gradients agree with float64": _gradients,
    "a window SVD is certified and agrees with LAPACK": _window,
    "a saved adapter loads to the bit": _adapter,
}
STOCK_PEFT = "stock PEFT loads a saved adapter"
