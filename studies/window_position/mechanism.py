"""Σ S_i · energy_i over each window of the protocol, in every adapted layer, from the tasks' calibration batches.

    python -m studies.window_position.mechanism

Writes ``results/mechanism.csv``, one row per experiment, layer and window. Its predictions are in PROTOCOL.md, their
outcome on the study's page. ``IPCA_DEMO_TEXT`` is the path of the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ipca.lab.sweep import Task
from ipca.model import AdapterSettings
from ipca.model.calibration import LayerSensitivity, sensitivity
from ipca.model.targets import find_targets
from ipca.window import Window
from studies.window_position import digits, minilm
from studies.window_position.rows import RESULTS, write_table

COLUMNS = ("experiment", "layer", "d", "window", "start", "rank", "sensitivity")
M_WINDOWS = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
V_WINDOWS = (0.0, 0.125, 0.25, 0.5, 0.75, 0.875, 1.0)


def measure(
    model: nn.Module, batches: Iterable[Any], settings: Mapping[str, AdapterSettings], windows: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """The rows of several experiments on one pretrained model.

    Args:
        batches: unlabeled inputs, as for :func:`ipca.model.calibration.sensitivity`.
        settings: ``{experiment: its layers and rank}``; the first must include the layers of all.
        windows: fractions of ``d − rank``.
    """
    first = next(iter(settings.values()))
    found = sensitivity(model, batches, targets=first.targets, exclude=first.exclude)
    for experiment, own in settings.items():
        for target in find_targets(model, own):
            for window in windows:
                yield {"experiment": experiment, **_row(target.name, found[target.name], window, own.rank)}


def _row(layer: str, found: LayerSensitivity, fraction: float, rank: int) -> dict[str, Any]:
    d = len(found.S)
    start = Window.at(fraction, rank).resolve(d).index
    total = found.sensitivity[start : start + rank].sum().item()
    return {"layer": layer, "d": d, "window": str(fraction), "start": start, "rank": rank, "sensitivity": total}


def rows() -> Iterator[dict[str, Any]]:
    """The rows of MiniLM with its three sets of layers, then those of the digits ViT."""
    sets = {"M2-all": "all", "M1": "intermediate", "M2-query-value": "query-value"}
    tasks = {experiment: minilm.task(layers) for experiment, layers in sets.items()}
    yield from _of_tasks(tasks, M_WINDOWS)
    yield from _of_tasks({"V1": digits.task()}, V_WINDOWS)


def _of_tasks(tasks: Mapping[str, Task], windows: Sequence[float]) -> Iterator[dict[str, Any]]:
    first = next(iter(tasks.values()))
    assert first.calibration is not None
    settings = {experiment: task.settings for experiment, task in tasks.items()}
    return measure(first.build(), first.calibration(), settings, windows)


if __name__ == "__main__":
    write_table(RESULTS / "mechanism.csv", COLUMNS, rows())
