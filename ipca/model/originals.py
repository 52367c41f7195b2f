"""What each layer's window is taken from: its own weight; for a quantised layer the original or the dequantised one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ipca.model.targets import Target
from ipca.nn.layer_kinds import read_layer
from ipca.nn.quantization import quantised_kind, quantised_sha256
from ipca.nn.quantized_linear import quantised_source
from ipca.nn.registry import find_layer

Originals = Mapping[str, Tensor] | Callable[[str], Tensor]
"""The weight ``(out, in)`` that a quantised layer had before, by the layer's path."""


class BaseMatrix(NamedTuple):
    """A layer's ``weight (out, in)``, what that is (:class:`ipca.SVDReport`), and the base's hash where it is known."""

    weight: Tensor
    source: str
    digest: str | None


def base_matrix(module: nn.Module, name: str, originals: Originals | None) -> BaseMatrix:
    """The matrix that the layer ``module`` at the path ``name`` starts from.

    Raises:
        TypeError, ValueError: as :func:`ipca.nn.quantized_linear.quantised_source`, or a callable's own.
    """
    if quantised_kind(module) is None:
        return BaseMatrix(read_layer(module)[0], "weight", None)
    found = None
    if originals is not None:
        found = originals[name] if isinstance(originals, Mapping) else originals(name)
        if not isinstance(found, Tensor):
            raise TypeError(f"originals gave {type(found).__name__}, not a tensor.")
    weight, source = quantised_source(module, found)
    return BaseMatrix(weight, source, quantised_sha256(module))


def check_originals(model: nn.Module, targets: Sequence[Target], originals: object) -> None:
    """Raise where ``originals`` is no mapping or function, lacks a quantised layer, or no layer is quantised.

    Raises:
        TypeError, ValueError: the message says what is missing.
    """
    if originals is None:
        return
    if not isinstance(originals, Mapping) and not callable(originals):
        raise TypeError(
            f"originals must be a mapping or a function from a layer's path to its weight, got {originals!r}; "
            "for a checkpoint folder say originals=ipca.original_weights(folder)."
        )
    quantised = [t.name for t in targets if quantised_kind(find_layer(model, t.name)) is not None]
    if not quantised:
        raise ValueError("originals are for quantised layers, and none of the layers to adapt is; leave it out.")
    missing = [name for name in quantised if isinstance(originals, Mapping) and name not in originals]
    if missing:
        raise ValueError(
            f"originals lacks the weight of {missing[0]} ({len(missing)} of {len(quantised)} layers are missing); "
            "add it, or exclude the layer."
        )
