"""Two eigensolvers of one symmetric matrix on a CPU: eigenvectors by index, and counts of eigenvalues.

:class:`Tridiagonal` reduces the matrix, ``G = Q T Qᵀ``. Then an eigenvector by index and an inertia count cost O(n): by
Sylvester's law the number of positive pivots of ``T − x I = L D Lᵀ`` is the number of eigenvalues of ``T`` above ``x``.
The recurrence of the pivots is backward stable for a tridiagonal matrix, without pivoting. :class:`FullEigh` finds all
eigenvectors, and counts by the order of the eigenvalues: faster for a small matrix.

Source: Demmel, "Applied Numerical Linear Algebra", section 5.3.4, lemma 5.3.
"""

from __future__ import annotations

from bisect import bisect_right
from ctypes import c_double, c_int
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ipca.svd.lapack import available, call, multiply_rows, with_workspace
from ipca.svd.lazy import lazy_property
from ipca.svd.random_vectors import PROBES, normal, probe_bound

_NARROW = 1 / 7
"""Share of the eigenvectors up to which finding them by index is faster than all of them by divide and conquer."""
_TINY = 1e-300
"""In place of a pivot of 0, which counts as not positive."""
_PROBES = 8
_COARSE = 1e-3
_EPS = torch.finfo(torch.float64).eps


class Eigensolver(Protocol):
    """What both know of a symmetric ``G (n, n)``."""

    def eigenvectors(self, wanted: range) -> Tensor:
        """``(k, n)``, those at the descending indices ``wanted``; raises LinAlgError without convergence."""

    def largest(self) -> float:
        """A lower bound of the largest eigenvalue, within a hundredth of it."""

    def count_above(self, threshold: float) -> int:
        """How many eigenvalues of a matrix within :attr:`error` of ``G`` lie above ``threshold``."""

    @property
    def error(self) -> float:
        """A bound on the distance of that matrix from ``G`` in the spectral norm."""


class FullEigh:
    """All eigenvectors of a float64 ``G (n, n)``, whose upper triangle is read."""

    def __init__(self, G: Tensor) -> None:
        values, vectors = torch.linalg.eigh(G, UPLO="U")
        self._rows = vectors.mT
        self._values: list[float] = values.tolist()
        self.error = 4 * len(G) * _EPS * self._values[-1]

    def eigenvectors(self, wanted: range) -> Tensor:
        n = len(self._values)
        return self._rows[n - wanted.stop : n - wanted.start].flip(0)

    def largest(self) -> float:
        return self._values[-1]

    def count_above(self, threshold: float) -> int:
        return len(self._values) - bisect_right(self._values, threshold)


def tridiagonal_available() -> bool:
    """Whether SciPy exports the routines."""
    return available("dsytrd", "dstemr", "dstedc", "dormtr", "dstebz", "dsterf", "dsymm")


