"""Measures of the change of weights in training: its size, its concentration, and how it moves singular components."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ipca.analysis.layer_pairs import Base, weight_pairs
from ipca.analysis.linalg import check_finite, decompose, ratio
from ipca.svd import window_svd
from ipca.window import Window


def update_norm(model: nn.Module, base: Base | None = None) -> float:
    """``√Σ‖W' − W‖_F² / √Σ‖W‖_F²`` over the layers of :func:`weight_pairs`.

    0 before training, NaN where a weight holds NaN. Two models are comparable where the same layers count: for a model
    without adapted layers name them with a mapping as ``base``.

    >>> base = nn.Sequential(nn.Linear(64, 32, bias=False))
    >>> trained = nn.Sequential(nn.Linear(64, 32, bias=False))
    >>> _ = trained.load_state_dict({"0.weight": 1.5 * base[0].weight})
    >>> round(ipca.analysis.update_norm(trained, base), 6)
    0.5

    Args:
        model, base: as for :func:`weight_pairs`.

    Raises:
        TypeError, ValueError: as :func:`weight_pairs`.
    """
    change = norm = 0.0
    for pair in weight_pairs(model, base):
        change += pair.change.square().sum().item()
        norm += pair.base.square().sum().item()
    return ratio(math.sqrt(change), math.sqrt(norm))


def intruder_dimensions(
    model: nn.Module, base: Base | None = None, *, top_k: int = 10, threshold: float = 0.5
) -> dict[str, int]:
    """The number of intruder dimensions of each layer: new directions among the largest of the trained weight.

    Of the ``top_k`` leading left singular vectors ``u'_j`` of ``W'`` those count whose ``max_i |⟨u'_j, u_i⟩|`` over all
    left singular vectors ``u_i`` of the pretrained ``W`` is below ``threshold`` (Shuttleworth et al., "LoRA vs Full
    Fine-tuning: An Illusion of Equivalence", arXiv 2410.21228). Vectors to singular values that are 0, to float64's
    rounding, are left out on both sides, as they are arbitrary. ``W`` must be the pretrained weight: the residual
    that PiSSA leaves lacks the window, whose vectors would then look new before any training.

    Args:
        model, base: as for :func:`weight_pairs`.
        top_k: how many leading vectors of ``W'`` are looked at.
        threshold: the cosine below which one is new, in (0, 1].

    Raises:
        TypeError, ValueError: as :func:`weight_pairs`; ``top_k`` or ``threshold`` is out of range; NaN or Inf.
    """
    if top_k < 1 or not 0 < threshold <= 1:
        raise ValueError(f"top_k must be at least 1 and threshold lie in (0, 1]; got {top_k} and {threshold}.")
    found = {}
    for pair in weight_pairs(model, base):
        before, after = decompose(pair.name, pair.base).left, decompose(pair.name, pair.trained).left
        cosines = (after[:, :top_k].mT @ before).abs()
        nearest = cosines.amax(1) if before.shape[1] else cosines.new_zeros(len(cosines))
        found[pair.name] = int((nearest < threshold).sum())
    return found


def spectral_imbalance(model: nn.Module, base: Base | None = None) -> dict[str, float]:
    """``σ₁² / Σ σᵢ²`` of each layer's ``ΔW``: the share of its energy in one direction, in ``[1 / rank, 1]``.

    1 for a change of rank 1, ``1 / r`` for one that is spread evenly over ``r`` directions, 0 for no change. That few
    directions hold most of an update is what "Spectral Imbalance Causes Forgetting in Low-Rank Continual Adaptation"
    (arXiv 2602.00722) is about; this number for it is our own, the reciprocal of the stable rank.

    Args:
        model, base: as for :func:`weight_pairs`.

    Raises:
        TypeError, ValueError: as :func:`weight_pairs`; NaN or Inf.
    """
    found = {}
    for pair in weight_pairs(model, base):
        check_finite(pair.name, pair.change)
        largest = torch.linalg.matrix_norm(pair.change, 2).item()
        found[pair.name] = ratio(largest, pair.change.norm().item()) ** 2
    return found


def overlap(model: nn.Module, base: Base | None = None, *, k: int = 16) -> dict[str, float]:
    """``ρ_k = ‖U_kᵀ ΔW V_k‖_F² / ‖ΔW‖_F²``: the share of each change among the ``k`` leading components of ``W``.

    ``U_k (out, k)`` and ``V_k (in, k)`` are the leading singular vectors of the pretrained ``W``. 0 for no change; for
    one in random directions about ``k² / (out · in)``. Named after the measure of OPLoRA (arXiv 2510.13003); here both
    sides are projected.

    Args:
        model, base: as for :func:`weight_pairs`.
        k: the number of leading components, at least 1.

    Raises:
        TypeError, ValueError: as :func:`weight_pairs`; ``k`` is below 1 or above ``min(out, in)``; NaN or Inf.
    """
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be a whole number of at least 1, got {k!r}.")
    found = {}
    for pair in weight_pairs(model, base):
        d = min(pair.base.shape)
        if k > d:
            raise ValueError(f"{pair.name}: k={k}, but its weight has only {d} singular values; lower k.")
        for weight in (pair.base, pair.trained):
            check_finite(pair.name, weight)
        top = window_svd(pair.base, Window(0, k), tol="exact")
        inside = (top.U.mT @ pair.change @ top.Vh.mT).norm().item()
        found[pair.name] = ratio(inside, pair.change.norm().item()) ** 2
    return found


@dataclass(frozen=True, eq=False)
class Drift:
    """The change ``ΔW`` of one weight, split by the components of the pretrained ``W = U diag(S) Vh``.

    Tensors are ``(d,)``, float64, on the CPU. ``rescaling² + rotation² + outside²`` sums to ``norm²``.

    Attributes:
        shape: ``(out, in)``.
        S: the singular values of ``W``.
        rescaling: ``|uᵢᵀ ΔW vᵢ|``, the change of the component's singular value without any rotation.
        rotation: ``√(½ Σⱼ (uᵢᵀ ΔW vⱼ)² + ½ Σⱼ (uⱼᵀ ΔW vᵢ)²)``, ``j ≠ i``: the mixing with other components. Each
            entry counts half for each of its two components.
        outside: of a rectangular ``W`` the part outside of the span of its singular vectors on the longer side,
            ``‖(I − U Uᵀ) ΔW vᵢ‖`` of a tall one, ``‖uᵢᵀ ΔW (I − V Vᵀ)‖`` of a wide one; 0 of a square one.
        norm: ``‖ΔW‖_F``.
        window: of an adapted layer, else None.
    """

    shape: tuple[int, int]
    S: Tensor
    rescaling: Tensor
    rotation: Tensor
    outside: Tensor
    norm: float
    window: Window | None

    @property
    def shares(self) -> dict[str, float]:
        """The shares of ``‖ΔW‖_F²`` in rescaling, rotation and outside; they add up to 1, or are 0 without a change."""
        parts = {"rescaling": self.rescaling, "rotation": self.rotation, "outside": self.outside}
        return {name: ratio(part.norm().item(), self.norm) ** 2 for name, part in parts.items()}


@dataclass(frozen=True, eq=False)
class WindowAngles:
    """Angles between the spans of the trained and the initial factors, in radians, largest first; float64, on the CPU.

    Attributes:
        output: principal angles between the columns of ``B`` and of ``B0``.
        input: between the rows of ``A`` and of ``A0``.

    There are ``rank`` of each, fewer where a factor has a lower rank, and none for a factor that is 0, such as the
    ``B0`` of plain LoRA.
    """

    output: Tensor
    input: Tensor


def drift(model: nn.Module, base: Base | None = None) -> dict[str, Drift]:
    """Split the change of each weight by its singular components, by the layer's path.

    With ``M = Uᵀ W' V (d, d)`` in the full SVD of the pretrained ``W``, the diagonal of ``M − diag(S)`` rescales
    components and the rest rotates them into each other. Where singular values of ``W`` are equal their vectors, and so
    the split between those components, are a matter of choice; sums over all of them are not.

    >>> model = ipca.apply_pc(nn.Sequential(nn.Linear(64, 32)), rank=4, progress=False)
    >>> with torch.no_grad():
    ...     _ = model[0].lora_B.mul_(2)  # doubles the window's singular values
    >>> found = ipca.analysis.drift(model)["0"]
    >>> found.shares["rescaling"] > 0.999
    True

    Args:
        model, base: as for :func:`weight_pairs`.

    Raises:
        TypeError, ValueError: as :func:`weight_pairs`; a weight holds NaN or Inf.
    """
    found = {}
    for pair in weight_pairs(model, base):
        check_finite(pair.name, pair.trained)
        (U, S, Vh), change = decompose(pair.name, pair.base), pair.change
        D = U.mT @ change @ Vh.mT
        square = D.square().fill_diagonal_(0.0)
        rotation = ((square.sum(0) + square.sum(1)) / 2).sqrt()
        found[pair.name] = Drift(
            shape=(len(U), Vh.shape[1]),
            S=S.cpu(),
            rescaling=D.diagonal().abs().cpu(),
            rotation=rotation.cpu(),
            outside=_outside(U, D, Vh, change).cpu(),
            norm=change.norm().item(),
            window=pair.window,
        )
    return found


def principal_angles(model: nn.Module, base: Base | None = None) -> dict[str, WindowAngles]:
    """Principal angles between ``B`` and ``B0`` and between ``A`` and ``A0`` of each adapted layer, by its path.

    Args:
        model, base: as for :func:`weight_pairs`.

    Raises:
        TypeError, ValueError: as :func:`weight_pairs`; a layer does not keep its initial factors; NaN or Inf.
    """
    found = {}
    for pair in weight_pairs(model, base):
        if pair.factors is None:
            raise ValueError(
                f"{pair.name}: a {type(pair.layer).__name__} does not keep its initial factors; an adapted layer of "
                "ipca.apply_pc or of ipca.peft.PCConfig, with one active adapter, does."
            )
        A, B, A0, B0 = pair.factors
        output, rows = ([decompose(pair.name, X).left for X in both] for both in ((B, B0), (A.mT, A0.mT)))
        found[pair.name] = WindowAngles(_angles(*output).cpu(), _angles(*rows).cpu())
    return found


def _outside(U: Tensor, D: Tensor, Vh: Tensor, change: Tensor) -> Tensor:
    """The part of ``change (out, in)`` outside of ``U D Vh``, for each component."""
    if len(U) > Vh.shape[1]:
        return (change @ Vh.mT - U @ D).norm(dim=0)
    if len(U) < Vh.shape[1]:
        return (U.mT @ change - D @ Vh).norm(dim=1)
    return change.new_zeros(len(D))


def _angles(X: Tensor, Y: Tensor) -> Tensor:
    """Principal angles of two orthonormal bases, descending; from sine and cosine, so that small ones are right too.

    Source: Knyazev & Argentati, "Principal angles between subspaces in an A-based scalar product", SISC 23 (2002).
    """
    P, Q = sorted((X, Y), key=lambda basis: basis.shape[1])
    overlap = Q.mT @ P
    cosines, sines = torch.linalg.svdvals(overlap), torch.linalg.svdvals(P - Q @ overlap)
    return torch.atan2(sines, cosines.flip(0))
