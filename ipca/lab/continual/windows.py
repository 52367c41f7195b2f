"""Methods that train windows: a new decomposition for every task, or windows of the original weights' basis."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ipca._atomic import uninterrupted
from ipca.analysis.linalg import check_finite
from ipca.lab.continual.method import Method, Setup
from ipca.model.apply import adapt, install, train_only_adapter
from ipca.model.decompose import SourceMatrix, source_matrix, split_window, window_of
from ipca.model.targets import Target
from ipca.nn.initialization import InitialFactors
from ipca.nn.registry import get_layer
from ipca.svd import WindowSVD
from ipca.window import Window


def fresh(setup: Setup) -> Method:
    """For every task the window of the current weights."""
    return Method(begin=lambda model, index: _adapt_current(model, setup))


def principal(setup: Setup) -> Method:
    """:func:`fresh` with the largest components, as in PiSSA (arXiv 2404.02948)."""
    return fresh(replace(setup, settings=replace(setup.settings, window="principal", window_pattern={})))


def minor(setup: Setup) -> Method:
    """:func:`fresh` with the smallest components, as in MiLoRA (arXiv 2406.09044)."""
    return fresh(replace(setup, settings=replace(setup.settings, window="minor", window_pattern={})))


def fixed(setup: Setup) -> Method:
    """The same window of the original weights for every task."""
    return _windows_of_basis(setup, 1)


def disjoint(setup: Setup) -> Method:
    """For every task another window of the original weights.

    The block of ``tasks · rank`` components at the position that ``settings.window`` gives a window of that size is
    split into windows of ``rank``; the first task gets the one with the largest singular values.

    Raises:
        ValueError: ``tasks`` is None, or a layer has fewer components than that; the message names it.
    """
    if setup.tasks is None:
        raise ValueError("method 'disjoint' divides the components among all tasks; pass their number as tasks=….")
    return _windows_of_basis(setup, setup.tasks)


def _windows_of_basis(setup: Setup, windows: int) -> Method:
    basis = _Basis(setup, windows)
    return Method(begin=basis.begin, state=basis.tensors)


def _adapt_current(model: nn.Module, setup: Setup) -> None:
    adapt(model, setup.settings, cache=setup.cache, progress=False)


class _Basis:
    """``windows`` adjacent windows of the weights at the first task; task ``i`` trains window ``i % windows``.

    The initial factors are ``U_w √(S_w / scaling)`` and ``√(S_w / scaling) Vh_w`` of those weights, whatever has been
    folded into the weights since; the layer keeps the remainder, so its function is that of the current weights.
    """

    def __init__(self, setup: Setup, windows: int) -> None:
        self.setup, self.windows = setup, windows
        self.blocks: dict[str, WindowSVD] = {}

    def tensors(self) -> Iterable[Tensor]:
        return [tensor for block in self.blocks.values() for tensor in (block.U, block.S, block.Vh)]

    def begin(self, model: nn.Module, index: int) -> None:
        blocks = self.blocks or {target.name: self._block(model, target) for target in self.setup.targets}
        factors = [self._initial_factors(model, target, blocks[target.name], index) for target in self.setup.targets]
        self.blocks = blocks
        with uninterrupted():
            install(model, zip(self.setup.targets, factors, strict=True))
            train_only_adapter(model, self.setup.modules_to_save)

    def _block(self, model: nn.Module, target: Target) -> WindowSVD:
        weight = source_matrix(get_layer(model, target.name), target.name).weight
        check_finite(target.name, weight)
        window = Window(target.window.start, self.windows * target.window.rank)
        return window_of(target, self.setup.settings, weight, window=window, cache=self.setup.cache)

    def _initial_factors(self, model: nn.Module, target: Target, block: WindowSVD, index: int) -> InitialFactors:
        weight = source_matrix(get_layer(model, target.name), target.name).weight
        part = part_of(block, index % self.windows, target.window.rank, weight.device)
        target = replace(target, window=part.report.window)
        return split_window(target, self.setup.settings, SourceMatrix(weight, "weight", None), part)


def part_of(block: WindowSVD, place: int, rank: int, device: torch.device) -> WindowSVD:
    """Components ``[place · rank, (place + 1) · rank)`` of ``block`` on ``device``; of a stack, of every matrix."""
    part = slice(place * rank, (place + 1) * rank)
    reports = tuple(replace(r, window=Window(r.window.index + part.start, rank)) for r in block.reports)
    U, S, Vh = (factor.to(device) for factor in (block.U[..., part], block.S[..., part], block.Vh[..., part, :]))
    return WindowSVD(U, S, Vh, reports)
