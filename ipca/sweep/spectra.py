"""Decompose each layer once for all windows of a sweep; every trial then reads its window from the cache."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from ipca.baselines.apply import needed_windows
from ipca.config import PCConfig
from ipca.model import precision
from ipca.model.auto import AUTO, auto_windows, without_auto
from ipca.model.originals import base_matrix
from ipca.model.starts import window_starts
from ipca.model.targets import find_targets, saved_modules
from ipca.nn.place import find_layer
from ipca.svd import SpectralCache, window_svd
from ipca.svd.entry import cache_key
from ipca.svd.sealed import write_whole
from ipca.window import Window

Run = tuple[str, int]
"""A method and a seed."""


def check_windows(model: nn.Module, config: PCConfig, runs: Iterable[Run]) -> None:
    """Raise where a layer cannot be adapted, or lacks a window that a method of ``runs`` asks for.

    Raises:
        TypeError, ValueError: as :func:`ipca.apply_pc`; the message names the layer.
    """
    for _ in _needed(model, config, runs):
        pass


def decompose(
    model: nn.Module,
    config: PCConfig,
    runs: Iterable[Run],
    cache: SpectralCache,
    *,
    progress: bool = True,
) -> None:
    """Put into ``cache`` every window that the methods of ``runs`` ask for.

    A layer with one window missing is decomposed anew for all, so that its bits do not depend on what was there before.
    Stacks of experts and windows that look at the spectrum are left to the trials; for ``"auto"`` see
    :func:`auto_config`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`ipca.apply_pc`.
    """
    layers = len(find_targets(model, config, whole=saved_modules(model, config)))
    needed = _needed(model, config, runs)
    for weight, windows in tqdm(needed, desc="Window SVD", unit="layer", total=layers, disable=not progress):
        if weight.ndim != 2:
            continue
        options = precision(config, weight)
        keys = [cache_key(weight, window, **options) for window in windows]
        if windows and not all((cache.folder / key.file_name).exists() for key in keys):
            for key, found in zip(keys, window_svd(weight, windows, **options), strict=True):
                cache.put(key, found)


def _needed(model: nn.Module, config: PCConfig, runs: Iterable[Run]) -> Iterator[tuple[Tensor, list[Window]]]:
    """Of each layer the weight, and the windows in ascending order whose place does not depend on the spectrum."""
    runs = sorted(set(runs))
    for target in find_targets(model, config, whole=saved_modules(model, config)):
        weight = base_matrix(find_layer(model, target.name), target.name, None).weight
        d = min(weight.shape[-2:])
        windows = [window for method, seed in runs for window in needed_windows(method, target, seed, d)]
        try:
            resolved = {window.resolve(d) for window in windows if not window.needs_spectrum}
        except ValueError as error:
            raise ValueError(f"{target.name}: {error}") from None
        yield weight, sorted(resolved, key=lambda window: window.index)


def auto_config(
    model: nn.Module,
    config: PCConfig,
    calibration: Callable[[], Iterable[Any]],
    path: Path,
    cache: SpectralCache,
    *,
    progress: bool = True,
) -> PCConfig:
    """``config`` with the window of each layer that the method ``"auto"`` takes, by its path.

    They depend on the model and the batches of ``calibration()`` alone, and cost a full SVD of every layer; so they are
    found once, kept in the JSON file at ``path``, and decomposed into ``cache`` as a trial would.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`ipca.apply_pc` with ``window="auto"``.
    """
    if not path.exists():
        asked = replace(config, window=AUTO)
        targets = find_targets(model, without_auto(asked), whole=saved_modules(model, config))
        found = auto_windows(model, targets, asked, calibration(), progress=progress)
        write_whole(path, json.dumps({target.name: target.window.text for target in found}, indent=1).encode())
    windows: dict[str, str] = json.loads(path.read_text())
    config = replace(config, window_pattern={re.escape(name): text for name, text in windows.items()})
    targets = find_targets(model, config, whole=saved_modules(model, config))
    window_starts(model, targets, config, cache=cache, progress=False)
    return config
