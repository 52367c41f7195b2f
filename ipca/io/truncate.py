"""The LoRA of a lower rank that is nearest to an adapter's change of the weights, and how far it is from it.

lora_B lora_A  ≈  scaling · (B A − B0 A0),  the first components of its SVD (Eckart, Young), each side with √S
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ipca.io.peft_kinds import PREFIX

TRUNCATION = "truncation.json"


def truncated(
    tensors: Mapping[str, Tensor], scalings: Mapping[str, float], rank: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The tensors of an adapter file with every pair of factors cut down to ``rank``, the scaling put into them.

    Args:
        tensors: ``lora_A = [A; A0] (2r, in)``, ``lora_B = [B, −B0] (out, 2r)`` of every layer under PEFT's names, with
            the axes of a convolution behind ``in`` and ``out``; and whatever else the file holds, which stays.
        scalings: of every layer, by its path.
        rank: to cut down to; a layer whose change of the weight has no higher rank stays exact, and its factors may be
            narrower.

    Returns:
        The tensors, and ``‖ΔW − lora_B lora_A‖_F / ‖ΔW‖_F`` by path, measured on the rounded factors; 0 where nothing
        was trained.

    Raises:
        ValueError: the factors of a stack of weights, which no one truncation serves.
    """
    cut, errors = dict(tensors), {}
    for name, scaling in scalings.items():
        keys = [key for key in tensors if key.removeprefix(PREFIX) in _factor_names(name)]
        if len(keys) != 2:
            raise ValueError(f"{name} has no one pair of factors (lora_A, lora_B) to truncate; use form='peft'.")
        key_A, key_B = sorted(keys)
        A, B = tensors[key_A], tensors[key_B]
        low_A, low_B = _nearest(A.flatten(1), B.flatten(1), scaling, rank)
        errors[name] = _relative_error(A.flatten(1), scaling * B.flatten(1).double(), low_A, low_B)
        cut[key_A] = low_A.reshape(-1, *A.shape[1:])
        cut[key_B] = low_B.reshape(B.shape[0], -1, *B.shape[2:])
    return cut, errors


def _factor_names(name: str) -> set[str]:
    return {
        f"{name}.{kind}_{side}{end}" for kind, end in (("lora", ".weight"), ("lora_embedding", "")) for side in "AB"
    }


def _nearest(A: Tensor, B: Tensor, scaling: float, rank: int) -> tuple[Tensor, Tensor]:
    """``lora_A (k, in), lora_B (out, k)`` in the dtype of ``A``, ``k`` the smallest of ``rank, 2r, in, out``."""
    Q, left = torch.linalg.qr(scaling * B.double())
    P, right = torch.linalg.qr(A.mT.double())
    U, S, Vh = torch.linalg.svd(left @ right.mT, full_matrices=False)
    S = S * (_noise(B * scaling, A) < S)
    root = S[:rank].sqrt()
    return (root[:, None] * (Vh[:rank] @ P.mT)).to(A.dtype), (Q @ (U[:, :rank] * root)).to(A.dtype)


def _relative_error(A: Tensor, B: Tensor, low_A: Tensor, low_B: Tensor) -> float:
    """``‖B A − low_B low_A‖_F / ‖B A‖_F`` in float64, from factors alone."""
    size = _norm(B.double(), A.double())
    difference = _norm(torch.cat([B.double(), -low_B.double()], dim=1), torch.cat([A.double(), low_A.double()]))
    return difference / size if size > _noise(B, A) else 0.0


def _noise(B: Tensor, A: Tensor) -> float:
    """What rounding leaves of ``‖B A‖`` where the halves of the factors cancel: nothing was trained."""
    return 4 * torch.finfo(torch.float64).eps * B.double().norm().item() * A.double().norm().item()


def _norm(B: Tensor, A: Tensor) -> float:
    """``‖B A‖_F``."""
    return torch.linalg.norm(torch.linalg.qr(B, mode="r").R @ torch.linalg.qr(A.mT, mode="r").R.mT).item()
