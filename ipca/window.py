"""Window: the consecutive singular components of a weight that train, and the rules for where they start.

A weight of shape ``(out, in)`` has ``d = min(out, in)`` singular values, in descending order. A window
``[start, start + rank)`` names ``rank`` of them. ``start`` is an index, or a rule that finds the index for each
layer, so that one setting serves layers of every size.
"""

from __future__ import annotations

import math
import numbers
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_NAMED = {"principal": 0.0, "middle": 0.5, "minor": 1.0}
_FORMS = (
    '"principal", "middle", "minor", a fraction such as "0.33", "start=256", "energy=0.9" or "erank", each also after '
    '"inputs:"'
)
_INPUTS = "inputs:"
TRAINED = ("both", "A", "B")
"""What may train: both factors, or one of them beside the other, which is frozen at its start."""
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]+")


@dataclass(frozen=True, init=False)
class Window:
    """The half-open window ``[start, start + rank)`` of singular components, zero-based, largest first.

    ``start`` is one of

    =============================  =====================================================================================
    an ``int`` or ``"start=256"``  that index; as a text it is never a bare number
    ``"principal"``                0: the largest components, as PiSSA trains (arXiv 2404.02948)
    ``"middle"``                   ``(d - rank) // 2``, the default everywhere in this package
    ``"minor"``                    ``d - rank``: the smallest components, as MiLoRA trains (arXiv 2406.09044)
    ``"0.33"``, see :meth:`at`     ``floor(fraction * (d - rank))``: "0.0" is principal, "1.0" is minor
    ``"energy=0.9"``               the number of leading components that hold 90 % of ``sum(S ** 2)``
    ``"erank"``                    the effective rank ``exp(-sum(p * log p))``, ``p = S / sum(S)``, rounded down
                                   (Roy & Vetterli, "The effective rank", EUSIPCO 2007)
    ``"inputs:minor"``, …          the same of the directions of the layer's inputs instead of its weight's components
    ``"auto"``                     experimental: found from inputs of the model
    =============================  =====================================================================================

    ``"energy=…"`` and ``"erank"`` look at the layer's singular values and never start later than ``d - rank``.

    After ``"inputs:"`` any of the other rules but ``"auto"`` counts the ``in`` eigenvectors ``v_i`` of the second
    moment of the layer's inputs, ``C = mean of x xᵀ (in, in)``, instead of the d singular vectors of its weight, the
    directions with the largest energy ``v_iᵀ C v_i`` first (``d = in``, ``S_i² = v_iᵀ C v_i``). What trains is the
    part of the weight that acts on them, ``W V_w V_wᵀ``. ``"inputs:minor"`` are directions that the inputs hardly have,
    their null space, as LoRA-Null trains (arXiv 2503.02659); ``"inputs:principal"`` are those they have most. Like
    ``"auto"`` it takes ``calibration=``, batches of unlabeled inputs, of :func:`ipca.apply_pc` or
    :func:`ipca.peft.prepare`.

    "Least but not Last" (arXiv 2602.03493) uses one index for a whole model: ``Window(256, rank)`` of d = 768 for
    ViT-B and ``Window(2048, rank)`` of d = 4096 for LLaMA-2-7B.

    >>> ipca.Window.middle(16).resolve(768)
    Window(start=376, rank=16)
    >>> ipca.Window("start=256", 16) == ipca.Window(256, 16)
    True

    Args:
        start: where the window begins, as above; a fraction as a float is :meth:`at`.
        rank: the number of components, at least 1.
        basis: what is counted, ``"weight"`` or ``"inputs"``; default what ``start`` says, the weight without a prefix.

    Raises:
        TypeError: ``start`` or ``rank`` has the wrong type.
        ValueError: ``rank`` is below 1, ``start`` is negative, or the text is none of the forms above.
    """

    start: int | str
    rank: int
    basis: str

    def __init__(self, start: int | str, rank: int, basis: str | None = None) -> None:
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise TypeError(f"rank must be an int, got {rank!r}.")
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}.")
        if basis not in (None, "weight", "inputs"):
            raise ValueError(f"basis must be 'weight' or 'inputs', got {basis!r}.")
        if isinstance(start, str) and start.strip().lower().startswith(_INPUTS):
            if basis == "weight":
                raise ValueError(f"window {start!r} is of the inputs, but basis='weight' was given too; leave it out.")
            start, basis = start.strip()[len(_INPUTS) :], "inputs"
        start = _normalize(start)
        if start == "auto" and basis == "inputs":
            raise ValueError("window 'auto' finds a window of the weight; write 'inputs:minor' or another rule.")
        for name, value in (("start", start), ("rank", rank), ("basis", basis or "weight")):
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return f"Window(start={self.text if self.basis == 'inputs' else self.start!r}, rank={self.rank})"

    @classmethod
    def principal(cls, rank: int) -> Window:
        """The ``rank`` largest components."""
        return cls("principal", rank)

    @classmethod
    def middle(cls, rank: int) -> Window:
        """The ``rank`` components in the middle of the index range."""
        return cls("middle", rank)

    @classmethod
    def minor(cls, rank: int) -> Window:
        """The ``rank`` smallest components."""
        return cls("minor", rank)

    @classmethod
    def at(cls, fraction: float, rank: int) -> Window:
        """The window that starts at ``floor(fraction * (d - rank))``, ``0 <= fraction <= 1``."""
        if isinstance(fraction, bool) or not isinstance(fraction, numbers.Real):
            raise TypeError(f"a window's fraction must be a number in [0, 1], got {fraction!r}.")
        return cls(str(float(fraction)), rank)

    @classmethod
    def energy(cls, quantile: float, rank: int) -> Window:
        """The window of ``rank`` components right after those that hold ``quantile`` of the energy ``sum(S ** 2)``."""
        return cls(f"energy={quantile}", rank)

    @classmethod
    def effective_rank(cls, rank: int) -> Window:
        """The window that starts at the layer's effective rank."""
        return cls("erank", rank)

    @property
    def text(self) -> str:
        """The text form of ``start``, as the command line and configuration files write it."""
        text = f"start={self.start}" if isinstance(self.start, int) else self.start
        return f"{_INPUTS}{text}" if self.basis == "inputs" else text

    @property
    def index(self) -> int:
        """``start`` as an index; ValueError unless the window is resolved."""
        if not isinstance(self.start, int):
            raise ValueError(f"{self} has no index before resolve().")
        return self.start

    @property
    def needs_spectrum(self) -> bool:
        """Whether :meth:`resolve` must be given the singular values."""
        looks = isinstance(self.start, str) and (self.start == "erank" or self.start.startswith("energy="))
        return looks and self.basis == "weight"

    @property
    def needs_calibration(self) -> bool:
        """Whether the window is found from inputs of the model, which :meth:`resolve` does not have."""
        return self.start == "auto" or self.basis == "inputs"

    @property
    def of_moment(self) -> Window:
        """A window of the inputs as the same window of their second moment ``C (in, in)``."""
        return Window(self.start, self.rank)

    def check_fits(self, shape: Sequence[int]) -> None:
        """Raise ValueError where the window does not fit a weight ``(…, out, in)``, as far as its shape tells."""
        d, inputs = min(shape[-2:]), shape[-1]
        if self.basis == "inputs" and isinstance(self.start, int) and self.start + self.rank > inputs:
            raise ValueError(
                f"window {self.text!r} of rank {self.rank} ends at {self.start + self.rank}, but there are only "
                f"{inputs} inputs; lower its start or rank, or use a relative window such as 'inputs:minor'."
            )
        if not (self.needs_spectrum or self.needs_calibration):
            self.resolve(d)
        elif self.rank > d:
            raise ValueError(f"rank {self.rank} is above its {d} singular values.")

    def resolve(self, d: int, singular_values: Tensor | None = None) -> Window:
        """The same window with ``start`` as an index, for a weight of ``d`` singular values.

        Args:
            d: ``min(out, in)`` of the weight.
            singular_values: shape ``(d,)``, descending; read only where :attr:`needs_spectrum`.

        Raises:
            ValueError: the window does not fit into ``[0, d)``, or is found from inputs.
        """
        if self.rank > d:
            raise ValueError(
                f"window {self.text!r} of rank {self.rank} needs {self.rank} singular values, but there are only {d}; "
                "lower the rank."
            )
        if self.needs_calibration:
            starts = ", or give starts that ipca.analysis.suggest_windows found" if self.start == "auto" else ""
            raise ValueError(
                f"window {self.text!r} is found from inputs of the model: call ipca.apply_pc(model, …, calibration="
                f"batches), or with a PCConfig ipca.peft.prepare(model, config, calibration=batches){starts}."
            )
        if self.needs_spectrum:
            if singular_values is None:
                raise ValueError(f"{self} depends on the singular values; pass singular_values.")
            start = min(_spectral_start(self.text, singular_values), d - self.rank)
        elif isinstance(self.start, int):
            start = self.start
        else:
            fraction = _NAMED[self.start] if self.start in _NAMED else float(self.start)
            start = int(fraction * (d - self.rank) + 1e-9)
        if start + self.rank > d:
            raise ValueError(
                f"window {self.text!r} of rank {self.rank} ends at {start + self.rank}, but there are only {d} "
                "singular values; lower its start or rank, or use a relative window such as 'middle'."
            )
        return Window(start, self.rank)


