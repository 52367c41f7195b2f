"""The singular components of any window of a matrix or a stack: ``window_svd``, and its checks of the input."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import overload

import torch
from torch import Tensor

from ipca.svd.lapack import one_thread
from ipca.svd.matrix_batch import MatrixBatch, largest_entry
from ipca.svd.parallel import thread_map, workspace
from ipca.svd.result import SVDReport, WindowSVD
from ipca.svd.solve import solve_window
from ipca.window import Window

TOLERANCES = {"fast": 1e-4, "default": 1e-6, "exact": 1e-9}
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SHARE = 0.6
"""Of a GPU's free memory, for the matrices that are decomposed together."""


@overload
def window_svd(
    W: Tensor, window: Window, *, tol: float | str = ..., dtype: torch.dtype | None = ..., seed: int = ...
) -> WindowSVD: ...
@overload
def window_svd(
    W: Tensor, window: Sequence[Window], *, tol: float | str = ..., dtype: torch.dtype | None = ..., seed: int = ...
) -> list[WindowSVD]: ...
def window_svd(
    W: Tensor,
    window: Window | Sequence[Window],
    *,
    tol: float | str = "default",
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> WindowSVD | list[WindowSVD]:
    """The singular components ``[start, start + rank)`` of ``W``, without the others where that is cheaper.

    >>> found = ipca.window_svd(torch.diag(torch.arange(8.0)), ipca.Window.middle(2))
    >>> found.S, found.report.certified
    (tensor([4., 3.]), True)

    Args:
        W: ``(m, n)``, or a stack ``(L, m, n)``; float16, bfloat16, float32 or float64, on any device. A stack on a GPU
            is decomposed as a batch, in parts that fit into free memory; on a CPU its matrices run in parallel.
        window: resolved against ``min(m, n)`` for each matrix. Several windows share the Gram matrix and the density of
            states, which are most of the cost.
        tol: the bound on ``report.residual``; ``"default"`` is 1e-6, ``"exact"`` 1e-9, ``"fast"`` 1e-4.
        dtype: of the result. Default: that of ``W``, but at least float32, and float64 where ``tol < 1e-6``.
        seed: of the random vectors that iterations start from.

    Returns:
        ``U (m, r)``, ``S (r,)``, ``Vh (r, n)`` on the device of ``W``, and a report for each matrix; a stack adds a
        leading ``L``. A list of these for a sequence of windows. The same input and seed give the same bits on the same
        machine and number of threads. The sign of each component makes the largest entry of its row of ``Vh`` positive.

    Raises:
        TypeError: ``W`` or ``window`` has the wrong type, or ``W`` an integer, complex or 8-bit dtype.
        ValueError: ``W`` is empty, on the meta device, not 2-D or 3-D, or holds NaN or Inf; the window does not fit;
            ``tol`` is below what float64 can give.
        RuntimeError: the full SVD itself missed ``tol``.
    """
    largest = check_matrix(W, dims=(2, 3))
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {seed!r}.")
    windows = [window] if isinstance(window, Window) else list(window) if isinstance(window, Sequence) else []
    if not windows or not all(isinstance(each, Window) for each in windows):
        raise TypeError(f"window must be a Window, for example Window.middle(16), or several; got {window!r}.")
    bound = tolerance(tol)
    if dtype is None:
        dtype = torch.float64 if bound < 1e-6 else torch.promote_types(W.dtype, torch.float32)
    elif dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be a 16-, 32- or 64-bit float, got {dtype!r}.")
    stack = W.detach() if W.ndim == 3 else W.detach()[None]
    work = partial(_decompose_batch, windows=windows, tol=bound, dtype=dtype, seed=seed)
    rows = [row for part in _map_parts(work, stack, largest, windows) for row in part]
    found = rows[0] if W.ndim == 2 else [_stacked([row[k] for row in rows]) for k in range(len(windows))]
    found = [_on_device(each, W.device) for each in found]
    return found[0] if isinstance(window, Window) else found


def singular_values(W: Tensor) -> Tensor:
    """All singular values of ``W (m, n)`` in float64, descending, on the CPU.

    Args:
        W: a matrix in float16, bfloat16, float32 or float64, on any device.

    Raises:
        TypeError, ValueError: as :func:`window_svd`.
    """
    check_matrix(W, dims=(2,))
    W = W.detach() if W.device.type in ("cpu", "cuda") else W.detach().cpu()
    tall = MatrixBatch((W if W.shape[0] >= W.shape[1] else W.mT)[None])
    return (torch.linalg.svdvals(tall.dense()) * tall.scale[:, None])[0].cpu()


def check_matrix(W: Tensor, dims: tuple[int, ...] = (2,)) -> Tensor:
    """``max|W|`` of each matrix ``(L,)``; raises unless ``W`` is finite, floating, not empty and fits ``dims``."""
    if not isinstance(W, Tensor):
        raise TypeError(f"expected a torch.Tensor, got {type(W).__name__}.")
    if W.dtype not in FLOAT_DTYPES:
        raise TypeError(f"cannot decompose a {W.dtype} tensor; dequantize or cast it to a 16-, 32- or 64-bit float.")
    if W.layout != torch.strided:
        raise TypeError(f"cannot decompose a {W.layout} tensor; make it dense first.")
    if W.ndim not in dims or W.numel() == 0:
        wanted = " or ".join({2: "a matrix (m, n)", 3: "a stack (L, m, n)"}[k] for k in dims)
        raise ValueError(f"expected {wanted} with at least one entry, got shape {tuple(W.shape)}.")
    if W.is_meta:
        raise ValueError("the tensor is on the meta device and holds no values; load the weights first.")
    largest = largest_entry((W if W.ndim == 3 else W[None]).detach())
    if not all(map(math.isfinite, largest.tolist())):
        raise ValueError("the tensor holds NaN or Inf.")
    return largest


def tolerance(tol: float | str) -> float:
    """``tol`` as a number; a ValueError where it is neither one of :data:`TOLERANCES` nor a number that fits."""
    if isinstance(tol, str):
        if tol not in TOLERANCES:
            raise ValueError(f"tol must be a number or one of {', '.join(TOLERANCES)}; got {tol!r}.")
        return TOLERANCES[tol]
    if isinstance(tol, bool) or not isinstance(tol, (int, float)) or not 1e-12 <= tol < 1:
        raise ValueError(f"tol must be a number in [1e-12, 1), which float64 can reach; got {tol!r}.")
    return float(tol)


def _map_parts(
    work: Callable[[tuple[Tensor, Tensor]], list[list[WindowSVD]]],
    W: Tensor,
    largest: Tensor,
    windows: Sequence[Window],
) -> Iterable[list[list[WindowSVD]]]:
    """Call ``work`` for parts of ``W (L, m, n)``: on a GPU batches that fit into its memory, on a CPU single matrices.

    A CPU gains nothing from a batch, as one matrix fills a core.
    """
    if W.device.type not in ("cpu", "cuda"):  # other devices have no float64
        W, largest = W.cpu(), largest.cpu()
    if W.device.type == "cpu":
        parts = list(zip(W.split(1), largest.split(1), strict=True))
        return thread_map(work, parts, [workspace(W.shape[1:], windows)] * len(W))
    together = 1  # where the spectrum decides, each matrix has its window at another index
    if not any(window.needs_spectrum for window in windows):
        together = max(1, int(_SHARE * torch.cuda.mem_get_info(W.device)[0] / workspace(W.shape[1:], windows)))
    return map(work, zip(W.split(together), largest.split(together), strict=True))


def _decompose_batch(
    part: tuple[Tensor, Tensor], windows: Sequence[Window], tol: float, dtype: torch.dtype, seed: int
) -> list[list[WindowSVD]]:
    """Each window of each matrix of a batch ``W``, given with its ``max|W|``: one row for each matrix."""
    W, largest = part
    transposed = W.shape[1] < W.shape[2]
    rows: list[list[WindowSVD]] = [[] for _ in W]
    with torch.autocast(W.device.type, enabled=False), one_thread():  # autocast would multiply in 16 bits
        batch = MatrixBatch(W.mT if transposed else W, seed, largest)
        spectrum = batch.spectrum()[0] if any(w.needs_spectrum for w in windows) else None
        for window in windows:
            began, batch.flops = time.perf_counter(), 0.0
            resolved = window.resolve(batch.n, spectrum)
            start = resolved.index
            solutions = solve_window(batch, range(start, start + resolved.rank), tol)
            seconds = (time.perf_counter() - began) / len(W)
            for row, solution, scale in zip(rows, solutions, batch.scale.tolist(), strict=True):
                if solution.error > tol:
                    raise RuntimeError(
                        f"the full float64 SVD left a residual of {solution.error:.1e}, above tol={tol:g}; raise tol."
                    )
                U, S, V = solution.U, solution.S * scale, solution.V
                report = SVDReport(
                    solution.path, resolved, solution.error, *solution.proof, seconds=seconds, flops=solution.flops
                )
                row.append(_result(*((V, S, U) if transposed else (U, S, V)), report, dtype))
    return rows


def _result(U: Tensor, S: Tensor, V: Tensor, report: SVDReport, dtype: torch.dtype) -> WindowSVD:
    """The factors in ``dtype``, signed so that the largest entry of each row of ``Vh`` is positive."""
    sign = V.gather(0, V.abs().argmax(0, keepdim=True)).sign()
    S = S.to(dtype)
    if not math.isfinite(S[0].item()):
        cure = "scale the matrix down" if dtype == torch.float64 else "pass dtype=torch.float64"
        raise ValueError(f"the singular values overflow {dtype}; {cure}.")
    signed_U, signed_Vh = U.new_empty(U.shape, dtype=dtype), V.new_empty(V.mT.shape, dtype=dtype)
    torch.mul(U, sign, out=signed_U)
    torch.mul(V.mT, sign.mT, out=signed_Vh)
    return WindowSVD(signed_U, S, signed_Vh, (report,))


def _stacked(found: list[WindowSVD]) -> WindowSVD:
    U, S, Vh = (torch.stack([getattr(one, name) for one in found]) for name in ("U", "S", "Vh"))
    return WindowSVD(U, S, Vh, tuple(report for one in found for report in one.reports))


def _on_device(found: WindowSVD, device: torch.device) -> WindowSVD:
    return WindowSVD(found.U.to(device), found.S.to(device), found.Vh.to(device), found.reports)
