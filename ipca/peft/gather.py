"""Write an adapter of a PeftModel in one go, from whatever engine its parameters live in."""

from __future__ import annotations

import copy
import os

import torch.distributed as dist
from peft import PeftModel, get_peft_model_state_dict
from peft.utils.integrations import gather_params_ctx
from safetensors.torch import save_file
from torch import Tensor

from ipca._atomic import staged_files
from ipca._dtensor import full
from ipca.io.peft_format import WEIGHTS
from ipca.peft.config import PCConfig, config_of


def export(model: PeftModel, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Write the adapter as ``save_pretrained`` does, with every factor gathered, the old files or the new ones.

    For parameters that are sharded: under DeepSpeed ZeRO-3, which goes past the model's state dict when it gathers, and
    under FSDP2. Every rank must call it; rank 0 writes.

    Args:
        model: a PeftModel, not the engine's wrapper around it.
        folder: where to write, directly; made if missing.
        adapter_name: which adapter.

    Raises:
        TypeError: ``model`` is another module.
        ValueError: no adapter of that name, or not one of a PCConfig.
        OSError: ``folder`` cannot be written; what was there is intact.
    """
    config = config_of(model, adapter_name)
    with gather_params_ctx([p for name, p in model.named_parameters() if f".{adapter_name}" in name]):
        state = get_peft_model_state_dict(model, adapter_name=adapter_name)
        tensors = {key: _whole(tensor) for key, tensor in state.items()}
    if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        return
    with staged_files(folder) as stage:
        save_file(tensors, stage / WEIGHTS, metadata={"format": "pt"})
        _config_of(model, config).save_pretrained(str(stage), auto_mapping_dict=_auto_mapping(model, config))


def _config_of(model: PeftModel, config: PCConfig) -> PCConfig:
    """What PEFT writes: for inference, with the name of the base."""
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


def _whole(tensor: Tensor) -> Tensor:
    """On the CPU and in memory of its own, as safetensors asks for."""
    return full(tensor.detach()).cpu().contiguous().clone()
