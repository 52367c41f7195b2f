"""A trainer around an adapter that is trained already, to evaluate it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ipca.io.peft_format import CONFIG
from ipca.train.data import find_source, read_data
from ipca.train.keep import Kept, build_keep, check_keep, draw_samples
from ipca.train.run import CHECKPOINTS, last_checkpoint
from ipca.train.settings import TrainSettings, read_labels
from ipca.train.tasks import Examples, build_trainer, examples, load_model

HELD_OUT = 512
"""Rows, or sequences, of the new data at most."""


@contextmanager
def open_adapter(settings: TrainSettings, adapter: Path) -> Iterator[tuple[Any, Kept | None]]:
    """A trainer of ``settings.model`` with the LoRA in ``adapter``, which evaluates on ``settings.data``; and what is
    measured on ``settings.keep``.

    The adapter is loaded by stock PEFT, as any program would.

    Raises:
        DataError, FileNotFoundError, ValueError: as :func:`ipca.train.fine_tune`; or PEFT cannot load the adapter.
    """
    from peft import PeftModel

    _check_adapter(adapter)
    data = read_data(find_source(settings.data), settings.task, settings.columns, labels=read_labels(adapter))
    source = check_keep(settings, data.layout.task)
    loaded = load_model(settings, data.layout.task, data.labels)
    samples = None
    if source is None and data.layout.task == "causal-lm":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        samples = draw_samples(loaded.model.to(device), loaded.processor, settings.keep_tokens, settings.seed)
    kept = build_keep(source, settings, data.layout.task, loaded, samples)
    rows = examples(data.rows, data, settings, loaded)
    if len(rows) > HELD_OUT:
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(settings.seed))[:HELD_OUT]
        rows = rows.select(sorted(chosen.tolist()))
    try:
        model = PeftModel.from_pretrained(loaded.model, str(adapter))
    except (OSError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"PEFT cannot load {adapter} on {settings.model}: {' '.join(str(error).split())[:300]}"
        ) from None
    with TemporaryDirectory() as folder:
        yield build_trainer(model, Examples(rows, rows), settings, loaded, data, Path(folder)), kept


def _check_adapter(folder: Path) -> None:
    """Raise FileNotFoundError where a folder holds no adapter; an id on the Hub has become one before."""
    if (folder / CONFIG).is_file():
        return
    last = last_checkpoint(folder / CHECKPOINTS)
    hint = "" if last is None else f"; its run has not ended, and its last checkpoint is {last}"
    raise FileNotFoundError(f"{folder} holds no {CONFIG}{hint}.")
