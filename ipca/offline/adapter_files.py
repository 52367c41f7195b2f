"""The adapter's files from a work's finished layers: those of :func:`ipca.save_adapter`, byte for byte."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from ipca._version import __version__
from ipca.io.adapter_folder import SIDECAR
from ipca.io.export_formats import write_config
from ipca.io.peft_format import WEIGHTS, join_factors
from ipca.io.peft_kinds import factor_keys, to_peft, wrappers_around
from ipca.model.apply import adapted_layers
from ipca.offline.decompose import FinishedLayer
from ipca.offline.stream_file import write_tensors
from ipca.offline.work_folder import WorkFolder


def write_adapter(
    model: nn.Module,
    layers: Sequence[FinishedLayer],
    work: WorkFolder,
    folder: Path,
    *,
    base_model: str | None,
    doubled: bool = True,
) -> None:
    """Write the adapter's files into ``folder``, one tensor in memory at a time.

    Args:
        model: with the layers installed, see :func:`install_layers`.
        base_model: for PEFT's ``base_model_name_or_path``.
        doubled: an adapter for the original base, and ``ipca.json``; False: PEFT's two files for a residual base.
    """
    with work.writing():
        folder.mkdir(parents=True, exist_ok=True)
        digest = _write_factors(model, layers, work, folder / WEIGHTS, doubled)
        write_config(model, folder, base_model, doubled=doubled)
        if doubled:
            (folder / SIDECAR).write_text(json.dumps(_sidecar(layers, digest), indent=2) + "\n")


def _sidecar(layers: Sequence[FinishedLayer], digest: str) -> dict[str, object]:
    """``ipca.json`` beside a file of factors with the hash ``digest``."""
    return {
        "format": 1,
        "versions": {"ipca": __version__, "torch": torch.__version__},
        "adapter_sha256": digest,
        "modules_to_save": [],
        "layers": {layer.target.name: asdict(layer.saved) for layer in layers},
    }


def _write_factors(
    model: nn.Module, layers: Sequence[FinishedLayer], work: WorkFolder, path: Path, doubled: bool
) -> str:
    """Write the file of factors; returns its SHA-256."""
    adapted = adapted_layers(model)
    kinds = {layer.target.name: layer.saved.kind for layer in layers}
    kernels = {name: getattr(adapted[name], "kernel_size", ()) for name in kinds}

    def as_stored(name: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        joined = join_factors(A, B, A, B) if doubled else (A, B)
        return to_peft(kinds[name], *joined, kernels[name])

    @lru_cache(maxsize=1)  # the two sides of a layer follow each other
    def pair(name: str, index: int) -> tuple[Tensor, Tensor]:
        factors = work.read_layer(index)[1]
        return as_stored(name, factors["A0"], factors["B0"])

    layout, owner, wrappers = {}, {}, wrappers_around(kinds)
    for layer in layers:
        name, like = layer.target.name, adapted[layer.target.name]
        empty = as_stored(name, like.lora_A0.to("meta"), like.lora_B0.to("meta"))
        for side, key in enumerate(factor_keys(name, kinds[name], wrappers[name])):
            layout[key], owner[key] = (layer.adapter_dtype, tuple(empty[side].shape)), (name, layer.index, side)

    def tensor(key: str) -> Tensor:
        name, index, side = owner[key]
        return pair(name, index)[side].contiguous()

    return write_tensors(path, layout, tensor, metadata={"format": "pt"})
