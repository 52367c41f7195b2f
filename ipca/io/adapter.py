"""save_adapter and load_adapter: one folder that is our checkpoint and, for the original base, a stock PEFT adapter."""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ipca._atomic import staged_files, uninterrupted
from ipca._dtensor import is_writer, write_once
from ipca.io.adapter_folder import (
    SIDECAR,
    AdapterFolder,
    OtherBaseError,
    OtherModelError,
    SavedLayer,
    file_sha256,
    other_base,
    read_adapter,
    read_record,
    sidecar,
)
from ipca.io.hub import adapter_folder
from ipca.io.labels import class_names, name_classes
from ipca.io.model_card import warn_of_card
from ipca.io.model_folder import WEIGHT_ENDINGS
from ipca.io.output_folder import check_not_read, check_output, is_adapter_file, is_training_checkpoint
from ipca.io.peft_format import (
    CONFIG,
    MATRIX,
    WEIGHTS,
    AdapterContents,
    adapter_state,
    bypassed_words,
    check_finite,
    formats,
    readable_config,
    write_peft,
)
from ipca.io.serving import warn_servers
from ipca.model.apply import adapted_layers, check_can_train, install, train_only_adapter
from ipca.model.merge import check_not_offloaded, check_not_sharded, require_adapted
from ipca.model.running_statistics import warn_moved_statistics
from ipca.model.targets import Target, check_endings, check_not_replicated, validate_targets
from ipca.model.trained_modules import fully_trained_modules, has_stepped, is_named
from ipca.model.vocabulary import vocab_size, warn_of_other_vocabulary, warn_of_vocabulary
from ipca.nn.experts import ExpertsPC
from ipca.nn.initialization import InitialFactors, certify_init
from ipca.nn.layer_kinds import base_sha256, read_layer
from ipca.nn.registry import get_layer, named_layers
from ipca.nn.window_layer import WindowLayer

_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module"}
_ONLY_PEFT = {"bias": "none", "trainable_token_indices": None}
"""Fields of PEFT's configuration that say what trains beside the factors, and their values where nothing does."""
_FSDP1 = "_fsdp_wrapped_module"
_ROUNDED = 1e-2
"""Relative distance that a factor may have after casts to 16 bits."""
_WRAPPED = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def save_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, base_model: str | None = None, overwrite: bool = False
) -> None:
    """Write the adapter of ``model`` to ``folder``: factors, fully trained modules, configuration.

    Writes ``adapter_model.safetensors`` and ``adapter_config.json``, which stock PEFT (and transformers'
    ``load_adapter``) load on the original base model, and ``ipca.json`` with what only :func:`load_adapter` needs:
    windows, form, a hash of each adapted base weight, the size of the vocabulary, the names of classes in
    ``model.config.id2label``. An earlier state of the same adapter in ``folder`` is replaced, once the new files are
    complete.

    Args:
        model: has adapted layers, from :func:`apply_pc` or in its own code. Every other module with trainable
            parameters is written as a whole, as PEFT's ``modules_to_save``.
        folder: made if missing.
        base_model: name or path of the base, for PEFT's ``base_model_name_or_path``; default ``model.name_or_path``.
        overwrite: replace an adapter of other layers, windows or bases, or one with fully trained modules that
            ``model`` does not train; write beside the weights of a model, which stay.

    A model that ``fully_shard`` has spread over processes must be saved by all of them: they gather it tensor by
    tensor, rank 0 writes, and none returns before the files are complete.

    Warns:
        RuntimeWarning: servers would read ``adapter_config.json`` differently from PEFT; the message names the fields.
            Or ``folder`` has a model card, which still describes what was there before.
            Or running statistics, such as BatchNorm's, moved in training, or a vocabulary was resized after the base
            was saved, which the adapter does not hold.
            Or the model reads a layer's weight instead of calling it, which PEFT and servers do not see.

    Raises:
        ValueError: nothing is adapted, something trains that an adapter file cannot hold, PEFT would read another
            adapter than this one, something holds NaN or Inf, or ``folder`` is where the model was loaded from.
        FileExistsError: ``folder`` holds another adapter, or a finished model, and not ``overwrite``.
        OSError: ``folder`` cannot be written; what was there is intact.
    """
    contents = collect_adapter(model)
    layers = {name: _saved(layer) for name, layer in contents.layers.items()}
    check_not_read(folder, model=[getattr(model, "name_or_path", None)])
    resumes = partial(_is_earlier, Path(folder), layers=layers, contents=contents)
    write_once(model, partial(check_output, folder, overwrite=overwrite, resumes=resumes))
    config = readable_config(model, formats(contents), contents.modules_to_save, base_model)
    tensors = adapter_state(model, contents)

    def write() -> None:
        check_finite(contents, tensors)
        with staged_files(folder, replaced=is_adapter_file) as stage:
            write_peft(stage, tensors, config)
            labels = class_names(getattr(model, "config", None))
            digest, whole = file_sha256(stage / WEIGHTS), list(contents.modules_to_save)
            record = sidecar(layers, digest, whole, labels, vocab_size(model))
            (stage / SIDECAR).write_text(json.dumps(record, indent=2) + "\n")

    write_once(model, write)
    if is_writer(model):
        warn_of_card(folder)
        warn_servers(folder)
        warn_moved_statistics(model, contents.modules_to_save)
        warn_of_vocabulary(model, contents.modules_to_save, base_model)
        words = bypassed_words(model, contents.layers)
        if words:
            warnings.warn(f"{words}. ipca.load_adapter and ipca merge read them right.", RuntimeWarning, stacklevel=2)


