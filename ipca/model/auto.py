"""window="auto": each layer's window where a step of training moves its output least. Experimental."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import nn

from ipca.config import PCConfig
from ipca.model.batches import as_batches
from ipca.model.calibration import sensitivities, sensitivity
from ipca.model.patterns import lookup
from ipca.model.targets import Target, find_targets
from ipca.model.unquantized_weights import UnquantizedWeights
from ipca.window import Window

AUTO = "auto"


def suggest_windows(
    model: nn.Module, batches: Iterable[Any], config: PCConfig | None = None, *, progress: bool = True
) -> dict[str, Window]:
    """For each layer that ``config`` names the window of its rank that ``window="auto"`` takes. Experimental.

    It is the window with the smallest ``Σ S_i · energy_i``, see :class:`ipca.model.LayerSensitivity`: where a step of a
    given length in ``B`` changes the layer's output least on these inputs. The model stays as it is. The windows can be
    given to any other run: ``window_pattern={layer: window.text for layer, window in found.items()}``.

    Args, Raises: as :func:`ipca.model.sensitivity`; ``rank`` and ``rank_pattern`` of ``config`` count too.
    """
    anywhere = replace(config or PCConfig(), window="principal", window_pattern={}, form="intact")
    ranks = {target.name: target.window.rank for target in find_targets(model, anywhere)}
    found = sensitivity(model, batches, config, progress=progress)
    return {name: layer.quietest(ranks[name]) for name, layer in found.items()}


def check_calibration(config: PCConfig, calibration: object) -> None:
    """Raise ValueError where ``config`` asks for "auto" and there are no inputs to find it from, or the reverse."""
    asked = AUTO in (config.window, *config.window_pattern.values())
    if asked and calibration is None:
        raise ValueError(
            "window 'auto' is found from inputs of the model; give some unlabeled batches, calibration=[…], or "
            "another window."
        )
    if calibration is not None and not asked:
        raise ValueError("calibration is for window='auto', and no layer's window is that; leave one of them out.")


def without_auto(config: PCConfig) -> PCConfig:
    """``config`` with a window that fits wherever any of its rank does in place of "auto"."""
    pattern = {key: "principal" if text == AUTO else text for key, text in config.window_pattern.items()}
    return replace(config, window="principal" if config.window == AUTO else config.window, window_pattern=pattern)


def auto_windows(
    model: nn.Module,
    targets: Sequence[Target],
    config: PCConfig,
    calibration: Iterable[Any],
    *,
    unquantized_weights: UnquantizedWeights | None = None,
    progress: bool = True,
) -> list[Target]:
    """``targets`` with the windows found for those that ``config`` says "auto" of, each at an explicit index.

    Raises:
        TypeError, ValueError: as :func:`ipca.model.sensitivity`; or several processes are at work, of which each would
            see other inputs.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f"window 'auto' would differ between the {dist.get_world_size()} processes, as their inputs do; find it in "
            "one with ipca.analysis.suggest_windows, and give all of them its starts in window_pattern."
        )
    batches = as_batches(calibration)
    names = [t.name for t in targets if lookup(config.window_pattern, t.name, config.window) == AUTO]
    found = sensitivities(model, names, batches, unquantized_weights=unquantized_weights, progress=progress)
    return [replace(t, window=found[t.name].quietest(t.window.rank)) if t.name in found else t for t in targets]
