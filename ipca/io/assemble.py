"""The adapter's files from a job's finished layers: those of :func:`ipca.save_adapter`, byte for byte."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from ipca._version import __version__
from ipca.io.export import write_config
from ipca.io.job import Job
from ipca.io.peft_format import WEIGHTS, factor_keys, join_factors
from ipca.io.read import SIDECAR
from ipca.io.stream_file import write_tensors
from ipca.io.streaming import FinishedLayer


def write_adapter(
    model: nn.Module,
    layers: Sequence[FinishedLayer],
    job: Job,
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
    with job.writing():
        folder.mkdir(parents=True, exist_ok=True)
        digest = _write_factors(layers, job, folder / WEIGHTS, doubled)
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


def _write_factors(layers: Sequence[FinishedLayer], job: Job, path: Path, doubled: bool) -> str:
    """Write the file of factors; returns its SHA-256."""
    layout, owner = {}, {}
    for layer in layers:
        out, inner = layer.saved.shape
        rank = layer.saved.rank * (2 if doubled else 1)
        for side, key, shape in zip((0, 1), factor_keys(layer.target.name), ((rank, inner), (out, rank)), strict=True):
            layout[key], owner[key] = (layer.adapter_dtype, shape), (layer.index, side)

    @lru_cache(maxsize=1)  # the two sides of a layer follow each other
    def pair(index: int) -> tuple[Tensor, Tensor]:
        factors = job.read_layer(index)[1]
        A0, B0 = factors["A0"], factors["B0"]
        return join_factors(A0, B0, A0, B0) if doubled else (A0, B0)

    return write_tensors(path, layout, lambda key: pair(owner[key][0])[owner[key][1]], metadata={"format": "pt"})
