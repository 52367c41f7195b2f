"""Checks around PEFT's own functions, which have no hooks for them: :func:`install_guards` wraps them.

| function | what is done before or after it |
|---|---|
| ``hotswap_adapter_from_state_dict`` | refused where it would leave ``A0, B0`` beside others' factors |
| ``LoraModel.add_weighted_adapter`` | refused: it combines only ``A, B`` |
| ``LoraModel.inject_adapter`` | adapters named like modules are refused, unmatched window patterns named, heads added |
| the same | "all-linear" leaves out what no window fits; where it raises, the model is as it was |
| the same | a layer that stands in several places is refused: PEFT replaces it in one, or saves it twice |
| the same | a PeftModel is refused as a base, around which an adapter would be saved under names that nothing reads |
| the same | the weights of all layers are decomposed together once PEFT has made these; in ``MixedModel`` too |
| the same, ``LoraModel.unload`` | heads and biases that a window has trained, and that stay so, are named |
| ``LoraModel.merge_adapter`` | refused for some of several active adapters: PEFT would leave out the others |
| ``PeftModel.save_pretrained`` | refused where stock PEFT would read another adapter; what it loses is named |
| ``PeftModel.from_pretrained``, ``load_adapter`` | with ``is_trainable=True`` a window trains on as with its PCConfig |
| ``PeftModel``, ``BaseTuner`` | refused on a model that ``ipca.apply_pc`` has adapted |
| ``BaseTuner`` | where it raises, the configurations of the model are as they were |
| transformers' ``load_adapter`` | refused for a window with ``is_trainable=True``, and where it misreads experts |
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import wraps
from inspect import signature
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import LoraModel, PeftModel, get_peft_model_state_dict
from peft.tuners import MixedModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, hotswap
from torch import Tensor, nn
from transformers.integrations.peft import PeftAdapterMixin

from ipca.io.adapter_folder import SIDECAR
from ipca.io.labels import class_names, name_classes
from ipca.io.peft_format import PREFIX, WEIGHTS
from ipca.io.peft_reader import misreading_transformers, plain_copy, read_with_peft
from ipca.model.heads import find_heads, warn_of_loose_parameters
from ipca.model.patterns import hint, matches
from ipca.model.running_statistics import forget_statistics, warn_moved_statistics, watch_statistics
from ipca.model.targets import few
from ipca.model.transformers_models import wrap_libraries
from ipca.model.weight_reads import weight_reads
from ipca.nn.initialization import warn_null
from ipca.nn.layer_kinds import EXPERTS
from ipca.nn.offload import is_offloaded
from ipca.peft.config import PCConfig
from ipca.peft.dispatch import admit_windows
from ipca.peft.factors import check_handed_out, has_initial, initial_factor
from ipca.peft.layers import WindowLora, WindowVariant, null_components
from ipca.peft.offload import with_stored_factors
from ipca.peft.preparation import start
from ipca.peft.save_load import warn_bypassed
from ipca.peft.selection import all_or_nothing, check_places, leave_out

_LOADED = "_hf_peft_config_loaded"
"""The attribute by which a model of transformers knows that it has an adapter of PEFT."""


def check_hotswap(model: nn.Module, state_dict: Mapping[str, Tensor], adapter: str) -> None:
    """Raise ValueError where ``state_dict`` lacks the factors of a window, or has only ``A`` and ``B`` of it."""
    for path, layer in model.named_modules():
        if not (isinstance(layer, WindowLora) and layer.holds(adapter)) or layer.pairs(adapter) is None:
            continue
        incoming = state_dict.get(f"{path.replace('_orig_mod.', '')}.lora_A.{adapter}.weight")
        if incoming is None or len(incoming) <= len(layer.lora_A[adapter].weight):
            raise ValueError(
                f"{path}: the adapter {adapter!r} trains a window of rank {layer.r[adapter]}, into which only a LoRA "
                "of a larger rank can be hot-swapped, such as the saved adapter of a window of this rank; load the "
                "first adapter with stock PEFT, without a PCConfig, to swap others."
            )


def check_weighted(model: LoraModel, adapters: Sequence[str]) -> None:
    """Raise ValueError where one of ``adapters`` trains a window."""
    windows = [name for name in adapters if isinstance(model.peft_config.get(name), PCConfig)]
    if windows:
        raise ValueError(
            f"{windows[0]!r} trains a window, and add_weighted_adapter would combine the trained factors without their "
            "initial ones: save the adapters, load them with stock PEFT, without a PCConfig, and combine those."
        )


def add_heads(model: nn.Module, config: PCConfig) -> None:
    """Name the head of ``model`` in the configuration's ``modules_to_save``."""
    chosen, excluded = config.target_modules or (), config.exclude_modules or ()
    heads = find_heads(model, chosen, (excluded,) if isinstance(excluded, str) else excluded)
    named = config.modules_to_save or []
    config.modules_to_save = [*named, *(name for name in heads if name not in named)] or None
    warn_of_loose_parameters(model)


