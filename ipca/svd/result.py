"""The result of ``window_svd``: the factors, and a report for each matrix."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ipca.window import Window


@dataclass(frozen=True)
class SVDReport:
    """Report on the decomposition of one matrix.

    Attributes:
        path: ``"interior"``, ``"top"`` or ``"bottom"`` (block Krylov), ``"tridiagonal"`` or ``"gram_eigh"`` (LAPACK on
            the Gram matrix), or ``"full"`` (float64 SVD).
        window: the resolved window, its start an index.
        residual: ``max(‖W V − U S‖₂, ‖Wᵀ U − V S‖₂, σ₁ ‖UᵀU − I‖₂, σ₁ ‖VᵀV − I‖₂) / σ₁``, or a bound on it, in float64,
            before rounding to the dtype that is returned.
        certified: whether the indices are proven, see ``ipca.svd.certificate``.
        certificate: the proof, or why there is none, in words.
        seconds: wall time; for matrices decomposed together, an equal share of it.
        flops: floating point operations by the textbook counts of the steps taken. What several windows of one matrix
            share is counted with the first.
        source: the matrix: ``"weight"``, a layer's own; for a quantized layer ``"unquantized"`` or ``"dequantized"``.
    """

    path: str
    window: Window
    residual: float
    certified: bool
    certificate: str
    seconds: float
    flops: float = 0.0
    source: str = "weight"


@dataclass(frozen=True)
class WindowSVD:
    """``W ≈ … + U diag(S) Vh + …`` for the components of one window.

    Attributes:
        U: ``(m, r)``, orthonormal columns; ``(L, m, r)`` for a stack.
        S: ``(r,)``, descending; ``(L, r)`` for a stack.
        Vh: ``(r, n)``, orthonormal rows, the largest entry of each positive; ``(L, r, n)`` for a stack.
        reports: one :class:`SVDReport` for each matrix.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    reports: tuple[SVDReport, ...]

    @property
    def report(self) -> SVDReport:
        """The report of the matrix, or of a stack's worst: an uncertified one first, then the largest residual."""
        return max(self.reports, key=lambda r: (not r.certified, r.residual))

    def __getitem__(self, one: int) -> WindowSVD:
        """One matrix of a stack."""
        return WindowSVD(self.U[one], self.S[one], self.Vh[one], (self.reports[one],))
