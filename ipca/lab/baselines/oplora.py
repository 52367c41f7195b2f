"""OPLoRA: plain LoRA outside of the leading singular directions of each weight.

    W' = W + scaling · (P_L B) (A P_R),      P_L = I − U_k U_kᵀ,      P_R = I − V_k V_kᵀ

So ``U_kᵀ ΔW = 0`` and ``ΔW V_k = 0``: the ``k`` leading singular triples of ``W`` stay. ``k`` is the rank. The
projections are parametrizations of the layer; :func:`torch.nn.utils.parametrize.remove_parametrizations` of ``lora_A``
and ``lora_B`` leaves a plain LoRA, to be saved or merged.

Source: "OPLoRA: Orthogonal Projection LoRA Prevents Catastrophic Forgetting during Parameter-Efficient Fine-Tuning",
arXiv 2510.13003.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from ipca.nn.window_layer import WindowLayer


class Outside(nn.Module):
    """``(I − Q Qᵀ) factor`` for orthonormal columns ``Q (…, n, k)``; of ``A``, which is wide, ``factor (I − Q Qᵀ)``."""

    def __init__(self, basis: Tensor, *, right: bool) -> None:
        super().__init__()
        self.register_buffer("basis", basis)
        self.basis: Tensor
        self.right = right

    def forward(self, factor: Tensor) -> Tensor:
        Q = self.basis
        with torch.autocast(factor.device.type, enabled=False):
            return factor - (factor @ Q) @ Q.mT if self.right else factor - Q @ (Q.mT @ factor)


def project_factors(layer: WindowLayer, U: Tensor, Vh: Tensor) -> None:
    """Keep the factors of a layer with ``B0 = 0`` off ``U (…, out, k)`` and ``Vh (…, k, in)`` from now on.

    ``layer.lora_A`` and ``layer.lora_B`` become ``A P_R`` and ``P_L B``, of the parameters ``A`` and ``B`` that train.
    """
    register_parametrization(layer, "lora_A", Outside(Vh.mT.to(layer.lora_A), right=True))
    register_parametrization(layer, "lora_B", Outside(U.to(layer.lora_B), right=False))