def warn_unmatched(model: nn.Module, config: PCConfig, adapter: str) -> None:
    """Warn of keys of ``window_pattern`` and names in ``target_modules`` that match no layer of the adapter."""
    paths = [layer.path for layer in model.modules() if isinstance(layer, WindowLora) and layer.holds(adapter)]
    listed = config.target_modules if isinstance(config.target_modules, (list, set)) else ()
    excluded = config.exclude_modules if isinstance(config.exclude_modules, (list, set)) else ()
    names = set(listed) - set(config.modules_to_save or ())  # a head that "all-linear" found, and that trains whole
    unmatched = {
        "window_pattern keys": (config.unmatched_windows(paths), paths),
        "target_modules": (_unmatched(names, [*paths, *excluded]), [name for name, _ in model.named_modules()]),
    }
    for field, (patterns, known) in unmatched.items():
        if patterns:
            meant = "".join(dict.fromkeys(hint(pattern, known) for pattern in patterns)).strip()
            meant = f" ({meant})" if meant else ""
            warnings.warn(
                f"The following {field} did not match any targeted module{meant} and were ignored: {patterns}.",
                RuntimeWarning,
                stacklevel=3,
            )


def _unmatched(names: Iterable[str], paths: Iterable[str]) -> list[str]:
    """Those of ``target_modules`` that are neither one of ``paths`` nor an end of one, as PEFT matches them."""
    return sorted(name for name in names if not any(f".{path}".endswith(f".{name}") for path in paths))


