"""Every window of a stack of matrices: a batch on a GPU, in parts that fit into its memory; side by side on a CPU."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from ipca.svd.parallel import thread_map
from ipca.svd.problem import MatrixBatch
from ipca.svd.result import SVDReport, WindowSVD
from ipca.svd.solve import Solution, solve
from ipca.window import Window

_MATRICES = 3.5
"""Float64 matrices ``(d, d)`` that one matrix of a batch needs: Gram matrix, factor, and what the steps keep."""
_SHARE = 0.6
"""Of a GPU's free memory."""


def workspace(shape: Sequence[int]) -> float:
    """Bytes that the decomposition of one matrix needs beside it, the full SVD excepted."""
    return _MATRICES * 8 * min(shape) ** 2


def decompose(W: Tensor, windows: Sequence[Window], *, tol: float, dtype: torch.dtype, seed: int) -> list[WindowSVD]:
    """Every window of the matrices ``W (L, m, n)``: one stacked result for each window, its tensors beside ``W``."""
    on = W if W.device.type in ("cpu", "cuda") else W.cpu()  # elsewhere there is no float64
    room = workspace(W.shape[1:])
    together = 1
    if on.device.type == "cuda" and not any(window.needs_spectrum for window in windows):
        together = max(1, int(_SHARE * torch.cuda.mem_get_info(on.device)[0] / room))
    parts = on.split(together)
    work = lambda part: _decompose(part, windows, tol, dtype, seed)  # noqa: E731
    threaded = on.device.type == "cpu"
    done = thread_map(work, parts, [room] * len(parts)) if threaded else map(work, parts)
    rows = [row for part in done for row in part]
    return [_stack([row[k] for row in rows], W.device) for k in range(len(windows))]


def _decompose(
    W: Tensor, windows: Sequence[Window], tol: float, dtype: torch.dtype, seed: int
) -> list[list[WindowSVD]]:
    """For each matrix of the batch ``W`` each of its windows."""
    with torch.autocast(W.device.type, enabled=False):
        return _decompose_exactly(W, windows, tol, dtype, seed)


def _decompose_exactly(
    W: Tensor, windows: Sequence[Window], tol: float, dtype: torch.dtype, seed: int
) -> list[list[WindowSVD]]:
    problem = MatrixBatch(W if W.shape[1] >= W.shape[2] else W.mT, seed)
    spectrum = torch.linalg.svdvals(problem.blocks.dense())[0] if any(w.needs_spectrum for w in windows) else None
    rows: list[list[WindowSVD]] = [[] for _ in W]
    for window in windows:
        began, problem.flops = time.perf_counter(), 0.0
        resolved = window.resolve(problem.n, spectrum)
        solutions = solve(problem, range(resolved.index, resolved.index + resolved.rank), tol)
        seconds = (time.perf_counter() - began) / len(W)
        for row, solution, scale in zip(rows, solutions, problem.blocks.scale.tolist(), strict=True):
            if solution.error > tol:
                raise RuntimeError(
                    f"the full float64 SVD left a residual of {solution.error:.1e}, above tol={tol:g}; raise tol."
                )
            report = SVDReport(
                solution.path, resolved, solution.error, *solution.proof, seconds=seconds, flops=solution.flops
            )
            row.append(_result(solution, scale, report, dtype, transposed=W.shape[1] < W.shape[2]))
    return rows


def _result(solution: Solution, scale: float, report: SVDReport, dtype: torch.dtype, *, transposed: bool) -> WindowSVD:
    """The solution in units of ``W``, its signs chosen, sides exchanged where ``Wᵀ`` was decomposed."""
    U, V = (solution.V, solution.U) if transposed else (solution.U, solution.V)
    sign = V.gather(0, V.abs().argmax(0, keepdim=True)).sign()
    S = (solution.S * scale).to(dtype)
    if not torch.isfinite(S).all():
        cure = "scale the matrix down" if dtype == torch.float64 else "pass dtype=torch.float64"
        raise ValueError(f"the singular values overflow {dtype}; {cure}.")
    return WindowSVD((U * sign).to(dtype), S, (V * sign).mT.to(dtype), (report,))


def _stack(found: list[WindowSVD], device: torch.device) -> WindowSVD:
    U, S, Vh = (torch.stack([getattr(one, name) for one in found]).to(device) for name in ("U", "S", "Vh"))
    return WindowSVD(U, S, Vh, tuple(one.report for one in found))
