"""Importance of blocks of singular components: the change of a loss when one is removed from its layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ipca.analysis.linalg import decompose, wide
from ipca.model.batches import as_batches, evaluating
from ipca.model.calibration import measurable
from ipca.model.targets import find_targets
from ipca.nn.layer_kinds import read_layer, write_matrix
from ipca.nn.quantization import quantization_kind
from ipca.nn.registry import get_layer
from ipca.window import Window

Loss = Callable[[nn.Module, Any], float | Tensor]


@dataclass(frozen=True, eq=False)
class BlockImportance:
    """The importance of one layer's components to a loss, block by block; its weight is ``W = U diag(S) Vh``.

    Attributes:
        shape: ``(…, out, in)`` of ``W``; ``d = min(out, in)``.
        edges: ``blocks + 1`` indices from 0 to d; block ``b`` is ``[edges[b], edges[b + 1])``.
        loss: of the model as it is.
        change: ``(blocks,)``, the loss without the block minus ``loss``; float64.
    """

    shape: tuple[int, ...]
    edges: tuple[int, ...]
    loss: float
    change: Tensor

    def quietest(self, rank: int) -> Window:
        """The window of ``rank`` components in the middle of the block of the smallest ``|change|``, as far as it fits.

        Of equal blocks the first; one without which the loss is NaN counts as the worst. Experimental.

        Raises:
            ValueError: ``rank`` is above d.
        """
        d = self.edges[-1]
        Window(0, rank).resolve(d)
        change = self.change.abs().nan_to_num(nan=torch.inf)
        block = int((change == change.min()).nonzero()[0])
        centered = (self.edges[block] + self.edges[block + 1] - rank) // 2
        return Window(min(max(centered, 0), d - rank), rank)


def component_importance(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    *,
    targets: str | Iterable[str] = "all-linear",
    exclude: str | Iterable[str] = (),
    blocks: int = 8,
    progress: bool = True,
) -> dict[str, BlockImportance]:
    """Measure how the loss on held-out data changes without each block of components of each target layer.

    One block of one layer at a time is removed, ``W − U_b S_b Vh_b``; then the weight's bits are restored, after an
    error too. Experimental as a way to choose a window: ``found[layer].quietest(rank)``.

    Args:
        model: plain, its weights loaded. It runs in evaluation mode, and ends as it was, random generators too.
        batches: as ``loss`` takes them; consumed once.
        loss: ``loss(model, batch)``, a number; the mean over the batches counts. Every evaluation starts from the same
            state of torch's random generators.
        targets, exclude: as for :func:`ipca.apply_pc`, of any kind that is not quantized. Of a stack of experts the
            block is removed from all at once.
        blocks: number of parts, of nearly equal size, into which a layer's components are divided.
        progress: show a progress bar.

    Costs a full SVD of every layer, and ``layers · blocks + 1`` evaluations of the loss on all batches.

    Raises:
        TypeError, ValueError: as :func:`ipca.apply_pc`; bad batches, a loss that is no finite number for the model as
            it is, fewer components than blocks, or a quantized layer; the message names it.
    """
    names = [target.name for target in find_targets(model, measurable(targets, exclude))]
    edges = {name: _edges(name, get_layer(model, name), blocks) for name in names}
    held = as_batches(batches)
    found = {}
    with tqdm(total=len(names) * blocks, desc="Importance", unit="block", disable=not progress) as bar:
        before = _mean_loss(model, held, loss)
        if not math.isfinite(before):
            raise ValueError(f"the loss of the unchanged model is {before}, with which no change can be compared.")
        for name in names:
            layer, changes = get_layer(model, name), []
            weight = read_layer(layer)[0]
            for part in _parts(name, weight, edges[name]):
                with _without(layer, part):
                    changes.append(_mean_loss(model, held, loss) - before)
                bar.update()
            change = torch.tensor(changes, dtype=torch.float64, device="cpu")
            found[name] = BlockImportance(tuple(weight.shape), edges[name], before, change)
    return found


def _edges(name: str, layer: nn.Module, blocks: int) -> tuple[int, ...]:
    """The indices where the blocks of a layer begin, and where the last one ends."""
    if quantization_kind(layer) is not None:
        raise ValueError(f"{name}: components of a quantized weight cannot be removed; exclude it, or dequantize it.")
    d = min(read_layer(layer)[0].shape[-2:])
    if not 1 <= blocks <= d:
        raise ValueError(f"{name}: its {d} components cannot be divided into {blocks} blocks; choose another number.")
    return tuple(i * d // blocks for i in range(blocks + 1))


def _parts(name: str, weight: Tensor, edges: tuple[int, ...]) -> Iterator[Tensor]:
    """``U_b S_b Vh_b (…, out, in)`` of each block, float64."""
    U, S, Vh = decompose(name, wide(weight))
    for start, end in pairwise(edges):
        yield (U[..., start:end] * S[..., None, start:end]) @ Vh[..., start:end, :]


@contextmanager
def _without(layer: nn.Module, part: Tensor) -> Iterator[None]:
    """Subtract ``part (…, out, in)`` from the weight of ``layer``, and restore its bits afterwards."""
    kept = read_layer(layer)[0].clone()
    try:
        write_matrix(layer, wide(kept) - part)
        yield
    finally:
        write_matrix(layer, kept)


def _mean_loss(model: nn.Module, batches: list[Any], loss: Loss) -> float:
    with evaluating(model):
        values = [loss(model, batch) for batch in batches]
    for value in values:
        if not isinstance(value, int | float) and not (isinstance(value, Tensor) and value.numel() == 1):
            what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r}"
            raise TypeError(f"loss(model, batch) must return one number, it returned {what}.")
    return sum(float(value) for value in values) / len(values)
