"""The adapter in PEFT's file format: a LoRA of the original base that needs no ipca to load.

    lora_A = [A; A0]  (2 rank, in)      lora_B = [B, −B0]  (out, 2 rank)      r = 2 rank      lora_alpha = 2 alpha

so that PEFT's ``lora_alpha / r · lora_B lora_A`` is ``scaling · (B A − B0 A0)``, the change of the weight.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ipca.nn import LinearPC

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


def factor_keys(name: str) -> tuple[str, str]:
    """The keys of ``lora_A`` and ``lora_B`` of the layer at the path ``name``."""
    return f"{PREFIX}{name}.lora_A.weight", f"{PREFIX}{name}.lora_B.weight"


def join_factors(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> tuple[Tensor, Tensor]:
    """``[A; A0] (2 rank, in)`` and ``[B, −B0] (out, 2 rank)``."""
    return torch.cat([A, A0]), torch.cat([B, -B0], dim=1)


def split_factors(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The inverse of :func:`join_factors`: ``A, B, A0, B0``, each contiguous."""
    rank = lora_A.shape[0] // 2
    return (
        lora_A[:rank].clone(),
        lora_B[:, :rank].contiguous().clone(),
        lora_A[rank:].clone(),
        -lora_B[:, rank:].contiguous(),
    )


@torch.no_grad()
def adapter_tensors(
    layers: Mapping[str, LinearPC], whole: Mapping[str, nn.Module], *, doubled: bool = True
) -> dict[str, Tensor]:
    """The tensors of the adapter file, on the CPU; ``doubled=False`` gives ``A, B`` alone, for a residual base."""
    tensors = {}
    for name, layer in layers.items():
        pair = (layer.lora_A, layer.lora_B)
        A, B = join_factors(*pair, layer.lora_A0, layer.lora_B0) if doubled else pair
        for key, value in zip(factor_keys(name), (A, B), strict=True):
            tensors[key] = value.detach().cpu().contiguous()
    for name, module in whole.items():
        for key, value in module.state_dict().items():
            tensors[f"{PREFIX}{name}.{key}"] = value.detach().cpu().contiguous()
    return tensors


def adapter_config(
    layers: Mapping[str, LinearPC],
    whole: Mapping[str, nn.Module],
    all_names: list[str],
    base_model: str | None,
    *,
    doubled: bool = True,
) -> dict[str, Any]:
    """``adapter_config.json`` for PEFT; ``all_names`` are the paths of all modules of the model."""
    factor = 2 if doubled else 1
    ranks = {name: factor * layer.rank for name, layer in layers.items()}
    alphas = {name: factor * layer.alpha for name, layer in layers.items()}
    r, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": r,
        "lora_alpha": _number(alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "init_lora_weights": True,
        "fan_in_fan_out": any(layer.kind == "conv1d" for layer in layers.values()),
        "target_modules": _target_modules(list(layers), all_names),
        "modules_to_save": list(whole) or None,
        "rank_pattern": {f"^{re.escape(n)}": v for n, v in ranks.items() if v != r},
        "alpha_pattern": {f"^{re.escape(n)}": _number(v) for n, v in alphas.items() if v != alpha},
    }


def _target_modules(names: list[str], all_names: list[str]) -> list[str] | str:
    """The paths themselves, or a regular expression where PEFT's match by suffix would take other modules too."""
    suffixes = tuple(f".{name}" for name in names)
    if any(name.endswith(suffixes) for name in all_names):
        return "|".join(re.escape(name) for name in names)
    return names


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value
