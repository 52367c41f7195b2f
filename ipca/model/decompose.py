"""Initial factors of all target layers: batched by shape on a GPU, threaded on a CPU, sharded across ranks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple, TypedDict, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from ipca.model.settings import AdapterSettings
from ipca.model.targets import Target
from ipca.nn.initialization import InitialFactors, factors_from_svd
from ipca.nn.layer_kinds import base_sha256, is_quantized, layer_kind, read_layer
from ipca.nn.offload import stored_tensor
from ipca.nn.quantization import quantized_sha256
from ipca.nn.quantized_linear import quantized_source
from ipca.nn.registry import get_layer
from ipca.svd.cache import SpectralCache, cached_window_svd
from ipca.svd.parallel import TOGETHER, thread_map, workspace
from ipca.svd.result import WindowSVD
from ipca.window import Window

Result = TypeVar("Result")
UnquantizedWeights = Mapping[str, Tensor] | Callable[[str], Tensor]
"""The weight ``(out, in)`` that a quantized layer had before, by the layer's path."""
_STACK = 32
"""Weights that one batch holds at most: enough to fill a GPU, few enough for the progress bar to move."""


class SourceMatrix(NamedTuple):
    """The matrix that a layer's window is taken from.

    ``source`` is its name (:class:`ipca.svd.SVDReport`), ``digest`` the base's hash where it is known.
    """

    weight: Tensor
    source: str
    digest: str | None


def source_matrix(
    module: nn.Module, name: str, unquantized_weights: UnquantizedWeights | None = None, kind: str | None = None
) -> SourceMatrix:
    """A layer's own weight; for a quantized layer the unquantized weight where it is given, else the dequantized one.

    ``kind`` as for :func:`ipca.nn.layer_kinds.read_layer`.

    Raises:
        TypeError, ValueError: as :func:`ipca.nn.quantized_linear.quantized_source`, or a callable's own.
    """
    kind = kind or layer_kind(module)
    if not is_quantized(kind):
        return SourceMatrix(read_layer(module, kind)[0], "weight", None)
    found = None
    if unquantized_weights is not None:
        mapped = isinstance(unquantized_weights, Mapping)
        found = unquantized_weights[name] if mapped else unquantized_weights(name)  # type: ignore[index,operator]
        if not isinstance(found, Tensor):
            raise TypeError(f"unquantized_weights gave {type(found).__name__}, not a tensor.")
    weight, source = quantized_source(module, found)
    return SourceMatrix(weight, source, quantized_sha256(module))


def check_unquantized_weights(targets: Sequence[Target], unquantized_weights: object) -> None:
    """Raise where ``unquantized_weights`` is no mapping or function, lacks a layer, or no layer is quantized.

    Raises:
        TypeError, ValueError: the message names what is missing.
    """
    if unquantized_weights is None:
        return
    if not isinstance(unquantized_weights, Mapping) and not callable(unquantized_weights):
        raise TypeError(
            "unquantized_weights must be a mapping or a function from a layer's path to its weight, "
            f"got {unquantized_weights!r}; for a checkpoint folder pass ipca.load_unquantized_weights(folder)."
        )
    quantized = [target.name for target in targets if target.quantized]
    if not quantized:
        raise ValueError(
            "unquantized_weights are for quantized layers, and none of the layers to adapt is; leave it out."
        )
    given = unquantized_weights
    missing = [name for name in quantized if isinstance(given, Mapping) and name not in given]
    if missing:
        raise ValueError(
            f"unquantized_weights lacks the weight of {missing[0]} ({len(missing)} of {len(quantized)} layers are "
            "missing); add it, or exclude the layer."
        )


class Precision(TypedDict):
    """Arguments of :func:`ipca.window_svd`."""

    tol: float | str
    dtype: torch.dtype


def precision(settings: AdapterSettings, weight: Tensor) -> Precision:
    """The tolerance and the dtype of a decomposition of ``weight``: float64 where its device has that."""
    return Precision(tol=settings.tol, dtype=weight.dtype if weight.device.type == "mps" else torch.float64)


