"""export: an adapted model in forms that other programs read."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ipca.io.files import staged_files, staged_folder
from ipca.io.peft_format import CONFIG, WEIGHTS, adapter_config, adapter_tensors
from ipca.model import adapted_layers, refuse_suffix, require_adapted, whole_modules
from ipca.nn import LinearPC

FORMS = ("peft", "residual")
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def export(
    model: nn.Module, folder: str | os.PathLike[str], *, form: str = "peft", base_model: str | None = None
) -> None:
    """Write the adapter for programs without ipca.

    Args:
        model: has LinearPC layers; unchanged.
        folder: where to write.
        form: ``"peft"``: a stock PEFT LoRA of rank ``2 rank`` for the *original* base, as :func:`ipca.save_adapter`
            writes but without ``ipca.json``. ``"residual"``: ``folder/base``, the whole model with ``W_res`` in place
            of ``W``, and ``folder/adapter``, a LoRA of rank ``rank`` that is right on this base alone (on the original
            base it gives wrong results without any message). ``folder`` must then be new or empty.
        base_model: for PEFT's ``base_model_name_or_path``; default ``model.name_or_path``, or ``folder/base``.

    Raises:
        ValueError: as :func:`ipca.save_adapter`, or an unknown ``form``.
        OSError: ``folder`` cannot be written, or (residual) is not empty; nothing has changed.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}; got {form!r}.")
    if form == "peft":
        with staged_files(folder) as stage:
            write_peft(model, stage, base_model)
        return
    with staged_folder(folder) as stage:
        (stage / "base").mkdir()
        (stage / "adapter").mkdir()
        _write_base(model, stage / "base")
        base_model = base_model or str(Path(folder).absolute() / "base")
        write_peft(model, stage / "adapter", base_model, doubled=False)


def savable(model: nn.Module) -> tuple[dict[str, LinearPC], dict[str, nn.Module]]:
    """The adapted layers and the modules trained whole, or a ValueError for what an adapter file cannot hold."""
    layers, whole = require_adapted(model), whole_modules(model)
    paths = list(model.named_modules(remove_duplicate=False))
    places = Counter(id(module) for _, module in paths)
    for name, layer in layers.items():
        if _WRAPPERS.intersection(name.split(".")) or isinstance(model, _PARALLEL):
            raise ValueError(f"{name} belongs to a wrapper, not to the model; save the model inside it.")
        if not name:
            raise ValueError("the model is itself a LinearPC; save its state_dict, or put it into a module.")
        if layer.window is None:
            raise ValueError(f"{name} has no window yet; load its weights first.")
        if layer.kept_weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad):
            raise ValueError(f"{name}: its weight or bias trains, which an adapter file does not hold; freeze them.")
        if places[id(layer)] > 1:
            raise ValueError(f"{name} stands in several places of the model, which PEFT's format cannot say.")
    for name in whole:
        inside = [path for path in layers if not name or path.startswith(f"{name}.")]
        if inside:
            raise ValueError(
                f"{name or type(model).__name__} has trainable parameters of its own beside the adapted {inside[0]}; "
                "an adapter file holds whole modules only, so freeze them."
            )
        refuse_suffix(name, [path for path, _ in paths])
    return layers, whole


def write_peft(model: nn.Module, folder: Path, base_model: str | None, *, doubled: bool = True) -> None:
    """Write PEFT's two files into ``folder``, which exists; ``base_model`` defaults to ``model.name_or_path``."""
    layers, whole = savable(model)
    base_model = base_model if base_model is not None else getattr(model, "name_or_path", None) or None
    save_file(adapter_tensors(layers, whole, doubled=doubled), folder / WEIGHTS, metadata={"format": "pt"})
    write_config(model, folder, base_model, doubled=doubled)


def write_config(model: nn.Module, folder: Path, base_model: str | None, *, doubled: bool = True) -> None:
    """Write PEFT's configuration of the adapter of ``model``."""
    layers, whole = savable(model)
    names = [name for name, _ in model.named_modules()]
    config = adapter_config(layers, whole, names, base_model, doubled=doubled)
    if type(model).__module__.startswith("transformers."):  # what peft.AutoPeftModel loads the base with
        config["auto_mapping"] = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def residual_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain model with ``W_res`` in place of every adapted ``W``."""
    layers = adapted_layers(model)
    ours = tuple(f"{name}.{key}" for name in layers for key in ("lora_", "kept_weight", "_extra_state"))
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(ours)}
    for name, layer in layers.items():
        weight = layer.residual_weight()
        state[f"{name}.weight"] = weight.mT.contiguous() if layer.kind == "conv1d" else weight
    return state


def _write_base(model: nn.Module, folder: Path) -> None:
    state = residual_state_dict(model)
    save_pretrained = getattr(model, "save_pretrained", None)
    if callable(save_pretrained):
        save_pretrained(folder, state_dict=state)
    else:
        # A copy of each tensor: safetensors refuses tensors that share memory, and tied weights do.
        save_file({k: v.cpu().contiguous().clone() for k, v in state.items()}, folder / "model.safetensors")
