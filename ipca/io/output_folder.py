"""The rule for folders that are written: nothing is replaced unasked that the same command would not go on from."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from ipca._atomic import check_writable, not_empty
from ipca.io.adapter_folder import read_adapter, read_record
from ipca.io.model_folder import WEIGHT_ENDINGS

TRUNCATION = "truncation.json"
_ADAPTER = (
    *("adapter_config.json", "ipca.json", "adapters.safetensors", TRUNCATION),
    *(f"adapter_model.{ending}" for ending in ("safetensors", "bin", "safetensors.index.json", "bin.index.json")),
)
_TRAINING = re.compile(
    r"trainer_state\.json|(optimizer|scheduler|scaler|sampler(_\d+)?|dl_state_dict|optimizer_\d+)(\.(pt|bin))?|"
    r"rng_state(_\d+)?\.pth|random_states_\d+\.pkl|custom_checkpoint_\d+\.pkl|global_step\d+"
)
"""Names in a checkpoint from which training goes on: of transformers (and so of ipca train), accelerate, DeepSpeed and
FSDP. ``training_args.bin`` also lies beside a finished model."""


def check_output(
    folder: str | os.PathLike[str],
    *,
    whole: bool = False,
    overwrite: bool = False,
    resumes: Callable[[set[str]], bool] = lambda names: False,
    option: str = "overwrite=True",
) -> None:
    """Raise now where writing to ``folder`` would fail, or would replace work of somebody who did not ask for it.

    Args:
        folder: where files are to be written; need not exist.
        whole: it must be new or empty; False: it must hold no weights and no adapter, unless that is not trained yet.
            Other files may be there.
        overwrite: all of it may be replaced.
        resumes: given the names of what must not be there, whether the command goes on from it.
        option: what the user gives to have it replaced.

    Raises:
        ValueError: its name is empty.
        FileExistsError: it holds something else; the message names it.
        OSError: it cannot be written.
    """
    if not os.fspath(folder):
        raise ValueError("the folder's name is empty; for the current folder give '.'.")
    target = Path(folder).absolute()
    check_writable(target)
    names = {path.name for path in target.iterdir()} if target.is_dir() else set()
    held = names if whole else {name for name in names if is_weights(name)}
    if not held or overwrite or resumes(held) or (not whole and _is_untrained(target, held)):
        return
    does = "replaces it"
    if whole:
        what = not_empty(target)
    elif any(map(is_adapter_file, held)):
        what = "holds an adapter that is trained or not readable; choose another folder"
    else:
        what, does = f"holds {min(held)}; choose another folder", "writes beside it"
    raise FileExistsError(f"{target} {what}. {option} {does}.")


def check_spared(folder: str | os.PathLike[str], inputs: Iterable[Any]) -> None:
    """Raise ValueError where replacing ``folder`` would delete one of ``inputs`` or the current folder."""
    target = Path(folder).resolve()
    for path in (Path(), *(Path(each) for each in inputs if isinstance(each, str | os.PathLike))):
        if path.exists() and path.resolve().is_relative_to(target):
            what = "the current folder" if path == Path() else str(path)
            raise ValueError(f"replacing {folder} would delete {what}; choose another output folder.")


def check_not_read(
    folder: str | os.PathLike[str], *, model: Iterable[Any] = (), adapter: Iterable[Any] = (), residual: bool = False
) -> None:
    """Raise ValueError where writing an adapter into ``folder`` would change the model or the adapter that is read.

    Args:
        folder: where the adapter is to be written.
        model: folders of models that are read; what is no folder of a model on this disk is skipped.
        adapter: folders of adapters that are read.
        residual: whether ``folder/base`` and ``folder/adapter`` are replaced.
    """
    written = [Path(folder), *(Path(folder) / name for name in ("base", "adapter") if residual)]
    for what, given, name in (("model", model, "config.json"), ("adapter", adapter, "adapter_config.json")):
        read = {Path(each).resolve() for each in given if isinstance(each, str | os.PathLike) and str(each)}
        there = {path for path in read if (path / name).is_file()}
        for path in written:
            if path.resolve() in there:
                change = ", which would then load with the adapter" if what == "model" and path == written[0] else ""
                raise ValueError(f"{path} is the {what} itself{change}; choose another folder.")


def _is_untrained(folder: Path, held: set[str]) -> bool:
    """Whether ``held``, the weights in ``folder``, are an adapter before training, which can be made again.

    Of modules that train as a whole nothing shows that they have not, but a record that ``ipca init`` wrote.
    """
    if not all(map(is_adapter_file, held)):
        return False
    try:
        adapter, record = read_adapter(folder, modules_to_save=False), read_record(folder)
    except (ValueError, OSError):  # damaged, or not ours
        return False
    if record.modules_to_save and not record.initial:
        return False
    factors = adapter.factors.values()
    return all(torch.equal(f.A, f.A0) and torch.equal(f.B, f.B0) for f in factors)


def is_adapter_file(name: str) -> bool:
    """Whether ``name`` is that of an adapter's file, which must not lie beside those of another."""
    return name in _ADAPTER


def is_training_checkpoint(folder: Path) -> bool:
    """Whether training goes on from ``folder``, beside whose weights an adapter may lie."""
    return any(_TRAINING.fullmatch(path.name) for path in folder.iterdir())


def is_weights(name: str) -> bool:
    """Whether ``name`` is that of a file of weights or of an adapter."""
    return name.endswith(WEIGHT_ENDINGS) or is_adapter_file(name)
