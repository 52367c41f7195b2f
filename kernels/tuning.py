"""Choice of a kernel's configuration: measured on request, else the nearest measured row, else a rule.

``IPCA_AUTOTUNE=1`` measures every candidate when a shape first occurs and stores the result on disk. ``M``
counts in powers of two, so one shape of a model is measured once. Without it no training step times anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ipca.kernels import tables
from ipca.kernels.configs import Config, Limits, arithmetic, fitting, untuned
from ipca.kernels.launch import programs

UNKNOWN_M = 8192
"""What a number of tokens counts as that torch.compile leaves open: one choice, and no recompilation."""

Shape = tuple[int, int, int, int]
"""``M, N, K, R``."""

UNLIMITED = 1 << 30  # shared memory of Triton's interpreter

_forced: ContextVar[tuple[str, Config] | None] = ContextVar("_forced", default=None)
_chosen: dict[tuple[Any, ...], Config] = {}


def bucket(M: int) -> int:
    """The power of two from 16 to 65536 at or above ``M``; ``UNKNOWN_M`` where it is symbolic."""
    return UNKNOWN_M if isinstance(M, torch.SymInt) else min(65536, max(16, 1 << (M - 1).bit_length()))


def choose(
    kernel: str,
    x: Tensor,
    *,
    N: int,
    K: int,
    R: int,
    dropout: bool = False,
    tma: bool = False,
    rerun: Callable[[], object] | None,
) -> Config:
    """The configuration for ``kernel`` on rows like those of ``x``; ``rerun`` runs the kernel once more, to be timed.

    Without ``rerun`` nothing is timed or stored: the result is what would run.
    """
    forced = _forced.get()
    if forced is not None and forced[0] == kernel:
        return forced[1]
    N, K, R = int(N), int(K), int(R)  # weights are not dynamic
    kind = arithmetic(x)
    of, shape = (kernel, kind, dropout), (bucket(x.shape[0]), N, K, R)
    key = (x.device, tma, *of, *shape)
    if key in _chosen:
        return _chosen[key]
    fit = fitting(kernel, kind, R, limits(x.device), dropout=dropout, tma=tma)
    if rerun is None or (autotunes(x) and not may_measure(x)):
        return look_up(fit, of, shape, x.device)
    _chosen[key] = measure(fit, of, shape, x.device, rerun) if autotunes(x) else look_up(fit, of, shape, x.device)
    return _chosen[key]


def look_up(fit: tuple[Config, ...], of: tuple[Any, ...], shape: Shape, device: torch.device) -> Config:
    """The nearest measured configuration, if it fits this device, else the rule of :func:`configs.untuned`."""
    *rest, dropout = of
    for known in (of, (*rest, False)) if dropout else (of,):  # without dropout, where it was not measured with
        row = tables.nearest("configs", known, shape, device)
        if row is not None and Config(*row.found) in fit:
            return Config(*row.found)
    M, N, K, _ = shape
    return untuned(of[0], fit, M, N, K, programs(device))


def autotunes(x: Tensor) -> bool:
    """Whether timing is requested, and possible."""
    return os.environ.get("IPCA_AUTOTUNE") == "1" and x.is_cuda


def may_measure(x: Tensor) -> bool:
    """Whether a kernel can be timed now: a real tensor, outside tracing and graph capture."""
    if isinstance(x.shape[0], torch.SymInt):
        return False
    return torch._guards.detect_fake_mode(x) is None and not torch.cuda.is_current_stream_capturing()


def measure(
    fit: tuple[Config, ...], of: tuple[Any, ...], shape: Shape, device: torch.device, rerun: Callable[[], object]
) -> Config:
    """Time every candidate and store the fastest on disk; a shape that was measured before is not measured again."""
    row = tables.nearest("configs", of, shape, device)
    if row is not None and row.shape == shape and Config(*row.found) in fit:
        return Config(*row.found)
    best = min(fit, key=lambda config: seconds(of[0], config, rerun))
    tables.add_rows(tables.cache_file(device), device, configs=[[list(of), list(shape), list(best)]])
    return best


def seconds(kernel: str, config: Config, rerun: Callable[[], object]) -> float:
    """Median time of one call, infinite where the configuration does not run on this device."""
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench

    with force(kernel, config):
        try:
            return float(do_bench(rerun, warmup=5, rep=30, return_mode="median"))
        except (OutOfResources, PTXASError):
            return float("inf")


@contextmanager
def force(kernel: str, config: Config) -> Iterator[None]:
    """Run ``kernel`` with ``config`` within the block."""
    token = _forced.set((kernel, config))
    try:
        yield
    finally:
        _forced.reset(token)


def limits(device: torch.device) -> Limits:
    """The limits of one block on a device."""
    if device.type != "cuda":
        return Limits(UNLIMITED, 0)
    from triton.runtime import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    shared = driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return Limits(shared, 512 if torch.cuda.get_device_capability(device)[0] == 10 else 0)
