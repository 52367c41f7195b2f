"""Measurement of kernel configurations and of backends on a GPU, into the table that later runs choose by."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled
from tqdm import tqdm

from ipca.kernels import tables
from ipca.kernels.few_tokens import few_tokens, takes
from ipca.kernels.linear import input_grad, linear
from ipca.kernels.outer import outer
from ipca.kernels.products import fuses, products
from ipca.kernels.project import project
from ipca.kernels.tuning import bucket
from ipca.ops.backend import BACKENDS, LinearShape, set_backend, unsupported_reason
from ipca.ops.linear import pc_linear

FORMS = ("intact", "residual")
MODES = {"training": True, "inference": False}
"""Whether a mode is training, by the table's convention."""
MOST_COPIES = 8


class Cell(NamedTuple):
    """A problem: ``x (M, K)``, ``weight (N, K)``, ``R`` components; ``dtype`` is the name of a torch dtype."""

    M: int
    N: int
    K: int
    R: int
    dtype: str = "bfloat16"
    dropout: float = 0.0

    @property
    def row_shape(self) -> list[int]:
        """``M, N, K, R`` as the table counts ``M``."""
        return [bucket(self.M), self.N, self.K, self.R]


def measure_configs(
    cells: Iterable[Cell], device: torch.device, *, seconds: float = math.inf, progress: bool = True
) -> bool:
    """Time every candidate of every kernel at each cell; what the table holds is not measured again.

    Args:
        seconds: no kernel is started after this time.

    Returns:
        Whether all cells were reached.
    """
    deadline = time.monotonic() + seconds
    # Outside of an op a launch would be traced, and the trace timed.
    with set_wrap_triton_enabled(False), _environment(IPCA_AUTOTUNE="1"):
        for cell in tqdm(list(cells), desc="Configurations", unit="shape", disable=not progress):
            shape = (cell.M, cell.N, cell.K, cell.R)
            for _ in every_kernel(*shape, getattr(torch, cell.dtype), device, cell.dropout):
                if time.monotonic() > deadline:
                    return False
    return True


def measure_backends(
    cells: Iterable[Cell],
    device: torch.device,
    forms: Iterable[str] = FORMS,
    *,
    seconds: float = math.inf,
    milliseconds: float = 20,
    progress: bool = True,
) -> bool:
    """Time the backends at each cell, in training and in inference; what the table holds is not measured again.

    Args:
        seconds: no row is started after this time.
        milliseconds: for the repetitions of one backend.

    Returns:
        Whether all rows are there.
    """
    deadline = time.monotonic() + seconds
    rows = [(cell, form, mode) for cell in cells for form in forms for mode in MODES]
    missing = [row for row in rows if known(device, *row) is None]
    for cell, form, mode in tqdm(missing, desc="Backends", unit="row", disable=not progress):
        if time.monotonic() > deadline:
            return False
        found = backend_times(cell, form, mode, device, milliseconds)
        row = [_key(cell, form, mode), cell.row_shape, found]
        tables.add_rows(tables.cache_file(device), device, backends=[row])
    return True


def known(device: torch.device, cell: Cell, form: str, mode: str) -> dict[str, float] | None:
    """What the device's own table holds for a row: milliseconds by backend."""
    path = tables.cache_file(device)
    rows = tables.read(path)["backends"] if path.exists() else []
    key = [_key(cell, form, mode), cell.row_shape]
    return next((found for *of, found in rows if of == key), None)


def forget(cells: Iterable[Cell], device: torch.device) -> None:
    """Drop what the device's own table holds for these cells, to be measured anew."""
    path, shapes = tables.cache_file(device), []
    for cell in cells:
        M, N, K, R = cell.row_shape
        for S in (R, 2 * R):  # rows of backends and linear, input_grad, project and outer, products
            shapes += [[M, *sizes, S] for sizes in ((N, K), (K, N), (S, K), (S, N), (N, 0))]
    if path.exists():
        tables.drop_rows(path, device, shapes)


