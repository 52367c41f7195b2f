"""Layer-by-layer decomposition: each weight is read, decomposed, written and released; finished layers are kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn
from tqdm import tqdm

from ipca._hashing import tensor_sha256
from ipca.io.adapter_folder import SavedLayer
from ipca.model.apply import install, train_only_adapter
from ipca.model.decompose import SourceMatrix, cost, map_targets, naming, partition, split_window, window_of
from ipca.model.settings import AdapterSettings
from ipca.model.targets import Target
from ipca.nn.initialization import InitialFactors, count_null
from ipca.nn.layer_kinds import base_sha256
from ipca.nn.registry import get_layer
from ipca.offline.ranks import Ranks
from ipca.offline.source import Source
from ipca.offline.work_folder import WorkFolder
from ipca.svd import SpectralCache


@dataclass(frozen=True)
class FinishedLayer:
    """A layer whose factors lie in the work folder under ``index``, and its record in the adapter's files.

    ``null`` says how many components are 0, and of how many.
    """

    index: int
    target: Target
    saved: SavedLayer
    adapter_dtype: torch.dtype
    null: tuple[int, int]


def decompose_layers(
    source: Source,
    targets: Sequence[Target],
    settings: AdapterSettings,
    work: WorkFolder,
    ranks: Ranks,
    *,
    device: str = "cpu",
    cache: SpectralCache | None = None,
    progress: bool = True,
) -> tuple[list[FinishedLayer], int]:
    """Decompose the layers that ``work`` has not finished yet; the processes of ``ranks`` share them.

    Args:
        targets: what to adapt, the same in every process.
        device: where to decompose; one layer at a time is moved to a GPU.
        progress: show a progress bar, only in the first process.

    Returns:
        Every layer, including those of other processes, and how many were finished before.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`ipca.nn.initial_factors`, with the layer's name.
        OSError: a weight cannot be read, or a finished layer not be written.
    """
    done = set(ranks.broadcast(work.finished(len(targets)) if ranks.is_main else []))
    pending = [index for index in range(len(targets)) if index not in done]
    costs = [cost(targets[index]) for index in pending]
    paths: Counter[str] = Counter()
    bar = tqdm(
        total=len(targets), initial=len(done), desc="Window SVD", unit="layer", disable=not (progress and ranks.is_main)
    )

    def one(index: int) -> str:
        return _decompose(source, targets[index], settings, work, index, device, cache)

    def show() -> None:
        bar.update(work.count() - bar.n)  # redrawn as often as a bar is, however often it is asked

    mine = {pending[k]: targets[pending[k]] for k in partition(costs, ranks.size)[ranks.rank]}
    with bar:
        for _, path in map_targets(one, mine) if device == "cpu" else ((index, one(index)) for index in mine):
            paths[path] += 1
            bar.set_postfix(paths, refresh=False)
            show()
        ranks.barrier(show)
    return [_finished(work, index, target) for index, target in enumerate(targets)], len(done)


def install_layers(
    model: nn.Module, layers: Sequence[FinishedLayer], work: WorkFolder, modules_to_save: Iterable[str] = ()
) -> None:
    """Replace every layer by an adapted one, and let ``modules_to_save`` train whole.

    On a model on the meta device the factors have no values.
    """

    def initial(layer: FinishedLayer) -> InitialFactors:
        factors = work.read_layer(layer.index)[1]
        device = get_layer(model, layer.target.name).get_parameter("weight").device
        A0, B0, saved = factors["A0"].to(device), factors["B0"].to(device), layer.saved
        certificate = saved.init_certificate()
        assert saved.base_sha256 is not None
        assert certificate is not None
        return InitialFactors(A0, B0, saved.window, saved.base_sha256, saved.report(), certificate)

    install(model, ((layer.target, initial(layer)) for layer in layers))
    train_only_adapter(model, modules_to_save)


def _decompose(
    source: Source,
    target: Target,
    settings: AdapterSettings,
    work: WorkFolder,
    index: int,
    device: str,
    cache: SpectralCache | None,
) -> str:
    """Decompose one layer and write it down; returns the path of the decomposition."""
    weight, module = source.weight(target.name).to(device), get_layer(source.model, target.name)
    digest = tensor_sha256(weight)
    base, origin = (base_sha256(module), "dequantized") if target.quantized else (digest, "weight")
    known = [digest] if weight.ndim == 2 else None  # a stack is decomposed, and cached, matrix by matrix
    with naming(target.name):
        found = window_of(target, settings, weight, cache=cache, digests=known)
        initial = split_window(target, settings, SourceMatrix(weight, origin, base), found)
    assert target.kind is not None
    assert initial.svd is not None
    saved = SavedLayer.of(
        target.kind,
        weight.shape,
        initial.window,
        alpha=target.alpha,
        form=target.form,
        dropout=target.dropout,
        base_sha256=initial.base_sha256,
        report=initial.svd,
        certificate=initial.certificate,
        train=target.train,
        magnitude=target.magnitude,
    )
    work.write_layer(index, asdict(saved), {"A0": initial.A0, "B0": initial.B0})
    return initial.svd.path


def _finished(work: WorkFolder, index: int, target: Target) -> FinishedLayer:
    record, tensors = work.read_layer(index)
    saved = SavedLayer(**{**record, "shape": tuple(record["shape"])})
    return FinishedLayer(index, target, saved, tensors["A0"].dtype, count_null(tensors["B0"]))
