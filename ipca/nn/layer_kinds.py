"""Kinds of layers that can be adapted: detection, the weight as a matrix ``(out, in)``, construction.

| kind | of | weight | as ``(out, in)`` |
|---|---|---|---|
| ``"linear"`` | ``nn.Linear``, Falcon's | ``(out, in)`` | itself |
| ``"conv1d"`` | transformers' ``Conv1D`` | ``(in, out)`` | transposed |
| ``"embedding"`` | ``nn.Embedding``, those times a constant | ``(num, dim)`` | transposed: out = dim, in = num |
| ``"conv"`` | ``nn.Conv1d``, ``Conv2d``, ``Conv3d`` | ``(out, channels, k…)`` | flattened: in = channels · k… |
| ``"experts"`` | a parameter ``(E, out, in)`` of a module of experts | the same | a stack of E matrices |
| ``"experts transposed"`` | the same where the module has ``is_transposed`` | ``(E, in, out)`` | a stack, transposed |
| ``"nf4"``, ``"int8"``, … | a quantized linear layer, see :mod:`ipca.nn.quantization` | | dequantized |

To support another type of layer: name it in :func:`layer_kind` and :func:`to_matrix`, list in
:func:`unsupported_reason` which of its settings do not work, write a :class:`~ipca.nn.window_layer.WindowLayer` that
computes it and name that in :func:`ipca.nn.registry.layer_class`. Everything else works on matrices.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ipca._hashing import tensor_sha256
from ipca.nn.offload import stored_tensor
from ipca.nn.quantization import dequantize, quantization_kind, quantized_sha256, unsupported_quantization
from ipca.nn.subclasses import computes_as

LINEAR = ("linear", "conv1d")
EXPERTS = ("experts", "experts transposed")
PLAIN = (*LINEAR, *EXPERTS, "embedding", "conv")
"""Every kind whose weight is not quantized."""
_TRANSPOSED = ("conv1d", "embedding", "experts transposed")
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def layer_kind(module: nn.Module) -> str | None:
    """The kind of a layer as in the table above, or None for any other module.

    Subclasses have none, as their ``forward`` may do more, but where :func:`ipca.nn.subclasses.computes_as` knows it.
    """
    if type(module) is nn.Linear and type(module.weight) is nn.Parameter:
        return "linear"
    quantized = quantization_kind(module)
    if quantized is not None:
        return quantized
    if computes_as(module, nn.Linear):
        return "linear"
    if computes_as(module, nn.Embedding):
        return "embedding"
    if type(module) in _CONVS:
        return "conv"
    if isinstance(module, ExpertStack):
        return "experts transposed" if module.transposed else "experts"
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return "conv1d" if conv1d is not None and type(module) is conv1d else None


def is_quantized(kind: str | None) -> bool:
    """Whether a layer of ``kind`` has a quantized weight."""
    return kind is not None and kind not in PLAIN


def unsupported_reason(module: nn.Module, kind: str | None = None, *, dropout: float = 0.0) -> str | None:
    """The reason why a layer cannot be adapted because of its settings, or None; ``kind`` as for :func:`read_layer`."""
    if is_quantized(kind or layer_kind(module)):
        return unsupported_quantization(module)
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return "its max_norm rewrites rows of the weight in every forward"
        if module.sparse or module.scale_grad_by_freq:
            return "its sparse or scale_grad_by_freq is about the gradient of a weight that stays frozen; unset it"
        if dropout:
            return "its input is indices, of which dropout can drop nothing; set dropout=0"
    if isinstance(module, ExpertStack) and dropout:
        return "the input of one expert's product cannot be reached to drop entries of it; set dropout=0"
    if isinstance(module, _CONVS):
        for name, plain in (("groups", 1), ("dilation", (1,) * len(module.kernel_size)), ("padding_mode", "zeros")):
            value = getattr(module, name)
            if value != plain:
                return f"it has {name}={value}, which PEFT's low-rank convolution does not have"
    return None


class ExpertStack(nn.Module):
    """A parameter ``(E, out, in)`` of a module of experts, ``(E, in, out)`` where ``transposed``, as a layer.

    It shares the parameter; computing is left to the module of experts.
    """

    def __init__(self, weight: nn.Parameter, transposed: bool) -> None:
        super().__init__()
        self.weight, self.transposed = weight, transposed


def stack_names(module: nn.Module) -> list[str]:
    """The names of a module's own parameters that are stacks of two weights or more, one for each expert."""
    if layer_kind(module) is not None or isinstance(module, ParametrizationList):
        return []
    return [name for name, p in module.named_parameters(recurse=False) if p.ndim == 3 and len(p) > 1]


def to_matrix(kind: str, weight: Tensor) -> Tensor:
    """A plain ``weight`` of ``kind`` as ``(out, in)`` or, for experts, ``(E, out, in)``.

    It shares the weight's memory, but that of a convolution in channels-last order is a copy; :func:`write_matrix`
    writes.
    """
    if kind in _TRANSPOSED:
        return weight.mT
    return weight.flatten(1) if kind == "conv" else weight


def from_matrix(kind: str, matrix: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`to_matrix`; ``shape`` is that of the plain weight."""
    return matrix.mT if kind in _TRANSPOSED else matrix.view(shape)


def read_layer(module: nn.Module, kind: str | None = None) -> tuple[Tensor, Tensor | None]:
    """``weight (out, in)`` and ``bias (out,)`` or None of a layer with a kind, to be read only (:func:`to_matrix`).

    A quantized weight comes dequantized. ``kind`` is the layer's :func:`layer_kind`, where it is
    known.
    """
    kind = kind or layer_kind(module) or "linear"
    weight, bias = stored_tensor(module, "weight"), stored_tensor(module, "bias")
    matrix = dequantize(module) if is_quantized(kind) else to_matrix(kind, weight.detach())
    return matrix, None if bias is None else bias.detach()


@torch.no_grad()
def write_matrix(module: nn.Module, matrix: Tensor) -> None:
    """Write ``matrix (…, out, in)`` into the weight of a layer with a kind that is not quantized, in its memory."""
    weight = stored_tensor(module, "weight")
    weight.copy_(from_matrix(layer_kind(module) or "linear", matrix, weight.shape))


def matrix_shape(module: nn.Module, kind: str) -> tuple[int, ...]:
    """The shape of the weight of a layer of ``kind`` as ``(…, out, in)``, without dequantizing it."""
    if is_quantized(kind):
        return module.out_features, module.in_features  # type: ignore[return-value]
    weight = module.weight
    assert isinstance(weight, Tensor)
    if kind == "conv":
        return weight.shape[0], weight[0].numel()
    return tuple(to_matrix(kind, weight).shape)


def base_sha256(module: nn.Module) -> str:
    """A hash of the layer's weight ``(out, in)``, or of what a quantized one stores, by which an adapter knows it."""
    return quantized_sha256(module) if is_quantized(layer_kind(module)) else tensor_sha256(read_layer(module)[0])


def build_layer(kind: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A plain ``nn.Linear`` or ``Conv1D`` that computes ``x weightᵀ + bias``; its parameters require gradients."""
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
