"""Files of a PCConfig's adapter: PEFT's configuration of a stock LoRA, and ``ipca.json`` beside it."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft import LoraConfig
from peft.utils import CONFIG_NAME
from safetensors import safe_open

from ipca._atomic import staged_files
from ipca.io.adapter_folder import SIDECAR, SavedLayer, file_sha256, read_adapter, sidecar
from ipca.io.peft_format import PREFIX, WEIGHTS, factor_keys, wrappers_around
from ipca.io.serving import warn_servers
from ipca.model.targets import few
from ipca.peft.records import OTHER_WINDOW, LayerRecords

_FIRST_FIELDS = {
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save"),
    *("init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
}
"""Fields that every version of PEFT from 0.10 on reads."""
OWN_FIELDS = ("window", "window_pattern", "tol", "train", "magnitude")
"""Fields of PCConfig that PEFT's configuration cannot hold."""


def save_config(
    folder: str | os.PathLike[str],
    values: Mapping[str, Any],
    own: Mapping[str, Any],
    records: LayerRecords,
    **kwargs: Any,
) -> None:
    """Write ``adapter_config.json`` and ``ipca.json``; both files are replaced together.

    transformers' own ``save_pretrained`` writes the weights after this, so that their hash is not known yet.

    Args:
        folder: holds the weights already where PEFT saves.
        values: the fields of LoraConfig, of a LoRA of rank ``r``.
        own: the other fields, :data:`OWN_FIELDS`.
        records: with the record of each layer; some may be another model's.
        kwargs: PEFT's, for ``LoraConfig.save_pretrained``.

    Raises:
        RuntimeError: the weights lack the initial factors.
    """
    weights, layers = Path(folder) / WEIGHTS, records.saved
    written = "auto_mapping_dict" in kwargs and weights.is_file()  # PEFT writes the weights first, transformers last
    if written:
        layers = doubled_layers(weights, layers)
        record = sidecar(
            layers, file_sha256(weights), _modules_to_save(weights, layers), records.labels, peft=dict(own)
        )
    else:
        record = sidecar(layers, None, [], records.labels, peft=dict(own))
    stock = stock_config(values)
    with staged_files(folder, replaced=SIDECAR.__eq__) as stage:
        stock.save_pretrained(str(stage), **kwargs)
        written = json.loads((stage / CONFIG_NAME).read_text())  # sorted, but the first pattern that matches counts
        written |= {"rank_pattern": stock.rank_pattern, "alpha_pattern": stock.alpha_pattern}
        (stage / CONFIG_NAME).write_text(json.dumps(_for_old_peft(written), indent=2) + "\n")
        if not records.replaced:
            (stage / SIDECAR).write_text(json.dumps(record, indent=2) + "\n")
    if records.replaced:
        words = f"{few(sorted(records.replaced))}: {OTHER_WINDOW}; ipca.import_peft finds the windows of this folder."
        warnings.warn(words, RuntimeWarning, stacklevel=6)
    warn_servers(folder, stacklevel=6)