def as_window(window: Window | str | float, rank: int | None, default_rank: int = 16) -> Window:
    """A :class:`Window` from any spelling: a window, or a start and a rank.

    Every entrance takes the same spellings: a :class:`Window`, one of its texts, or a ``float`` in [0, 1], which is a
    fraction. A whole number, which could be an index or a fraction, raises.

    Raises:
        TypeError: ``window`` is something else.
        ValueError: a whole number, an unknown text, a fraction outside of [0, 1], or both ``window`` and ``rank`` name
            a rank, and they differ.
    """
    if isinstance(window, Window):
        if rank is not None and rank != window.rank:
            raise ValueError(f"{window} has rank {window.rank}, but rank={rank} was given too; give one of them.")
        return window
    rank = default_rank if rank is None else rank
    if isinstance(window, numbers.Integral) and not isinstance(window, bool):
        _raise_ambiguous(str(window))
    if isinstance(window, numbers.Real) and not isinstance(window, bool):
        return Window.at(window, rank)
    if not isinstance(window, str):
        raise TypeError(f"a window is {_FORMS}, a fraction as a float, or an ipca.Window; got {window!r}.")
    return Window(window, rank)


def as_pattern_window(pattern: str, window: Window | str | float, rank: int, rank_word: str) -> str:
    """The text of ``window_pattern[pattern]``, which holds no rank.

    Args:
        rank: that of the layers, ``rank_pattern[pattern]`` or the general one.
        rank_word: the argument of the general one, for the message.

    Raises:
        TypeError, ValueError: as :func:`as_window`, or a :class:`Window` of another rank.
    """
    try:
        text = as_window(window, None).text
    except (TypeError, ValueError) as error:
        raise type(error)(f"window_pattern[{pattern!r}]: {error}") from None
    if isinstance(window, Window) and window.rank != rank:
        raise ValueError(
            f"window_pattern[{pattern!r}] is {window}, but layers train {rank} components: set "
            f"rank_pattern[{pattern!r}] or {rank_word}, or give only the start, {text!r}."
        )
    return text


