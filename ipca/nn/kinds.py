"""The layer types that can be adapted: how to read each as ``weight (out, in), bias``, and how to build it again.

To support another type, add its name here; everything else works on ``(out, in)`` matrices.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn


def layer_kind(module: nn.Module) -> str | None:
    """``"linear"`` for ``nn.Linear``, ``"conv1d"`` for transformers' ``Conv1D``, else None.

    Subclasses do not count: their ``forward`` may do more than a matrix product.
    """
    if type(module) is nn.Linear:
        return "linear"
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return "conv1d" if conv1d is not None and type(module) is conv1d else None


def read_layer(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """``weight (out, in)`` and ``bias (out,)`` or None, sharing memory with the layer."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    weight = weight.detach() if layer_kind(module) == "linear" else weight.detach().mT
    return weight, None if bias is None else bias.detach()


def build_layer(kind: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A plain layer of ``kind`` that computes ``x weightᵀ + bias``, frozen as little as a new one."""
    out_features, in_features = weight.shape
    if kind == "linear":
        layer: nn.Module = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(weight)
    else:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            layer = Conv1D(out_features, in_features)
        layer.weight = nn.Parameter(weight.mT.contiguous())
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias))
    return layer
