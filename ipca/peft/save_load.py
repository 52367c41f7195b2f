"""A PCConfig's files: PEFT's configuration of a stock LoRA, and ``ipca.json`` beside it."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig
from peft.utils import CONFIG_NAME
from safetensors import safe_open

from ipca._atomic import staged_files
from ipca._version import __version__
from ipca.io.adapter_folder import SIDECAR, Factors, SavedLayer, file_sha256, read_adapter
from ipca.io.peft_format import PREFIX, WEIGHTS, factor_keys, wrappers_around
from ipca.nn.initialization import InitCertificate, InitialFactors

if TYPE_CHECKING:
    from ipca.peft.config import PCConfig

_OURS = ("window", "window_pattern", "tol")
"""Fields of PCConfig that PEFT's configuration cannot hold."""


def save_config(config: PCConfig, folder: str | os.PathLike[str], **kwargs: Any) -> None:
    """See :meth:`PCConfig.save_pretrained`; both files are replaced together.

    transformers' own ``save_pretrained`` writes the weights after this, so that their hash is not known yet.
    """
    sidecar: dict[str, Any] = {
        "format": 1,
        "versions": {"ipca": __version__, "torch": torch.__version__},
        "peft": {name: getattr(config, name) for name in _OURS},
    }
    weights = Path(folder) / WEIGHTS
    written = "auto_mapping_dict" in kwargs and weights.is_file()  # PEFT writes the weights first, transformers last
    layers = doubled_layers(weights, config.layers) if written else config.layers
    if layers:
        sidecar |= {
            "adapter_sha256": file_sha256(weights) if written else None,
            "modules_to_save": _whole_modules(weights, layers) if written else [],
            "layers": {path: asdict(layer) for path, layer in layers.items()},
        }
    stock = config.stock()
    for name in ("target_modules", "exclude_modules"):
        if isinstance(getattr(stock, name), set):  # which has another order in every process
            setattr(stock, name, sorted(getattr(stock, name)))
    with staged_files(folder) as stage:
        stock.save_pretrained(str(stage), **kwargs)
        (stage / SIDECAR).write_text(json.dumps(sidecar, indent=2) + "\n")


def doubled_layers(weights: Path, layers: Mapping[str, SavedLayer]) -> dict[str, SavedLayer]:
    """Those of ``layers`` that the file holds: a config may have served another model too.

    Raises:
        RuntimeError: the file does not hold their ``A`` and ``B`` doubled by ``A0`` and ``B0``.
    """
    keys = _keys(layers)
    with safe_open(str(weights), "pt") as file:
        there = set(file.keys())
        held = {path: layer for path, layer in layers.items() if keys[path][0] in there}
        for path, layer in held.items():
            experts = layer.shape[0] if len(layer.shape) == 3 else 1
            key, wanted = keys[path][0], 2 * layer.rank
            rank = file.get_slice(key).get_shape()[0] // experts
            if rank > wanted:
                raise RuntimeError(
                    f"{weights} holds {key} of rank {rank} instead of {wanted}: the adapter of a PCConfig fits the "
                    "original base as it is; leave out path_initial_model_for_weight_conversion."
                )
            if rank < wanted:
                raise RuntimeError(
                    f"{weights} holds {key} without the factor it started from, so that the adapter would be wrong: "
                    "it was gathered past the model's state dict, as DeepSpeed ZeRO-3 does. "
                    "Use ipca.peft.export(model, folder)."
                )
    return held


def _keys(layers: Mapping[str, SavedLayer]) -> dict[str, tuple[str, str]]:
    """By layer, the keys of its two factors."""
    wrappers = wrappers_around({path: layer.kind for path, layer in layers.items()})
    return {path: factor_keys(path, layer.kind, wrappers[path]) for path, layer in layers.items()}