def _is_earlier(folder: Path, held: set[str], layers: Mapping[str, SavedLayer], contents: AdapterContents) -> bool:
    """Whether ``folder``, where ``held`` are the weights, has no adapter but one of the same starts and base.

    It may hold fewer fully trained modules, not others, which would be lost. In a training checkpoint an adapter may
    lie beside a model's weights; a finished model would load with the adapter from then on.
    """
    if not any(name.startswith("adapter") and name.endswith(WEIGHT_ENDINGS) for name in held):
        return not (folder / "config.json").is_file() or is_training_checkpoint(folder)
    try:
        there, modules, *_ = read_record(folder)
    except (OSError, ValueError):
        return False
    if not contents.modules_to_save.keys() >= set(modules):
        return False
    if there.keys() != layers.keys() or any(_start(there[name]) != _start(layer) for name, layer in layers.items()):
        return False
    of_inputs = [name for name, layer in layers.items() if layer.basis == "inputs"]
    return not of_inputs or _same_directions(folder, {name: contents.layers[name] for name in of_inputs})


def _start(layer: SavedLayer) -> tuple[object, ...]:
    """What decides from which components a layer starts, at which size, and what trains."""
    place = (layer.kind, layer.shape, layer.start, layer.basis, layer.rank, layer.base_sha256)
    return *place, layer.train, layer.magnitude