class Tridiagonal:
    """``G = Q T Qᵀ`` for a float64 ``G (n, n)``, whose upper triangle is read.

    ``seed`` is that of the probes that measure the error.
    """

    def __init__(self, G: Tensor, seed: int) -> None:
        n = len(G)
        self.G, self.seed = G, seed
        self.reflectors = G.numpy().copy()
        self.diagonal, self.beside, self.tau = np.empty(n), np.empty(n - 1), np.empty(n - 1)
        with_workspace("dsytrd", b"L", n, self.reflectors, n, self.diagonal, self.beside, self.tau)
        self._error: float | None = None

    @property
    def error(self) -> float:
        if self._error is None:
            self._rotate(np.empty((0, len(self.G))))
        assert self._error is not None
        return self._error

    def eigenvectors(self, wanted: range) -> Tensor:
        return torch.from_numpy(self._rotate(self._solve(wanted))).flip(0)

    def largest(self) -> float:
        if "_all" in self.__dict__:
            return float(self._all[0][-1])
        n = len(self.diagonal)
        values, work, integers = np.empty(n), np.empty(4 * n), np.empty(5 * n, np.intc)
        bound = c_double(_COARSE * np.abs(self.diagonal).max())
        unused, count = c_double(), c_int()
        call(
            *("dstebz", b"I", b"E", n, unused, unused, n, n, bound, self.diagonal, self.beside, count, c_int()),
            *(values, integers, integers[n:], work, integers[2 * n :]),
        )
        return float(values[0]) - 2 * bound.value

    def values(self) -> Tensor:
        """All eigenvalues ``(n,)``, descending."""
        values, e = self.diagonal.copy(), self.beside.copy()
        call("dsterf", len(values), values, e)
        return torch.from_numpy(values).flip(0)

    def count_above(self, threshold: float) -> int:
        count, pivot = 0, 1.0
        for a, b in zip(self.diagonal.tolist(), [0.0, *np.square(self.beside).tolist()], strict=True):
            pivot = a - threshold - b / pivot
            if pivot > 0:
                count += 1
            elif pivot == 0:
                pivot = -_TINY
        return count

    def _solve(self, wanted: range) -> np.ndarray:
        """Eigenvectors ``(k, n)`` of ``T``, ascending."""
        n = len(self.diagonal)
        if len(wanted) <= _NARROW * n:
            return self._by_index(wanted)
        return self._all[1][n - wanted.stop : n - wanted.start].copy()

    @lazy_property
    def _all(self) -> tuple[np.ndarray, np.ndarray]:
        """Every eigenvalue and eigenvector of ``T``, ascending, by divide and conquer."""
        n = len(self.diagonal)
        values, e, vectors = self.diagonal.copy(), self.beside.copy(), np.empty((n, n))
        work, integers = np.empty(1 + 4 * n + n * n), np.empty(3 + 5 * n, np.intc)
        call("dstedc", b"I", n, values, e, vectors, n, work, work.size, integers, integers.size)
        return values, vectors

    def _by_index(self, wanted: range) -> np.ndarray:
        """Some of the eigenvectors ``(k, n)`` by LAPACK's robust representations."""
        n, k = len(self.diagonal), len(wanted)
        values, vectors = np.empty(n), np.empty((k, n))
        d, e = self.diagonal.copy(), np.append(self.beside, 0.0)  # overwritten
        work, integers, support, found = np.empty(18 * n), np.empty(10 * n, np.intc), np.empty(2 * k, np.intc), c_int()
        first, last = n - wanted.stop + 1, n - wanted.start  # LAPACK counts upward, from 1
        unused, accurate = np.zeros(1), c_int(1)
        call(
            *("dstemr", b"V", b"I", n, d, e, unused, unused, first, last, found, values, vectors, n, k, support),
            *(accurate, work, work.size, integers, integers.size),
        )
        if found.value != k:
            raise np.linalg.LinAlgError(f"LAPACK's dstemr found {found.value} eigenvalues, not {k}")
        return vectors

    def _rotate(self, rows: np.ndarray) -> np.ndarray:
        """``Q x`` for each of ``rows (k, n)``; the first call also measures the error.

        That by ``(G Q − Q T) y`` for normal ``y``, as ``Q y`` is as normal as ``y``.
        """
        k, n = rows.shape
        measure = self._error is None
        if measure:
            y = _probe_rows(n, self.seed)
            Ty = self.diagonal * y
            Ty[:, :-1] += self.beside * y[:, 1:]
            Ty[:, 1:] += self.beside * y[:, :-1]
            rows = np.concatenate([rows, y, Ty])
        with_workspace("dormtr", b"L", b"L", b"N", n, len(rows), self.reflectors, n, self.tau, rows, n)
        if measure:
            Qy, QTy = np.split(rows[k:], 2)
            self._error = probe_bound(torch.from_numpy(multiply_rows(Qy, self.G) - QTy).mT[None]).item()
        return rows[:k]


@lru_cache(maxsize=8)
def _probe_rows(n: int, seed: int) -> np.ndarray:
    """Standard normal numbers ``(8, n)``, not to be written to."""
    return normal(seed, PROBES, (_PROBES, n), torch.float64).numpy()