def _key(cell: Cell, form: str, mode: str) -> list[Any]:
    return [cell.dtype, form == "intact", cell.dropout > 0, MODES[mode]]


def backend_times(cell: Cell, form: str, mode: str, device: torch.device, milliseconds: float) -> dict[str, float]:
    """Milliseconds of each backend that can run: one forward pass, in training with all gradients but the weight's.

    The inputs rotate, so that a weight comes from memory and not from the cache, as in a model.
    """
    dtype = getattr(torch, cell.dtype)
    size = (cell.M * cell.K + cell.N * cell.K) * dtype.itemsize
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    copies = min(MOST_COPIES, max(2, 3 * cache // size + 1))
    calls = [_call(cell, form, mode, device) for _ in range(copies)]
    shape = LinearShape(device, dtype, cell.M, cell.N, cell.K, cell.R, form == "intact", cell.dropout > 0, MODES[mode])
    found = {}
    for name in BACKENDS:
        if unsupported_reason(name, shape):
            continue
        before = set_backend(name)
        try:
            found[name] = median_time(lambda: [call() for call in calls], milliseconds) / copies
        except Exception as error:  # of a compiler, a launch or the device; the other backends are measured
            words = (str(error).strip() or "no message").splitlines()[0]
            tqdm.write(f"{name} is left out at {shape}: {type(error).__name__}: {words}", file=sys.stderr)
        finally:
            set_backend(before)
    if not found:
        raise RuntimeError(f"no backend could be timed at {shape}; run ipca doctor.")
    return found


def median_time(call: Callable[[], object], milliseconds: float) -> float:
    """Milliseconds of one call in a CUDA graph, so without the time that Python takes."""
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(call, rep=milliseconds, return_mode="median"))


def _call(cell: Cell, form: str, mode: str, device: torch.device) -> Callable[[], object]:
    M, N, K, R, name, dropout = cell
    dtype = getattr(torch, name)

    def random(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, dtype=of, device=device)

    x, dy, weight = random(M, K), random(M, N), random(N, K)
    A, B = random(R, K, of=torch.float32), random(N, R, of=torch.float32)  # as in LinearPC
    A0, B0 = (A.clone(), B.clone()) if form == "intact" else (None, None)
    wanted = [tensor.requires_grad_() for tensor in (x, A, B)]

    def run() -> Tensor:
        return pc_linear(x, weight, A, B, A0=A0, B0=B0, dropout=dropout)

    def inference() -> Tensor:
        with torch.no_grad():
            return run()

    return (lambda: torch.autograd.grad(run(), wanted, dy)) if MODES[mode] else inference


def every_kernel(
    M: int, N: int, K: int, R: int, dtype: torch.dtype, device: torch.device, p: float = 0.0
) -> Iterator[object]:
    """Run each kernel at one shape, for R components and for the 2 R of the intact form.

    Launches measure missing configurations.
    """

    def random(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, dtype=of, device=device)

    x, dy, weight, h_A = random(M, K), random(M, N), random(N, K), random(M, R)
    seed = torch.zeros(1, dtype=torch.int64, device=device) if p else None
    for S in (R, 2 * R):
        D, E = random(S, K, of=torch.float32), random(N, S, of=torch.float32)  # as in LinearPC
        if takes(x, S):
            yield few_tokens(x, weight, D, E, None, seed, p, scaling=1.0)
        h = project(x, D, seed, p)
        yield linear(x, weight, h, E, scaling=1.0)
        g = products(dy, h_A, E, E.dtype, scaling=1.0)[0] if fuses(dy, E, R) else project(dy, E.mT)
        yield input_grad(dy, weight, g, D, seed, p)
        yield outer(g.split(R, dim=1)[0], x, D.dtype, seed, p)
    yield outer(h_A, dy, E.dtype, transposed=True)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ |= values
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
