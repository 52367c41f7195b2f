"""Methods that train windows: a new decomposition for every task, or windows of the original weights' one basis."""

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
    """For every task the window of the weights as they are then."""
    return Method(begin=lambda model, index: _apply(model, setup))


def principal(setup: Setup) -> Method:
    """:func:`fresh` with the largest components, as PiSSA starts (arXiv 2404.02948)."""
    return fresh(replace(setup, config=replace(setup.config, window="principal", window_pattern={})))


def minor(setup: Setup) -> Method:
    """:func:`fresh` with the smallest components, as MiLoRA starts (arXiv 2406.09044)."""
    return fresh(replace(setup, config=replace(setup.config, window="minor", window_pattern={})))


def fixed(setup: Setup) -> Method:
    """The same window of the original weights for every task."""
    return _of_basis(setup, 1)


def disjoint(setup: Setup) -> Method:
    """For every task another window of the original weights.

    The block of ``tasks · rank`` components where ``config.window`` puts a window of that size is cut into windows of
    ``rank``: the first task gets those with the largest singular values.

    Raises:
        ValueError: ``tasks`` is None, or a layer has fewer components than that; the message names it.
    """
    if setup.tasks is None:
        raise ValueError("method 'disjoint' shares the components out among all tasks; say how many with tasks=….")
    return _of_basis(setup, setup.tasks)


def _of_basis(setup: Setup, windows: int) -> Method:
    basis = _Basis(setup, windows)
    return Method(begin=basis.begin, state=basis.tensors)


def _apply(model: nn.Module, setup: Setup) -> None:
    adapt(model, setup.config, cache=setup.cache, progress=False)


class _Basis:
    """``windows`` adjacent windows of the weights that the first task finds; task ``i`` trains window ``i % windows``.

    The factors start at ``U_w √(S_w / scaling)`` and ``√(S_w / scaling) Vh_w`` of those weights, whatever was folded
    into the weights since; the layer keeps what remains, so that its function is that of the weights as they are.
    """

    def __init__(self, setup: Setup, windows: int) -> None:
        self.setup, self.windows = setup, windows
        self.blocks: dict[str, WindowSVD] = {}

    def tensors(self) -> Iterable[Tensor]:
        return [tensor for block in self.blocks.values() for tensor in (block.U, block.S, block.Vh)]

    def begin(self, model: nn.Module, index: int) -> None:
        blocks = self.blocks or {target.name: self._block(model, target) for target in self.setup.targets}
        starts = [self._start(model, target, blocks[target.name], index) for target in self.setup.targets]
        self.blocks = blocks
        with uninterrupted():
            install(model, zip(self.setup.targets, starts, strict=True))
            train_only_adapter(model, self.setup.modules_to_save)

    def _block(self, model: nn.Module, target: Target) -> WindowSVD:
        weight = source_matrix(get_layer(model, target.name), target.name).weight
        check_finite(target.name, weight)
        window = Window(target.window.start, self.windows * target.window.rank)
        return window_of(target, self.setup.config, weight, window=window, cache=self.setup.cache)

    def _start(self, model: nn.Module, target: Target, block: WindowSVD, index: int) -> InitialFactors:
        weight = source_matrix(get_layer(model, target.name), target.name).weight
        piece = part_of(block, index % self.windows, target.window.rank, weight.device)
        target = replace(target, window=piece.report.window)
        return split_window(target, self.setup.config, SourceMatrix(weight, "weight", None), piece)


def part_of(block: WindowSVD, place: int, rank: int, device: torch.device) -> WindowSVD:
    """Components ``[place · rank, (place + 1) · rank)`` of ``block`` on ``device``; of a stack, of every matrix."""
    part = slice(place * rank, (place + 1) * rank)
    reports = tuple(replace(r, window=Window(r.window.index + part.start, rank)) for r in block.reports)
    U, S, Vh = (factor.to(device) for factor in (block.U[..., part], block.S[..., part], block.Vh[..., part, :]))
    return WindowSVD(U, S, Vh, reports)
