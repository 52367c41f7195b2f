"""Decompositions of a sweep: each layer once for all windows, cached for the trials."""

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
from ipca.lab.baselines.adapt import needed_windows
from ipca.model.calibration import AUTO, auto_windows
from ipca.model.decompose import decompose_targets, precision, source_matrix
from ipca.model.settings import AdapterSettings
from ipca.model.targets import find_modules_to_save, find_targets
from ipca.nn.layer_kinds import layer_kind, matrix_shape
from ipca.nn.registry import get_layer
from ipca.svd import SpectralCache, window_svd
from ipca.svd.cache import cache_key
from ipca.svd.parallel import thread_map, workspace
from ipca.window import Window

Run = tuple[str, int]
"""A method and a seed."""


def find_windows(model: nn.Module, settings: AdapterSettings, runs: Iterable[Run]) -> dict[str, list[Window]]:
    """By layer path, the windows that the methods of ``runs`` need, in ascending order.

    Excludes windows that depend on the spectrum; for ``"auto"`` see :func:`auto_settings`.

    Raises:
        TypeError, ValueError: as :func:`ipca.apply_pc`, or a window does not fit into a layer; the message names it.
    """
    runs, found = sorted(set(runs)), {}
    for target in find_targets(model, settings, modules_to_save=find_modules_to_save(model, settings)):
        d = min(target.shape[-2:])
        windows = [window for method, seed in runs for window in needed_windows(method, target, seed)]
        try:
            resolved = {window.resolve(d) for window in windows if not window.needs_spectrum}
        except ValueError as error:
            raise ValueError(f"{target.name}: {error}") from None
        found[target.name] = sorted(resolved, key=lambda window: window.index)
    return found


def cache_windows(
    model: nn.Module,
    settings: AdapterSettings,
    needed: Mapping[str, Sequence[Window]],
    cache: SpectralCache,
    *,
    progress: bool = True,
) -> None:
    """Decompose the windows returned by :func:`find_windows` into ``cache``.

    If one window of a layer is missing, all of its windows are decomposed again, so that the bits do not depend on
    earlier content of the cache. Stacks of experts are left to the trials.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`ipca.apply_pc`.
    """

    def one(name: str) -> None:
        weight, windows = source_matrix(get_layer(model, name), name, None).weight, needed[name]
        options = precision(settings, weight)
        keys = [cache_key(weight, window, **options) for window in windows]
        if not all((cache.folder / key.file_name).exists() for key in keys):
            for key, found in zip(keys, window_svd(weight, windows, **options), strict=True):
                cache.put(key, found)

    rooms = {}
    for name, windows in needed.items():
        layer = get_layer(model, name)
        kind = layer_kind(layer)
        assert kind is not None
        shape = matrix_shape(layer, kind)
        if windows and len(shape) == 2:
            rooms[name] = workspace(shape, windows)
    done = thread_map(one, [*rooms], [*rooms.values()])
    for _ in tqdm(done, total=len(rooms), desc="Window SVD", unit="layer", disable=not progress):
        pass


def auto_settings(
    model: nn.Module,
    settings: AdapterSettings,
    calibration: Callable[[], Iterable[Any]],
    path: Path,
    cache: SpectralCache,
    *,
    progress: bool = True,
) -> AdapterSettings:
    """``settings`` with the window of each layer that the method ``"auto"`` selects, as ``window_pattern``.

    The windows depend only on the model and the batches of ``calibration()``, and cost a full SVD of every layer. They
    are computed once, stored in the JSON file at ``path``, and decomposed into ``cache``.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`ipca.apply_pc` with ``window="auto"``.
    """
    if not path.exists():
        requested = replace(settings, window=AUTO)
        targets = find_targets(model, requested, modules_to_save=find_modules_to_save(model, settings))
        found = auto_windows(model, targets, calibration(), progress=progress)
        write_atomic(path, json.dumps({target.name: target.window.text for target in found}, indent=1).encode())
    windows: dict[str, str] = json.loads(path.read_text())
    settings = replace(settings, window_pattern={re.escape(name): text for name, text in windows.items()})
    targets = find_targets(model, settings, modules_to_save=find_modules_to_save(model, settings))
    decompose_targets(model, targets, settings, cache=cache, progress=False)
    return settings
