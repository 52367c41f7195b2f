"""The adapter in PEFT's file format: a LoRA of the original base that needs no ipca to load.

    lora_A = [A; A0]  (2 rank, in)      lora_B = [B, −B0]  (out, 2 rank)      r = 2 rank      lora_alpha = 2 alpha

so that PEFT's ``lora_alpha / r · lora_B lora_A`` is ``scaling · (B A − B0 A0)``, the change of the weight.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ipca._dtensor import full
from ipca.io.peft_kinds import PREFIX, factor_keys, to_peft, wrappers_around
from ipca.nn.layer_kinds import EXPERTS
from ipca.nn.window_layer import WindowLayer

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def join_factors(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> tuple[Tensor, Tensor]:
    """``[A; A0] (…, 2 rank, in)`` and ``[B, −B0] (…, out, 2 rank)``."""
    return torch.cat([A, A0], dim=-2), torch.cat([B, -B0], dim=-1)


def split_factors(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The inverse of :func:`join_factors`: ``A, B, A0, B0``, each contiguous."""
    (A, A0), (B, B0) = lora_A.chunk(2, dim=-2), lora_B.chunk(2, dim=-1)
    A, B, A0, B0 = (half.clone(memory_format=torch.contiguous_format) for half in (A, B, A0, B0))
    return A, B, A0, B0.neg_()


@torch.no_grad()
def adapter_tensors(
    layers: Mapping[str, WindowLayer], modules_to_save: Mapping[str, nn.Module], *, doubled: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the adapter file; ``doubled=False`` gives ``A, B`` alone, for a residual base.

    Sharded factors come modules_to_save, which is a collective; for the rest see :func:`ipca.io.gather.gathered`.
    """
    wrappers = wrappers_around({name: layer.kind for name, layer in layers.items()})
    for name, layer in layers.items():
        pair = (full(layer.lora_A), full(layer.lora_B))
        pair = join_factors(*pair, layer.lora_A0, layer.lora_B0) if doubled else pair
        pair = to_peft(layer.kind, *pair, getattr(layer, "kernel_size", ()))
        yield from zip(factor_keys(name, layer.kind, wrappers[name]), pair, strict=True)
    for name, module in modules_to_save.items():
        for key, value in module.state_dict().items():
            yield f"{PREFIX}{name}.{key}", value


def adapter_config(
    layers: Mapping[str, WindowLayer],
    modules_to_save: Mapping[str, nn.Module],
    all_names: list[str],
    base_model: str | None,
    *,
    doubled: bool = True,
) -> dict[str, Any]:
    """``adapter_config.json`` for PEFT; ``all_names`` are the paths of all modules of the model.

    Raises:
        ValueError: PEFT has no configuration for such an adapter.
    """
    factor = 2 if doubled else 1
    ranks = {name: factor * layer.rank for name, layer in layers.items()}
    alphas = {name: factor * layer.alpha for name, layer in layers.items()}
    r, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    stacks = [name for name, layer in layers.items() if layer.kind in EXPERTS]
    transposed = any(layer.kind == "conv1d" for layer in layers.values())
    _check_stacks(stacks, all_names, transposed)
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
        "fan_in_fan_out": transposed,
        "target_modules": _target_modules([name for name in layers if name not in stacks], all_names),
        "target_parameters": stacks or None,
        "modules_to_save": list(modules_to_save) or None,
        "rank_pattern": {f"^{re.escape(n)}": v for n, v in ranks.items() if v != r},
        "alpha_pattern": {f"^{re.escape(n)}": _number(v) for n, v in alphas.items() if v != alpha},
    }


def _check_stacks(stacks: list[str], all_names: list[str], transposed: bool) -> None:
    """Raise where PEFT, which matches a stack by the end of its path, would take others too, or takes none."""
    if stacks and transposed:
        raise ValueError(f"PEFT cannot have {stacks[0]} in one adapter with a Conv1D layer; adapt one of them.")
    for stack in stacks:
        owner = stack.rpartition(".")[0]
        other = next((name for name in all_names if name.endswith(f".{owner}")), None)
        if other is not None:
            raise ValueError(f"PEFT would take the weights of {other} for those of {stack}; rename one of them.")


def _target_modules(names: list[str], all_names: list[str]) -> list[str] | str:
    """The paths themselves, or a regular expression where PEFT's match by suffix would take other modules too."""
    suffixes = tuple(f".{name}" for name in names)
    if any(name.endswith(suffixes) for name in all_names):
        return "|".join(re.escape(name) for name in names)
    return names


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value
