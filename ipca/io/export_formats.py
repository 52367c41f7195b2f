"""export: an adapted model in forms that other programs read."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ipca._atomic import staged_files, staged_folder
from ipca.io.gather import gathered, is_writer, needs_all, plain_type, write_once
from ipca.io.peft_format import CONFIG, WEIGHTS, adapter_config, adapter_tensors
from ipca.io.truncate import TRUNCATION, truncated
from ipca.model.apply import adapted_layers
from ipca.model.merge import fully_trained_modules, require_adapted
from ipca.model.targets import check_ambiguous_suffix
from ipca.nn.experts import ExpertsPC
from ipca.nn.layer_kinds import EXPERTS, from_matrix
from ipca.nn.quantized_linear import QuantizedLinearPC
from ipca.nn.window_layer import WindowLayer

FORMS = ("peft", "residual", "truncated")
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module"}
_FSDP1 = "_fsdp_wrapped_module"
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def export(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    form: str = "peft",
    base_model: str | None = None,
    rank: int | None = None,
) -> dict[str, float]:
    """Write the adapter for programs without ipca.

    Args:
        model: has adapted layers; unchanged.
        folder: where to write.
        form: ``"peft"``: a stock PEFT LoRA of rank ``2 rank`` for the *original* base, as :func:`ipca.save_adapter`
            writes but without ``ipca.json``. ``"residual"``: ``folder/base``, the whole model with ``W_res`` in place
            of ``W``, and ``folder/adapter``, a LoRA of rank ``rank`` that is right on this base alone (on the original
            base it gives wrong results without any message). ``folder`` must then be new or empty. ``"truncated"``: a
            stock LoRA for the original base that is nearest to the change of each weight among those of rank ``rank``;
            ``truncation.json`` beside it has the relative errors.
        base_model: for PEFT's ``base_model_name_or_path``; default ``model.name_or_path``, or ``folder/base``.
        rank: of the truncated form alone, at least 1.

    Returns:
        ``‖ΔW − lora_B lora_A‖_F / ‖ΔW‖_F`` by layer of the truncated form; empty for the others, which are exact up to
        rounding.

    Raises:
        ValueError: as :func:`ipca.save_adapter`, an unknown ``form``, or a ``rank`` that does not go with it.
        OSError: ``folder`` cannot be written, or (residual) is not empty; nothing has changed.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}; got {form!r}.")
    if form == "truncated" and rank is None:
        raise ValueError("form 'truncated' needs a rank, such as that of the window.")
    if form != "truncated" and rank is not None:
        raise ValueError(f"a rank is for form 'truncated' alone; got {form!r} and rank {rank}.")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank must be an int of at least 1, got {rank!r}.")
    if form == "residual":
        _check_quantized(model)
    tensors = adapter_state(model, doubled=form != "residual")
    errors: dict[str, float] = {}
    if form == "peft":
        write_once(model, lambda: _export_peft(model, tensors, folder, base_model))
    elif rank is not None:
        write_once(model, lambda: errors.update(_export_truncated(model, tensors, folder, base_model, rank)))
    else:
        base = residual_state_dict(model)
        write_once(model, lambda: _export_residual(model, tensors, base, folder, base_model))
    return errors


def _export_peft(
    model: nn.Module, tensors: dict[str, Tensor], folder: str | os.PathLike[str], base_model: str | None
) -> None:
    with staged_files(folder) as stage:
        write_peft(model, tensors, stage, base_model)