def load_config(
    cls: type[PCConfig], folder: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
) -> PCConfig:
    """See :meth:`PCConfig.from_pretrained`."""
    path = _local(folder, subfolder, **kwargs)
    stock = LoraConfig.from_pretrained(str(path))
    if not isinstance(stock, LoraConfig) or stock.r % 2:
        raise ValueError(f"{path} holds no adapter of a PCConfig, which is a LoRA of even rank; got r={stock.r}.")
    alpha = math.sqrt(2) if stock.use_rslora else 2
    values = {f.name: getattr(stock, f.name) for f in fields(LoraConfig)}
    values |= {
        "r": stock.r // 2,
        "lora_alpha": _number(stock.lora_alpha / alpha),
        "rank_pattern": {key: rank // 2 for key, rank in (stock.rank_pattern or {}).items()},
        "alpha_pattern": {key: _number(value / alpha) for key, value in (stock.alpha_pattern or {}).items()},
    }
    if not (path / WEIGHTS).is_file():
        return cls(**values, **_own_fields(path))
    saved = read_adapter(path, modules_to_save=False)
    config = cls(**{**values, **_windows(path, saved.layers)})
    config.layers = dict(saved.layers)
    config.bases = {name: layer.base_sha256 for name, layer in saved.layers.items() if layer.base_sha256}
    config.starts = {name: _start(layer, saved.factors[name]) for name, layer in saved.layers.items()}
    return config


def _windows(path: Path, layers: dict[str, SavedLayer]) -> dict[str, Any]:
    """The fields that PEFT's file lacks: as saved, or for an adapter of :func:`ipca.save_adapter` as its layers say."""
    starts = {f"^{re.escape(name)}": f"start={layer.start}" for name, layer in layers.items()}
    dropout = max(layer.dropout for layer in layers.values())
    return _own_fields(path) or {"window_pattern": starts, "lora_dropout": dropout}


def _own_fields(path: Path) -> dict[str, Any]:
    try:
        record = json.loads((path / SIDECAR).read_text()).get("peft", {})
        return {name: record[name] for name in _OURS if name in record}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path / SIDECAR} is damaged: {type(error).__name__}: {error}") from None


def _whole_modules(weights: Path, layers: Mapping[str, SavedLayer]) -> list[str]:
    """The modules whose tensors the file holds beside the layers' factors and base weights."""
    ours = {f"{PREFIX}{path}.base_layer.weight" for path in layers}.union(*_keys(layers).values())
    with safe_open(str(weights), "pt") as file:
        others = set(file.keys()) - ours
    return sorted({key.removeprefix(PREFIX).rpartition(".")[0] for key in others})


def _start(layer: SavedLayer, factors: Factors) -> InitialFactors:
    dtype = str(factors.A0.dtype).removeprefix("torch.")
    certificate = InitCertificate(dtype, 0.0, 0.0, 0.0)
    return InitialFactors(factors.A0, factors.B0, layer.window, layer.base_sha256 or "", layer.report(), certificate)


def _local(folder: str | os.PathLike[str], subfolder: str | None, **kwargs: Any) -> Path:
    """The adapter's folder on this disk, fetched from the Hub where ``folder`` is none."""
    path = Path(folder)
    if path.is_file():
        raise ValueError(f"{path} is a file, but an adapter is a folder; give the folder it is in.")
    if not path.is_dir():
        inside = f"{subfolder}/" if subfolder else ""
        wanted = [f"{inside}{name}" for name in (CONFIG_NAME, SIDECAR, WEIGHTS)]
        known = set(inspect.signature(snapshot_download).parameters)
        options = {key: value for key, value in kwargs.items() if key in known}
        path = Path(snapshot_download(str(folder), allow_patterns=wanted, **options))
    path = path / subfolder if subfolder else path
    for name in (CONFIG_NAME, SIDECAR):
        if not (path / name).is_file():
            raise ValueError(f"{path} has no {name}: it is no adapter of a PCConfig; use peft.LoraConfig.")
    return path


def _number(value: float) -> float | int:
    """An int where rounding hides one: PEFT's files say 16, not 16.000000000000004."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value