def _same_directions(folder: Path, layers: Mapping[str, WindowLayer]) -> bool:
    """Whether the adapter in ``folder`` starts as ``layers`` do: their inputs decide it, which no record holds."""
    try:
        factors = read_adapter(folder, modules_to_save=False).factors
    except (OSError, ValueError):
        return False

    def distance(name: str, layer: WindowLayer) -> float:
        there, here = factors[name].A0.float(), layer.lora_A0.cpu().float()
        return float((there - here).norm() / here.norm().clamp_min(torch.finfo(here.dtype).tiny))

    return all(distance(name, layer) <= _ROUNDED for name, layer in layers.items())


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    form: str | None = None,
    check_base: bool = True,
    trainable: bool = True,
) -> nn.Module:
    """Load the adapter in ``folder`` onto ``model``, without an SVD.

    >>> base, x = nn.Sequential(nn.Linear(64, 32)), torch.ones(2, 64)
    >>> model = ipca.apply_pc(copy.deepcopy(base), rank=4, progress=False)
    >>> with torch.no_grad():
    ...     _ = model[0].lora_B.mul_(2)  # training
    >>> ipca.save_adapter(model, "adapter")
    >>> torch.equal(ipca.load_adapter(base, "adapter")(x), model(x))
    True

    Args:
        model: the original base, or that base already adapted by the same windows (a checkpoint is then resumed in
            place). Changed in place.
        folder: written by :func:`save_adapter`, or the id of a repository on the Hub that holds it.
        form: ``"residual"`` or ``"intact"``; default as saved.
        check_base: compare the hash of each adapted base weight with the one the adapter was made on.
        trainable: whether the factors and the saved modules train; everything else is frozen.

    Returns:
        The same model; ``model.config.id2label`` has the classes of the adapter's head, where it was saved with names.

    Warns:
        RuntimeWarning: it had other names before, or another order of them. Or the vocabulary has another size than
            that of the model that the adapter was trained on. Or a saved module is rounded to fewer bits here.

    Raises:
        FileNotFoundError: ``folder`` lacks a file.
        ValueError: a damaged file, shapes or layers that do not fit, another base, or a model with an adapter of PEFT;
            the model is unchanged.
        RuntimeError: a lazy module has no parameters yet; or the call or, with ``trainable``, a weight is of
            ``torch.inference_mode()``.
    """
    check_not_wrapped(model)
    check_can_train(model, trainable=trainable)
    present = adapted_layers(model)
    if not present:
        check_not_replicated(model)
    check_not_sharded(model, "load the adapter first, then shard; torch.distributed.checkpoint resumes a sharded run.")
    folder = adapter_folder(folder)
    _check_peft_fields(folder)
    saved = read_adapter(folder)
    modules_to_save = modules_to_save_state(model, saved.modules_to_save)
    changed = {**present, **{name: model.get_submodule(name) for name in saved.modules_to_save}}
    check_not_offloaded(changed, "load the adapter onto the model without offloading, then offload.")
    mixed = set(present) - set(saved.layers)
    if mixed:
        raise ValueError(
            f"{sorted(mixed)[0]} is adapted, but the adapter in {folder} does not hold it; unload it first."
        )
    whole = {name for name, module in model.named_modules() if is_named(module) or has_stepped(module)}
    within = tuple(f"{name}." for name in saved.modules_to_save)
    other = sorted(name for name in whole if not f"{name}.".startswith(within))
    if other:
        raise ValueError(
            f"{other[0] or type(model).__name__} trains whole in this model, and the adapter in {folder} does not hold "
            "it; load onto the plain base."
        )
    if present:
        _check_resumable(present, saved, form, check_base)
        fresh = []
    else:
        fresh = _fresh_layers(model, saved, form, check_base)
    with uninterrupted(), torch.no_grad():
        install(model, fresh)
        for name, layer in adapted_layers(model).items():
            layer.unmerge()
            layer.was_read |= saved.layers[name].bypassed
            layer.lora_A.copy_(saved.factors[name].A)
            layer.lora_B.copy_(saved.factors[name].B)
        for module, state in modules_to_save:
            module.load_state_dict(state)
        train_only_adapter(model, saved.modules_to_save, trainable=trainable)
    warn_of_rounding(modules_to_save)
    name_classes(model, saved.labels, stacklevel=2)
    warn_of_other_vocabulary(model, saved.vocab_size, saved.modules_to_save)
    return model


def check_not_wrapped(model: nn.Module) -> None:
    """Raise ValueError where ``model`` is a wrapper, whose paths are not those of the adapter.

    :func:`ipca.model.targets.check_not_replicated` says more of DistributedDataParallel.
    """
    named = isinstance(model, nn.DataParallel | AveragedModel)
    inside = "_orig_mod" if "_orig_mod" in model._modules else "module" if named else None
    if inside is not None:
        raise ValueError(f"the model is inside a {type(model).__name__}; load the adapter onto model.{inside}.")


def collect_adapter(model: nn.Module) -> AdapterContents:
    """The adapted layers and the fully trained modules of ``model``.

    Raises:
        ValueError: nothing is adapted, or something trains that an adapter file cannot hold.
    """
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
    for name, module in modules_to_save.items():
        wrapped = [path for path, _ in module.named_modules(prefix=name) if _WRAPPERS.intersection(path.split("."))]
        if wrapped:
            raise ValueError(f"{wrapped[0]} belongs to a wrapper, not to the model; save the model without it.")
        inside = [path for path in layers if not name or path.startswith(f"{name}.")]
        if inside:
            raise ValueError(
                f"{name or type(model).__name__} trains parameters of its own beside the adapted {inside[0]}, which an "
                "adapter file does not hold: freeze them before training, or put them into a module without it."
            )
    check_endings(list(modules_to_save), [path for path, _ in paths])
    return AdapterContents(layers, modules_to_save)


