"""What each layer's window is taken from: its own weight; for a quantized layer the original or the dequantized one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ipca.model.targets import Target
from ipca.nn.layer_kinds import read_layer
from ipca.nn.quantization import quantization_kind, quantized_sha256
from ipca.nn.quantized_linear import quantized_source
from ipca.nn.registry import get_layer

UnquantizedWeights = Mapping[str, Tensor] | Callable[[str], Tensor]
"""The weight ``(out, in)`` that a quantized layer had before, by the layer's path."""


class SourceMatrix(NamedTuple):
    """A layer's ``weight (out, in)``, what that is (:class:`ipca.SVDReport`), and the base's hash where it is known."""

    weight: Tensor
    source: str
    digest: str | None


def source_matrix(module: nn.Module, name: str, unquantized_weights: UnquantizedWeights | None) -> SourceMatrix:
    """The matrix that the layer ``module`` at the path ``name`` starts from.

    Raises:
        TypeError, ValueError: as :func:`ipca.nn.quantized_linear.quantized_source`, or a callable's own.
    """
    if quantization_kind(module) is None:
        return SourceMatrix(read_layer(module)[0], "weight", None)
    found = None
    if unquantized_weights is not None:
        found = unquantized_weights[name] if isinstance(unquantized_weights, Mapping) else unquantized_weights(name)
        if not isinstance(found, Tensor):
            raise TypeError(f"unquantized_weights gave {type(found).__name__}, not a tensor.")
    weight, source = quantized_source(module, found)
    return SourceMatrix(weight, source, quantized_sha256(module))


def check_unquantized_weights(model: nn.Module, targets: Sequence[Target], unquantized_weights: object) -> None:
    """Raise where ``originals`` is no mapping or function, lacks a quantized layer, or no layer is quantized.

    Raises:
        TypeError, ValueError: the message says what is missing.
    """
    if unquantized_weights is None:
        return
    if not isinstance(unquantized_weights, Mapping) and not callable(unquantized_weights):
        raise TypeError(
            f"unquantized_weights must be a mapping or a function from a layer's path to its weight, "
            f"got {unquantized_weights!r}; "
            "for a checkpoint folder say unquantized_weights=ipca.load_unquantized_weights(folder)."
        )
    quantized = [t.name for t in targets if quantization_kind(get_layer(model, t.name)) is not None]
    if not quantized:
        raise ValueError(
            "unquantized_weights are for quantized layers, and none of the layers to adapt is; leave it out."
        )
    missing = [
        name for name in quantized if isinstance(unquantized_weights, Mapping) and name not in unquantized_weights
    ]
    if missing:
        raise ValueError(
            f"unquantized_weights lacks the weight of {missing[0]} ({len(missing)} of {len(quantized)} layers are "
            "missing); "
            "add it, or exclude the layer."
        )