def _export_truncated(
    model: nn.Module, tensors: dict[str, Tensor], folder: str | os.PathLike[str], base_model: str | None, rank: int
) -> dict[str, float]:
    layers, _ = collect_adapter(model)
    low, errors = truncated(tensors, {name: layer.scaling for name, layer in layers.items()}, rank)
    widths = {name: min(2 * layer.rank, *layer.matrix_shape) for name, layer in layers.items()}
    narrow = {f"^{re.escape(name)}": width for name, width in widths.items() if width < rank}
    with staged_files(folder) as stage:
        write_peft(model, low, stage, base_model)
        config = json.loads((stage / CONFIG).read_text())
        config |= {"r": rank, "lora_alpha": rank, "rank_pattern": narrow, "alpha_pattern": narrow}
        (stage / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        (stage / TRUNCATION).write_text(json.dumps({"rank": rank, "relative_error": errors}, indent=2) + "\n")
    return errors


def _export_residual(
    model: nn.Module,
    tensors: dict[str, Tensor],
    base: dict[str, Tensor],
    folder: str | os.PathLike[str],
    base_model: str | None,
) -> None:
    with staged_folder(folder) as stage:
        (stage / "base").mkdir()
        (stage / "adapter").mkdir()
        _write_base(model, base, stage / "base")
        base_model = base_model or str(Path(folder).absolute() / "base")
        write_peft(model, tensors, stage / "adapter", base_model, doubled=False)


def _check_quantized(model: nn.Module) -> None:
    """Raise where there is no ``W_res`` in floats to write."""
    for name, layer in adapted_layers(model).items():
        if isinstance(layer, QuantizedLinearPC):
            raise ValueError(
                f"{name} is quantized ({layer.kind}), and W_res would have to be quantized anew; adapt the model "
                "before it is quantized, export that, and quantize its base."
            )


def collect_adapter(model: nn.Module) -> tuple[dict[str, WindowLayer], dict[str, nn.Module]]:
    """The adapted layers and the fully trained modules, or a ValueError for what an adapter file cannot hold."""
    layers, modules_to_save = require_adapted(model), fully_trained_modules(model)
    paths = list(model.named_modules(remove_duplicate=False))
    places = Counter(id(module) for _, module in paths)
    moved = tuple(f"{name}.base." for name, module in paths if isinstance(module, ExpertsPC))
    for name, layer in layers.items():
        _check_layer(model, name, layer, places[id(layer)])
    for name in (*layers, *modules_to_save):
        if f"{name}.".startswith(moved):
            raise ValueError(
                f"{name} trains beside an adapted stack of weights, in the module that was moved to that path; freeze "
                "it, or put the stack into a module of its own."
            )
    for name in modules_to_save:
        inside = [path for path in layers if not name or path.startswith(f"{name}.")]
        if inside:
            raise ValueError(
                f"{name or type(model).__name__} has trainable parameters of its own beside the adapted {inside[0]}; "
                "an adapter file holds whole modules only, so freeze them."
            )
        check_ambiguous_suffix(name, [path for path, _ in paths])
    return layers, modules_to_save


def _check_layer(model: nn.Module, name: str, layer: WindowLayer, places: int) -> None:
    """Raise where an adapter file cannot hold the ``layer``, which stands in so many ``places`` of ``model``."""
    if _FSDP1 in name.split(".") or layer.lora_A.shape != layer.lora_A0.shape:
        raise ValueError(
            f"{name}: its factors are flat pieces of FullyShardedDataParallel or ZeRO-3; shard with "
            "torch.distributed.fsdp.fully_shard, or save within deepspeed.zero.GatheredParameters."
        )
    if _WRAPPERS.intersection(name.split(".")) or isinstance(model, _PARALLEL):
        raise ValueError(f"{name} belongs to a wrapper, not to the model; save the model inside it.")
    if not name:
        kind = type(layer).__name__
        raise ValueError(f"the model is itself a {kind}; save its state_dict, or put it into a module.")
    if layer.window is None:
        raise ValueError(f"{name} has no window yet; load its weights first.")
    if any(p.requires_grad for key, p in layer.named_parameters() if key not in ("lora_A", "lora_B")):
        raise ValueError(f"{name}: its weight or bias trains, which an adapter file does not hold; freeze them.")
    if places > 1:
        raise ValueError(f"{name} stands in several places of the model, which PEFT's format cannot say.")


def adapter_state(model: nn.Module, *, doubled: bool = True) -> dict[str, Tensor]:
    """The tensors of the adapter file, on the CPU; of a sharded model gathered by all processes, for rank 0 alone.

    Args:
        doubled: False gives ``A, B`` alone, for a residual base.
    """
    return gathered(adapter_tensors(*collect_adapter(model), doubled=doubled), keep=is_writer(model))


def write_peft(
    model: nn.Module, tensors: dict[str, Tensor], folder: Path, base_model: str | None, *, doubled: bool = True
) -> None:
    """Write PEFT's two files into ``folder``, which exists; ``base_model`` defaults to ``model.name_or_path``.

    ``tensors`` are those of :func:`adapter_state`, with the same ``doubled``.
    """
    base_model = base_model if base_model is not None else getattr(model, "name_or_path", None) or None
    save_file(_apart(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    write_config(model, folder, base_model, doubled=doubled)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``tensors``, copies of those that share memory with one before: safetensors refuses them."""
    found: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return found


def write_config(model: nn.Module, folder: Path, base_model: str | None, *, doubled: bool = True) -> None:
    """Write PEFT's configuration of the adapter of ``model``."""
    layers, modules_to_save = collect_adapter(model)
    names = [name for name, _ in model.named_modules()]
    config = adapter_config(layers, modules_to_save, names, base_model, doubled=doubled)
    cls = plain_type(model)
    if cls.__module__.startswith("transformers."):  # what peft.AutoPeftModel loads the base with
        config["auto_mapping"] = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def residual_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain model with ``W_res`` in place of every adapted ``W``.

    Of a sharded model every process must call it, and rank 0 alone gets the tensors, whole and on the CPU.
    """
    layers = adapted_layers(model)
    ours = tuple(f"{name}.{key}" for name in layers for key in ("lora_", "base_weight", "_extra_state"))
    state = {_plain_key(model, k): value for k, value in model.state_dict().items() if not k.startswith(ours)}
    if needs_all(model):
        state = gathered(state.items(), keep=is_writer(model))
    for name, layer in layers.items():
        weight = layer.residual_weight()
        if is_writer(model):
            key = name if layer.kind in EXPERTS else f"{name}.weight"
            state[key] = from_matrix(layer.kind, weight, layer.base_weight.shape).contiguous()
    return state


def _plain_key(model: nn.Module, key: str) -> str:
    """The key without the step from an adapted module of experts to the module itself."""
    wrapped = [name for name, module in model.named_modules() if isinstance(module, ExpertsPC)]
    owner = next((name for name in wrapped if key.startswith(f"{name}.base.")), None)
    return key if owner is None else owner + key.removeprefix(f"{owner}.base")


def _write_base(model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    save_pretrained = getattr(model, "save_pretrained", None)
    if callable(save_pretrained):
        save_pretrained(folder, state_dict=state)
    else:
        # A copy of each tensor: safetensors refuses tensors that share memory, and tied weights do.
        save_file({k: v.cpu().contiguous().clone() for k, v in state.items()}, folder / "model.safetensors")
