"""The bench's matrices, and the accuracy of a provider's components.

``"gaussian"``: noise. ``"outliers"``: the same with 32 components far above it, as trained weights have them.
``"heavy"``: singular values ``(k + 1)^-0.8`` between random orthonormal vectors. ``"minilm query"`` and the like:
weights of the demo's model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

OUTLIERS, _LARGE = 32, 1536
MINILM = {
    "minilm query": "encoder.layer.3.attention.self.query.weight",
    "minilm key": "encoder.layer.3.attention.self.key.weight",
    "minilm dense": "encoder.layer.3.attention.output.dense.weight",
    "minilm intermediate": "encoder.layer.3.intermediate.dense.weight",
}
"""Of the fourth of six layers, 384 wide."""


@dataclass(frozen=True)
class Found:
    """The components of a window as a provider returns them: ``U (m, r)``, ``S (r,)``, ``V (n, r)``, and our report.

    ``residual`` is the largest of a whole stack, where there is one; ``certified`` is None where nobody proves indices.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    path: str = ""
    certified: bool | None = None
    flops: float | None = None
    residual: float = 0.0


@dataclass(frozen=True)
class Truth:
    """All singular vectors on the shorter side, ``(d, d)``, and the largest singular value, in float64."""

    vectors: Tensor
    largest: float


@dataclass(frozen=True)
class Accuracy:
    """Of one window.

    Attributes:
        residual: ``max(‖W V − U S‖₂, ‖Wᵀ U − V S‖₂) / σ₁``.
        angle: the largest principal angle to the true subspace, on the shorter side of the matrix.
        index_errors: how many components lie nearest to another true one than that whose index they claim.
    """

    residual: float
    angle: float
    index_errors: int


@lru_cache(maxsize=3)
def matrix(m: int, n: int, spectrum: str, device: torch.device, batch: int) -> Tensor:
    """The stack ``(batch, m, n)``, float32; the same in every process."""
    if spectrum in MINILM:
        return minilm()[MINILM[spectrum]].to(device)[None]
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    if spectrum == "heavy":
        d = min(m, n)
        U, V = (torch.linalg.qr(normal(batch, size, d))[0] for size in (m, n))
        S = torch.arange(1, d + 1, device=device, dtype=torch.float32) ** -0.8
        return (U * S) @ V.mT
    W = normal(batch, m, n).div_(math.sqrt(min(m, n)))  # the noise ends at 1 + √(max / min)
    if spectrum == "outliers":
        U, V = normal(batch, m, OUTLIERS), normal(batch, n, OUTLIERS)
        sizes = torch.linspace(20, 4, OUTLIERS, device=device) * math.sqrt(max(m, n) / min(m, n))
        W.baddbmm_(U / U.norm(dim=1, keepdim=True) * sizes, (V / V.norm(dim=1, keepdim=True)).mT)
    else:
        assert spectrum == "gaussian", spectrum
    return W


@lru_cache(maxsize=1)
def minilm() -> dict[str, Tensor]:
    """The weights of the demo's model; ImportError says what to install."""
    from ipca.lab.demo.encoder import Settings, load_encoder

    state = load_encoder(Settings()).model.state_dict()
    return {name: state[name].float() for name in MINILM.values()}


@lru_cache(maxsize=3)
def truth(m: int, n: int, spectrum: str, device: torch.device, batch: int) -> Truth:
    """Of the first matrix of :func:`matrix`, by a float64 SVD.

    Of large matrices, where that takes minutes, by the eigenvectors of the float64 Gram matrix: what this squares away
    matters from about 1e-7 of the largest singular value downwards, where none of these spectra has a window.
    """
    W = matrix(m, n, spectrum, device, batch)[0].double()
    if W.shape[0] < W.shape[1]:
        W = W.mT
    if device.type == "cuda" or W.shape[1] >= _LARGE:
        squares, V = torch.linalg.eigh(W.mT @ W)
        return Truth(V.flip(1), math.sqrt(squares[-1].item()))
    _, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return Truth(Vh.mT.contiguous(), S[0].item())


def accuracy(W: Tensor, found: Found, exact: Truth, start: int) -> Accuracy:
    """The accuracy of ``found`` as the window of ``W (m, n)`` that begins at ``start``."""
    mine = (found.V if W.shape[0] >= W.shape[1] else found.U).double()
    rank = mine.shape[1]
    overlaps = (exact.vectors.mT @ mine).abs()
    claimed = torch.arange(start, start + rank, device=mine.device)
    errors = int((overlaps.argmax(0) != claimed).sum())
    Q = torch.linalg.qr(mine)[0]
    outside = Q - exact.vectors[:, start : start + rank] @ (exact.vectors[:, start : start + rank].mT @ Q)
    sine = float(torch.linalg.matrix_norm(outside, 2))
    return Accuracy(residual(W, found, exact.largest), math.asin(min(1.0, sine)), errors)


def residual(W: Tensor, found: Found, largest: float) -> float:
    """``max(‖W V − U S‖₂, ‖Wᵀ U − V S‖₂) / σ₁``, in float64."""
    W, U, S, V = W.double(), found.U.double(), found.S.double(), found.V.double()
    sides: Sequence[Tensor] = (W @ V - U * S, W.mT @ U - V * S)
    return max(float(torch.linalg.matrix_norm(side, 2)) for side in sides) / largest
