"""A trainer around an adapter that is trained already, to evaluate it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ipca.io.adapter_folder import SIDECAR, read_adapter, read_labels
from ipca.io.peft_format import CONFIG
from ipca.nn.layer_kinds import base_sha256
from ipca.nn.registry import get_layer
from ipca.train.checkpoints import last_checkpoint
from ipca.train.classes import base_classes
from ipca.train.data import read_data
from ipca.train.examples import HELD_OUT, Examples, examples, parted
from ipca.train.keep import Kept, build_keep, draw_samples, read_keep
from ipca.train.models import fitting_length, load_model
from ipca.train.run_folder import CHECKPOINTS
from ipca.train.settings import TrainSettings
from ipca.train.sources import find_source
from ipca.train.trainers import build_trainer


@contextmanager
def open_adapter(
    settings: TrainSettings, adapter: Path, *, check_base: bool = True, progress: bool = False
) -> Iterator[tuple[Any, Kept | None]]:
    """A trainer of ``settings.model`` with the LoRA in ``adapter``, which evaluates on ``settings.data``; and what is
    measured on ``settings.keep``.

    The adapter is loaded by stock PEFT, as any program would.

    Args:
        check_base: compare base weights with those that an adapter of ipca was made on.
        progress: show a bar where reading the data takes long.

    Raises:
        DataError, FileNotFoundError, ValueError: as :func:`ipca.train.fine_tune`; or PEFT cannot load the adapter, or
            it was made on another model.
    """
    from peft import PeftModel

    _check_adapter(adapter)
    source, labels, base = find_source(settings.data), read_labels(adapter), base_classes(settings.model)
    data = read_data(source, settings.task, settings.columns, labels=labels, base=base, progress=progress)
    kept_source = read_keep(settings, data.layout.task, progress=progress)
    loaded = load_model(settings, data.layout.task, data.labels)
    if check_base and (adapter / SIDECAR).is_file():
        _check_base(loaded.model, adapter, settings.model)
    settings = fitting_length(settings, loaded)
    samples = None
    if kept_source is None and data.layout.task == "causal-lm":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        samples = draw_samples(loaded.model.to(device), loaded.processor, settings)
    kept = build_keep(kept_source, settings, data.layout.task, loaded, samples)
    rows = examples(data.rows if data.held_out is None else data.held_out, data, settings, loaded)
    rows, _ = parted(rows, HELD_OUT, settings.seed)
    try:
        model = PeftModel.from_pretrained(loaded.model, str(adapter))
    except (OSError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"PEFT cannot load {adapter} on {settings.model}: {' '.join(str(error).split())[:300]}"
        ) from None
    with TemporaryDirectory() as folder:
        yield build_trainer(model, Examples(rows, rows), settings, loaded, data, Path(folder)), kept


def _check_base(model: Any, adapter: Path, name: str) -> None:
    """Raise where a layer has other values than the one the adapter was made on; another dtype is no other model."""
    for layer, was in read_adapter(adapter, modules_to_save=False).layers.items():
        if was.base_sha256 is None:
            continue
        try:
            here = base_sha256(get_layer(model, layer))
        except AttributeError:  # PEFT says what does not fit
            return
        if here != was.base_sha256 and here.partition("-")[0] == was.base_sha256.partition("-")[0]:
            raise ValueError(
                f"{adapter} was made on another model than {name}: {layer} has other values. Give its base, or pass "
                "--any-base if you know that they fit."
            )


def _check_adapter(folder: Path) -> None:
    """Raise FileNotFoundError where a folder holds no adapter; an id on the Hub has become one before."""
    if (folder / CONFIG).is_file():
        return
    last = last_checkpoint(folder / CHECKPOINTS)
    hint = "" if last is None else f"; its run has not ended, and its last checkpoint is {last}"
    raise FileNotFoundError(f"{folder} holds no {CONFIG}{hint}.")
