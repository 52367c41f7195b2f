"""The adapter in PEFT's file format: a LoRA of twice the rank for the original base, which needs no ipca to load.

    lora_A = [A; A0]  (2 rank, in)      lora_B = [B, −B0]  (out, 2 rank)      r = 2 rank      lora_alpha = 2 alpha

so that PEFT's ``lora_alpha / r · lora_B lora_A`` is ``scaling · (B A − B0 A0)``, the change of the weight. Keys and
shapes by kind of layer, for a LoRA of rank ``r``:

| kind | keys below the layer's path | lora_A | lora_B |
|---|---|---|---|
| linear layers | ``lora_A.weight``, ``lora_B.weight`` | ``(r, in)`` | ``(out, r)`` |
| ``"embedding"`` | ``lora_embedding_A``, ``lora_embedding_B`` | ``(r, num)`` | ``(dim, r)`` |
| ``"conv"`` | as linear layers | ``(r, channels, k…)`` | ``(out, r, 1…)`` |
| experts | ``[base_layer.…]lora_A.weight``, below the path of their module | ``(E r, in)`` | ``(out, r E)`` |
| ``"matrix"`` | as experts | ``(r, in)`` | ``(out, r)`` |

A matrix is a parameter ``(out, in)`` that is no layer's weight; only PEFT adapts it. It and experts are PEFT's
``target_parameters``: PEFT wraps their module once for each adapted parameter, the first one innermost, and their keys
contain the wrappers around them. Experts lie one after the other in ``lora_A`` and interleaved in ``lora_B``.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ipca._dtensor import full, gathered, is_writer, plain_type
from ipca.nn.layer_kinds import EXPERTS
from ipca.nn.window_layer import WindowLayer

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
MATRIX = "matrix"
_PARAMETERS = (*EXPERTS, MATRIX)

Part = Literal["A", "B"]


class AdapterContents(NamedTuple):
    """What an adapter file holds of a model: the adapted layers and the fully trained modules, by path."""

    layers: dict[str, WindowLayer]
    modules_to_save: dict[str, nn.Module]


# -- keys and shapes


def factor_keys(name: str, kind: str = "linear", wrappers: int = 0) -> tuple[str, str]:
    """The keys of ``lora_A`` and ``lora_B`` of the layer at the path ``name``, around which lie ``wrappers``."""
    if kind == "embedding":
        return f"{PREFIX}{name}.lora_embedding_A", f"{PREFIX}{name}.lora_embedding_B"
    path = name.rpartition(".")[0] + ".base_layer" * wrappers if kind in _PARAMETERS else name
    return f"{PREFIX}{path}.lora_A.weight", f"{PREFIX}{path}.lora_B.weight"


def wrappers_around(kinds: Mapping[str, str]) -> dict[str, int]:
    """For each layer how many stacks of the same module come after it; ``kinds`` by path, in the model's order."""
    names = list(kinds)
    stacks = [name for name in names if kinds[name] in _PARAMETERS]
    owner = {name: name.rpartition(".")[0] for name in stacks}
    behind = {name: sum(owner[other] == owner[name] for other in stacks[i + 1 :]) for i, name in enumerate(stacks)}
    return {name: behind.get(name, 0) for name in names}


