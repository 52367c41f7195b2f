"""A model without its weights: built on the meta device, with the checkpoint's tensor for each of its parameters.

Where transformers does more to a weight than rename it while loading, the weight cannot be read by itself;
:class:`NotStreamable` then says so, and the whole model has to be loaded.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ipca.io.checkpoint import Checkpoint
from ipca.io.model_folder import read_config
from ipca.model.targets import Target
from ipca.nn.layer_kinds import ExpertStack, layer_kind
from ipca.nn.registry import get_layer


class NotStreamable(Exception):
    """The layers of this model cannot be read one by one; the message says why."""


def build_skeleton(folder: Path, checkpoint: Checkpoint, model_class: str | None = None) -> nn.Module:
    """The model of ``folder`` on the meta device, in the dtype that transformers would load it with.

    Args:
        model_class: as for :func:`ipca.io.model_folder.read_config`.

    Raises:
        NotStreamable: loading takes more than reading tensors, or the model cannot be built without them.
        FileNotFoundError, ImportError, ValueError: as :func:`ipca.io.model_folder.read_config`.
    """
    cls, config = read_config(folder, model_class)
    for name in ("quantization_config", "fusion_config", "transformers_weights"):
        if getattr(config, name, None) is not None:
            raise NotStreamable(f"its config.json has a {name}")
    if (folder / "adapter_config.json").exists():
        raise NotStreamable("an adapter_config.json lies beside it")
    dtype = _dtype(config, checkpoint)
    try:
        with torch.device("meta"):
            build = getattr(cls, "_from_config", None) or cls.from_config  # AutoModel has the latter
            model: nn.Module = build(config, dtype=dtype)
    except (RuntimeError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise NotStreamable(f"it cannot be built without weights ({_first_line(error)})") from None
    _check_dtype_plan(model, dtype)
    return model.eval()


def checkpoint_keys(
    model: nn.Module, targets: Sequence[Target], checkpoint: Checkpoint, *, residual: bool
) -> dict[str, str]:
    """The checkpoint's tensor for the weight of each target, by the target's path.

    Raises:
        NotStreamable: a weight is not in the checkpoint under a name of its own, or (``residual``) its dtype there is
            not the model's, so that it cannot be replaced in place.
    """
    sources = _sources(model, checkpoint)
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    keys = {}
    for target in targets:
        own = target.name if isinstance(get_layer(model, target.name), ExpertStack) else f"{target.name}.weight"
        parameter = model.get_parameter(own)
        key = next((sources[name] for name in (own, *tied[id(parameter)]) if name in sources), None)
        if key is None:
            raise NotStreamable(f"the checkpoint holds no tensor that is {own} and nothing else")
        stored = checkpoint.tensors[key].torch_dtype
        if residual and stored != parameter.dtype:
            raise NotStreamable(f"{key} is stored as {checkpoint.tensors[key].dtype} and loaded as {parameter.dtype}")
        keys[target.name] = key
    return keys


def whole_module_keys(model: nn.Module, modules_to_save: Sequence[str], checkpoint: Checkpoint) -> dict[str, str]:
    """The checkpoint's tensor for each entry of the state dict of ``modules_to_save``.

    Raises:
        NotStreamable: the checkpoint lacks an entry, as that of a new head.
    """
    inside = tuple(f"{name}." for name in modules_to_save)
    wanted = [key for key in model.state_dict() if key.startswith(inside)]
    sources = _sources(model, checkpoint) if wanted else {}
    absent = next((key for key in wanted if key not in sources), None)
    if absent is not None:
        raise NotStreamable(f"the checkpoint holds no tensor that is {absent} and nothing else")
    return {key: sources[key] for key in wanted}


def _sources(model: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """The tensor of the checkpoint for every entry of the model's state dict that is one such tensor, unchanged.

    Names are mapped as transformers does: the base model's prefix is added or removed, old names become new ones.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        rules = get_model_conversion_mapping(model)
        state, prefix = model.state_dict(), model.base_model_prefix
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        found, seen = {}, Counter[str]()
        for key in checkpoint.tensors:
            name, converted = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:
                name, converted = rename_source_key(key, [], [], prefix, state)
            seen[name] += 1
            if converted is None:
                found[name] = key
    except (ImportError, AttributeError, TypeError) as error:
        raise NotStreamable(f"this transformers does not tell how it renames weights ({_first_line(error)})") from None
    return {name: key for name, key in found.items() if name in state and seen[name] == 1}


def _dtype(config: Any, checkpoint: Checkpoint) -> torch.dtype:
    """The meaning of ``dtype="auto"``: the configuration's dtype, else the one of all floats in the checkpoint."""
    dtype = config.dtype
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    if isinstance(dtype, torch.dtype):
        return dtype
    held = {stored.torch_dtype for stored in checkpoint.tensors.values()}
    floats = {dtype for dtype in held if dtype is not None and dtype.is_floating_point}
    if dtype is not None or len(floats) != 1:
        raise NotStreamable("its config.json does not say one dtype, and neither do its weights")
    return floats.pop()


def _check_dtype_plan(model: Any, dtype: torch.dtype) -> None:
    """Raise where transformers keeps layers of a 16-bit model in float32, which only its own loading does."""
    kept = getattr(model, "_keep_in_fp32_modules", None) if dtype == torch.float16 else None
    always = getattr(model, "_keep_in_fp32_modules_strict", None) if dtype.itemsize == 2 else None
    names = [name for name, module in model.named_modules() if layer_kind(module)]
    for pattern in (*(kept or ()), *(always or ())):
        words = re.findall(r"\w+", pattern)
        if any(all(word in name for word in words) for name in names):
            raise NotStreamable(f"transformers keeps {pattern} of it in float32")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
