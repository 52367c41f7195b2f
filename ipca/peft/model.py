"""A PeftModel with windows as a whole: its configuration, its summary, and an adapter file gathered from all ranks."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch.distributed as dist
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import gather_params_ctx
from safetensors.torch import save_file
from torch import Tensor, nn

from ipca._atomic import staged_files
from ipca._dtensor import full
from ipca.io.labels import class_names
from ipca.io.peft_format import PREFIX, WEIGHTS
from ipca.model.report import Summary, account
from ipca.peft.config import PCConfig
from ipca.peft.guards import bypassed_layers, check_saved
from ipca.peft.layers import WindowLora, null_components
from ipca.peft.save_load import warn_bypassed


def config_of(model: nn.Module, adapter_name: str) -> PCConfig:
    """The configuration of an adapter.

    Raises:
        TypeError: ``model`` is not a PeftModel.
        ValueError: there is no adapter of that name, or it is not one of a PCConfig.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"expected a PeftModel, got a {type(model).__name__}; pass the model inside the wrapper.")
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, PCConfig):
        names = [name for name, other in model.peft_config.items() if isinstance(other, PCConfig)]
        raise ValueError(f"{adapter_name!r} is no adapter of a PCConfig; those are {', '.join(names) or '(none)'}.")
    return config


def summary(model: PeftModel, adapter_name: str = "default") -> Summary:
    """Layers, windows and certificates of one adapter; parameters are counted over the whole model.

    Args:
        model: a PeftModel, not the engine's wrapper around it.
        adapter_name: which adapter.

    Raises:
        TypeError: it is no PeftModel.
        ValueError: the adapter is not one of a PCConfig.
    """
    records = config_of(model, adapter_name).records
    saved = {path: layer for path, layer in records.saved.items() if path not in records.replaced}
    layers = [m for m in model.modules() if isinstance(m, WindowLora) and m.holds(adapter_name)]
    held = {layer.path: saved[layer.path] for layer in layers if layer.path in saved}
    reports = {path: layer.report() for path, layer in held.items()}
    fields = ("shape", "start", "rank", "alpha", "form", "basis", "train")
    windows: Any = [tuple(getattr(layer, name) for name in fields) for layer in held.values()]
    whole = {
        name.removeprefix(PREFIX): wrapper.modules_to_save[adapter_name]
        for name, wrapper in model.named_modules()
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save
    }
    null = null_components(model, adapter_name)
    return account(model, windows, {path: report for path, report in reports.items() if report}, {}, whole, null)


def save_gathered(model: PeftModel, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Write the adapter as ``save_pretrained`` does, with every factor gathered; all files are replaced together.

    For parameters that are sharded: under DeepSpeed ZeRO-3, which goes past the model's state dict when it gathers, and
    under FSDP2. Every rank must call it; rank 0 writes.

    Args:
        model: a PeftModel, not the engine's wrapper around it.
        folder: where to write, directly; made if missing.
        adapter_name: which adapter.

    Raises:
        TypeError, ValueError: as :func:`summary`, or stock PEFT would read another adapter from the files.
        OSError: ``folder`` cannot be written; what was there is intact.
    """
    config = config_of(model, adapter_name)
    check_saved(model, adapter_name)
    config.records.labels = class_names(getattr(model.get_base_model(), "config", None))
    with gather_params_ctx([p for name, p in model.named_parameters() if f".{adapter_name}" in name]):
        state = get_peft_model_state_dict(model, adapter_name=adapter_name)
        tensors = {key: _gathered(tensor) for key, tensor in state.items()}
    if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        return
    with staged_files(folder) as stage:
        save_file(tensors, stage / WEIGHTS, metadata={"format": "pt"})
        _for_inference(model, config).save_pretrained(str(stage), auto_mapping_dict=_auto_mapping(model, config))
    warn_bypassed(bypassed_layers(model, adapter_name))


def _for_inference(model: PeftModel, config: PCConfig) -> PCConfig:
    """The configuration as PEFT writes it: for inference, with the name of the base."""
    written = copy.copy(config)
    written.inference_mode = True
    if written.base_model_name_or_path is None:
        written.base_model_name_or_path = model.base_model.model.__dict__.get("name_or_path") or None
    return written


def _auto_mapping(model: PeftModel, config: PCConfig) -> dict[str, str] | None:
    if config.task_type is not None:
        return None
    base = model._get_base_model_class()
    return {"base_model_class": base.__name__, "parent_library": base.__module__}


def _gathered(tensor: Tensor) -> Tensor:
    """All of a tensor on the CPU, in memory of its own, as safetensors needs it."""
    return full(tensor.detach()).cpu().contiguous().clone()