def window_of(
    target: Target,
    settings: AdapterSettings,
    weight: Tensor,
    *,
    window: Window | None = None,
    cache: SpectralCache | None = None,
    digests: Sequence[str] | None = None,
) -> WindowSVD:
    """The target's window of ``weight``, or another ``window``.

    Args:
        digests: ``tensor_sha256`` of each matrix, where it is known already.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`ipca.window_svd`.
    """
    window = target.window if window is None else window
    return cached_window_svd(weight, window, **precision(settings, weight), cache=cache, digests=digests)


def split_window(target: Target, settings: AdapterSettings, matrix: SourceMatrix, found: WindowSVD) -> InitialFactors:
    """The target's initial factors from ``found``, the window of ``matrix``; raises as :func:`factors_from_svd`."""
    factors = factors_from_svd(
        matrix.weight,
        found,
        scaling=target.scaling,
        form=target.form,
        adapter_dtype=settings.factor_dtype(matrix.weight.dtype),
        magnitude=target.magnitude,
        digest=matrix.digest,
    )
    assert factors.svd is not None
    return replace(factors, svd=replace(factors.svd, source=matrix.source))


def decompose_targets(
    model: nn.Module,
    targets: Sequence[Target],
    settings: AdapterSettings,
    *,
    cache: SpectralCache | None,
    progress: bool,
    unquantized_weights: UnquantizedWeights | None = None,
    share: bool = True,
) -> list[InitialFactors]:
    """The initial factors of every target, in order.

    Under an initialized process group each rank computes a part of them, or with ``share=False`` all, without waiting
    for another rank.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`ipca.window_svd` or :func:`factors_from_svd`, with the layer's
            name; on every rank.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if _is_distributed() else (0, 1)
    world = world if share else 1
    mine = partition([cost(target) for target in targets], world)[rank % world]
    bar = tqdm(total=len(mine), desc="Window SVD", unit="layer", disable=not progress or rank > 0)
    made: dict[int, InitialFactors] = {}
    paths: Counter[str] = Counter()
    error: Exception | None = None
    modules = [get_layer(model, target.name) for target in targets]
    try:
        with bar:
            own = ([targets[i] for i in mine], [modules[i] for i in mine])
            for place, factors in _decompose(*own, settings, cache, unquantized_weights):
                made[mine[place]] = factors
                assert factors.svd is not None
                paths[factors.svd.path] += 1
                bar.set_postfix(paths, refresh=False)
                bar.update()
    except Exception as problem:  # any error must reach the other ranks, which wait
        error = problem
    if world > 1:
        made, error = _exchange(made, error, rank, world)
        error = error or _check_same([target.name for target in targets], modules, made, set(mine))
    if error is not None:
        raise error
    return [_to_device(made[i], stored_tensor(module, "weight").device) for i, module in enumerate(modules)]


def cost(target: Target) -> float:
    """The cost of a target's decomposition, in some unit."""
    return float(math.prod(target.shape)) * min(target.shape[-2:])


def partition(costs: Sequence[float], size: int) -> list[list[int]]:
    """Indices into ``costs`` for each of ``size`` processes, with about the same total for each.

    The costliest first, each to the process with the least so far; equal costs give equal shares, each in order.
    """
    shares: list[list[int]] = [[] for _ in range(size)]
    loads = [0.0] * size
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += costs[index]
    return [sorted(indices) for indices in shares]


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Prefix the message of an error within the block with the layer's path."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        raise _reworded(error, f"{name}: {error}") from None


def _decompose(
    targets: Sequence[Target],
    modules: Sequence[nn.Module],
    settings: AdapterSettings,
    cache: SpectralCache | None,
    unquantized_weights: UnquantizedWeights | None,
) -> Iterator[tuple[int, InitialFactors]]:
    """Each target's index and factors, batches of a GPU last; a weight is dequantized just before its decomposition."""
    batched = {i for i, target in enumerate(targets) if _can_batch(target, modules[i])}
    single = [i for i in range(len(targets)) if i not in batched]

    def one(i: int) -> InitialFactors:
        with naming(targets[i].name):
            matrix = source_matrix(modules[i], targets[i].name, unquantized_weights, targets[i].kind)
            return split_window(
                targets[i], settings, matrix, window_of(targets[i], settings, matrix.weight, cache=cache)
            )

    yield from map_targets(one, {i: targets[i] for i in single})
    weights = {i: read_layer(modules[i], targets[i].kind)[0] for i in sorted(batched)}
    for group in _groups(weights, targets):
        first = targets[group[0]]
        with naming(first.name):
            found = window_of(first, settings, torch.stack([weights[i] for i in group]), cache=cache)
        for place, i in enumerate(group):
            with naming(targets[i].name):
                matrix = SourceMatrix(weights[i], "weight", None)
                yield i, split_window(targets[i], settings, matrix, found[place])


