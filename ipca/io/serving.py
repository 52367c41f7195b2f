"""Adapters for programs that serve models: plain LoRA of one rank and scale 1, and what servers make of other files.

    lora_A = [A − A0; A0; 0]  (r, in)      lora_B = scaling · [B, B − B0, 0]  (out, r)      r = lora_alpha for all

The product is ``scaling · (B (A − A0) + (B − B0) A0) = scaling · (B A − B0 A0)``, the change of the weight. So what is
rounded to 16 bits is the change, not the window, and every server scales by 1, whichever fields it reads. Of a layer
with one factor as it was at the start only one of the two terms is left, of half the rank.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ipca._dtensor import full
from ipca.io.peft_format import CONFIG, AdapterContents, factor_keys, split_factor, wrappers_around, write_peft
from ipca.nn.layer_kinds import EXPERTS, LINEAR, is_quantized
from ipca.nn.offload import stored_tensor
from ipca.nn.window_layer import WindowLayer

MLX_WEIGHTS = "adapters.safetensors"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's ``max_lora_rank``, of which 16 is its default; an adapter may have any rank up to it."""
_DEFAULT_RANK = 16
_MLX_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")
_MLX_OTHERS = ("model.embed_tokens", "lm_head")


def check_servable(contents: AdapterContents) -> None:
    """Raise ValueError where a module trains whole, which servers do not take from an adapter."""
    if contents.modules_to_save:
        names = ", ".join(contents.modules_to_save)
        raise ValueError(
            f"{names}: trained whole, and servers read only LoRA factors from an adapter. Merge the adapter into the "
            "model and serve that (ipca merge MODEL ADAPTER -o OUT), or train without it."
        )


def write_serve(
    folder: Path,
    model: nn.Module,
    contents: AdapterContents,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    moved: Mapping[str, str],
) -> int:
    """Write PEFT's two files of a LoRA with one rank and scale 1 into ``folder``; returns the rank.

    Args:
        tensors: those of :func:`ipca.io.peft_format.adapter_state`, doubled.
        config: PEFT's configuration of that LoRA.
        moved: of :func:`moved_factors`.

    Raises:
        ValueError: a list of names cannot tell the adapted layers from others.
    """
    rank = serving_rank(contents.layers, moved)
    names = [name for name, layer in contents.layers.items() if layer.kind not in EXPERTS]
    excluded = _beside(names, [name for name, _ in model.named_modules()])
    config = dict(config)
    if isinstance(config["target_modules"], str):  # a regular expression, which SGLang refuses
        parameters = config.get("target_parameters") or []
        names = [name for name in names if f"{name}.weight" not in parameters]
        config |= {"target_modules": names, "exclude_modules": excluded}
    write_peft(folder, serving_factors(tensors, contents.layers, rank, moved), config)
    return rank


def serving_rank(layers: Mapping[str, WindowLayer], moved: Mapping[str, str]) -> int:
    """The rank of the LoRA that holds all ``layers``: twice that of the widest window, once where one factor moved."""
    return max(layer.rank * (2 if moved[name] == "both" else 1) for name, layer in layers.items())


def moved_factors(layers: Mapping[str, WindowLayer]) -> dict[str, str]:
    """The factors that each layer's change consists of: those that train, or both where the other one has moved too.

    Of sharded layers a collective, which every process must call.
    """
    return {name: _moved(layer) for name, layer in layers.items()}


def _moved(layer: WindowLayer) -> str:
    frozen = {"A": "B", "B": "A"}.get(layer.trained)
    if frozen is None:
        return "both"
    now, start = (full(stored_tensor(layer, f"lora_{frozen}{suffix}")) for suffix in ("", "0"))
    return layer.trained if not now.is_meta and torch.equal(now, start.to(now)) else "both"


def serving_factors(
    tensors: Mapping[str, Tensor], layers: Mapping[str, WindowLayer], rank: int, moved: Mapping[str, str]
) -> dict[str, Tensor]:
    """``tensors`` of an adapter file, doubled, with the factors of ``layers`` as above, each in its dtype.

    The differences are made in float64. A stack of experts has its rows and columns within each expert, as in PEFT.
    """
    made, wrappers = dict(tensors), wrappers_around({name: layer.kind for name, layer in layers.items()})
    for name, layer in layers.items():
        key_A, key_B = factor_keys(name, layer.kind, wrappers[name])
        experts = math.prod(layer.matrix_shape[:-2])
        A, A0 = split_factor("A", tensors[key_A].double(), experts)
        B, B0 = split_factor("B", tensors[key_B].double(), experts)
        lora_A, lora_B = [A - A0, A0], [layer.scaling * B, layer.scaling * (B - B0)]
        if moved[name] != "both":
            only = "AB".index(moved[name])
            lora_A, lora_B = [lora_A[only]], [lora_B[only]]
        made[key_A] = _padded(lora_A, 0, rank, experts).to(tensors[key_A].dtype)
        made[key_B] = _padded(lora_B, 1, rank, experts).to(tensors[key_B].dtype)
    return made


