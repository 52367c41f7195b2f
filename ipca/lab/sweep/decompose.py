"""Decompose each layer once for all windows of a sweep; every trial then reads its window from the cache."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from ipca._atomic import write_atomic
from ipca.lab.baselines.apply import needed_windows
from ipca.model.calibration import AUTO, auto_windows, without_auto
from ipca.model.decompose import decompose_targets, precision, source_matrix
from ipca.model.settings import AdapterSettings
from ipca.model.targets import find_modules_to_save, find_targets
from ipca.nn.registry import get_layer
from ipca.svd import SpectralCache, window_svd
from ipca.svd.cache import cache_key
from ipca.window import Window

Run = tuple[str, int]
"""A method and a seed."""


def find_windows(model: nn.Module, config: AdapterSettings, runs: Iterable[Run]) -> dict[str, list[Window]]:
    """For each layer the windows, in ascending order, that the methods of ``runs`` ask for; by the layer's path.

    Without those that look at the spectrum; for ``"auto"`` see :func:`auto_config`.

    Raises:
        TypeError, ValueError: as :func:`ipca.apply_pc`, or a window does not fit into a layer; the message names it.
    """
    runs, found = sorted(set(runs)), {}
    for target in find_targets(model, config, modules_to_save=find_modules_to_save(model, config)):
        d = min(source_matrix(get_layer(model, target.name), target.name, None).weight.shape[-2:])
        windows = [window for method, seed in runs for window in needed_windows(method, target, seed, d)]
        try:
            resolved = {window.resolve(d) for window in windows if not window.needs_spectrum}
        except ValueError as error:
            raise ValueError(f"{target.name}: {error}") from None
        found[target.name] = sorted(resolved, key=lambda window: window.index)
    return found


def decompose(
    model: nn.Module,
    config: AdapterSettings,
    needed: Mapping[str, Sequence[Window]],
    cache: SpectralCache,
    *,
    progress: bool = True,
) -> None:
    """Put into ``cache`` the windows that :func:`find_windows` found.

    A layer with one window missing is decomposed anew for all, so that its bits do not depend on what was there before.
    Stacks of experts are left to the trials.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`ipca.apply_pc`.
    """
    for name, windows in tqdm(needed.items(), desc="Window SVD", unit="layer", disable=not progress):
        weight = source_matrix(get_layer(model, name), name, None).weight
        if weight.ndim != 2:
            continue
        options = precision(config, weight)
        keys = [cache_key(weight, window, **options) for window in windows]
        if windows and not all((cache.folder / key.file_name).exists() for key in keys):
            for key, found in zip(keys, window_svd(weight, windows, **options), strict=True):
                cache.put(key, found)


def auto_config(
    model: nn.Module,
    config: AdapterSettings,
    calibration: Callable[[], Iterable[Any]],
    path: Path,
    cache: SpectralCache,
    *,
    progress: bool = True,
) -> AdapterSettings:
    """``config`` with the window of each layer that the method ``"auto"`` takes, by its path.

    They depend on the model and the batches of ``calibration()`` alone, and cost a full SVD of every layer; so they are
    found once, kept in the JSON file at ``path``, and decomposed into ``cache`` as a trial would.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`ipca.apply_pc` with ``window="auto"``.
    """
    if not path.exists():
        asked = replace(config, window=AUTO)
        targets = find_targets(model, without_auto(asked), modules_to_save=find_modules_to_save(model, config))
        found = auto_windows(model, targets, asked, calibration(), progress=progress)
        write_atomic(path, json.dumps({target.name: target.window.text for target in found}, indent=1).encode())
    windows: dict[str, str] = json.loads(path.read_text())
    config = replace(config, window_pattern={re.escape(name): text for name, text in windows.items()})
    targets = find_targets(model, config, modules_to_save=find_modules_to_save(model, config))
    decompose_targets(model, targets, config, cache=cache, progress=False)
    return config