def to_peft(kind: str, A: Tensor, B: Tensor, kernel: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """``A (…, r, in), B (…, out, r)`` in PEFT's shapes; ``kernel (k…)`` is that of a convolution."""
    if kind == "conv":
        return A.reshape(A.shape[0], -1, *kernel), B.reshape(*B.shape, *(1 for _ in kernel))
    if kind in EXPERTS:
        return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    return A, B


def from_peft(kind: str, shape: Sequence[int], lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`to_peft`; ``shape (…, out, in)`` is that of the matrix or the stack, which they fit."""
    if kind in EXPERTS:
        B = lora_B.unflatten(1, (-1, shape[0])).permute(2, 0, 1).contiguous()
        return lora_A.unflatten(0, (shape[0], -1)), B
    return lora_A.flatten(1), lora_B.flatten(1)


def double_factor(part: Part, factor: Tensor, initial: Tensor, experts: int = 1) -> Tensor:
    """``[A; A0]`` or ``[B, −B0]`` in PEFT's shapes, a stack of ``experts`` doubled within each of them."""
    pair = (factor, initial if part == "A" else -initial)
    both = torch.cat([_by_rank(part, each, experts) for each in pair], dim=1)
    axis = 0 if part == "A" else 1
    return both.reshape(*factor.shape[:axis], 2 * factor.shape[axis], *factor.shape[axis + 1 :])


def split_factor(part: Part, doubled: Tensor, experts: int = 1) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`double_factor`: ``A, A0`` or ``B, B0``, each contiguous in memory of its own."""
    axis = 0 if part == "A" else 1
    shape = (*doubled.shape[:axis], doubled.shape[axis] // 2, *doubled.shape[axis + 1 :])
    halves = (half.reshape(shape) for half in _by_rank(part, doubled, experts).chunk(2, dim=1))
    factor, initial = (half.clone(memory_format=torch.contiguous_format) for half in halves)
    return factor, initial if part == "A" else initial.neg_()


def _by_rank(part: Part, tensor: Tensor, experts: int) -> Tensor:
    """A view of one of PEFT's factors whose dimension 1 counts the ranks of each expert."""
    return tensor.reshape(experts, -1, tensor[0].numel()) if part == "A" else tensor.reshape(len(tensor), -1, experts)


# -- what the file holds


@torch.no_grad()
def adapter_tensors(
    layers: Mapping[str, WindowLayer], modules_to_save: Mapping[str, nn.Module], *, doubled: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the adapter file; ``doubled=False`` gives only ``A, B``, for a residual base.

    Sharded factors are gathered, which is a collective; for the rest see :func:`ipca._dtensor.gathered`.
    """
    wrappers = wrappers_around({name: layer.kind for name, layer in layers.items()})
    for name, layer in layers.items():
        kernel, experts = getattr(layer, "kernel_size", ()), math.prod(layer.matrix_shape[:-2])
        A, B = to_peft(layer.kind, full(layer.lora_A), full(layer.lora_B), kernel)
        if doubled:
            A0, B0 = to_peft(layer.kind, layer.lora_A0, layer.lora_B0, kernel)
            A, B = double_factor("A", A, A0, experts), double_factor("B", B, B0, experts)
        yield from zip(factor_keys(name, layer.kind, wrappers[name]), (A, B), strict=True)
    for name, module in modules_to_save.items():
        for key, value in module.state_dict().items():
            yield f"{PREFIX}{name}.{key}", value


def adapter_state(model: nn.Module, contents: AdapterContents, *, doubled: bool = True) -> dict[str, Tensor]:
    """The tensors of the adapter file on the CPU; for a sharded model a collective, and only rank 0 gets them."""
    return gathered(adapter_tensors(*contents, doubled=doubled), keep=is_writer(model))


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


# -- files


def write_peft(
    folder: Path,
    model: nn.Module,
    contents: AdapterContents,
    tensors: Mapping[str, Tensor],
    base_model: str | None,
    *,
    doubled: bool = True,
) -> None:
    """Write PEFT's two files into ``folder``, which exists.

    Args:
        tensors: those of :func:`adapter_state`, with the same ``doubled``.
        base_model: PEFT's ``base_model_name_or_path``; default ``model.name_or_path``.
    """
    save_file(_unshared(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    write_config(folder, model, contents, base_model, doubled=doubled)


def write_config(
    folder: Path, model: nn.Module, contents: AdapterContents, base_model: str | None, *, doubled: bool = True
) -> None:
    """Write PEFT's configuration of the adapter of ``model``; arguments as for :func:`write_peft`."""
    base_model = base_model if base_model is not None else getattr(model, "name_or_path", None) or None
    names = [name for name, _ in model.named_modules()]
    config = adapter_config(*contents, names, base_model, doubled=doubled)
    cls = plain_type(model)
    if cls.__module__.startswith("transformers."):  # what peft.AutoPeftModel loads the base with
        config["auto_mapping"] = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors``, with copies of those that share memory with an earlier one, which safetensors refuses."""
    found: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return found
