"""Check of every Triton kernel on this machine's GPU, against float64, in every configuration that fits the device.

A kernel passes where its error is at most twice that of PyTorch's product in the same arithmetic, both measured against
float64 as the root mean square over the entries: one wrong entry among ten thousand is far above it. Where PyTorch
happens to be nearly exact, four rounding errors of float32, relative to the result, are allowed. tf32 has 10 bits
behind the point, and a matrix unit may truncate where cuBLAS rounds, whose error is smaller and has no sign: there the
allowance is two epsilons, 2⁻⁹.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled
from tqdm import tqdm
from triton import AsyncCompileMode

from ipca.device.check_cases import Case, draw, run_kernel, run_pytorch
from ipca.kernels import tables
from ipca.kernels.launch import compile_only

ALLOWANCE = {"16-bit": 2.0**-21, "tf32": 2.0**-9, "float32": 2.0**-21}
"""Root mean square error, relative to that of the result, that is always allowed."""


class Check(NamedTuple):
    """What a case found. ``problem`` is empty where it passed, ``lost`` says that the device no longer answers."""

    case: Case
    error: float
    bound: float
    seconds: float
    problem: str
    lost: bool = False

    def record(self) -> dict[str, Any]:
        """For JSON, which has no NaN: None where nothing was measured."""
        return {
            "kernel": self.case.family.name,
            "arithmetic": self.case.arithmetic,
            "dtype": _name(self.case.dtype),
            "shape": list(self.case.shape),
            "dropout": self.case.dropout,
            "config": self.case.config.describe(),
            "error": _finite(self.error),
            "bound": _finite(self.bound),
            "seconds": self.seconds,
            "problem": self.problem,
        }


def self_check(device: torch.device, todo: Sequence[Case], *, progress: bool = True) -> list[Check]:
    """Run the cases one by one, with a progress bar on stderr.

    A crash ends its family, whose other cases would crash as well. After a fault that the device does not survive
    nothing else can run in this process: the last check is then the one that was ``lost``.
    """
    found: list[Check] = []
    ended: set[tuple[str, str]] = set()
    with set_wrap_triton_enabled(False):
        if device.type == "cuda":
            _compile(todo, device, progress=progress)
        for case in (bar := tqdm(todo, desc="Kernels", unit="check", disable=not progress)):
            family = case.family.name, case.arithmetic
            if family in ended:
                continue
            bar.set_postfix_str(f"{case.family.name}, {_name(case.dtype)}")
            check, crashed = _check(case, device)
            found.append(check)
            if crashed:
                ended.add(family)
            if check.lost:
                break
    return found


def _compile(todo: Sequence[Case], device: torch.device, *, progress: bool) -> None:
    """Compile the kernels of all cases beside each other; what does not compile is found again by its check."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        mode = AsyncCompileMode(pool, ignore_errors=True)
        with mode, compile_only():
            for case in todo:
                with suppress(Exception), _multiplying(case.arithmetic):
                    run_kernel(case, draw(case, device))
            waiting = as_completed(mode.raw_futures)
            for _ in tqdm(waiting, "Compiling", len(mode.raw_futures), unit="kernel", disable=not progress):
                pass


def _check(case: Case, device: torch.device) -> tuple[Check, bool]:
    """One check, and whether it crashed."""
    began = time.perf_counter()
    error = bound = float("nan")
    problem, crashed = "", False
    try:
        with _multiplying(case.arithmetic), _poisoned():
            error, bound, problem = _compared(case, device)
    except Exception as caught:  # whatever a compiler, a launch or a device raises is what is looked for
        words = (str(caught).strip() or "no message").splitlines()[0]
        problem, crashed = f"{type(caught).__name__}: {words}", True
    lost = crashed and _is_lost(device)
    return Check(case, error, bound, time.perf_counter() - began, problem, lost), crashed


def _compared(case: Case, device: torch.device) -> tuple[float, float, str]:
    """The largest error relative to its bound, that bound, and what is wrong."""
    given = draw(case, device)
    found = run_kernel(case, given)
    plain, exact = run_pytorch(case, given), run_pytorch(case, given, torch.float64)
    worst = (0.0, float("inf"), "")
    for got, other, true in zip(found, plain, exact, strict=True):
        error = _rms(got.double() - true)
        bound = max(2 * _rms(other.double() - true), ALLOWANCE[case.arithmetic] * _rms(true))
        if not error <= bound:  # NaN is not
            return error, bound, f"an error of {error:.1e}, allowed {bound:.1e}"
        worst = max(worst, (error, bound, ""), key=lambda each: each[0] / each[1])
    return worst


def faults(todo: Sequence[Case], found: Sequence[Check]) -> dict[str, str]:
    """For each arithmetic what is wrong with it, empty where all of its checks passed."""
    first: dict[str, str] = {}
    for check in found:
        if check.problem:
            where = f"{check.case.family.name}, {_name(check.case.dtype)} at M, N, K, R = {check.case.shape}"
            first.setdefault(check.case.arithmetic, f"{where}: {check.problem}")
    lost = bool(found) and found[-1].lost
    unreached = {case.arithmetic for case in todo[todo.index(found[-1].case) + 1 :]} if lost else set()
    for kind in unreached:
        first.setdefault(kind, f"not all was checked, since the device was lost ({found[-1].case.family.name})")
    return {kind: first.get(kind, "") for kind in dict.fromkeys(case.arithmetic for case in todo)}


def store(device: torch.device, verdict: dict[str, str]) -> None:
    """Keep the faults of each arithmetic where ``"auto"`` looks, for these versions."""
    row = [tables.versions(), [], verdict]
    tables.add_rows(tables.cache_file(device), device, checks=[row])


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_lost(device: torch.device) -> bool:
    """Whether the device answers nothing any more, as after an illegal address."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


@contextmanager
def _multiplying(kind: str) -> Iterator[None]:
    """float32 products in tf32, or in float32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if kind == "tf32" else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@contextmanager
def _poisoned() -> Iterator[None]:
    """Memory that PyTorch hands out uninitialized is NaN: an output that is not written cannot pass."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
