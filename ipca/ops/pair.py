"""The factors of a layer as one pair ``D, E``, and pairs kept between calls that need no gradient.

    one pair of factors              D = A                  E = B
    with the frozen pair A0, B0      D = [A − A0; A0]       E = [B, B − B0]        E D = B A − B0 A0

Where ``A = A0`` and ``B = B0`` the product ``E D`` is exactly 0, and where they have moved little the change keeps its
digits: a difference of two products would lose them in rounding.
"""

from __future__ import annotations

import weakref
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]
"""``D (S, K), E (N, S)``."""


def one_pair(A: Tensor, B: Tensor, A0: Tensor | None, B0: Tensor | None) -> Pair:
    """``D, E`` with S = 2 R; or ``A, B`` without a frozen pair.

    Subtracted in the factors' own dtype, to be rounded once to that of a product.
    """
    if A0 is None or B0 is None:
        return A, B
    if A0.dtype != A.dtype:  # FSDP's mixed precision casts parameters, and leaves buffers as they are
        A0, B0 = A0.to(A.dtype), B0.to(B.dtype)
    return torch.cat([A - A0, A0]), torch.cat([B, B - B0], dim=1)


class _Kept(NamedTuple):
    """A pair, and what shows that it is still that of its factors, whose memory ``factors`` holds.

    A write through ``.data`` leaves a tensor's version as it is: ``seen`` are entries of each component in ``A`` and
    ``B`` as they are, ``copied`` as they were.
    """

    owner: weakref.ref[nn.Parameter]
    state: tuple[object, ...]
    factors: tuple[Tensor, ...]
    seen: tuple[Tensor, ...]
    copied: tuple[Tensor, ...]
    pair: Pair

    def fits(self, A: Tensor, state: tuple[object, ...]) -> bool:
        return self.owner() is A and self.state == state and all(map(torch.equal, self.seen, self.copied))


_kept: dict[int, _Kept] = {}


def kept_pair(A: Tensor, B: Tensor, A0: Tensor | None, B0: Tensor | None, dtype: torch.dtype) -> Pair:
    """:func:`one_pair` on a CPU as ``dtype``, without gradients; as it was, if the factors are as they were.

    The pair takes the memory of ``A, B, A0, B0`` once more, until a factor changes or ``A`` is gone. Any write that
    PyTorch counts is seen, and one through ``.data`` if it changes a whole factor or component, not single entries.
    """
    if A0 is None or B0 is None or type(A) is not nn.Parameter:
        return _as(dtype, one_pair(A, B, A0, B0))
    factors = (A, B, A0, B0)
    try:
        state = (dtype, *[factor._version for factor in factors], *[factor.data_ptr() for factor in factors])
    except RuntimeError:  # a tensor made in inference mode has no version
        return _as(dtype, one_pair(*factors))
    kept = _kept.get(id(A))
    if kept is not None and kept.fits(A, state):
        return kept.pair
    pair = _as(dtype, one_pair(*factors))
    if not (A.is_contiguous() and B.is_contiguous()):
        return pair
    key, held = id(A), tuple(factor.detach() for factor in factors)
    seen = _of_every_component(held[0], held[1])
    owner = weakref.ref(A, lambda _: _kept.pop(key, None))
    _kept[key] = _Kept(owner, state, held, seen, tuple(entries.clone() for entries in seen), pair)
    return pair


def _of_every_component(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Views of a few entries, one of each row of ``A (R, K)`` and of each column of ``B (N, R)`` at least."""
    (R, K), N = A.shape, B.shape[0]
    rows = next(rows for rows in range(max(1, N // (R + 1)), 0, -1) if gcd(rows, R) == 1)
    return A.view(-1)[:: K + 1], B.view(-1)[:: rows * (R + 1)]


def _as(dtype: torch.dtype, pair: Pair) -> Pair:
    return pair[0].to(dtype), pair[1].to(dtype)
