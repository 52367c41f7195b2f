"""Reduction of a symmetric matrix to a tridiagonal one, ``G = Q T Qᵀ``, and what is cheap once it is known.

An eigenvector by index and an inertia count cost O(n): by Sylvester's law the number of positive pivots of
``T − x I = L D Lᵀ`` is the number of eigenvalues of ``T`` above ``x``. The recurrence of the pivots is backward stable
for a tridiagonal matrix, without pivoting.

Source: Demmel, "Applied Numerical Linear Algebra", section 5.3.4, lemma 5.3.
"""

from __future__ import annotations

from ctypes import c_int
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from ipca.svd.lapack import available as exported
from ipca.svd.lapack import call, with_workspace
from ipca.svd.random_vectors import PROBE_COUNT, PROBES, norm_bound, normal

_NARROW = 1 / 6
"""Share of the eigenvectors up to which finding them by index is faster than all of them by divide and conquer."""
_TINY = 1e-300
"""In place of a pivot of 0, which counts as not positive."""


def available() -> bool:
    """Whether SciPy exports the routines."""
    return exported("dsytrd", "dstemr", "dstedc", "dormtr")


class Tridiagonal:
    """``G = Q T Qᵀ`` for one symmetric float64 ``G (n, n)`` on the CPU; ``seed`` is that of the probes."""

    def __init__(self, G: Tensor, seed: int) -> None:
        n = len(G)
        self.G, self.seed = G, seed
        self.reflectors = G.numpy().copy()
        self.diagonal, self.beside, self.tau = np.empty(n), np.empty(n - 1), np.empty(n - 1)
        with_workspace("dsytrd", b"L", n, self.reflectors, n, self.diagonal, self.beside, self.tau)
        self._error: float | None = None

    @property
    def error(self) -> float:
        """A bound on ``‖G − Q T Qᵀ‖₂``, measured."""
        if self._error is None:
            self._rotate(np.empty((0, len(self.G))))
        assert self._error is not None
        return self._error

    def eigenpairs(self, wanted: range) -> tuple[list[float], Tensor]:
        """The eigenvalues of ``T``, ascending, and eigenvectors ``(n, k)`` of ``G``, descending, at ``wanted``.

        Raises:
            LinAlgError: no convergence.
        """
        values, vectors = self._solve(wanted)
        return values.tolist(), torch.from_numpy(self._rotate(vectors)).flip(0).mT

    def largest(self) -> float:
        """The largest eigenvalue of ``T``."""
        if "_all" in self.__dict__:
            return float(self._all[0][-1])
        return float(self._by_index(b"N", range(1))[0][0])

    def count_above(self, threshold: float) -> int:
        """How many eigenvalues of ``T`` lie above ``threshold``."""
        count, pivot = 0, 1.0
        for a, b in zip(self.diagonal.tolist(), [0.0, *np.square(self.beside).tolist()], strict=True):
            pivot = a - threshold - b / pivot
            if pivot > 0:
                count += 1
            elif pivot == 0:
                pivot = -_TINY
        return count

    def _solve(self, wanted: range) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues ``(k,)`` and eigenvectors ``(k, n)`` of ``T``, ascending."""
        n = len(self.diagonal)
        if len(wanted) <= _NARROW * n:
            return self._by_index(b"V", wanted)
        values, vectors = self._all
        part = slice(n - wanted.stop, n - wanted.start)
        return values[part], vectors[part].copy()

    @cached_property
    def _all(self) -> tuple[np.ndarray, np.ndarray]:
        """Every eigenvalue and eigenvector of ``T``, ascending, by divide and conquer."""
        n = len(self.diagonal)
        values, e, vectors = self.diagonal.copy(), self.beside.copy(), np.empty((n, n))
        work, integers = np.empty(1 + 4 * n + n * n), np.empty(3 + 5 * n, np.intc)
        call("dstedc", b"I", n, values, e, vectors, n, work, work.size, integers, integers.size)
        return values, vectors

    def _by_index(self, job: bytes, wanted: range) -> tuple[np.ndarray, np.ndarray]:
        """Some of them by LAPACK's robust representations; for the job N no eigenvectors."""
        n, k = len(self.diagonal), len(wanted)
        values, vectors = np.empty(n), np.empty((k if job == b"V" else 0, n))
        d, e = self.diagonal.copy(), np.append(self.beside, 0.0)  # overwritten
        work, integers, support, found = np.empty(18 * n), np.empty(10 * n, np.intc), np.empty(2 * k, np.intc), c_int()
        first, last = n - wanted.stop + 1, n - wanted.start  # LAPACK counts upward, from 1
        unused, accurate = np.zeros(1), c_int(1)
        call(
            *("dstemr", job, b"I", n, d, e, unused, unused, first, last, found, values, vectors, n, k, support),
            *(accurate, work, work.size, integers, integers.size),
        )
        if found.value != k:
            raise np.linalg.LinAlgError(f"LAPACK's dstemr found {found.value} eigenvalues, not {k}")
        return values[:k], vectors

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
            Qy, QTy = torch.from_numpy(rows[k:]).chunk(2)
            self._error = norm_bound((Qy @ self.G - QTy).mT[None]).item()
        return rows[:k]


@lru_cache(maxsize=8)
def _probe_rows(n: int, seed: int) -> np.ndarray:
    """Standard normal numbers ``(16, n)``, not to be written to."""
    return normal(seed, PROBES, (PROBE_COUNT, n), torch.float64).numpy()
