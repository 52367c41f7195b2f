"""The factors of tasks whose change is in the weights already: how to keep, remove and save them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ipca._atomic import staged_files
from ipca.io.peft_format import CONFIG, WEIGHTS, adapter_config, adapter_tensors
from ipca.lab.continual.method import Adapter
from ipca.nn.initialization import add_low_rank
from ipca.nn.layer_kinds import read_layer
from ipca.nn.registry import get_layer


def without_weights(layers: Adapter) -> Adapter:
    """``layers``, which have left their model, without their weights: the factors and what they mean."""
    for layer in layers.values():
        layer.base_weight = nn.Parameter(torch.empty_like(layer.base_weight, device="meta"), requires_grad=False)
        layer.bias = None
        layer.requires_grad_(False)
    return layers


def factors(layers: Adapter) -> Iterable[Tensor]:
    """``A, B, A0, B0`` of every layer."""
    for layer in layers.values():
        yield from (layer.lora_A, layer.lora_B, layer.lora_A0, layer.lora_B0)


@torch.no_grad()
def take_out(model: nn.Module, layers: Adapter) -> None:
    """Subtract ``scaling · (B A − B0 A0)`` of every layer from its plain weight in ``model``, rounded once."""
    changed = []
    for name, layer in layers.items():
        weight, _ = read_layer(get_layer(model, name))
        terms = [(-layer.scaling, layer.lora_B, layer.lora_A), (layer.scaling, layer.lora_B0, layer.lora_A0)]
        changed.append((weight, add_low_rank(weight, terms)))
    for weight, new in changed:
        weight.copy_(new)


def save_stock(model: nn.Module, layers: Adapter, folder: str | os.PathLike[str], base_model: str | None) -> None:
    """Write ``layers`` as a stock PEFT LoRA of twice the rank for any weights of ``model``.

    Raises:
        ValueError: PEFT's format cannot hold them.
        OSError: ``folder`` cannot be written; what was there is intact.
    """
    names = [name for name, _ in model.named_modules()]
    config = adapter_config(layers, {}, names, base_model or getattr(model, "name_or_path", None))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter_tensors(layers, {})}
    with staged_files(folder) as stage:
        save_file(tensors, stage / WEIGHTS, metadata={"format": "pt"})
        (stage / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
