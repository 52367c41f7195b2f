"""Stock PEFT LoRA folders: factors and scaling by layer; an error names the field that makes it no plain LoRA."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ipca.io.adapter_folder import read_tensors
from ipca.io.peft_format import CONFIG, PREFIX, WEIGHTS

PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
# Fields that do not change the function of a saved adapter, or are read below; any other must be off.
_HARMLESS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save"),
    *("fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config", "init_lora_weights"),
}
_INITIALIZATIONS = ("gaussian", "pissa")


@dataclass(frozen=True)
class StockLayer:
    """One layer's change ``scaling · lora_B lora_A`` of the weight: ``A (r, in)``, ``B (out, r)``, on the CPU.

    ``base`` is the weight beside it, as PEFT saves that of a head or an embedding; None where it does not.
    """

    A: Tensor
    B: Tensor
    scaling: float
    base: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[0]


@dataclass(frozen=True)
class StockLora:
    """An adapter as read.

    ``init`` is PEFT's ``init_lora_weights``; ``modules_to_save`` holds the states of fully trained modules by path.
    """

    layers: dict[str, StockLayer]
    modules_to_save: dict[str, dict[str, Tensor]]
    init: bool | str
    dropout: float
    config: dict[str, Any]


def read_stock(folder: str | os.PathLike[str]) -> StockLora:
    """Read the LoRA that PEFT's ``save_pretrained`` wrote into ``folder``.

    Raises:
        FileNotFoundError: a file is missing, or the factors are in a pickle.
        ValueError: a file is damaged, or the configuration is not that of a plain LoRA of linear layers; the message
            names the field.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder; give the folder of a PEFT adapter.")
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(f"{path} has no {CONFIG}: it is no PEFT adapter.")
    config = _read_config(path / CONFIG)
    if not (path / WEIGHTS).is_file():
        pickled = next((name for name in PICKLES if (path / name).is_file()), None)
        if pickled:
            raise FileNotFoundError(
                f"{path} holds {pickled}, a pickle, which can run code when it is read; save the adapter again with "
                "PEFT as safetensors."
            )
        raise FileNotFoundError(f"{path} has no {WEIGHTS}: it is no PEFT adapter.")
    tensors = read_tensors(path / WEIGHTS)
    layers = _layers(tensors, config)
    modules_to_save = _module_states(tensors, config.get("modules_to_save") or [])
    dropout = float(config.get("lora_dropout") or 0.0)
    return StockLora(layers, modules_to_save, config.get("init_lora_weights", True), dropout, config)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise TypeError(f"it is a {type(config).__name__}, not an object")
        if "lora_parameters" in config:
            raise FileNotFoundError(
                f"{path} is that of an adapter of mlx-lm, which only mlx-lm reads; give the one it was exported from."
            )
        _check_values(config)
    except (ValueError, KeyError, TypeError, RecursionError, re.error) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r}; only 'LORA' can hold a window.")
    for name, value in config.items():
        if name == "bias" and value != "none":
            raise ValueError(
                f"{path}: bias is {value!r}, so biases were trained, which an adapter of ipca does not hold."
            )
        if name == "target_parameters" and _are_layers(value):
            continue
        if name not in _HARMLESS and name != "bias" and value:
            raise ValueError(
                f"{path}: {name} is {value!r}, so this is no plain LoRA and nothing that a window of singular "
                "components can express; use it with PEFT."
            )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init not in _INITIALIZATIONS and not re.fullmatch(r"pissa_niter_\d+", init):
        raise ValueError(
            f"{path}: init_lora_weights is {init!r}, which is no window of singular components; "
            "use the adapter with PEFT."
        )
    return config


def _are_layers(parameters: Any) -> bool:
    """Whether ``target_parameters`` are weights of layers, which PEFT adapts as it does the layers."""
    return isinstance(parameters, list) and all(str(name).endswith(".weight") for name in parameters)


def _check_values(config: dict[str, Any]) -> None:
    """Raise where a value has the wrong type or is out of range, or a pattern is no regular expression."""
    for pattern in (*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})):
        re.compile(pattern)
    names = config.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"modules_to_save is {names!r}, not a list of names")
    for name, value in {"r": config["r"], **(config.get("rank_pattern") or {})}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}, not a rank")
    for name, value in {"lora_alpha": config["lora_alpha"], **(config.get("alpha_pattern") or {})}.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{name} is {value!r}, not a positive number")
    if not 0 <= float(config.get("lora_dropout") or 0) < 1:
        raise ValueError(f"lora_dropout is {config['lora_dropout']!r}")


def _layers(tensors: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, StockLayer]:
    """Take every pair of factors out of ``tensors``."""
    layers = {}
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        other = key.removesuffix("lora_A.weight") + "lora_B.weight"
        if other not in tensors:
            raise ValueError(f"{WEIGHTS} holds {key} without {other}.")
        A, B = tensors.pop(key), tensors.pop(other)
        rank, scaling = _rank_and_scaling(name, config)
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != rank or B.shape[1] != rank:
            raise ValueError(
                f"{name}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are no factors of the rank {rank} that "
                f"{CONFIG} says for a linear layer."
            )
        for of, factor in ((key, A), (other, B)):
            if not bool(torch.isfinite(factor).all()):
                raise ValueError(f"{WEIGHTS}: {of} holds NaN or Inf; take a checkpoint from before.")
        base, _ = (tensors.pop(f"{PREFIX}{name}.base_layer.{part}", None) for part in ("weight", "bias"))
        layers[name] = StockLayer(A, B, scaling, base)
    if not layers:
        raise ValueError(f"{WEIGHTS} holds no lora_A.weight: it is no LoRA of linear layers.")
    return layers


def _rank_and_scaling(name: str, config: Mapping[str, Any]) -> tuple[int, float]:
    """PEFT's rank and scaling of the layer ``name``: the first pattern that is an end of its path, or the default."""
    ends = tuple(f".{parameter}" for parameter in config.get("target_parameters") or ())
    if f".{name}.weight".endswith(ends):  # the path of its parameter then
        name = f"{name}.weight"

    def lookup(patterns: Mapping[str, Any], default: Any) -> Any:
        return next((v for pattern, v in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)), default)

    rank: int = lookup(config.get("rank_pattern") or {}, config["r"])
    alpha: float = lookup(config.get("alpha_pattern") or {}, config["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _module_states(tensors: Mapping[str, Tensor], endings: list[str]) -> dict[str, dict[str, Tensor]]:
    """The states of fully trained modules by path, from the tensors that are no factors; ``endings`` of their paths."""
    modules_to_save: dict[str, dict[str, Tensor]] = {}
    pattern = re.compile(rf"{re.escape(PREFIX)}(.*?(?:{'|'.join(map(re.escape, endings)) or '(?!)'}))\.(.+)")
    for key, value in tensors.items():
        found = pattern.fullmatch(key)
        if found is None:
            raise ValueError(f"{WEIGHTS} holds {key}, neither a factor of a linear layer nor in modules_to_save.")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{WEIGHTS}: {key} holds NaN or Inf; take a checkpoint from before.")
        modules_to_save.setdefault(found[1], {})[found[2]] = value
    return modules_to_save
