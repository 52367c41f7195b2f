"""Providers of the bench: our chosen path, each of our paths by force, and what PyTorch and SciPy offer.

A provider is asked for a window of ``W (m, n)``, float32. ``torch.linalg.svd``, and ``torch.linalg.eigh`` of the
float64 Gram matrix, compute all components whatever the window, so that they are timed once for all windows of a cell;
what takes the window out of them, and from the eigenvectors to ``U``, is not in their time. ``scipy.linalg.eigh``
computes a range of that Gram matrix's eigenvectors; ``torch.svd_lowrank`` all components up to the window's end, from a
random sketch. SciPy's ``svds`` and scikit-learn's ``randomized_svd`` find the first components.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import scipy.linalg
import scipy.sparse.linalg
import torch
from torch import Tensor

import ipca
from bench.svd_grid import ARPACK, EIGH, FORCED, LOWRANK, OURS, PROPACK, RANDOMIZED, RANGE, YARDSTICK
from bench.svd_matrices import Found
from ipca.svd import solve as solving

Call = Callable[[], Any]
POWER_ITERATIONS = 2
TOGETHER = 32
"""Matrices of a stack that one call is given, so that a model's projections fit beside their workspace."""


class Refused(Exception):
    """The provider cannot or need not run here; the message says why."""


@dataclass(frozen=True)
class Provider:
    """``prepare()`` returns the call that is timed; ``cut(result, window)`` takes the window out of what it returned.

    ``whole``: the call does not depend on the window. ``scaled_by``: the call is one of so many equal ones.
    """

    prepare: Callable[[], Call]
    cut: Callable[[Any, ipca.Window], Found]
    whole: bool = False
    scaled_by: int = 1


def provider(name: str, W: Tensor, window: ipca.Window) -> Provider:
    """The provider ``name`` for the stack ``W (batch, m, n)``; raises :class:`Refused`."""
    m, n = W.shape[1:]
    first, stop = W[0], window.index + window.rank
    if name == OURS or name in FORCED:
        call: Call = partial(forced, FORCED[name], W, window) if name in FORCED else partial(ours, W, window)
        return Provider(lambda: call, lambda found, _: from_ours(found, W))
    if name == YARDSTICK:
        return Provider(lambda: partial(torch.linalg.svd, first, full_matrices=False), _cut_svd, True, len(W))
    if name == LOWRANK and stop > min(m, n) / 2:
        raise Refused("the window ends beyond d / 2, where a sketch of as many columns costs more than a full SVD")
    if name in (RANDOMIZED, ARPACK, PROPACK):
        if not window.rank < min(m, n):
            raise Refused("it finds fewer than all components")
        solver = () if name == RANDOMIZED else (name.split()[1],)
        call = partial(scipy_svds if solver else sklearn_randomized, first, window.rank, *solver)
        return Provider(lambda: call, lambda found, _: found)
    if name == LOWRANK:
        return Provider(lambda: partial(torch.svd_lowrank, first, q=stop, niter=POWER_ITERATIONS), _cut_lowrank)
    assert m >= n
    if name == EIGH:
        return Provider(lambda: lambda: torch.linalg.eigh(_gram(first)), partial(_cut_eigh, first), whole=True)
    assert name == RANGE, name
    return Provider(lambda: partial(scipy_range, first, window), lambda found, _: found)


def ours(W: Tensor, window: ipca.Window) -> list[ipca.WindowSVD]:
    """``window_svd`` of a stack, in parts."""
    return [ipca.window_svd(part, window) for part in W.split(TOGETHER)]


def forced(path: str, W: Tensor, window: ipca.Window) -> list[ipca.WindowSVD]:
    """The same by one path; :class:`Refused` where that path is not good enough here and the full SVD ran."""
    with only_path(path):
        found = ours(W, window)
    if went := {report.path for part in found for report in part.reports} - {path}:
        raise Refused(f"not within the tolerance or not proven, so that {', '.join(sorted(went))} ran")
    return found


@contextmanager
def only_path(path: str) -> Iterator[None]:
    """Within the block ``window_svd`` tries only this path before the full SVD."""
    with patch.object(solving, "plan", lambda *_: [] if path == "full" else [path]):
        yield


def from_ours(found: list[ipca.WindowSVD], W: Tensor) -> Found:
    """The first matrix's window, what holds for all of the stack, and the operations of one matrix."""
    reports = [report for part in found for report in part.reports]
    assert len(reports) == len(W)
    first = found[0][0]
    path = "+".join(sorted({report.path for report in reports}))
    worst = max(report.residual for report in reports)
    proven = all(report.certified for report in reports)
    return Found(first.U, first.S, first.Vh.mT, path, proven, reports[0].flops, worst)


def scipy_range(W: Tensor, window: ipca.Window) -> Found:
    """Eigenvectors of the float64 Gram matrix by index, and ``U = W V / S``."""
    m, n = W.shape
    indices = (n - window.index - window.rank, n - window.index - 1)  # LAPACK counts upwards
    squares, vectors = scipy.linalg.eigh(_gram(W).numpy(), subset_by_index=indices, driver="evr", check_finite=False)
    V, S = torch.from_numpy(vectors).flip(1), torch.from_numpy(squares).flip(0).clamp_min(0).sqrt()
    flops = m * n**2 + 4 / 3 * n**3 + 4 * n**2 * window.rank
    return Found((W.double() @ V / S).float(), S.float(), V.float(), flops=flops)


def scipy_svds(W: Tensor, rank: int, solver: str) -> Found:
    """The first components by SciPy's iterative solvers, in their default accuracy."""
    U, S, Vh = scipy.sparse.linalg.svds(W.numpy(), k=rank, solver=solver, random_state=0)
    order = S.argsort()[::-1].copy()  # which svds does not promise
    U, S, V = (torch.from_numpy(each.copy()) for each in (U[:, order], S[order], Vh[order].T))
    return Found(U, S, V)


def sklearn_randomized(W: Tensor, rank: int) -> Found:
    """The first components by a seeded random sketch with six power iterations."""
    from sklearn.utils.extmath import randomized_svd

    U, S, Vh = randomized_svd(W.numpy(), rank, n_iter=6, random_state=0)
    return Found(torch.from_numpy(U), torch.from_numpy(S), torch.from_numpy(Vh).mT)


def _gram(W: Tensor) -> Tensor:
    W = W.double()
    return W.mT @ W


def _cut_svd(found: Any, window: ipca.Window) -> Found:
    U, S, Vh = found
    part, (m, n) = _slice(window), (len(U), Vh.shape[1])
    flops = 4 * max(m, n) * min(m, n) ** 2 + 22 * min(m, n) ** 3
    return Found(U[:, part], S[part], Vh[part].mT, flops=flops)


def _cut_lowrank(found: Any, window: ipca.Window) -> Found:
    U, S, V = found
    part = _slice(window)
    flops = 4 * (POWER_ITERATIONS + 1) * len(U) * len(V) * S.numel()
    return Found(U[:, part], S[part], V[:, part], flops=flops)


def _cut_eigh(W: Tensor, found: Any, window: ipca.Window) -> Found:
    squares, vectors = found
    (m, n), part = W.shape, _slice(window)
    V, S = vectors.flip(1)[:, part], squares.flip(0)[part].clamp_min(0).sqrt()
    return Found((W.double() @ V / S).float(), S.float(), V.float(), flops=m * n**2 + 9 * n**3)


def _slice(window: ipca.Window) -> slice:
    return slice(window.index, window.index + window.rank)