def check_factors(train: str, magnitude: float | str) -> None:
    """Raise TypeError or ValueError where ``train`` or ``magnitude`` is none of a layer's, see ``ipca.nn.LinearPC``."""
    if train not in TRAINED:
        raise ValueError(f"train must be one of {', '.join(TRAINED)}, the factors that train; got {train!r}.")
    if isinstance(magnitude, bool) or not isinstance(magnitude, (int, float, str)):
        raise TypeError(f"magnitude must be 'sigma' or a number, got {magnitude!r}.")
    if magnitude != "sigma" and (isinstance(magnitude, str) or not (math.isfinite(magnitude) and magnitude > 0)):
        raise ValueError(
            "magnitude must be 'sigma', each component's own singular value, or a positive number, the size of all of "
            f"them over the root mean square of the layer's singular values; got {magnitude!r}."
        )


def _normalize(start: int | str) -> int | str:
    """``start`` as an index, or as the one text of its rule."""
    if isinstance(start, float):
        raise TypeError(f"Window(start, rank) takes an index or a text; for a fraction write Window.at({start}, rank).")
    if isinstance(start, bool) or not isinstance(start, (int, str)):
        raise TypeError(f"A window starts at an int or is {_FORMS}; got {start!r}.")
    if isinstance(start, int):
        if start < 0:
            raise ValueError(f"A window cannot start at {start}: indices count from 0, the largest singular value.")
        return start
    text = start.strip().lower()
    if text in _NAMED or text in ("erank", "auto"):
        return text
    if _WHOLE_NUMBER.fullmatch(text):
        _raise_ambiguous(text)
    key, equals, value = text.rpartition("=")
    try:
        if key not in ("start", "energy") and equals:
            raise ValueError
        number = int(value) if key == "start" else float(value)
    except ValueError:
        raise ValueError(f"Unknown window {start!r}: use {_FORMS}.") from None
    if isinstance(number, int):
        return _normalize(number)
    if not 0.0 <= number <= 1.0:
        meant = f" For an index write 'start={int(number)}'." if number > 1 and number.is_integer() else ""
        raise ValueError(f"The fraction in window {start!r} must lie in [0, 1].{meant}")
    return f"{key}={number}" if key else str(number)


def _raise_ambiguous(number: str) -> NoReturn:
    index = _normalize(int(number))  # raises for a negative one
    fraction = f", '{index}.0' for the fraction" if index in (0, 1) else ""
    raise ValueError(
        f"window {number} is ambiguous, an index or a fraction: write 'start={index}' for the index{fraction}."
    )


def _spectral_start(text: str, singular_values: Tensor) -> int:
    S = singular_values.double()
    if not S.any():
        return 0
    if text == "erank":
        p = S / S.sum()
        return int(math.exp(-p.xlogy(p).sum().item()) * (1 + 1e-12))
    energy = S.square().cumsum(0)
    quantile = float(text.removeprefix("energy="))
    return int((energy < quantile * energy[-1] * (1 - 1e-12)).sum()) + (quantile > 0)
