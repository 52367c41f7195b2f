"""window_svd: any window of singular components of a matrix or a stack, on the path that fits, certified."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ipca.svd import certificate
from ipca.svd.blocks import Blocks
from ipca.svd.full import full_svd
from ipca.svd.range import range_svd
from ipca.svd.result import SVDReport, WindowSVD
from ipca.window import Window

TOLERANCES = {"fast": 1e-4, "default": 1e-6, "exact": 1e-9}
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Measured on 2 CPU cores: below these the full SVD is as fast as the range solver.
_RANGE_MIN_D = 256
_RANGE_MAX_SHARE = 0.25


def window_svd(
    W: Tensor, window: Window, *, tol: float | str = "default", dtype: torch.dtype | None = None
) -> WindowSVD:
    """The singular components ``[start, start + rank)`` of ``W``, without the others where that is cheaper.

    Args:
        W: ``(m, n)``, or a stack ``(L, m, n)``; float16, bfloat16, float32 or float64, on any device.
        window: an index or a rule; resolved against ``min(m, n)`` for each matrix.
        tol: the bound on ``report.residual``; ``"default"`` is 1e-6, ``"exact"`` 1e-9, ``"fast"`` 1e-4.
        dtype: of the result. Default: that of ``W``, but at least float32, and float64 where ``tol < 1e-6``.

    Returns:
        ``U (m, r)``, ``S (r,)``, ``Vh (r, n)`` on the device of ``W``, and a report for each matrix; a stack adds a
        leading ``L``. The same input gives the same bits on the same machine and number of threads. The sign of each
        component makes the largest entry of its row of ``Vh`` positive.

    Raises:
        TypeError: ``W`` or ``window`` has the wrong type, or ``W`` an integer, complex or 8-bit dtype.
        ValueError: ``W`` is empty, on the meta device, not 2-D or 3-D, or holds NaN or Inf; the window does not fit;
            ``tol`` is below what float64 can give.
        RuntimeError: the full SVD itself missed ``tol``.
    """
    check_matrix(W, dims=(2, 3))
    if not isinstance(window, Window):
        raise TypeError(f"window must be a Window, for example Window.middle(16); got {window!r}.")
    bound = tolerance(tol)
    if dtype is None:
        dtype = torch.float64 if bound < 1e-6 else torch.promote_types(W.dtype, torch.float32)
    elif dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be a 16-, 32- or 64-bit float, got {dtype!r}.")
    parts = [_window_svd(matrix, window, bound, dtype) for matrix in (W if W.ndim == 3 else W[None])]
    Us, Ss, Vhs, reports = zip(*parts, strict=True)
    U, S, Vh = torch.stack(Us), torch.stack(Ss), torch.stack(Vhs)
    return WindowSVD(U, S, Vh, reports) if W.ndim == 3 else WindowSVD(U[0], S[0], Vh[0], reports)


def singular_values(W: Tensor) -> Tensor:
    """All singular values of ``W (m, n)`` in float64, descending, on the CPU; raises as :func:`window_svd` does."""
    check_matrix(W, dims=(2,))
    tall = Blocks(_workable(W if W.shape[0] >= W.shape[1] else W.mT))
    return torch.linalg.svdvals(tall.dense()).cpu() * tall.scale


def check_matrix(W: Tensor, dims: tuple[int, ...] = (2,)) -> None:
    """Raise unless ``W`` is a non-empty, finite, floating tensor with one of ``dims`` dimensions."""
    if not isinstance(W, Tensor):
        raise TypeError(f"expected a torch.Tensor, got {type(W).__name__}.")
    if W.dtype not in FLOAT_DTYPES:
        raise TypeError(f"cannot decompose a {W.dtype} tensor; dequantise or cast it to a 16-, 32- or 64-bit float.")
    if W.layout != torch.strided:
        raise TypeError(f"cannot decompose a {W.layout} tensor; make it dense first.")
    if W.ndim not in dims or W.numel() == 0:
        wanted = " or ".join({2: "a matrix (m, n)", 3: "a stack (L, m, n)"}[k] for k in dims)
        raise ValueError(f"expected {wanted} with at least one entry, got shape {tuple(W.shape)}.")
    if W.is_meta:
        raise ValueError("the tensor is on the meta device and holds no values; load the weights first.")
    if not all(bool(torch.isfinite(rows).all()) for rows in W.split(1024, dim=-2)):
        raise ValueError("the tensor holds NaN or Inf.")


def _window_svd(W: Tensor, window: Window, tol: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, SVDReport]:
    began = time.perf_counter()
    transposed = W.shape[0] < W.shape[1]
    blocks = Blocks(_workable(W.mT if transposed else W))
    d = min(W.shape)
    spectrum = torch.linalg.svdvals(blocks.dense()) if window.needs_spectrum else None
    window = window.resolve(d, spectrum)
    found = None
    if blocks.W.device.type == "cpu" and d >= _RANGE_MIN_D and window.rank <= _RANGE_MAX_SHARE * d:
        found = _certified_range(blocks, window.index, window.rank, tol)
    path = "range" if found else "full"
    U, S, V, error, certified, words = found or _full(blocks, window.index, window.rank)
    if error > tol:
        raise RuntimeError(f"the full float64 SVD left a residual of {error:.1e}, above tol={tol:g}; raise tol.")

    if transposed:
        U, V = V, U
    sign = V.gather(0, V.abs().argmax(0, keepdim=True)).sign()
    U, V = U * sign, V * sign
    S = (S * blocks.scale).to(dtype)
    if not torch.isfinite(S).all():
        raise ValueError(f"the singular values overflow {dtype}; pass dtype=torch.float64.")
    report = SVDReport(path, window, error, certified, words, time.perf_counter() - began)
    return U.to(W.device, dtype), S.to(W.device), V.mT.to(W.device, dtype), report


_Found = tuple[Tensor, Tensor, Tensor, float, bool, str]


def _certified_range(blocks: Blocks, start: int, rank: int, tol: float) -> _Found | None:
    """The range solver's window, or None where it misses ``tol`` or cannot be certified."""
    G = blocks.gram()
    sigma1 = certificate.largest_singular_value(G)
    if sigma1 == 0:
        return None
    U, S, V = range_svd(blocks, G, start, rank)
    rho = certificate.residual(blocks, U, S, V)
    error = max(rho / sigma1, certificate.orthogonality(U, V))
    if error > tol:
        return None
    certified, words = certificate.certify(G, S, rho, sigma1, start)
    return (U, S, V, error, True, words) if certified else None


def _full(blocks: Blocks, start: int, rank: int) -> _Found:
    U, S, V, spectrum = full_svd(blocks, start, rank)
    sigma1 = spectrum[0].item()
    relative = certificate.residual(blocks, U, S, V) / sigma1 if sigma1 > 0 else 0.0
    m, n = blocks.W.shape
    certified, words = certificate.certify_full(spectrum, start, rank, n, m)
    return U, S, V, max(relative, certificate.orthogonality(U, V)), certified, words


def tolerance(tol: float | str) -> float:
    """The number that ``tol`` means, or a ValueError."""
    if isinstance(tol, str):
        if tol not in TOLERANCES:
            raise ValueError(f"tol must be a number or one of {', '.join(TOLERANCES)}; got {tol!r}.")
        return TOLERANCES[tol]
    if isinstance(tol, bool) or not isinstance(tol, (int, float)) or not 1e-12 <= tol < 1:
        raise ValueError(f"tol must be a number in [1e-12, 1), which float64 can reach; got {tol!r}.")
    return float(tol)


def _workable(W: Tensor) -> Tensor:
    """``W`` detached, on its own device where that has float64, else on the CPU."""
    W = W.detach()
    return W if W.device.type in ("cpu", "cuda") else W.cpu()