def _for_old_peft(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` without newer fields at their defaults, which older versions of PEFT refuse and newer ones add."""
    defaults = LoraConfig().to_dict() | {"peft_version": config.get("peft_version")}
    return {
        name: value
        for name, value in config.items()
        if name in _FIRST_FIELDS or name not in defaults or value != defaults[name]
    }


def stock_config(values: Mapping[str, Any]) -> LoraConfig:
    """The configuration of the saved LoRA of rank ``2 r``, from the fields of one of rank ``r`` of equal scaling."""
    alpha = math.sqrt(2) if values["use_rslora"] else 2
    doubled = {
        "r": 2 * values["r"],
        "lora_alpha": alpha * values["lora_alpha"],
        "rank_pattern": {key: 2 * rank for key, rank in values["rank_pattern"].items()},
        "alpha_pattern": {key: alpha * value for key, value in values["alpha_pattern"].items()},
        "init_lora_weights": True,
    }
    stock = LoraConfig(**{**values, **doubled})
    for name in ("target_modules", "exclude_modules"):
        if isinstance(getattr(stock, name), set):  # which has another order in every process
            setattr(stock, name, sorted(getattr(stock, name)))
    return stock


def _halved(stock: LoraConfig) -> dict[str, Any]:
    """The inverse of :func:`stock_config`."""
    alpha = math.sqrt(2) if stock.use_rslora else 2
    return {f.name: getattr(stock, f.name) for f in fields(LoraConfig)} | {
        "r": stock.r // 2,
        "lora_alpha": _number(stock.lora_alpha / alpha),
        "rank_pattern": {key: rank // 2 for key, rank in (stock.rank_pattern or {}).items()},
        "alpha_pattern": {key: _number(value / alpha) for key, value in (stock.alpha_pattern or {}).items()},
    }


def doubled_layers(weights: Path, layers: Mapping[str, SavedLayer]) -> dict[str, SavedLayer]:
    """The layers whose factors the file ``weights`` holds; the others are of another model with the same config.

    Raises:
        RuntimeError: the file does not hold ``[A; A0]`` and ``[B, −B0]``.
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
                    f"{weights} holds {key} of rank {rank} instead of {wanted}: another adapter than this PCConfig's. "
                    "Save the model again, into a folder of its own."
                )
            if rank < wanted:
                raise RuntimeError(
                    f"{weights} holds {key} without its initial factor, so that the adapter would be wrong: it was "
                    "gathered past the model's state dict, as DeepSpeed ZeRO-3 does. "
                    "Use ipca.peft.save_gathered(model, folder)."
                )
    return held


def _keys(layers: Mapping[str, SavedLayer]) -> dict[str, tuple[str, str]]:
    """The keys of each layer's two factors in the file of weights."""
    wrappers = wrappers_around({path: layer.kind for path, layer in layers.items()})
    return {path: factor_keys(path, layer.kind, wrappers[path]) for path, layer in layers.items()}


def load_config(
    folder: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
) -> tuple[dict[str, Any], LayerRecords]:
    """Read the fields of a PCConfig and what is known of its layers: of weights in a pickle only those of the base.

    Args:
        folder: on this disk, or a repository of the Hub.
        subfolder: of ``folder``.
        kwargs: for ``huggingface_hub.snapshot_download``.

    Raises:
        ValueError: there is no adapter of a PCConfig, or a damaged one.
    """
    path = _local(folder, subfolder, **kwargs)
    stock = LoraConfig.from_pretrained(str(path))
    if not isinstance(stock, LoraConfig) or stock.r % 2:
        raise ValueError(f"{path} holds no adapter of a PCConfig, which is a LoRA of even rank; got r={stock.r}.")
    values = _halved(stock)
    if not (path / WEIGHTS).is_file():
        return values | _own_fields(path), LayerRecords(base_sha256=_base_hashes(path), loaded=True)
    adapter = read_adapter(path, modules_to_save=False)
    warn_bypassed([name for name, layer in adapter.layers.items() if layer.bypassed], stacklevel=4)
    return values | _windows(path, adapter.layers), LayerRecords.of(adapter)


def warn_bypassed(names: list[str], stacklevel: int = 3) -> None:
    """Warn of layers that PEFT neither trains nor applies, because the model does not call them."""
    if names:
        warnings.warn(
            f"{few(names)}: the model reads the weight and does not call the layer, so that PEFT, with a PCConfig too, "
            "neither trains its adapter nor applies it, but merging adds it; exclude it in exclude_modules, or use "
            "ipca.apply_pc and ipca.load_adapter, which compute it.",
            RuntimeWarning,
            stacklevel=stacklevel,
        )


def _windows(path: Path, layers: dict[str, SavedLayer]) -> dict[str, Any]:
    """The fields that PEFT's file lacks: as saved, or of an adapter by :func:`ipca.save_adapter` from its layers."""
    starts = {f"^{re.escape(name)}": layer.window.text for name, layer in layers.items()}
    dropout = max(layer.dropout for layer in layers.values())
    return _own_fields(path) or {"window_pattern": starts, "lora_dropout": dropout, **_factors_of(layers.values())}


def _factors_of(layers: Collection[SavedLayer]) -> dict[str, Any]:
    """``train`` and ``magnitude`` of all layers, or nothing where they differ: PCConfig's default.

    Of ``train``, which counts where training goes on, that is said; the starts are in the file whatever the magnitude.
    """
    values = {name: sorted({getattr(layer, name) for layer in layers}, key=str) for name in ("train", "magnitude")}
    if len(values["train"]) > 1:
        warnings.warn(
            f"the adapter's layers have train {', '.join(map(repr, values['train']))}, and a PCConfig has one for all: "
            "its default counts where training goes on; ipca.load_adapter keeps each layer's.",
            RuntimeWarning,
            stacklevel=6,
        )
    return {name: found[0] for name, found in values.items() if len(found) == 1}


def _own_fields(path: Path) -> dict[str, Any]:
    try:
        record = json.loads((path / SIDECAR).read_text()).get("peft", {})
        return {name: record[name] for name in OWN_FIELDS if name in record}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path / SIDECAR} is damaged: {type(error).__name__}: {error}") from None


def _base_hashes(path: Path) -> dict[str, str]:
    """The hashes that ``ipca.json`` has of base weights, by layer."""
    layers = json.loads((path / SIDECAR).read_text()).get("layers", {})
    return {name: layer["base_sha256"] for name, layer in layers.items() if layer.get("base_sha256")}


def _modules_to_save(weights: Path, layers: Mapping[str, SavedLayer]) -> list[str]:
    """The modules whose tensors the file holds beside the layers' factors and base layers."""
    bases = {f"{PREFIX}{path}.base_layer.{part}" for path in layers for part in ("weight", "bias")}
    ours = bases.union(*_keys(layers).values())
    with safe_open(str(weights), "pt") as file:
        others = set(file.keys()) - ours
    return sorted({key.removeprefix(PREFIX).rpartition(".")[0] for key in others})


def _local(folder: str | os.PathLike[str], subfolder: str | None, **kwargs: Any) -> Path:
    """The adapter's folder on this disk, downloaded from the Hub where ``folder`` does not exist."""
    path = Path(folder)
    if path.is_file():
        raise ValueError(f"{path} is a file, but an adapter is a folder; pass the folder it is in.")
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
    """An int where ``value`` is one up to rounding: 16 in PEFT's files, not 16.000000000000004."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value
