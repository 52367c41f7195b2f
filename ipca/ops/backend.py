"""Which implementation runs: named by hand, or chosen by shape from what was measured on the device.

| backend | the large product | for |
|---|---|---|
| ``triton`` | one Triton kernel that adds the low-rank part as it stores | CUDA from 8.0 on, 16-bit and float32 |
| ``addmm`` | the library's matrix product, added to the low-rank part (beta = 1) | every device |
| ``merged`` | the library's matrix product by ``W_eff``, built anew in each call | every device, no dropout |
| ``reference`` | the library's matrix product, then the low-rank part on top | every device |

The first three take Triton's kernels for the low-rank products where those run, ``reference`` is PyTorch throughout.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

BACKENDS = ("triton", "addmm", "merged", "reference")
VARIABLE = "IPCA_BACKEND"

_chosen: str | None = None


class LinearShape(NamedTuple):
    """What decides: ``x (M, K)``, ``weight (N, K)``, rank ``R``."""

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
    """Run ``pc_linear`` through one backend from now on, or through the measured best (``"auto"``, the default).

    Args:
        name: ``"auto"``, ``"triton"``, ``"addmm"``, ``"merged"`` or ``"reference"``. Without a call the environment
            variable ``IPCA_BACKEND`` decides.

    Returns:
        The name that was in force before.

    Raises:
        ValueError: another name.

    A backend asked for by name runs, or the call says why it cannot; only ``"auto"`` chooses. The exception is a
    backward pass that is itself differentiated (``create_graph=True``): it always goes through the reference. Under a
    ``torch.func`` transform ``"auto"`` is the reference and ``"triton"``, ``"addmm"`` and ``"merged"`` raise. Under
    torch.compile each name is a compilation of its own.
    """
    global _chosen
    before, _chosen = get_backend(), _known(name, "set_backend")
    return before


def get_backend() -> str:
    """The name in force: that of :func:`set_backend`, of the environment, or ``"auto"``."""
    return _chosen or _known(os.environ.get(VARIABLE) or "auto", f"the environment variable {VARIABLE}")


def _known(name: str, source: str) -> str:
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"{source} got {name!r}; backends are 'auto', {', '.join(map(repr, BACKENDS))}.")
    return name


def choose(name: str, problem: LinearShape) -> BackendChoice:
    """What ``name`` means for ``problem``.

    Raises:
        RuntimeError: a backend asked for by name cannot run.
    """
    if name == "auto":
        return _measured_best(problem)
    why_not = unsupported_reason(name, problem)
    if why_not:
        raise RuntimeError(f"backend {name!r} cannot run {problem}: {why_not}. Say ipca.set_backend('auto').")
    return BackendChoice(
        name, name != "reference" and not unsupported_reason("triton", problem), f"{name!r} was asked for by name"
    )


def unsupported_reason(name: str, problem: LinearShape) -> str:
    """Why a backend cannot run, or an empty text."""
    if name == "merged" and problem.dropout:
        return "dropout acts on the low-rank branch alone, and a merged weight has none"
    return _triton_unsupported(problem) if name == "triton" else ""


def _triton_unsupported(problem: LinearShape) -> str:
    if not _has_triton():
        return "triton is not installed"
    if problem.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"its kernels take float16, bfloat16 and float32, not {problem.dtype}"
    if problem.device.type != "cuda":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1" and problem.device.type == "cpu"
        return "" if interpreted else f"it needs a CUDA device, x is on {problem.device}"
    capability = torch.cuda.get_device_capability(problem.device)
    return "" if capability >= (8, 0) else f"it needs compute capability 8.0, this device has {capability}"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _measured_best(problem: LinearShape) -> BackendChoice:
    """The fastest backend at the nearest measured shape."""
    if problem.device.type != "cuda":
        return off_cuda(problem.device)
    if problem.dtype == torch.float64:
        return BackendChoice("reference", False, "the kernels have no float64")
    in_triton = not unsupported_reason("triton", problem)
    if not in_triton:
        return BackendChoice("addmm", False, unsupported_reason("triton", problem))
    from ipca.kernels import tables, tuning

    shape = (tuning.bucket(problem.M), problem.N, problem.K, problem.R)
    of = (str(problem.dtype).removeprefix("torch."), problem.frozen, problem.dropout, problem.training)
    row = tables.nearest("backends", of, shape, problem.device)
    if row is None:
        device = torch.cuda.get_device_name(problem.device)
        # The library's own product is the safer guess; for dropout its backward needs a mask in PyTorch, which is slow.
        name = "triton" if problem.dropout else "addmm"
        return BackendChoice(name, True, f"no backend was measured on {device} or its kind; `make gpu` measures")
    rounds = problem.frozen and problem.dtype.itemsize == 2  # W + Δ rounds back to W where Δ is small
    times: dict[str, float] = {
        name: ms
        for name, ms in row.found.items()
        if not unsupported_reason(name, problem) and not (rounds and name == "merged")
    }
    best = min(times, key=lambda name: times[name])
    others = ", ".join(f"{name} {ms:.3f} ms" for name, ms in sorted(times.items(), key=lambda item: item[1]))
    return BackendChoice(best, best != "reference", f"measured at (M, N, K, R) = {row.shape} in {row.source}: {others}")


@cache
def off_cuda(device: torch.device) -> BackendChoice:
    """The choice of ``"auto"`` on another device than CUDA, which no shape changes."""
    return BackendChoice("reference", False, f"x is on {device}: the kernels are for CUDA")


def linear_shape(x: Tensor, weight: Tensor, A: Tensor, A0: Any, dropout: float, training: bool) -> LinearShape:
    """The facts about one call, with ``x`` as rows."""
    (N, K), M = weight.shape, x.shape[0]
    return LinearShape(x.device, x.dtype, M, N, K, A.shape[0], A0 is not None, dropout > 0, training)
