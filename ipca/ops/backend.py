"""Backend selection: explicit, or the fastest at the nearest shape that was measured on the device.

| backend | the large product | for |
|---|---|---|
| ``triton`` | one Triton kernel that adds the low-rank part as it stores | CUDA from 8.0 on, 16-bit and float32 |
| ``addmm`` | the library's matrix product, added to the low-rank part (beta = 1) | every device |
| ``merged`` | the library's matrix product by ``W_eff``, built anew in each call | every device, no dropout |
| ``reference`` | the library's matrix product, then the low-rank part on top | every device |

The first three take Triton's kernels for the low-rank products where those run, ``reference`` is PyTorch throughout.
``"auto"`` takes a Triton kernel only where ``ipca doctor`` has found the kernels right on this device.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

BACKENDS = ("triton", "addmm", "merged", "reference")
VARIABLE = "IPCA_BACKEND"

_chosen: str | None = None
_of_environment = os.environ.get(VARIABLE) or "auto"  # once: each lookup takes as long as a small product
_warned: set[torch.device] = set()


class LinearShape(NamedTuple):
    """The facts of a call that decide its backend: ``x (M, K)``, ``weight (N, K)``, rank ``R`` and settings."""

    device: torch.device
    dtype: torch.dtype
    M: int
    N: int
    K: int
    R: int
    frozen: bool
    dropout: bool
    training: bool

    def __str__(self) -> str:
        return (
            f"x ({self.M}, {self.K}) by weight ({self.N}, {self.K}), rank {self.R}, "
            f"{'intact' if self.frozen else 'residual'} form{', dropout' if self.dropout else ''}, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device}"
        )


class BackendChoice(NamedTuple):
    """A backend, whether Triton computes the low-rank products, and why."""

    backend: str
    low_rank_in_triton: bool
    reason: str


def set_backend(name: str) -> str:
    """Set the backend of ``pc_linear`` for all later calls; ``"auto"``, the default, is the fastest one measured.

    >>> ipca.set_backend("reference")
    'auto'
    >>> ipca.set_backend("auto")
    'reference'

    Args:
        name: ``"auto"``, ``"triton"``, ``"addmm"``, ``"merged"`` or ``"reference"``. Without a call the environment
            variable ``IPCA_BACKEND`` decides, as it was when ipca was imported.

    Returns:
        The name that was set before.

    Raises:
        ValueError: another name.

    A backend set by name runs, or the call raises with the reason why it cannot; only ``"auto"`` chooses. The exception
    is a backward pass that is itself differentiated (``create_graph=True``): it always uses the reference. Under a
    ``torch.func`` transform ``"auto"`` is the reference, and ``"triton"``, ``"addmm"`` and ``"merged"`` raise. Under
    torch.compile each name is a compilation of its own.
    """
    global _chosen
    before, _chosen = get_backend(), _known(name, "set_backend")
    return before


def get_backend() -> str:
    """The backend's name as set by :func:`set_backend` or by the environment, else ``"auto"``."""
    return _chosen or _known(_of_environment, f"the environment variable {VARIABLE}")


def _known(name: str, source: str) -> str:
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"{source} got {name!r}; backends are 'auto', {', '.join(map(repr, BACKENDS))}.")
    return name


def choose(name: str, shape: LinearShape) -> BackendChoice:
    """The backend that ``name`` means for ``shape``.

    Raises:
        RuntimeError: a backend set by name cannot run.
    """
    if name == "auto":
        return _on_cuda(shape) if shape.device.type == "cuda" else off_cuda(shape.device)
    why_not = unsupported_reason(name, shape)
    if why_not:
        raise RuntimeError(f"backend {name!r} cannot run {shape}: {why_not}. Call ipca.set_backend('auto').")
    in_triton = name != "reference" and not unsupported_reason("triton", shape)
    return BackendChoice(name, in_triton, f"{name!r} was set by name")


def unsupported_reason(name: str, shape: LinearShape) -> str:
    """The reason why a backend cannot run, or an empty text."""
    if name == "merged" and shape.dropout:
        return "dropout acts on the low-rank branch only, and a merged weight has none"
    return _triton_unsupported(shape) if name == "triton" else ""


