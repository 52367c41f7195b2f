"""Saving by transformers: ``save_pretrained`` of an adapted model, and Trainer's checkpoints, which resume it.

transformers has no hook for either, so two methods of its ``PreTrainedModel`` are wrapped once a model is adapted, or
an adapted one is unpickled. ``save_pretrained``, which ``push_to_hub`` and Trainer call too, writes the plain model
with the adapter folded in: any reader loads the trained function. In a folder that is called ``checkpoint-N``, as
Trainer's are, the file has one tensor more: the bytes of what trains, in full precision. ``load_state_dict`` of an
adapted model recognizes it and restores that state instead of the folded weights. Models of diffusers and of
huggingface_hub's mixin, which save their state dict, are saved as plain models too. PEFT is kept from putting an
adapter on an adapted model: each library saves only its own.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from ipca._dtensor import is_sharded_model
from ipca.nn.experts import ExpertsPC
from ipca.nn.initialization import LayerRecord, add_low_rank, check_extra_state, decode_extra_state
from ipca.nn.layer_kinds import EXPERTS, from_matrix
from ipca.nn.offload import stored_state_dict, stored_value
from ipca.nn.quantized_linear import QuantizedLinearPC
from ipca.nn.window_layer import WindowLayer

STATE = "ipca_training_state"
"""The name of the tensor of bytes in a checkpoint; transformers may put a prefix in front."""
INSTALLED = "_ipca_installed"
"""The attribute that marks an adapted layer which took the place of a plain one."""
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_FACTORS = ("lora_A", "lora_B", "lora_A0", "lora_B0")


class Mark:
    """What :data:`INSTALLED` holds. A copy of it wraps the methods too, in whatever process it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return mark, ()


def mark() -> Mark:
    """A mark for a layer, once :func:`wrap_libraries` was called."""
    wrap_libraries()
    return Mark()


def wrap_libraries() -> None:
    """Wrap the methods by which Hugging Face's libraries save and resume models, and PEFT's that begin an adapter.

    Those of libraries that are not imported are left alone.
    """
    for module, cls, method, wrap in (
        ("transformers.modeling_utils", "PreTrainedModel", "save_pretrained", _wrap_transformers),
        ("diffusers.models.modeling_utils", "ModelMixin", "save_pretrained", _wrap_saving),
        ("huggingface_hub.hub_mixin", "PyTorchModelHubMixin", "_save_pretrained", _wrap_saving),
        ("peft.peft_model", "PeftModel", "__init__", _wrap_peft),
        ("peft.tuners.tuners_utils", "BaseTuner", "__init__", _wrap_peft),
    ):
        found = getattr(sys.modules.get(module), cls, None)
        if found is not None and not hasattr(getattr(found, method), INSTALLED):
            wrap(found, method)
            setattr(getattr(found, method), INSTALLED, True)