def map_targets(work: Callable[[int], Result], targets: Mapping[int, Target]) -> Iterator[tuple[int, Result]]:
    """Each target's index and ``work(index)``; raises whatever ``work`` raises.

    Large ones come first, one after another with all threads, then the others side by side, the costliest first, as the
    last ones leave threads idle.
    """
    rooms = {i: workspace(target.shape[-2:], [target.window]) for i, target in targets.items()}
    large = [i for i in targets if 2 * rooms[i] > TOGETHER]
    small = sorted(targets.keys() - set(large), key=lambda i: (-cost(targets[i]), i))
    for group in (large, small):
        yield from zip(group, thread_map(work, group, [rooms[i] for i in group]), strict=True)


def _can_batch(target: Target, module: nn.Module) -> bool:
    """Whether the weight is decomposed in a batch of its shape; a stack of experts is a batch already."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.is_cuda and len(target.shape) == 2 and not target.quantized and not target.window.needs_spectrum


def _groups(weights: Mapping[int, Tensor], targets: Sequence[Target]) -> Iterator[list[int]]:
    """Indices of weights of one shape, dtype, device and window, at most ``_STACK`` together."""
    groups: dict[tuple[torch.Size, torch.dtype, torch.device, Window], list[int]] = {}
    for i, weight in weights.items():
        groups.setdefault((weight.shape, weight.dtype, weight.device, targets[i].window), []).append(i)
    for group in groups.values():
        for first in range(0, len(group), _STACK):
            yield group[first : first + _STACK]


def _exchange(
    made: dict[int, InitialFactors], error: Exception | None, rank: int, world: int
) -> tuple[dict[int, InitialFactors], Exception | None]:
    """Every rank's factors, and the first rank's error where one has failed; the tensors on the CPU."""
    everything: dict[int, InitialFactors] = {}
    for source in range(world):
        mine = {i: _to_device(f, torch.device("cpu")) for i, f in made.items()} if source == rank else None
        held = [(mine, error if source == rank else None)]
        dist.broadcast_object_list(held, src=source)
        theirs, problem = held[0]
        if problem is not None:
            return {}, problem if source == rank else _reworded(problem, f"rank {source}: {problem}")
        assert theirs is not None
        everything |= theirs
    return everything, None


def _check_same(
    names: Sequence[str], modules: Sequence[nn.Module], made: Mapping[int, InitialFactors], mine: Container[int]
) -> Exception | None:
    """A ValueError, in every process, where one has another weight than that whose factors were made elsewhere."""
    others = [i for i in range(len(names)) if i not in mine]
    digests = thread_map(lambda i: base_sha256(modules[i]), others, [1.0] * len(others))
    differ = [names[i] for i, digest in zip(others, digests, strict=True) if digest != made[i].base_sha256]
    found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, differ)
    if not any(found):
        return None
    rank = next(rank for rank, names in enumerate(found) if names)
    return ValueError(
        f"{found[rank][0]} has other values in the process of rank {rank} ({len(found[rank])} of {len(names)} layers "
        "differ), and the processes share the windows; load the same weights in all of them, for example after one "
        "torch.manual_seed."
    )


def _to_device(factors: InitialFactors, device: torch.device) -> InitialFactors:
    return replace(factors, A0=factors.A0.to(device), B0=factors.B0.to(device))


def _reworded(error: Exception, message: str) -> Exception:
    """An error of the same type with another message, or a RuntimeError where the type takes something else."""
    try:
        return type(error)(message)
    except TypeError:
        return RuntimeError(message)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
