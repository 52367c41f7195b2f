"""A batch of tall matrices: float64 products by blocks of rows, and what all windows of a matrix share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from ipca.svd import lapack
from ipca.svd.eigensolvers import FullEigh, Tridiagonal, tridiagonal_available
from ipca.svd.lanczos import CHAINS, STEPS, Density, spectral_density
from ipca.svd.lazy import lazy_property
from ipca.svd.ldlt import LDLT, factorize_shifted
from ipca.svd.random_vectors import KRYLOV, POWER, normal

_ROWS, _COLUMNS = 256, 512
_KEPT = 2**19
"""Entries of a matrix that is kept in float64, and not widened for every product."""
_POWER_STEPS = 16
_PLAIN = 32
"""Binary exponent up to which, either way, squares of the entries of a float32 matrix can be summed."""


@dataclass(frozen=True)
class Candidate:
    """Approximate right singular vectors of one window for a batch of matrices, not yet proven.

    Attributes:
        V: ``(batch, n, r)``, orthonormal.
        neighbors: ``(batch, 2)``; estimates of the singular values next to the window, above (infinity where the
            window starts the spectrum) and below (0 where it ends it). None where they are not known.
        polish: one more step of the path's iteration on ``V``, where the path has one.
    """

    V: Tensor
    neighbors: Tensor | None
    polish: Callable[[Tensor], Tensor] | None = None


class MatrixBatch:
    """Tall matrices ``W (batch, m, n)``, ``m >= n``; every result is in units of ``W / scale``.

    ``W`` keeps its dtype, and products widen a block of rows at a time: a float64 copy of all of it would take four
    times the memory of a 16-bit weight. The Gram matrix has to be float64, because squaring halves the digits of
    interior and small singular values: in float32 subspaces are off by angles up to 0.23.

    Attributes:
        largest: ``(batch,)``; ``max|W|`` of each matrix, in float64.
        scale: ``(batch,)``; the power of two at or below ``largest``, so that squares neither overflow nor underflow
            and the division is exact.
        flops: the operations counted so far, for one matrix of the batch.
    """

    def __init__(self, W: Tensor, seed: int = 0, largest: Tensor | None = None) -> None:
        assert W.ndim == 3
        assert W.shape[1] >= W.shape[2]
        self.W, self.seed, self.flops = W, seed, 0.0
        self.size, self.m, self.n = W.shape
        self.largest = (largest_entry(W) if largest is None else largest).double()
        self.scale = self.largest.new_tensor([_power_of_two(x) for x in self.largest.tolist()])

    def part(self, rows: list[int]) -> MatrixBatch:
        """The matrices at the indices ``rows``, with what is known of them."""
        if len(rows) == self.size:
            return self
        part = object.__new__(MatrixBatch)
        part.W, part.seed, part.flops = self.W[rows], self.seed, self.flops
        part.size, part.m, part.n = part.W.shape
        part.largest, part.scale = self.largest[rows], self.scale[rows]
        for name in ("gram", "gram32", "sigma1"):
            if name in self.__dict__:
                part.__dict__[name] = self.__dict__[name][rows]
        return part

    def dense(self) -> Tensor:
        """``W / scale (batch, m, n)`` as one float64 tensor."""
        return self._widened(self.W)

    def matmul(self, V: Tensor) -> Tensor:
        """``W V (batch, m, k)`` for ``V (batch, n, k)``; the columns of the product are contiguous."""
        if self._kept is not None:
            return torch.bmm(V.mT, self._kept.mT).mT
        return torch.cat([torch.bmm(V.mT, block.mT) for block in self._row_blocks()], dim=2).mT

    def rmatmul(self, U: Tensor) -> Tensor:
        """``Wᵀ U (batch, n, k)`` for ``U (batch, m, k)``; the columns of the product are contiguous."""
        if self._kept is not None:
            return torch.bmm(U.mT, self._kept).mT
        out = torch.zeros(self.size, U.shape[2], self.n, dtype=torch.float64, device=self.W.device)
        for block, columns in zip(self._row_blocks(), U.mT.split(_ROWS, dim=2), strict=True):
            out.baddbmm_(columns, block)
        return out.mT

    def _triangle(self, dtype: torch.dtype) -> Tensor:
        """The upper triangle of ``Wᵀ W (batch, n, n)``, multiplied in ``dtype``; what lies below is not to be read."""
        self.flops += self.m * self.n**2
        G = torch.zeros(self.size, self.n, self.n, dtype=dtype, device=self.W.device)
        by_blas = dtype == torch.float64 and self.W.device.type == "cpu" and lapack.available("dsyrk")
        for block in self._row_blocks(dtype):
            if by_blas:
                for product, rows in zip(G, block, strict=True):
                    lapack.add_gram_(product, rows)
                continue
            for c in self._columns():
                G[:, c, c.start :].baddbmm_(block[:, :, c].mT, block[:, :, c.start :])
        return G

    def _mirror_(self, G: Tensor) -> Tensor:
        """``G`` with its upper triangle copied to the lower one."""
        for c in self._columns():
            G[:, c.stop :, c] = G[:, c, c.stop :].mT
            G[:, c, c] = G[:, c, c].triu() + G[:, c, c].triu(1).mT
        return G

    def _columns(self) -> list[slice]:
        return [slice(j, min(j + _COLUMNS, self.n)) for j in range(0, self.n, _COLUMNS)]

    def _row_blocks(self, dtype: torch.dtype = torch.float64) -> Iterable[Tensor]:
        """``W / scale`` in blocks ``(batch, rows, n)``; a small matrix is one."""
        if self._kept is not None:
            return [self._kept.to(dtype)]
        return (self._widened(rows).to(dtype) for rows in self.W.split(_ROWS, 1))

    def _widened(self, rows: Tensor) -> Tensor:
        return rows / self.scale[:, None, None]  # which is float64

    @lazy_property
    def _kept(self) -> Tensor | None:
        """``W / scale`` of a small matrix in float64, kept instead of widened for every product."""
        return self.dense() if self.m * self.n <= _KEPT else None

    @lazy_property
    def single(self) -> Tensor:
        """``W / scale (batch, m, n)`` in float32, which holds 16- and 32-bit weights as they are."""
        if self.W.dtype == torch.float64:
            return self.dense().float()
        return self.W.float() / self.scale.float()[:, None, None]

    @lazy_property
    def gram_triangle(self) -> Tensor:
        """The upper triangle of :attr:`gram`; what lies below is not to be read."""
        return self.gram if "gram" in self.__dict__ else self._triangle(torch.float64)

    @lazy_property
    def gram(self) -> Tensor:
        """``Wᵀ W (batch, n, n)`` in float64, in the memory of :attr:`gram_triangle`."""
        return self._mirror_(self.gram_triangle)

    @lazy_property
    def gram32(self) -> Tensor:
        """The same in float32: a copy where :attr:`gram` is known, else at half its cost."""
        return self.gram.float() if "gram" in self.__dict__ else self._mirror_(self._triangle(torch.float32))

    @lazy_property
    def sigma1(self) -> Tensor:
        """``(batch,)``; a lower bound of the largest singular value, usually within a few percent."""
        G = self.gram if "gram" in self.__dict__ else self.gram32
        v = normal(self.seed, POWER, (self.n, 1), G.dtype).to(G.device).expand(self.size, -1, -1)
        for _ in range(_POWER_STEPS):
            v = G @ (v / v.norm(dim=1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny))
        self.flops += 2 * _POWER_STEPS * self.n**2
        return v.norm(dim=1)[:, 0].double().sqrt() * (1 - 1e-5)  # float32 may round upward

    @lazy_property
    def eigh(self) -> list[FullEigh]:
        """All eigenvectors of ``WᵀW`` of each matrix, on the CPU."""
        self.flops += 9 * self.n**3
        return [FullEigh(G) for G in self.gram_triangle]

    @lazy_property
    def tridiagonal(self) -> list[Tridiagonal]:
        """``WᵀW = Q T Qᵀ`` of each matrix, on the CPU."""
        self.flops += 4 / 3 * self.n**3
        return [Tridiagonal(G, self.seed) for G in self.gram_triangle]

    def spectrum(self) -> Tensor:
        """All singular values ``(batch, n)``, descending, those below 1e-4 σ₁ to no more than 1e-8 σ₁.

        That is enough for the rules of windows, as such values are a share of 1e-8 of the energy. On a CPU by
        :attr:`tridiagonal`, which the window may need next.
        """
        if self.W.device.type == "cpu" and tridiagonal_available():
            return torch.stack([T.values() for T in self.tridiagonal]).clamp_min_(0).sqrt_()
        return torch.linalg.svdvals(self.dense())

    @lazy_property
    def density(self) -> Density:
        """The distribution of the singular values; float32 is enough for a first guess of a shift."""
        self.flops += 2 * STEPS * CHAINS * self.n**2
        return spectral_density(self.gram32, self.seed)

    def random_columns(self, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """``(batch, n, width)``; for a given seed the same for every matrix."""
        columns = normal(self.seed, KRYLOV, (self.n, width), dtype)
        return columns.to(self.W.device).expand(self.size, -1, -1)

    def factorize(self, shift: Tensor) -> LDLT:
        """``WᵀW − shift I = L D Lᵀ`` for ``shift (batch,)``."""
        self.__dict__.pop("gram32", None)  # its memory is wanted for the factor
        self.flops += self.n**3 / 3
        return factorize_shifted(self.gram, shift)


def _power_of_two(x: float) -> float:
    """The one at or below ``x > 0``; 1 for 0."""
    return math.ldexp(1.0, math.frexp(x)[1] - 1) if x > 0 else 1.0


def largest_entry(W: Tensor) -> Tensor:
    """``max|W|`` of each matrix of ``W (batch, m, n)``, without a copy of it; NaN or Inf where it holds one."""
    # not by torch.stack, which autocast on a CPU refuses for float16
    blocks = W.split(_ROWS, dim=1) if W.shape[1] > _ROWS else [W]
    return reduce(torch.maximum, (rows.abs().amax((1, 2)) for rows in blocks))


def frobenius_norm(W: Tensor) -> Tensor:
    """``‖W‖_F (…)`` of ``W (…, m, n)`` in float64, on MPS in float32; squares of entries may over- or underflow."""
    wide = torch.promote_types(W.dtype, torch.float32)
    largest = largest_entry(W.reshape(-1, *W.shape[-2:])).reshape(W.shape[:-2]).to(wide)
    extreme = (largest > 0) & ((largest < 2.0**-_PLAIN) | (largest > 2.0**_PLAIN))
    result = wide if W.device.type == "mps" else torch.float64
    if not bool(extreme.any()):
        return torch.linalg.vector_norm(W, dim=(-2, -1), dtype=wide).to(result)
    unit = torch.where(largest > 0, largest, 1)
    return torch.linalg.vector_norm(W / unit[..., None, None], dim=(-2, -1), dtype=wide).to(result) * unit.to(result)