def _triton_unsupported(shape: LinearShape) -> str:
    if not _has_triton():
        return "triton is not installed"
    if shape.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"its kernels take float16, bfloat16 and float32, not {shape.dtype}"
    if shape.device.type != "cuda":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1" and shape.device.type == "cpu"
        return "" if interpreted else f"it needs a CUDA device, x is on {shape.device}"
    capability = torch.cuda.get_device_capability(shape.device)
    return "" if capability >= (8, 0) else f"it needs compute capability 8.0, this device has {capability}"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _on_cuda(shape: LinearShape) -> BackendChoice:
    """The fastest backend at the nearest measured shape, found once for each power of two of ``M``."""
    from ipca.kernels import configs, tables, tuning

    arithmetic = configs.arithmetic_of(shape.dtype.itemsize)
    return _measured_best(shape._replace(M=tuning.bucket(shape.M)), arithmetic, tables.readings())


@lru_cache(maxsize=4096)
def _measured_best(shape: LinearShape, arithmetic: str, readings: int) -> BackendChoice:
    """By the tables as they were at the last of so many ``readings``."""
    if shape.dtype == torch.float64:
        return BackendChoice("reference", False, "the kernels have no float64")
    why_not = unsupported_reason("triton", shape) or _unchecked_reason(shape.device, arithmetic)
    if why_not:
        return BackendChoice("addmm", False, why_not)
    from ipca.kernels import tables

    sizes = (shape.M, shape.N, shape.K, shape.R)
    of = (str(shape.dtype).removeprefix("torch."), shape.frozen, shape.dropout, shape.training)
    row = tables.nearest("backends", of, sizes, shape.device)
    rounds = shape.frozen and shape.dtype.itemsize == 2  # W + Δ rounds back to W where Δ is small
    times: dict[str, float] = {
        name: ms
        for name, ms in (row.found.items() if row else ())
        if not unsupported_reason(name, shape) and not (rounds and name == "merged")
    }
    if row is None or not times:
        device = torch.cuda.get_device_name(shape.device)
        # The library's own product is the safer guess; for dropout its backward needs a mask in PyTorch, which is slow.
        name = "triton" if shape.dropout else "addmm"
        return BackendChoice(name, True, f"no backend was measured on {device} or its kind; `ipca tune` measures")
    best = min(times, key=lambda name: times[name])
    others = ", ".join(f"{name} {ms:.3f} ms" for name, ms in sorted(times.items(), key=lambda item: item[1]))
    return BackendChoice(best, best != "reference", f"measured at (M, N, K, R) = {row.shape} in {row.source}: {others}")


def _unchecked_reason(where: torch.device, kind: str) -> str:
    """The reason why ``"auto"`` leaves Triton's kernels aside on this device, or an empty text; warns of it once."""
    from ipca.kernels import tables

    fault = tables.checked(where).get(kind)
    if fault == "":
        return ""
    device = torch.cuda.get_device_name(where)
    if fault is None:
        reason = f"Triton's {kind} kernels are not checked on {device} with these versions; run `ipca doctor`"
    else:
        reason = f"`ipca doctor` found a fault in Triton's {kind} kernels on {device}: {fault}"
    if where not in _warned:
        _warned.add(where)
        warnings.warn(f"PyTorch's products run instead of fused kernels: {reason}.", RuntimeWarning, stacklevel=2)
    return reason


@cache
def off_cuda(device: torch.device) -> BackendChoice:
    """The choice of ``"auto"`` on another device than CUDA, the same for every shape."""
    return BackendChoice("reference", False, f"x is on {device}: the kernels are for CUDA")


def linear_shape(x: Tensor, weight: Tensor, A: Tensor, A0: Any, dropout: float, training: bool) -> LinearShape:
    """The :class:`LinearShape` of one call with ``x (…, K)``."""
    N, K = weight.shape
    return LinearShape(x.device, x.dtype, x.numel() // K, N, K, A.shape[0], A0 is not None, dropout > 0, training)
