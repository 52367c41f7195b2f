"""The methods by name, and what each of them can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ipca.lab.continual import lora, windows
from ipca.lab.continual.method import Method, Setup
from ipca.lab.continual.osf import osf
from ipca.lab.continual.sd_lora import sd_lora
from ipca.nn.layer_kinds import LINEAR


@dataclass(frozen=True)
class Kind:
    """What a name stands for.

    Attributes:
        make: the method for one model.
        folds: whether a task's factors are folded into the weights when it ends, so that they can be kept apart.
        factors: whether the layers are :class:`ipca.nn.WindowLayer`, one factor of which can be frozen, and which
            :func:`ipca.save_adapter` writes while a task runs.
        layers: the kinds of layers it adapts, see :mod:`ipca.nn.layer_kinds`; None for all.
        frozen: which factors may be frozen. Plain LoRA starts at ``B = 0``, and would learn nothing with that frozen;
            O-LoRA's penalty is about the very ``A``.
    """

    make: Callable[[Setup], Method]
    folds: bool = True
    factors: bool = True
    layers: tuple[str, ...] | None = None
    frozen: tuple[str, ...] = ("A", "B")


METHODS = {
    "fresh": Kind(windows.fresh),
    "fixed": Kind(windows.fixed),
    "disjoint": Kind(windows.disjoint),
    "pissa": Kind(windows.principal),
    "milora": Kind(windows.minor),
    "lora": Kind(lora.one_lora, folds=False, frozen=("A",)),
    "lora-fresh": Kind(lora.fresh_lora, frozen=("A",)),
    "o-lora": Kind(lora.o_lora, frozen=()),
    "sd-lora": Kind(sd_lora, folds=False, factors=False, layers=LINEAR, frozen=()),
    "osf": Kind(osf, folds=False, factors=False, layers=("linear",), frozen=()),
}
"""Every method of :class:`ipca.lab.continual.ContinualLearner`; docs/continual.md describes them."""


def find_kind(method: str) -> Kind:
    """What the name ``method`` stands for.

    Raises:
        ValueError: it is none of :data:`METHODS`.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}.")
    return METHODS[method]
