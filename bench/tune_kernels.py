"""Tuning of all kernels over a grid of shapes, into the table that later runs read."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

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


def tune_grid(cells: Iterable[Mapping[str, Any]], path: Path, device: torch.device, seconds: float) -> bool:
    """Time every candidate of every kernel at each cell, for ``seconds``; whether all of them were reached.

    Args:
        cells: ``M``, ``N``, ``K``, ``rank`` and ``dtype`` (a torch dtype name) of each.
        path: the table, named by :func:`tables.cache_file`; its existing rows are not measured again.
        seconds: no kernel is started after this time.
    """
    os.environ |= {"IPCA_AUTOTUNE": "1", "IPCA_CACHE": str(path.parent)}
    assert tables.cache_file(device) == path
    deadline = time.monotonic() + seconds
    for cell in tqdm(list(cells), desc="tuning", unit="shape"):
        shape = (cell["M"], cell["N"], cell["K"], cell["rank"])
        with set_wrap_triton_enabled(False):  # outside an op the launch would be traced, and the trace timed
            for _ in every_kernel(*shape, getattr(torch, cell["dtype"]), device):
                if time.monotonic() > deadline:
                    return False
    return True


def every_kernel(M: int, N: int, K: int, R: int, dtype: torch.dtype, device: torch.device) -> Iterator[object]:
    """Run each kernel at one shape, for R components and for the 2 R of the intact form.

    Launches measure missing configurations.
    """

    def random(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, dtype=of, device=device)

    x, dy, weight, h_A = random(M, K), random(M, N), random(N, K), random(M, R)
    for S in (R, 2 * R):
        D, E = random(S, K, of=torch.float32), random(N, S, of=torch.float32)  # as in LinearPC
        if takes(x, S):
            yield few_tokens(x, weight, D, E, scaling=1.0)
        h = project(x, D)
        yield linear(x, weight, h, E, scaling=1.0)
        g = products(dy, h_A, E, E.dtype, scaling=1.0)[0] if fuses(dy, E, R) else project(dy, E.mT)
        yield input_grad(dy, weight, g, D)
        yield outer(g.narrow(1, 0, R), x, D.dtype)
    yield outer(h_A, dy, E.dtype, transposed=True)
