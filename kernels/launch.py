"""Kernel launch: captured where PyTorch traces, elsewhere with its options and with memory for descriptors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from functools import cache, partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

INTERPRETED_PROGRAMS = 4
_KEYS = torch._C._TorchDispatchModeKey
_TRACERS = (_KEYS.FUNCTIONAL, _KEYS.PROXY, _KEYS.FAKE)

_compiles_only: ContextVar[bool] = ContextVar("_compiles_only", default=False)


def grid_of(kernel: Any, grid: tuple[Any, ...], *, descriptors: bool = False) -> Callable[..., Any]:
    """``kernel[grid]``; ``descriptors`` gives Triton memory for those that the kernel makes.

    While tracing it is what ``wrap_triton`` makes of it, which takes no ``enable_fp_fusion``; outside of a trace that
    would only cost time. The allocator is set within a copy of the context, so that a user's own one stays.
    """
    if _compiles_only.get():
        return partial(kernel.warmup, grid=grid, enable_fp_fusion=True)
    if isinstance(kernel, JITFunction) and any(torch._C._get_dispatch_mode(key) is not None for key in _TRACERS):
        return torch.library.wrap_triton(kernel)[grid]
    launch = partial(kernel[grid], enable_fp_fusion=True)
    return partial(copy_context().run, _with_allocator, launch) if descriptors else launch


def _with_allocator(launch: Callable[..., Any], *args: Any, **options: Any) -> Any:
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    return launch(*args, **options)


@contextmanager
def compile_only() -> Iterator[None]:
    """Within the block launches compile their kernel, beside each other under ``triton.AsyncCompileMode``."""
    token = _compiles_only.set(True)
    try:
        yield
    finally:
        _compiles_only.reset(token)


def dropout_arguments(p: float) -> tuple[int, float]:
    """``threshold, keep_scale`` as :mod:`ipca.kernels.dropout` takes them: ``p`` in steps of 2⁻¹⁶, the scale exact."""
    threshold = round(p * 65536)
    return threshold, 65536 / (65536 - threshold) if threshold < 65536 else 0.0


@cache
def programs(device: torch.device) -> int:
    """Programs of a persistent grid: one a multiprocessor."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def has_descriptors(device: torch.device) -> bool:
    """Whether kernels load by TMA: compute capability 9 to 11; those of 12 multiply as those of 8 do.

    With descriptors some of their kernels spill.
    """
    return device.type == "cuda" and 9 <= torch.cuda.get_device_capability(device)[0] < 12


def descriptor_fits(tensor: Tensor) -> bool:
    """Whether TMA can read the 2-D ``tensor``: rows contiguous, start and row stride multiples of 16 bytes.

    While tracing only the offset within the storage is known, whose own start PyTorch aligns.
    """
    stride, step = tensor.stride()
    return (
        step == 1
        and stride >= tensor.shape[1]
        and (stride * tensor.element_size()) % 16 == 0
        and _start(tensor) % 16 == 0
    )


def _start(tensor: Tensor) -> int:
    if torch.compiler.is_compiling() or torch._guards.detect_fake_mode(tensor) is not None:
        return int(tensor.storage_offset()) * tensor.element_size()
    return tensor.data_ptr()