def check_names(model: nn.Module, adapters: Mapping[str, Any]) -> None:
    """Raise ValueError where PEFT, saving one of several adapters, would leave out a module with another one's name."""
    if len(adapters) < 2 or not any(isinstance(config, PCConfig) for config in adapters.values()):
        return
    inside: tuple[str, ...] = ()
    parts = {"base_model", "model", "base_layer", "weight", "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}
    for path, module in model.named_modules():
        if not path.startswith(inside or ("//",)):
            parts.update(path.split("."))
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                inside += (f"{path}.",)
    for name in parts.intersection(adapters):
        raise ValueError(
            f"the adapter {name!r} has the name of a part of the model, and PEFT would leave out the tensors of that "
            "part when it saves another adapter; give the adapter another name."
        )


def check_merge(model: LoraModel, adapters: Sequence[str] | None) -> None:
    """Raise ValueError where only some of the active ``adapters`` of a layer would be merged, some with a window.

    PEFT's forward of a merged layer adds no other adapter.
    """
    for path, layer in model.model.named_modules():
        if not isinstance(layer, WindowLora):
            continue
        active = [name for name in layer.active_adapters if layer.holds(name)]
        merged = {*layer.merged_adapters, *(active if adapters is None else adapters)}
        rest = [name for name in active if name not in merged]
        if rest and any(layer.holds(name) for name in merged):
            raise ValueError(
                f"{path}: {rest[0]!r} is active too, and PEFT leaves it out once another adapter is merged; merge all "
                f"of {active} at once, or activate only those to merge with set_adapter."
            )


def check_saved(model: PeftModel, adapter: str) -> None:
    """Raise ValueError where stock PEFT would read another adapter from the files than the one that is saved.

    A warning says where that cannot be checked. Parameters that ZeRO-3 has spread are left to the save itself.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return
    layers = {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, WindowLora)}
    held = {name: layer.owners(adapter) for name, layer in layers.items() if layer.holds(adapter)}
    for owner in chain.from_iterable(held.values()):
        check_handed_out(*owner)  # which would warn within the block below
    swapped = [name for name, owners in held.items() if any(initial_factor(*owner) is None for owner in owners)]
    if swapped:
        raise ValueError(
            f"the factors of {few(swapped)} were hot-swapped, so that {adapter!r} is no window any more; the folder "
            "they came from holds them."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
        config = model.peft_config[adapter].to_dict()
    scalings = {}
    for name, layer in layers.items():
        if layer.holds(adapter):
            part = "lora_A.weight" if adapter in layer.lora_A else "lora_embedding_A"
            root = math.sqrt(layer.r[adapter]) if config["use_rslora"] else layer.r[adapter]
            scalings[f"{PREFIX}{name}.{part}"] = layer.lora_alpha[adapter] / root
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items() if not is_second(key, adapter, state)}
    reading = read_with_peft(plain_copy(model.get_base_model()), config, shapes, scalings)
    if reading.refusal:
        warnings.warn(f"it was not checked what stock PEFT makes of {adapter!r}: {reading.refusal}", stacklevel=3)
        return
    wrong = [*reading.ignored, *reading.missing, *reading.scaled]
    if wrong:
        raise ValueError(
            f"stock PEFT would read another adapter than {adapter!r} from its files: {few(wrong)} would not fit what "
            "target_modules, target_parameters, rank_pattern and alpha_pattern say; name layers by their full paths."
        )


def is_second(key: str, adapter: str, state: Mapping[str, Tensor]) -> bool:
    """Whether PEFT writes under ``key``, which it does not read, what it writes under another key of ``state`` too.

    With ``bias="all"`` these are the biases of modules that train whole.
    """
    path, whole, rest = key.partition(".modules_to_save.")
    return bool(whole) and f"{path}.{rest.removeprefix(f'{adapter}.')}" in state


def is_window(layer: WindowLora, adapter: str) -> bool:
    """Whether a layer computes an adapter that it has as a window, be it without its initial factors."""
    variant = isinstance(layer.lora_variant.get(adapter), WindowVariant)
    return variant or any(has_initial(*owner) for owner in layer.owners(adapter))


def check_no_window(model: PeftModel, adapter: str) -> None:
    """Raise ValueError where layers hold a window under the name of an adapter whose configuration has none."""
    layers = {path: m for path, m in model.get_base_model().named_modules() if isinstance(m, WindowLora)}
    held = [path for path, layer in layers.items() if layer.holds(adapter) and is_window(layer, adapter)]
    if held:
        raise ValueError(
            f"{few(held)}: the adapter {adapter!r} is a window there, and its configuration in peft_config is a "
            f"{type(model.peft_config[adapter]).__name__}, with which it would be read wrong; put the PCConfig back."
        )


def bypassed_layers(model: nn.Module, adapter: str) -> list[str]:
    """The layers of an adapter whose weight the model reads instead of calling them, once the model has run."""
    layers = [m for m in model.modules() if isinstance(m, WindowLora) and m.holds(adapter)]
    read = [layer.path for layer in layers if layer.was_read and not layer.was_called]
    return read if len(read) == len(layers) or any(layer.was_called for layer in layers) else []


def merged_past_calls(model: LoraModel, adapters: Sequence[str] | None) -> list[str]:
    """The layers that compute nothing of ``adapters``, by default the active ones, until these are merged."""
    chosen = model.active_adapters if adapters is None else adapters
    windows = [name for name in chosen if isinstance(model.peft_config.get(name), PCConfig)]
    layers = {path: layer for path, layer in model.model.named_modules() if isinstance(layer, WindowLora)}
    held = [path for path, layer in layers.items() if not layer.was_called and any(map(layer.holds, windows))]
    ran = {path for name in windows for path in bypassed_layers(model, name)}
    return [path for path in held if path in ran.union(weight_reads(model.model, held).uncalled)]


def trained_heads(model: nn.Module, adapter: str) -> list[str]:
    """The modules that an adapter trains whole, and whose weights have moved."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            before, now = module.original_module.parameters(), module.modules_to_save[adapter].parameters()
            if any(not (old.is_meta or torch.equal(old, new.to(old))) for old, new in zip(before, now, strict=True)):
                found.append(name)
    return found


def warn_unloaded(model: LoraModel) -> None:
    """Warn of what ``model`` leaves trained in its base where windows are active and it is unloaded."""
    windows = {n: c for n, c in model.peft_config.items() if n in model.active_adapters and isinstance(c, PCConfig)}
    left = list(dict.fromkeys(name for adapter in windows for name in trained_heads(model.model, adapter)))
    biases = {config.bias for config in windows.values()} - {"none"}
    left += [f"the biases ({each!r})" for each in sorted(biases)]
    if left:
        warnings.warn(
            f"{few(left)} keep what was trained: PEFT's unload takes out only the factors. For the pretrained model "
            "load the base again.",
            RuntimeWarning,
            stacklevel=4,
        )


def window_config(folder: str | os.PathLike[str], **kwargs: Any) -> PCConfig | None:
    """The configuration of a window in ``folder``, or a repository of the Hub; None where there is another adapter."""
    place = Path(folder, kwargs.get("subfolder") or "")
    if Path(folder).exists():
        return PCConfig.from_pretrained(str(folder), **kwargs) if (place / SIDECAR).is_file() else None
    known = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download")
    try:
        hf_hub_download(str(folder), SIDECAR, **{name: kwargs[name] for name in known if name in kwargs})
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError):
        return None
    return PCConfig.from_pretrained(str(folder), **kwargs)