def _check_layer(model: nn.Module, name: str, layer: WindowLayer, places: int) -> None:
    """Raise where an adapter file cannot hold ``layer``, which occurs at ``places`` paths of ``model``."""
    if _FSDP1 in name.split(".") or layer.lora_A.shape != layer.lora_A0.shape:
        raise ValueError(
            f"{name}: its factors are flat pieces of FullyShardedDataParallel or ZeRO-3; shard with "
            "torch.distributed.fsdp.fully_shard, or save within deepspeed.zero.GatheredParameters."
        )
    if _WRAPPERS.intersection(name.split(".")) or isinstance(model, _WRAPPED):
        raise ValueError(f"{name} belongs to a wrapper, not to the model; save the model inside it.")
    if not name:
        kind = type(layer).__name__
        raise ValueError(f"the model is itself a {kind}; save its state_dict, or put it into a module.")
    if layer.window is None:
        raise ValueError(f"{name} has no window yet; load its weights first.")
    if hasattr(layer, "base_weight") and "base_weight" not in layer._parameters:
        raise ValueError(
            f"{name}: its base_weight is computed from other parameters, as by torch.nn.utils.prune, which an adapter "
            "file does not hold; prune before the model is adapted, and make it permanent with prune.remove."
        )
    others = (p for key, p in layer.named_parameters() if key not in ("lora_A", "lora_B"))
    if has_stepped(layer) or any(p.requires_grad for p in others):
        raise ValueError(
            f"{name}: its weight or bias trains or has trained, which an adapter file does not hold; freeze them "
            "before training, or name the layer in modules_to_save."
        )
    if places > 1:
        raise ValueError(f"{name} stands in several places of the model, which PEFT's format cannot express.")


def _saved(layer: WindowLayer) -> SavedLayer:
    assert layer.window is not None
    return SavedLayer.of(
        layer.kind,
        layer.matrix_shape,
        layer.window,
        alpha=layer.alpha,
        form=layer.form,
        dropout=layer.dropout,
        base_sha256=layer.base_sha256,
        report=layer.svd_report,
        bypassed=layer.bypassed,
        certificate=layer.certificate,
        train=layer.trained,
        magnitude=layer.magnitude,
    )


def modules_to_save_state(
    model: nn.Module, modules_to_save: Mapping[str, dict[str, torch.Tensor]]
) -> list[tuple[nn.Module, dict[str, torch.Tensor]]]:
    """The fully trained modules of an adapter in ``model``, each with its saved state; names and shapes are checked."""
    found = []
    for name, state in modules_to_save.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise OtherModelError(f"the adapter holds the module {name!r}, which this model does not have") from None
        here = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        there = {key: tuple(value.shape) for key, value in state.items()}
        if here != there:
            raise ValueError(f"{name}: the adapter holds {there}, this model has {here}.")
        check_untied(model, name)
        found.append((module, state))
    return found


def warn_of_rounding(
    modules_to_save: Iterable[tuple[nn.Module, Mapping[str, torch.Tensor]]], *, stacklevel: int = 3
) -> None:
    """Warn where modules have fewer bits than the states that were copied into them."""
    for module, state in modules_to_save:
        here = module.state_dict()
        for key, value in state.items():
            if value.is_floating_point() and value.dtype.itemsize > here[key].dtype.itemsize:
                there, own = (str(dtype).removeprefix("torch.") for dtype in (value.dtype, here[key].dtype))
                warnings.warn(
                    f"the adapter holds {key} of a {type(module).__name__} in {there}, and this model rounds it to "
                    f"{own}; cast that module before loading to keep every bit.",
                    RuntimeWarning,
                    stacklevel=stacklevel,
                )
                return