def _wrap_peft(cls: Any, method: str) -> None:
    """Let ``method``, which puts an adapter of PEFT on a model, refuse an adapted one."""
    begin = getattr(cls, method)

    @wraps(begin)
    def checked(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        check_not_adapted(model)
        begin(self, model, *args, **kwargs)

    setattr(cls, method, checked)


def check_not_adapted(model: nn.Module) -> None:
    """Raise ValueError where ``model`` has adapted layers in the place of plain ones, or of its own that train."""
    for name, layer in model.named_modules():
        if not isinstance(layer, WindowLayer):
            continue
        if getattr(layer, INSTALLED, False) or any(p.requires_grad for p in layer.parameters()):
            name = name or type(layer).__name__
            raise ValueError(
                f"{name}: it is adapted by ipca, and PEFT's save_pretrained would leave that out; "
                "call ipca.unload(model) first, which folds it into the weight, or adapt all layers inside PEFT with "
                "ipca.peft.PCConfig."
            )


def _wrap_saving(cls: Any, method: str) -> None:
    """Let ``method``, which asks ``state_dict`` for what it writes, get that of the plain model."""
    save = getattr(cls, method)

    def fold(model: nn.Module, state: dict[str, Any], *_: Any) -> None:
        plain = plain_state_dict(model, {key: stored_value(model, key, value) for key, value in state.items()})
        state.clear()
        state.update(plain)

    @wraps(save)
    def saved_plain(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not replaced_layers(self):
            return save(self, *args, **kwargs)
        check_can_fold(self, None)
        hook = self.register_state_dict_post_hook(fold)
        try:
            return save(self, *args, **kwargs)
        finally:
            hook.remove()

    setattr(cls, method, saved_plain)


def _wrap_transformers(cls: Any, method: str) -> None:
    """Wrap ``save_pretrained`` and ``load_state_dict`` of transformers' models."""
    save, load = getattr(cls, method), cls.load_state_dict

    @wraps(save)
    def save_pretrained(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not replaced_layers(self):
            return save(self, *args, **kwargs)
        call = inspect.signature(save).bind(self, *args, **kwargs)
        folder, state = call.arguments["save_directory"], call.arguments.get("state_dict")
        check_can_fold(self, state)
        state = stored_state_dict(self) if state is None else state
        plain = plain_state_dict(self, state)
        if _CHECKPOINT.fullmatch(Path(folder).name):
            plain[STATE] = _packed(training_state(self, state))
            call.arguments["max_shard_size"] = sys.maxsize  # Trainer reads one file whole, but shards one by one
        call.arguments["state_dict"] = plain
        with _plain_experts(self):
            return save(*call.args, **call.kwargs)

    @wraps(load)
    def load_state_dict(self: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        packed = next((key for key in state_dict if key.endswith(STATE)), None)
        if packed is None or not replaced_layers(self):
            return load(self, state_dict, *args, **kwargs)
        saved = safetensors.torch.load(state_dict[packed].numpy().tobytes())
        load(self, resumable_state(self, saved), strict=False)
        return _IncompatibleKeys([], [])

    cls.save_pretrained, cls.load_state_dict = save_pretrained, load_state_dict


def replaced_layers(model: nn.Module) -> dict[str, WindowLayer]:
    """The adapted layers of ``model`` that took the place of plain ones, by path; not those in a model's own code."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, WindowLayer))
    return {name: layer for name, layer in layers if getattr(layer, INSTALLED, False)}


def check_can_fold(model: nn.Module, state_dict: Mapping[str, Any] | None) -> None:
    """Raise ValueError where the adapter of ``model`` cannot be folded into the weights that are saved.

    Args:
        state_dict: given by the caller, who has then gathered it.
    """
    if state_dict is None and is_sharded_model(model):
        raise ValueError(
            f"this {type(model).__name__} is sharded over processes, and save_pretrained cannot fold its adapter in; "
            "ipca.save_adapter(model, folder), called by every process, gathers the adapter."
        )
    quantized = any(isinstance(layer, QuantizedLinearPC) for layer in replaced_layers(model).values())
    if quantized or getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            f"save_pretrained cannot fold the adapter of {next(iter(replaced_layers(model)))} into this "
            f"{type(model).__name__}, which is quantized: ipca.save_adapter(model, folder) writes the adapter, and "
            "after ipca.unload(model) the adapted layers are in floats."
        )


@torch.no_grad()
def plain_state_dict(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """``state_dict`` of ``model`` as that of the plain model, with the trained function; it is not changed.

    Raises:
        ValueError: a weight would hold NaN or Inf.
    """
    state = dict(state_dict)
    for name, layer in replaced_layers(model).items():
        if f"{name}.base_weight" not in state:
            continue
        own = {key: state.pop(f"{name}.{key}", getattr(layer, key)) for key in ("base_weight", *_FACTORS)}
        state.pop(f"{name}._extra_state", None)
        terms = [(layer.scaling, own["lora_B"], own["lora_A"])]
        if layer.form == "intact":
            terms.append((-layer.scaling, own["lora_B0"], own["lora_A0"]))
        base = own["base_weight"]
        weight = from_matrix(layer.kind, add_low_rank(layer.as_matrix(base), terms), base.shape)
        if not (weight.is_meta or weight.isfinite().all()):
            raise ValueError(
                f"{name}: with its adapter folded in, the weight holds NaN or Inf in {weight.dtype}: nothing was "
                "written. Load an adapter from before, or cast the model to a wider dtype first."
            )
        state[name if layer.kind in EXPERTS else f"{name}.weight"] = weight.cpu().contiguous()
    return {plain_key(model, key): value for key, value in state.items()}


def plain_key(model: nn.Module, key: str) -> str:
    """``key`` without the step from an adapted module of experts to the module itself."""
    wrapped = [name for name, module in model.named_modules() if isinstance(module, ExpertsPC)]
    owner = next((name for name in wrapped if key.startswith(f"{name}.base.")), None)
    return key if owner is None else owner + key.removeprefix(f"{owner}.base")


@contextmanager
def _plain_experts(model: nn.Module) -> Iterator[None]:
    """Put adapted stacks of weights back where transformers asks for their shapes, on the meta device."""
    places = {name: module for name, module in model.named_modules() if isinstance(module, ExpertsPC)}
    try:
        for name, experts in places.items():
            for leaf, stack in experts.stacks().items():
                experts.base._parameters[leaf] = nn.Parameter(stack.base_weight.detach().to("meta"))
            _put(model, name, experts.base)
        yield
    finally:
        for name, experts in places.items():
            _put(model, name, experts)
            for leaf in experts.stacks():
                experts.base._parameters[leaf] = None


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def training_state(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """What training changes and what it started from, of ``state_dict``: all but the frozen parameters."""
    factors = {f"{name}.{factor}" for name in replaced_layers(model) for factor in _FACTORS}
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad} - factors
    return {key: value for key, value in state_dict.items() if isinstance(value, Tensor) and key not in frozen}


def resumable_state(model: nn.Module, saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """``saved``, the training state of a checkpoint, as ``model`` can load it, so that nothing fails halfway.

    Raises:
        ValueError: it belongs to a model that was adapted in another way.
    """
    here, layers = model.state_dict(), replaced_layers(model)
    differ = (training_state(model, here).keys() - saved.keys()) | (saved.keys() - here.keys())
    other = sorted(key for key in differ if not key.endswith("_extra_state"))
    if other:
        has, lacks = ("model", "checkpoint") if other[0] in here else ("checkpoint", "model")
        raise ValueError(f"cannot resume: the {has} has {other[0]}, the {lacks} has not; adapt the model as before.")
    for key, value in saved.items():
        if not key.endswith("_extra_state") and value.shape != here[key].shape:
            raise ValueError(
                f"cannot resume: {key} is {tuple(value.shape)} in the checkpoint and {tuple(here[key].shape)} here; "
                "adapt the model as before."
            )
    for name, layer in layers.items():
        state = saved.pop(f"{name}._extra_state")
        try:
            check_extra_state(layer._record(), state)
        except ValueError as error:
            raise ValueError(f"cannot resume {name}: {error} Adapt the model as before.") from None
        _check_same_start(name, layer._record(), decode_extra_state(state))
        initial = ((layer.lora_A0, saved[f"{name}.lora_A0"]), (layer.lora_B0, saved[f"{name}.lora_B0"]))
        if layer.form == "residual" and not all(torch.equal(mine.cpu(), theirs) for mine, theirs in initial):
            raise ValueError(
                f"cannot resume {name}: it starts from other factors than the checkpoint, and the residual form has "
                "them in its base weight; adapt the same base by the same window."
            )
    return saved


def _check_same_start(name: str, here: LayerRecord, saved: LayerRecord) -> None:
    """Raise ValueError where a layer and its checkpoint start from other components, at another size or base weight."""
    places = [(record.basis, record.start) for record in (saved, here)]
    if None not in (saved.start, here.start) and places[0] != places[1]:
        words = [f"component {start} of its {basis}" for basis, start in places]
        raise ValueError(
            f"cannot resume {name}: the checkpoint starts from {words[0]}, this layer from {words[1]}; adapt the model "
            "by the same window."
        )
    if saved.magnitude != here.magnitude:
        raise ValueError(
            f"cannot resume {name}: the checkpoint was saved with magnitude={saved.magnitude!r}, this layer has "
            f"{here.magnitude!r}. Adapt the model as before."
        )
    if saved.base_sha256 and here.base_sha256 and saved.base_sha256 != here.base_sha256:
        raise ValueError(
            f"cannot resume {name}: its base weight is another one than the checkpoint's; load the same base, in the "
            "same dtype."
        )


def _packed(state: dict[str, Tensor]) -> Tensor:
    """The tensors of ``state`` as one tensor of bytes."""
    copies = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in state.items()}
    return torch.frombuffer(bytearray(safetensors.torch.save(copies)), dtype=torch.uint8)
