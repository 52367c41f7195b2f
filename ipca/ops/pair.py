"""The factors of a layer as one pair ``D, E``, and pairs kept between calls that need no gradient.

    one pair of factors              D = A                  E = B
    with the frozen pair A0, B0      D = [A − A0; A0]       E = [B, B − B0]        E D = B A − B0 A0

Where ``A = A0`` and ``B = B0`` the product ``E D`` is exactly 0, and where they have moved little the change keeps its
digits: a difference of two products would lose them in rounding.
"""

from __future__ import annotations

import weakref
from math import gcd, log2
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

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


def balanced_pair(
    A: Tensor, B: Tensor, A0: Tensor | None, B0: Tensor | None, scaling: float, x: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, float]:
    """``c A, c B, c A0, c B0, scaling / c²``, where products with ``x`` are in float16 and ``scaling`` is below 1/2.

    The factors of a window with the singular values σ are as large as √(σ / scaling), so that ``z A0ᵀ`` could overflow
    float16 where the layer's output does not, and ``c`` is the power of two nearest to √scaling. Otherwise ``c = 1``.
    """
    if scaling >= 0.5 or scaling <= 0 or (autocast_dtype(x) or x.dtype) != torch.float16:
        return A, B, A0, B0, scaling
    c = 2.0 ** round(log2(scaling) / 2)
    A0, B0 = (None if factor is None else c * factor for factor in (A0, B0))
    return c * A, c * B, A0, B0, scaling / c**2


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives products with ``x``, as for ``nn.Linear``; None where it does not change it."""
    device = x.device.type
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


class _Kept(NamedTuple):
    """A pair, and what shows that it is still that of its factors, whose memory ``factors`` holds.

    Every step of an optimizer ends it. A write through ``.data`` leaves a tensor's version as it is: ``seen`` are
    entries of each component in ``A`` and ``B`` as they are, ``copied`` as they were. The owner is ``A0``: PyTorch
    swaps no tensor that has a weak reference, and ``A`` is what it swaps (``torch.utils.swap_tensors``).
    """

    owner: weakref.ref[Tensor]
    state: tuple[object, ...]
    factors: tuple[Tensor, ...]
    seen: tuple[Tensor, ...]
    copied: tuple[Tensor, ...]
    pair: Pair

    def fits(self, A0: Tensor, state: tuple[object, ...]) -> bool:
        return self.owner() is A0 and self.state == state and all(map(torch.equal, self.seen, self.copied))


LEAST_SEEN = 128
"""Entries of a factor that are compared at least, if it has so many."""
_kept: dict[int, _Kept] = {}
_steps = [0]


def _after_step(*_: object) -> None:
    _steps[0] += 1
    _kept.clear()


# A fused optimizer (``fused=True``) leaves the versions of the parameters that it writes as they are.
register_optimizer_step_post_hook(_after_step)


def optimizer_steps() -> int:
    """The number of steps that optimizers have taken in this process since this module is imported."""
    return _steps[0]


def kept_pair(A: Tensor, B: Tensor, A0: Tensor | None, B0: Tensor | None, dtype: torch.dtype) -> Pair:
    """:func:`one_pair` on a CPU as ``dtype``, without gradients; as it was, if the factors are as they were.

    The pair takes the memory of ``A, B, A0, B0`` once more, until a factor changes, an optimizer takes a step or ``A0``
    is gone. Any write that PyTorch counts is seen, and one through ``.data`` if it changes all of ``A`` or ``B`` or a
    component of theirs, not single entries, nor ``A0`` or ``B0`` alone. Nothing is kept of tensors without values, nor
    under a dispatch mode, which makes tensors of its own kind.
    """
    if A0 is None or B0 is None or type(A) is not nn.Parameter or A.is_meta or torch._C._len_torch_dispatch_stack():
        return _as(dtype, one_pair(A, B, A0, B0))
    factors = (A, B, A0, B0)
    try:
        state = (dtype, *[factor._version for factor in factors], *[factor.data_ptr() for factor in factors])
    except RuntimeError:  # a tensor made in inference mode has no version
        return _as(dtype, one_pair(*factors))
    kept = _kept.get(id(A0))
    if kept is not None and kept.fits(A0, state):
        return kept.pair
    if not (A.is_contiguous() and B.is_contiguous()):
        return _as(dtype, one_pair(*factors))
    key, held = id(A0), tuple(factor.detach() for factor in factors)
    seen = _of_every_component(held[0], held[1])
    copied = tuple(entries.clone() for entries in seen)  # before the pair: another thread may write
    owner = weakref.ref(A0, lambda _: _kept.pop(key, None))
    _kept[key] = kept = _Kept(owner, state, held, seen, copied, _as(dtype, one_pair(*factors)))
    return kept.pair


def drop_kept_pair(A0: Tensor) -> None:
    """Forget the pair kept for ``A0``, and the weak reference to it."""
    _kept.pop(id(A0), None)


def _of_every_component(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Views of some entries, spread over ``A (R, K)`` and ``B (N, R)``: at least one of each component."""
    R = max(1, A.shape[0])
    return _spread(A, A.numel() // R), _spread(B, B.numel() // R)


def _spread(factor: Tensor, length: int) -> Tensor:
    """About ``LEAST_SEEN`` entries or more, in steps that meet every row and column in turn.

    Args:
        length: of a component, which a step is shorter than.
    """
    longest = max(1, min(factor.numel() // LEAST_SEEN, 5 * length // 8))
    step = next(step for step in range(longest, 0, -1) if gcd(step, factor.shape[1]) == 1)
    return factor.view(-1)[::step]


def _as(dtype: torch.dtype, pair: Pair) -> Pair:
    return pair[0].to(dtype), pair[1].to(dtype)
