"""Measures of an update of the weights: its size, its concentration, its overlap with the pretrained components."""

from __future__ import annotations

import math

import torch
from torch import nn

from ipca.analysis.layer_pairs import Base, weight_pairs
from ipca.analysis.linalg import check_finite, decompose, ratio
from ipca.svd import window_svd
from ipca.window import Window


def update_norm(model: nn.Module, base: Base | None = None) -> float:
    """``√Σ‖W' − W‖_F² / √Σ‖W‖_F²`` over the layers of :func:`weight_pairs`.

    0 before training, NaN where a weight holds NaN. Two models are comparable where the same layers count: for a model
    without adapted layers name them with a mapping as ``base``.

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