def check_in_memory(model: nn.Module) -> None:
    """Raise ValueError where accelerate offloads weights of ``model``: PEFT removes its hooks before it loads."""
    away = next((name for name, module in model.named_modules() if is_offloaded(module)), None)
    if away is not None:
        raise ValueError(
            f"{away}: accelerate keeps its weight on the CPU or the disk, and PEFT, which loads an adapter onto such a "
            "base, removes accelerate's hooks first. Load the base without offloading, load the adapter, and offload "
            "then (accelerate.cpu_offload)."
        )


def check_load_in_transformers(folder: Any, *, is_trainable: bool, **kwargs: Any) -> None:
    """Raise ValueError where transformers' own ``load_adapter`` would train ``A0, B0`` too, or misread experts."""
    old = misreading_transformers()
    if folder is None or not (is_trainable or old):
        return
    config = window_config(folder, **kwargs)
    if config is None:
        return
    if is_trainable:
        raise ValueError(
            f"{folder} holds a window, of which transformers' load_adapter would train the initial factors too; train "
            "on with peft.PeftModel.from_pretrained(model, folder, is_trainable=True), or leave out is_trainable."
        )
    if any(layer.kind in EXPERTS for layer in config.records.saved.values()):
        raise ValueError(
            f"{folder} holds stacks of experts, which load_adapter of transformers {old} misreads; load it with "
            "peft.PeftModel.from_pretrained, or update transformers to 5.7."
        )


def _check_no_older_weights(given: Mapping[str, Any], adapter: str) -> None:
    """Raise ValueError where PEFT would write a pickle of weights beside a safetensors file, which it loads instead."""
    folder = Path(given["save_directory"]) / ("" if adapter == "default" else adapter)
    if not given.get("safe_serialization", True) and (folder / WEIGHTS).is_file():
        raise ValueError(
            f"{folder} holds {WEIGHTS}, which PEFT would load in place of the file that is written with "
            "safe_serialization=False; delete it, choose another folder, or leave safe_serialization out."
        )


