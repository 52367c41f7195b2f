"""The check of an adapter with its reader: what PEFT builds from a configuration on a base without weights."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import math
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ipca.model.apply import adapted_layers
from ipca.nn.layer_kinds import is_quantized
from ipca.nn.quantization import quantization_kind
from ipca.nn.registry import set_layer

Shapes = Mapping[str, tuple[int, ...]]
"""The shape of each tensor of an adapter file by its key."""

_HOOKS = tuple(name for name, value in vars(nn.Module()).items() if name.endswith("_hooks") and isinstance(value, dict))


class Reading(NamedTuple):
    """What PEFT makes of an adapter.

    Attributes:
        ignored: keys of the file that PEFT puts nowhere.
        missing: keys that PEFT's layers look for and the file lacks.
        scaled: keys of factors that PEFT multiplies by another scaling.
        refusal: PEFT's error, where it loads nothing; else empty.
    """

    ignored: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    scaled: tuple[str, ...] = ()
    refusal: str = ""

    def __bool__(self) -> bool:
        """Whether PEFT reads something else than was written."""
        return any(self)


def has_peft() -> bool:
    """Whether the library PEFT is installed, and with it transformers."""
    return all(importlib.util.find_spec(name) is not None for name in ("peft", "transformers"))


def misreading_transformers() -> str:
    """The version of transformers, where its own ``load_adapter`` misreads stacks of experts, or an empty text."""
    if importlib.util.find_spec("transformers") is None:
        return ""
    version = importlib.metadata.version("transformers")
    major, minor = version.split(".")[:2]
    return version if (int(major), int(minor)) < (5, 7) else ""


def read_with_peft(
    base: nn.Module, config: Mapping[str, Any], shapes: Shapes, scalings: Mapping[str, float]
) -> Reading:
    """What PEFT builds from ``config`` on ``base``, and where it puts the tensors of the file.

    Args:
        base: of :func:`plain_copy`; PEFT changes it.
        config: the contents of ``adapter_config.json``.
        shapes: of every tensor of the adapter file.
        scalings: of layers, by the keys of their ``lora_A``.
    """
    from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, LoraConfig, PeftModel, set_peft_model_state_dict

    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            lora = LoraConfig.from_peft_type(**config)
            kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(lora.task_type, PeftModel)
            model = kind(base, lora, low_cpu_mem_usage=True)
            found: Any = set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=True)
        except Exception as error:  # whatever PEFT and transformers raise is what a reader would see
            return Reading(refusal=" ".join(f"{type(error).__name__}: {error}".split())[:300])
    missing = tuple(key.replace(".default", "") for key in found.missing_keys if ".lora_" in key)
    ignored = tuple(key.replace(".default", "") for key in found.unexpected_keys)
    read = {key: scaling for key, scaling in scalings.items() if key not in ignored}
    scaled = [key for key, scaling in read.items() if not math.isclose(_scaling(model, key), scaling, rel_tol=1e-6)]
    return Reading(ignored, missing, tuple(scaled))


def output_in_peft(base: nn.Module, folder: Path, x: Tensor) -> Tensor:
    """What stock PEFT computes from ``x`` with the adapter in ``folder`` on ``base``, which it changes."""
    from peft import PeftModel

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # about a base without a transformers configuration
        y: Tensor = PeftModel.from_pretrained(base, str(folder)).eval()(x)
        return y


def _scaling(model: nn.Module, key: str) -> float:
    """PEFT's scaling of the layer whose ``lora_A`` has the key ``key``."""
    layer: Any = model.get_submodule(key.rpartition(".lora_")[0])
    return float(layer.scaling["default"])


def plain_copy(model: nn.Module) -> nn.Module:
    """``model`` with plain layers, ours and PEFT's taken off, on the meta device: it shares no tensor and no module.

    Attributes that are neither are shared with ``model``, and hooks are left out.
    """
    copied = _copy(model, {}, {})
    if "config" in vars(copied):  # of which PEFT changes an entry
        copied.__dict__["config"] = copy.copy(copied.config)
    for name, layer in adapted_layers(copied).items():
        plain = _linear_like(layer) if is_quantized(layer.kind) else layer.to_plain()
        set_layer(copied, name, plain.train(layer.training))
    return copied


def _linear_like(layer: Any) -> nn.Module:
    """A layer with the keys and shapes that PEFT has for a quantized one, whose weight has no values here."""
    return nn.Linear(layer.in_features, layer.out_features, device="meta")


def _copy(module: nn.Module, modules: dict[int, nn.Module], tensors: dict[int, Tensor]) -> nn.Module:
    """Copy one module and what is in it; ``modules`` and ``tensors`` hold what was copied before, by its identity."""
    names = {base.__name__ for base in type(module).__mro__}
    while names & {"BaseTunerLayer", "AuxiliaryTrainingWrapper"}:  # PEFT's
        module = module.get_base_layer() if "BaseTunerLayer" in names else module.original_module  # type: ignore
        names = {base.__name__ for base in type(module).__mro__}
    if id(module) in modules or isinstance(module, torch.jit.ScriptModule):
        return modules.get(id(module), module)
    if quantization_kind(module) is not None:
        return _linear_like(module)
    new: nn.Module = object.__new__(type(module))
    modules[id(module)] = new
    new.__dict__.update(vars(module))
    for held in ("_parameters", "_buffers"):
        new.__dict__[held] = {name: _on_meta(value, tensors) for name, value in vars(module)[held].items()}
    new.__dict__["_modules"] = {
        name: None if child is None else _copy(child, modules, tensors) for name, child in module._modules.items()
    }
    new.__dict__.update((name, OrderedDict()) for name in _HOOKS)  # a plain dict cannot be referred to weakly
    for name in ("peft_config", "_hf_hook", "_old_forward", "forward"):  # to which PEFT would add, or accelerate's
        new.__dict__.pop(name, None)
    if "_merged" in vars(new):
        new.__dict__["_merged"] = None
    return new


def _on_meta(tensor: Tensor | None, tensors: dict[int, Tensor]) -> Tensor | None:
    """A tensor without values of the same shape and dtype; a parameter for a parameter."""
    if tensor is None:
        return None
    if id(tensor) not in tensors:
        shape = getattr(tensor, "ds_shape", tensor.shape)  # of a parameter that ZeRO-3 has spread
        empty = torch.empty(shape, dtype=tensor.dtype, device="meta")
        trains = isinstance(tensor, nn.Parameter) and tensor.requires_grad
        tensors[id(tensor)] = nn.Parameter(empty, trains) if isinstance(tensor, nn.Parameter) else empty
    return tensors[id(tensor)]
