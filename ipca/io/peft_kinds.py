"""Where PEFT's file holds the factors of each kind of layer, and in which shape.

| kind | keys below the layer's path | lora_A | lora_B |
|---|---|---|---|
| linear layers | ``lora_A.weight``, ``lora_B.weight`` | ``(r, in)`` | ``(out, r)`` |
| ``"embedding"`` | ``lora_embedding_A``, ``lora_embedding_B`` | ``(r, num)`` | ``(dim, r)`` |
| ``"conv"`` | as linear layers | ``(r, channels, k…)`` | ``(out, r, 1…)`` |
| experts | ``[base_layer.…]lora_A.weight``, below the path of their module | ``(E r, in)`` | ``(out, r E)`` |
| ``"matrix"`` | as experts | ``(r, in)`` | ``(out, r)`` |

A matrix is a parameter ``(out, in)`` that is no layer's weight; PEFT alone adapts it. It and experts are PEFT's
``target_parameters``: it wraps their module once for each adapted one, the first one innermost, and their keys pass the
wrappers around them. Experts lie one after the other in ``lora_A``, interleaved in ``lora_B``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ipca.nn.layer_kinds import EXPERTS

PREFIX = "base_model.model."
MATRIX = "matrix"
_PARAMETERS = (*EXPERTS, MATRIX)


def factor_keys(name: str, kind: str = "linear", wrappers: int = 0) -> tuple[str, str]:
    """The keys of ``lora_A`` and ``lora_B`` of the layer at the path ``name``; ``wrappers`` lie around a stack."""
    if kind == "embedding":
        return f"{PREFIX}{name}.lora_embedding_A", f"{PREFIX}{name}.lora_embedding_B"
    path = name.rpartition(".")[0] + ".base_layer" * wrappers if kind in _PARAMETERS else name
    return f"{PREFIX}{path}.lora_A.weight", f"{PREFIX}{path}.lora_B.weight"


def wrappers_around(kinds: Mapping[str, str]) -> dict[str, int]:
    """For each layer how many stacks of the same module come after it; ``kinds`` by path, in the model's order."""
    names = list(kinds)
    stacks = [name for name in names if kinds[name] in _PARAMETERS]
    owner = {name: name.rpartition(".")[0] for name in stacks}
    behind = {name: sum(owner[other] == owner[name] for other in stacks[i + 1 :]) for i, name in enumerate(stacks)}
    return {name: behind.get(name, 0) for name in names}


def to_peft(kind: str, A: Tensor, B: Tensor, kernel: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """``A (…, r, in), B (…, out, r)`` as PEFT holds them; ``kernel (k…)`` is that of a convolution."""
    if kind == "conv":
        return A.reshape(A.shape[0], -1, *kernel), B.reshape(*B.shape, *(1 for _ in kernel))
    if kind in EXPERTS:
        return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    return A, B


def from_peft(kind: str, shape: Sequence[int], lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`to_peft`; ``shape (…, out, in)`` is that of the matrix or the stack, which they fit."""
    if kind in EXPERTS:
        return lora_A.unflatten(0, (shape[0], -1)), lora_B.unflatten(1, (-1, shape[0])).permute(2, 0, 1)
    return lora_A.flatten(1), lora_B.flatten(1)