def _padded(halves: Sequence[Tensor], axis: int, rank: int, experts: int) -> Tensor:
    """Factors in PEFT's shapes one after the other along ``axis``, with zeros up to ``rank``, in each expert."""
    like = halves[0]
    if axis == 0:  # (E r, in, …)
        both = torch.cat([half.reshape(experts, -1, half[0].numel()) for half in halves], dim=1)
    else:  # (out, r E, …)
        both = torch.cat([half.reshape(len(half), -1, experts) for half in halves], dim=1)
    both = torch.cat([both, both.new_zeros(len(both), rank - both.shape[1], both.shape[2])], dim=1)
    return both.reshape(*like.shape[:axis], rank * experts, *like.shape[axis + 1 :])


def _beside(names: list[str], all_names: Iterable[str]) -> list[str]:
    """The modules to exclude where ``target_modules`` is the list ``names``, which matches the ends of paths."""
    known, ends = set(names), tuple(f".{name}" for name in names)
    others = [name for name in all_names if name.endswith(ends) and name not in known]
    for other in others:
        lost = next((name for name in names if name.endswith(f".{other}")), None)
        if lost is not None:
            raise ValueError(
                f"{lost} is adapted and {other} is not, but readers match modules by the ends of their paths and "
                "cannot tell them apart: adapt both, or merge the adapter into the model and serve that."
            )
    return others


# -- mlx-lm


def write_mlx(
    folder: Path,
    model: nn.Module,
    contents: AdapterContents,
    tensors: Mapping[str, Tensor],
    moved: Mapping[str, str],
) -> int:
    """Write mlx-lm's two files of the same LoRA into ``folder``; returns the rank.

    Args:
        tensors, moved: as for :func:`write_serve`.

    Raises:
        ValueError: mlx-lm has no such layer; nothing is written.
    """
    rank, made = serving_rank(contents.layers, moved), {}
    keys = [_mlx_key(name, layer) for name, layer in contents.layers.items()]
    factors = serving_factors(tensors, contents.layers, rank, moved)
    for name, layer in contents.layers.items():
        for part, tensor in zip("ab", factor_keys(name, layer.kind), strict=True):
            made[f"{name}.lora_{part}"] = factors[tensor].T.contiguous()
    config = {
        "fine_tune_type": "lora",
        "num_layers": max(_blocks(name for name, _ in model.named_modules()))
        + 1
        - min(_blocks(contents.layers)),  # counted from the last one
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(set(keys))},
    }
    save_file(made, folder / MLX_WEIGHTS, metadata={"format": "mlx"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return rank


def _mlx_key(name: str, layer: WindowLayer) -> str:
    """mlx-lm's key of the layer, which is relative to its block."""
    found = _MLX_BLOCK.fullmatch(name)
    supported = layer.kind in (*LINEAR, "embedding") or is_quantized(layer.kind)
    if not supported or (found is None and name not in _MLX_OTHERS):
        raise ValueError(
            f"{name} ({layer.kind}): mlx-lm adapts linear layers called model.layers.NUMBER.…, {_MLX_OTHERS[0]} and "
            f"{_MLX_OTHERS[1]}; merge the adapter into the model and convert that, or train without it."
        )
    return name if found is None else found[2]


def _blocks(names: Iterable[str]) -> list[int]:
    """The numbers of the blocks in which ``names`` are; of none, 0."""
    return [int(found[1]) for name in names if (found := _MLX_BLOCK.match(name))] or [0]


# -- what servers make of a file


def warn_rank(rank: int, stacklevel: int = 3) -> None:
    """Warn where servers do not take an adapter of ``rank`` by default; the message says what they must allow."""
    allowed = next((value for value in RANKS if value >= rank), None)
    if allowed is None:
        words = f"is above {RANKS[-1]}, the largest that vLLM allows; use the truncated format, or merge"
    elif allowed > _DEFAULT_RANK:
        words = f"has to be allowed by the server: start vLLM with --max-lora-rank {allowed} (default {_DEFAULT_RANK})"
    else:
        return
    warnings.warn(f"the adapter's rank {rank} {words}.", RuntimeWarning, stacklevel=stacklevel)


def server_faults(config: Mapping[str, Any]) -> str | None:
    """Words that name what servers misread in ``adapter_config.json``, each without a message, or None."""
    faults = {
        "rank_pattern": (bool(config.get("rank_pattern")), "vLLM before 0.32, SGLang"),
        "alpha_pattern": (bool(config.get("alpha_pattern")), "vLLM before 0.32, SGLang, llama.cpp"),
        "use_rslora": (bool(config.get("use_rslora")), "SGLang, llama.cpp"),
        "a fractional lora_alpha": (config.get("lora_alpha", 1) % 1 != 0, "Ollama"),
    }
    found = [f"{field} (misread by {servers})" for field, (wrong, servers) in faults.items() if wrong]
    if not found:
        return None
    return f"{CONFIG} has {', '.join(found)}"


def warn_servers(folder: str | os.PathLike[str], stacklevel: int = 3) -> None:
    """Warn where a server would compute another function from the adapter in ``folder`` than PEFT."""
    faults = server_faults(json.loads((Path(folder) / CONFIG).read_text()))
    if faults is not None:
        words = f"{faults}. PEFT and transformers read it right; for a server use ipca export --format serve."
        warnings.warn(words, RuntimeWarning, stacklevel=stacklevel)