def _check_peft_fields(folder: Path) -> None:
    """Raise ValueError where PEFT has trained more than the factors and whole modules."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        trained = [name for name, none in _ONLY_PEFT.items() if config.get(name) not in (None, none)]
    except (OSError, ValueError, AttributeError):  # missing or damaged, and not needed here
        return
    if trained:
        name = trained[0]
        raise ValueError(
            f"{folder / CONFIG}: {name} is {config[name]!r}, which only PEFT trains and holds; load the folder with "
            "peft.PeftModel.from_pretrained, and merge it there with merge_and_unload()."
        )


def check_untied(model: nn.Module, name: str) -> None:
    """Raise ValueError where loading the module ``name`` as a whole would change another one, to which it is tied."""
    own = {id(parameter) for parameter in model.get_submodule(name).parameters()}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in own and not path.startswith(f"{name}."):
            raise ValueError(
                f"{name}: the adapter holds it as a whole, and here its weight is tied to {path}, which would change "
                "with it; untie them (of transformers: from_pretrained(…, tie_word_embeddings=False)), or load the "
                "adapter with peft.PeftModel.from_pretrained, and merge it there with merge_and_unload()."
            )


def _check_resumable(present: dict[str, WindowLayer], saved: AdapterFolder, form: str | None, check_base: bool) -> None:
    """Raise where a layer that is adapted already differs from the saved one in more than ``A, B``."""
    for name, layer in saved.layers.items():
        if name not in present:
            raise ValueError(f"the adapter holds {name}, which is not adapted in this model; load onto the plain base.")
        mine = _saved(present[name])
        wanted = {field: getattr(layer, field) for field in ("shape", "rank", "alpha", "form", "train")}
        for field, value in (wanted | ({"form": form} if form else {})).items():
            if getattr(mine, field) != value:
                raise ValueError(
                    f"{name} has {field} {getattr(mine, field)}, the adapter {value}; load onto the plain base."
                )
        if check_base and layer.base_sha256 and mine.base_sha256 != layer.base_sha256:
            raise OtherBaseError(other_base(name, layer.base_sha256, mine.base_sha256))
        factors = saved.factors[name]
        for ours, theirs in ((present[name].lora_A0, factors.A0), (present[name].lora_B0, factors.B0)):
            if not torch.equal(ours.cpu(), theirs.to(ours.dtype)):
                raise ValueError(f"{name} starts from other factors than the adapter; load onto the plain base.")


def _fresh_layers(
    model: nn.Module, saved: AdapterFolder, form: str | None, check_base: bool
) -> list[tuple[Target, InitialFactors]]:
    """What to install on a plain ``model``; raises where it does not fit."""
    here = named_layers(model)
    targets = []
    for name, layer in saved.layers.items():
        if layer.kind == MATRIX:
            raise ValueError(
                f"the adapter holds {name}, a bare parameter, as the weight of a router is, which only PEFT adapts: "
                "load the folder with peft.PeftModel.from_pretrained, and merge it there with merge_and_unload()."
            )
        if name not in here:
            raise OtherModelError(f"the adapter holds {name}, which this {type(model).__name__} does not have")
        options = (form or layer.form, layer.dropout, layer.train, layer.magnitude)
        target = Target.of(name, here[name], layer.window, layer.alpha, *options)
        if target.kind is not None and target.shape != layer.shape:
            raise ValueError(f"{name} has shape {target.shape}, but the adapter was made for {layer.shape}.")
        targets.append(target)
    # A weight with the recorded hash has the values that were checked when the adapter was made.
    known = check_base and all(layer.base_sha256 for layer in saved.layers.values())
    validate_targets(model, targets, modules_to_save=saved.modules_to_save, values=not known)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases the GIL
        digests = list(pool.map(lambda target: base_sha256(get_layer(model, target.name)), targets))
    return [
        (target, _initial_factors(model, target, saved, digest, check_base))
        for target, digest in zip(targets, digests, strict=True)
    ]


def _initial_factors(
    model: nn.Module, target: Target, saved: AdapterFolder, digest: str, check_base: bool
) -> InitialFactors:
    layer, factors = saved.layers[target.name], saved.factors[target.name]
    weight, _ = read_layer(get_layer(model, target.name))
    if check_base and layer.base_sha256 and digest != layer.base_sha256:
        raise OtherBaseError(other_base(target.name, layer.base_sha256, digest))
    A0, B0 = factors.A0.to(weight.device), factors.B0.to(weight.device)
    same = check_base and layer.base_sha256 is not None and target.form == layer.form == "residual"
    certificate = layer.init_certificate() if same else None  # of these very bits
    if certificate is None:
        certificate = certify_init(weight, A0, B0, scaling=target.scaling, form=target.form)
    return InitialFactors(A0, B0, target.window, digest, layer.report(), certificate)
