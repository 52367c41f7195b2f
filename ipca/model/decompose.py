"""Where all layers of a model begin: one shape is a batch on a GPU, a CPU has them side by side, ranks share them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from ipca.config import PCConfig
from ipca.model.start import precision, start_of
from ipca.model.targets import Target
from ipca.model.unquantized_weights import UnquantizedWeights, source_matrix
from ipca.nn import InitialFactors
from ipca.nn.layer_kinds import read_layer
from ipca.nn.quantization import quantization_kind
from ipca.nn.registry import get_layer
from ipca.svd import SpectralCache, cached_window_svd
from ipca.svd.parallel import thread_map, workspace
from ipca.window import Window

_STACK = 32
"""Weights that one batch holds at most: enough to fill a GPU, few enough for the progress bar to move."""


def decompose_targets(
    model: nn.Module,
    targets: Sequence[Target],
    config: PCConfig,
    *,
    cache: SpectralCache | None,
    progress: bool,
    unquantized_weights: UnquantizedWeights | None = None,
) -> list[InitialFactors]:
    """The start of every target, in order; under an initialized process group each rank makes its share.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`ipca.nn.initial_factors`, with the layer's name; on every rank.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if _together() else (0, 1)
    costs = [_cost(_shape(get_layer(model, target.name))) for target in targets]
    mine = share(costs, world)[rank]
    bar = tqdm(total=len(mine), desc="Window SVD", unit="layer", disable=not progress or rank > 0)
    made: dict[int, InitialFactors] = {}
    paths: Counter[str] = Counter()
    error: Exception | None = None
    try:
        with bar:
            for place, start in _starts(model, [targets[i] for i in mine], config, cache, unquantized_weights):
                made[mine[place]] = start
                assert start.svd is not None
                paths[start.svd.path] += 1
                bar.set_postfix(paths, refresh=False)
                bar.update()
    except Exception as problem:  # whatever it is, the other ranks must hear of it
        error = problem
    if world > 1:
        made, error = _exchange(made, error, rank, world)
    if error is not None:
        raise error
    devices = [get_layer(model, target.name).get_parameter("weight").device for target in targets]
    return [_on(made[i], device) for i, device in enumerate(devices)]


def share(costs: Sequence[float], size: int) -> list[list[int]]:
    """Indices into ``costs`` for each of ``size`` processes, so that no process has much more to do than another.

    The costliest first, each to the process with the least so far; the same costs give the same shares, each in order.
    """
    shares: list[list[int]] = [[] for _ in range(size)]
    loads = [0.0] * size
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += costs[index]
    return [sorted(indices) for indices in shares]


def _starts(
    model: nn.Module,
    targets: Sequence[Target],
    config: PCConfig,
    cache: SpectralCache | None,
    unquantized_weights: UnquantizedWeights | None,
) -> Iterator[tuple[int, InitialFactors]]:
    """Each target's place and start: those beside others on a GPU last; a weight is dequantized when its turn comes."""
    modules = [get_layer(model, target.name) for target in targets]
    weights = {i: read_layer(module)[0] for i, module in enumerate(modules) if quantization_kind(module) is None}
    single = {i: weight for i, weight in weights.items() if weight.ndim == 2}  # experts are a batch already
    beside = {i for i, weight in single.items() if weight.is_cuda and not targets[i].window.needs_spectrum}
    alone = [i for i in range(len(targets)) if i not in beside]

    def one(i: int) -> InitialFactors:
        with _named(targets[i].name):
            base = source_matrix(modules[i], targets[i].name, unquantized_weights)
            found = cached_window_svd(base.weight, targets[i].window, **precision(config, base.weight), cache=cache)
            return start_of(targets[i], config, base.weight, found, base.digest, base.source)

    yield from zip(alone, thread_map(one, alone, [workspace(_shape(modules[i])[-2:]) for i in alone]), strict=True)
    for group in _groups(weights, targets, beside):
        first = group[0]
        with _named(targets[first].name):
            stack = torch.stack([weights[i] for i in group])
            found = cached_window_svd(stack, targets[first].window, **precision(config, stack), cache=cache)
        for place, i in enumerate(group):
            with _named(targets[i].name):
                yield i, start_of(targets[i], config, weights[i], found[place])


def _cost(shape: torch.Size) -> float:
    """Of the decomposition of a matrix or a stack, in some unit."""
    return float(math.prod(shape)) * min(shape[-2:])


def _shape(module: nn.Module) -> torch.Size:
    """``(…, out, in)``, without dequantizing."""
    if quantization_kind(module) is None:
        return read_layer(module)[0].shape
    return torch.Size((module.out_features, module.in_features))  # type: ignore[arg-type]


def _groups(weights: Mapping[int, Tensor], targets: Sequence[Target], places: set[int]) -> Iterator[list[int]]:
    """``places`` of weights of one shape, dtype, device and window, at most ``_STACK`` together."""
    groups: dict[tuple[torch.Size, torch.dtype, torch.device, Window], list[int]] = {}
    for i in sorted(places):
        groups.setdefault((weights[i].shape, weights[i].dtype, weights[i].device, targets[i].window), []).append(i)
    for group in groups.values():
        for first in range(0, len(group), _STACK):
            yield group[first : first + _STACK]


def _exchange(
    made: dict[int, InitialFactors], error: Exception | None, rank: int, world: int
) -> tuple[dict[int, InitialFactors], Exception | None]:
    """Every rank's starts, and the first rank's error where one has failed; the tensors on the CPU."""
    everything: dict[int, InitialFactors] = {}
    for source in range(world):
        share = {i: _on(start, torch.device("cpu")) for i, start in made.items()} if source == rank else None
        held = [(share, error if source == rank else None)]
        dist.broadcast_object_list(held, src=source)
        share, problem = held[0]
        if problem is not None:
            return {}, problem if source == rank else _retold(problem, f"rank {source}: {problem}")
        assert share is not None
        everything |= share
    return everything, None


def _on(start: InitialFactors, device: torch.device) -> InitialFactors:
    return replace(start, A0=start.A0.to(device), B0=start.B0.to(device))


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        raise _retold(error, f"{name}: {error}") from None


def _retold(error: Exception, words: str) -> Exception:
    """An error of the same type that says ``words``, or a RuntimeError where the type takes something else."""
    try:
        return type(error)(words)
    except TypeError:
        return RuntimeError(words)


def _together() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