def install_guards() -> None:
    """Put the checks above before or after PEFT's functions, for the whole process."""
    wrap_libraries()  # of which PEFT is imported now
    swap, combine = hotswap.hotswap_adapter_from_state_dict, LoraModel.add_weighted_adapter
    merge, load = LoraModel.merge_adapter, PeftModel.load_adapter
    merge_and_unload, unload = LoraModel.merge_and_unload, LoraModel.unload
    from_pretrained = PeftModel.from_pretrained.__func__  # type: ignore[attr-defined]
    native_load = PeftAdapterMixin.load_adapter
    inject, save = LoraModel.inject_adapter, PeftModel.save_pretrained
    begin = BaseTuner.__init__

    @wraps(begin)
    def restoring_begin(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        configs = getattr(model, "peft_config", {})
        before = dict(configs)
        try:
            begin(self, model, *args, **kwargs)
        except BaseException:
            configs.clear()
            configs.update(before)
            if not before and getattr(model, _LOADED, False):  # which transformers' add_adapter has set
                setattr(model, _LOADED, False)
            raise

    @wraps(swap)
    def checked_swap(
        model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        check_hotswap(model, state_dict, adapter_name)
        swap(model, state_dict, adapter_name, *args, **kwargs)

    @wraps(combine)
    def checked_combine(self: LoraModel, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        check_weighted(self, adapters)
        combine(self, adapters, *args, **kwargs)

    @wraps(inject)
    def checked_inject(
        self: LoraModel | MixedModel, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        check_names(model, self.peft_config)
        config = self.peft_config[adapter_name]
        windows = isinstance(config, PCConfig) or any(isinstance(module, WindowLora) for module in model.modules())
        if windows and isinstance(model, PeftModel):
            raise ValueError(
                f"the model is a {type(model).__name__} already, and an adapter around it would be saved under names "
                "that nothing reads; call unload() on it first, or add_adapter or load_adapter for another one inside."
            )
        loaded = isinstance(config, PCConfig) and config.records.loaded
        if isinstance(config, PCConfig) and not loaded:
            add_heads(model, config)
            leave_out(model, config)
        heads = [] if loaded or not windows else trained_heads(model, adapter_name)
        names = [name for name, _ in model.named_modules()]
        try:
            with all_or_nothing(model, adapter_name, config) if windows else nullcontext():
                inject(self, model, adapter_name, *args, **kwargs)
                if isinstance(config, PCConfig):
                    check_places(model, adapter_name)
                    start(model, adapter_name, config)
        except ValueError as error:
            targets = config.target_modules if isinstance(config, PCConfig) else None
            patterns = [targets] if isinstance(targets, str) else sorted(targets or ())
            meant = "".join(hint(each, names) for each in patterns if not any(matches(each, name) for name in names))
            if meant:
                raise ValueError(f"{error}{meant}") from None
            raise
        if isinstance(config, PCConfig):
            name_classes(model, config.records.labels, stacklevel=3)
            config.records.labels = class_names(getattr(model, "config", None))
            warn_unmatched(model, config, adapter_name)
            if heads:
                warnings.warn(
                    f"{few(heads)}: the weights that an earlier adapter {adapter_name!r} has trained stay, and the new "
                    "one starts from them; load the base again, or give the adapter another name.",
                    RuntimeWarning,
                    stacklevel=3,
                )
            if not loaded:
                warn_null(null_components(model, adapter_name), config.train)
                layers = [path for path, layer in model.named_modules() if isinstance(layer, WindowLora)]
                warn_bypassed(weight_reads(model, layers).uncalled, stacklevel=3)
            watch_statistics(model)

    @wraps(merge)
    def checked_merge(self: LoraModel, adapter_names: list[str] | None = None, *args: Any, **kwargs: Any) -> None:
        check_merge(self, adapter_names)
        warn_bypassed(merged_past_calls(self, adapter_names))
        merge(self, adapter_names, *args, **kwargs)

    @wraps(merge_and_unload)
    def checked_merge_and_unload(self: LoraModel, *args: Any, **kwargs: Any) -> Any:
        given = signature(merge_and_unload).bind(self, *args, **kwargs).arguments
        warn_bypassed(merged_past_calls(self, given.get("adapter_names")))
        plain = merge_and_unload(self, *args, **kwargs)
        forget_statistics(plain)
        return plain

    @wraps(unload)
    def warned_unload(self: LoraModel) -> Any:
        warn_unloaded(self)
        plain = unload(self)
        forget_statistics(plain)
        return plain

    @wraps(load)
    def resuming_load(
        self: PeftModel, model_id: Any, adapter_name: str, is_trainable: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        config = window_config(model_id, **kwargs) if is_trainable and adapter_name not in self.peft_config else None
        if config is None:
            return load(self, model_id, adapter_name, is_trainable, *args, **kwargs)
        admit_windows(self.get_base_model())
        options = ("low_cpu_mem_usage", "autocast_adapter_dtype")
        self.add_adapter(adapter_name, config, **{name: kwargs[name] for name in options if name in kwargs})
        loaded = load(self, model_id, adapter_name, is_trainable, *args, **kwargs)
        self.set_requires_grad(adapter_name)
        return loaded

    @classmethod
    @wraps(from_pretrained)
    def resuming_start(
        cls: Any,
        model: nn.Module,
        model_id: Any,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if is_trainable and config is None:
            config = window_config(model_id, **kwargs)
        if isinstance(config, PCConfig):
            check_in_memory(model)
        return from_pretrained(cls, model, model_id, adapter_name, is_trainable, config, *args, **kwargs)

    @wraps(save)
    def checked_save(self: PeftModel, *args: Any, **kwargs: Any) -> None:
        given = signature(save).bind(self, *args, **kwargs).arguments
        for name in given.get("selected_adapters") or list(self.peft_config):
            config: Any = self.peft_config.get(name)
            if isinstance(config, PCConfig):
                if given.get("path_initial_model_for_weight_conversion") is not None:
                    raise ValueError(
                        f"the saved adapter of {name!r} fits the original base already; leave out "
                        "path_initial_model_for_weight_conversion, which is for adapters that changed their base."
                    )
                check_saved(self, name)
                config.records.labels = class_names(getattr(self.get_base_model(), "config", None))
                _check_no_older_weights(given, name)
            elif name in self.peft_config:
                check_no_window(self, name)
        save(self, *args, **with_stored_factors(self, kwargs))
        for name, config in self.peft_config.items():
            warn_bypassed(bypassed_layers(self, name) if isinstance(config, PCConfig) else [])
        saved = [name for name, _ in self.named_modules() if name.endswith(".modules_to_save")]
        warn_moved_statistics(self, saved)

    @wraps(native_load)
    def checked_native_load(self: Any, peft_model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
        is_trainable = args[4] if len(args) > 4 else kwargs.get("is_trainable", False)
        check_load_in_transformers(peft_model_id, is_trainable=is_trainable, **(kwargs.get("adapter_kwargs") or {}))
        return native_load(self, peft_model_id, *args, **kwargs)

    hotswap.hotswap_adapter_from_state_dict = checked_swap
    LoraModel.add_weighted_adapter = checked_combine  # type: ignore[method-assign]
    BaseTuner.__init__ = restoring_begin  # type: ignore[method-assign]
    LoraModel.inject_adapter = MixedModel.inject_adapter = checked_inject  # type: ignore[assignment,method-assign]
    LoraModel.merge_adapter = checked_merge  # type: ignore[assignment,method-assign]
    LoraModel.merge_and_unload = checked_merge_and_unload  # type: ignore[assignment,method-assign]
    LoraModel.unload = warned_unload  # type: ignore[assignment,method-assign]
    PeftAdapterMixin.load_adapter = checked_native_load  # type: ignore[method-assign]
    PeftModel.save_pretrained = checked_save  # type: ignore[method-assign]
    PeftModel.load_adapter = resuming_load  # type: ignore[method-assign]
    PeftModel.from_pretrained = resuming_start  # type: ignore[assignment,method-assign]
