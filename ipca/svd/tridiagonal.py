"""Reduction of a symmetric matrix to a tridiagonal one, ``G = Q T Qᵀ``, and what is cheap once it is known.

Eigenvectors by index cost O(n) each, and an inertia count O(n): by Sylvester's law the number of positive pivots of
``T − x I = L D Lᵀ`` is the number of eigenvalues of ``T`` above ``x``. The recurrence of the pivots without pivoting is
backward stable for a tridiagonal matrix.

Source: Demmel, "Applied Numerical Linear Algebra", section 5.3.4, lemma 5.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ipca.svd import lapack
from ipca.svd.random_vectors import PROBES, norm_bound, normal

_ROUTINES = ("dsytrd", "dstemr", "dormtr")
_PROBES = 16
_TINY = 1e-300
"""In place of a pivot of 0, which counts as not positive."""


def available() -> bool:
    """Whether SciPy exports the routines."""
    return lapack.available(*_ROUTINES)


@dataclass(frozen=True)
class Tridiagonal:
    """``G = Q T Qᵀ`` for one symmetric ``G (n, n)``, by LAPACK's dsytrd.

    Attributes:
        diagonal: ``(n,)``, of ``T``.
        beside: ``(n − 1,)``, next to it.
        reflectors, tau: ``Q`` as dsytrd leaves it.
        error: a bound on ``‖G − Q T Qᵀ‖₂``, measured.
    """

    diagonal: np.ndarray
    beside: np.ndarray
    reflectors: np.ndarray
    tau: np.ndarray
    error: float

    @classmethod
    def of(cls, G: Tensor, seed: int) -> Tridiagonal:
        """Reduce ``G``; ``seed`` is that of the probes.

        Raises:
            LinAlgError: it holds NaN.
        """
        n = len(G)
        A = G.numpy().copy()
        d, e, tau = np.empty(n), np.empty(n - 1), np.empty(n - 1)
        _with_work("dsytrd", b"L", n, A, n, d, e, tau)
        unmeasured = cls(d, e, A, tau, 0.0)
        return cls(d, e, A, tau, unmeasured._measure_error(G, seed))

    def _measure_error(self, G: Tensor, seed: int) -> float:
        """By ``(G Q − Q T) y`` for normal ``y``, as ``Q y`` is as normal as ``y`` is."""
        n = len(G)
        y = np.ascontiguousarray(normal(seed, PROBES, (n, _PROBES), torch.float64).numpy().T)
        Ty = self.diagonal * y
        Ty[:, :-1] += self.beside * y[:, 1:]
        Ty[:, 1:] += self.beside * y[:, :-1]
        Qy, QTy = torch.from_numpy(self._rotate_(np.concatenate([y, Ty]))).split(_PROBES)
        return norm_bound((Qy @ G - QTy).mT[None]).item()

    def _rotate_(self, rows: np.ndarray) -> np.ndarray:
        """``Q x`` for each row ``x`` of ``rows (k, n)``, in place."""
        k, n = rows.shape
        _with_work("dormtr", b"L", b"L", b"N", n, k, self.reflectors, n, self.tau, rows, n)
        return rows

    def eigenpairs(self, wanted: range) -> tuple[Tensor, Tensor]:
        """The eigenvalues ``(k,)`` of ``T``, and eigenvectors ``(n, k)`` of ``G``, at the indices ``wanted``.

        Both in descending order.

        Raises:
            LinAlgError: no convergence.
        """
        values, vectors = self._eigen(wanted, b"V")
        return values, torch.from_numpy(self._rotate_(vectors)).flip(0).mT

    @cached_property
    def largest(self) -> Tensor:
        """``()``: the largest eigenvalue of ``T``."""
        return self._eigen(range(1), b"N")[0][0]

    def _eigen(self, wanted: range, job: bytes) -> tuple[Tensor, np.ndarray]:
        """The eigenvalues of ``T`` descending, and their eigenvectors ``(k, n)`` ascending; none for ``job`` N."""
        n, k = len(self.diagonal), len(wanted)
        first, last = n - wanted.stop + 1, n - wanted.start  # LAPACK counts upward
        values = np.empty(n)
        vectors = np.empty((k if job == b"V" else 0, n))
        found = lapack.ctypes.c_int(0)
        nothing, d, e = np.zeros(1), self.diagonal.copy(), np.append(self.beside, 0.0)
        work, integers, support = np.empty(18 * n), np.empty(10 * n, np.int32), np.empty(2 * n, np.int32)
        lapack.routine("dstemr")(  # type: ignore[misc]
            *(job, b"I", n, d, e, nothing, nothing, first, last, found, values, vectors, n, k, support),
            *(lapack.ctypes.c_int(1), work, work.size, integers, integers.size),
        )
        assert found.value == k
        return torch.from_numpy(values[:k]).flip(0), vectors

    def count_above(self, threshold: float) -> int:
        """How many eigenvalues of ``T`` lie above ``threshold``."""
        count, pivot, above = 0, 1.0, [0.0, *np.square(self.beside).tolist()]
        for a, b in zip(self.diagonal.tolist(), above, strict=True):
            pivot = a - threshold - b / pivot
            if pivot > 0:
                count += 1
            elif pivot == 0:
                pivot = -_TINY
        return count


def _with_work(name: str, *arguments: object) -> None:
    """Call a routine whose last arguments are a workspace and its size, with as much as it asks for."""
    call = lapack.routine(name)
    assert call is not None
    size = np.empty(1)
    call(*arguments, size, -1)
    work = np.empty(int(size[0]))
    call(*arguments, work, work.size)
