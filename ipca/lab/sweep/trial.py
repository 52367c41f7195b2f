"""One trial of a sweep: adapt a copy of the model, train it at one rate with one seed, judge it."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ipca.analysis import update_norm
from ipca.lab import baselines
from ipca.lab.sweep.device import device_of, same_bits
from ipca.lab.sweep.notes import noted
from ipca.lab.sweep.task import Task
from ipca.lab.sweep.watch import watched
from ipca.model.apply import adapt, adapted_layers
from ipca.model.batches import evaluating
from ipca.model.decompose import source_matrix
from ipca.model.optim import param_groups
from ipca.model.settings import AdapterSettings
from ipca.model.targets import find_modules_to_save, find_targets
from ipca.nn.registry import get_layer
from ipca.svd import SpectralCache

Row = dict[str, Any]
COLUMNS = (
    *("method", "kind", "position", "comparison", "lr", "lr_used", "seed", "step", "status"),
    *("trainable", "early_update", "update", "target", "retained"),
)
"""Of every row, in this order; other metrics follow in alphabetical order."""
_REQUIRED = COLUMNS[-2:]
"""Metrics that every task has."""


@dataclass(frozen=True)
class Trial:
    """What is tried.

    Attributes:
        method: see :func:`ipca.lab.baselines.apply`.
        comparison: ``"same"`` (the rate as it is), ``"sqrt-sigma"`` (scaled in each layer by
            :func:`ipca.param_groups`) or ``"update"`` (chosen so that the first steps move the weights as far as the
            reference's do).
        lr: the rate of the grid.
        lr_used: of the factors; for ``"sqrt-sigma"`` before the scaling. Fully trained modules beside them has ``lr``.
        seed: of everything random in adapting and training.
    """

    method: str
    comparison: str
    lr: float
    lr_used: float
    seed: int

    @property
    def key(self) -> str:
        """A file name that belongs to this trial alone."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def __str__(self) -> str:
        return f"{self.method} ({self.comparison} rate, lr {self.lr:g}, seed {self.seed})"


def run_trial(
    task: Task,
    base: nn.Module,
    trial: Trial,
    *,
    cache: SpectralCache,
    early: int,
    checkpoints: tuple[int, ...],
    auto: AdapterSettings | None = None,
) -> list[Row]:
    """The rows of ``trial``: one for each checkpoint, then one for the end of training.

    A row of a trial that has no √σ-matched rate, as its window lies in a null space, says so; it is not trained.

    Args:
        base: the pretrained model; stays as it is.
        early: steps after which ``early_update`` is measured.
        checkpoints: steps after which the model is judged on the way.
        auto: for trials of ``"auto"``, the configuration with the window of each layer.

    Raises:
        ValueError: training took no step over the parameters, fewer than ``early``, or none at a rate of the trial; or
            a metric is missing; the message names the trial.
        Exception: whatever the task raises.
    """
    seed_everything(trial.seed)
    model = copy.deepcopy(base)
    if trial.method == "auto":
        assert auto is not None
        adapt(model, auto, cache=cache, progress=False)
    else:
        baselines.apply(model, trial.method, task.config, seed=trial.seed, cache=cache)
    parameters = [p for p in model.parameters() if p.requires_grad]
    try:
        groups = rate_groups(model, trial)
    except ValueError as error:
        if trial.comparison != "sqrt-sigma":
            raise
        nothing = dict.fromkeys(_REQUIRED, math.nan)  # a window in a null space has no rate to match
        return [_row(trial, parameters, None, None, math.nan, nothing) | {"status": f"failed: {error}"}]
    before = None if adapted_layers(model) else _weights(base, task)
    rows: list[Row] = []
    moved: dict[int, float] = {}
    metrics_of = partial(judge, task, trial=trial, seed=trial.seed)

    def on_the_way(step: int) -> None:
        moved[step] = update_norm(model, before)
        if step in checkpoints:
            rows.append(_row(trial, parameters, step, moved.get(early), moved[step], metrics_of(model)))

    seed_everything(trial.seed)
    with same_bits(device_of(model)), watched(groups, {early, *checkpoints}, on_the_way) as watch:
        task.train(model, groups, trial.seed)
    if early not in moved:
        raise ValueError(
            f"{trial}: train() took {watch.steps} optimizer steps over the parameters it was given, fewer than "
            f"early={early}; build the optimizer from `groups`, train longer, or lower early."
        )
    if not watch.at_rate:
        raise ValueError(
            f"{trial}: train() used the learning rates {', '.join(f'{lr:g}' for lr in watch.rates)} and never one that "
            "the sweep gave; build the optimizer from `groups`, which hold the rates, and let a schedule start or peak "
            "at them."
        )
    final = _row(trial, parameters, None, moved[early], update_norm(model, before), metrics_of(model))
    return [*rows, final]


def build_base(task: Task) -> nn.Module:
    """The pretrained model; whatever ``build`` draws, such as a new head, is the same every time.

    Raises:
        TypeError: ``build`` returned something else.
    """
    seed_everything(0)
    model = task.build()
    if not isinstance(model, nn.Module):
        raise TypeError(f"build() must return the pretrained model, an nn.Module; it returned {model!r}.")
    return model


def base_row(task: Task, base: nn.Module) -> Row:
    """The row of the untrained model, of which a copy is judged: trials start from ``base`` as it is.

    Raises:
        ValueError: as :func:`judge`, or what is required is no finite number: then nothing can be compared with it.
        Exception: whatever ``evaluate`` raises, with a note.
    """
    with noted("In judging the untrained model."):
        found = judge(task, copy.deepcopy(base), "the untrained model")
    lost = [name for name in _REQUIRED if not math.isfinite(found[name])]
    if lost:
        raise ValueError(
            f"the untrained model: {lost[0]} is {found[lost[0]]}; evaluate() must give a finite number for it, and its "
            "weights must hold no NaN or Inf."
        )
    known = {name: value if math.isfinite(value) else None for name, value in found.items()}
    return {**dict.fromkeys(COLUMNS), "method": "base", "kind": "base", "status": "ok", **known}


def judge(task: Task, model: nn.Module, trial: object, seed: int = 0) -> dict[str, float]:
    """The task's metrics of ``model``, whose modes and the random generators' states stay as they are.

    What ``evaluate`` draws depends on ``seed`` alone. It is not asked about a model that diverged, for which some
    metrics raise and others have an answer: where a weight that trains is no finite number, both metrics are NaN.

    Raises:
        ValueError: ``target`` or ``retained`` is missing, something is no number, or has the name of another column;
            the message begins with ``trial``.
    """
    if not all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad):
        return dict.fromkeys(_REQUIRED, math.nan)
    states = random.getstate(), np.random.get_state()
    with evaluating(model), same_bits(device_of(model)):
        seed_everything(seed)
        found = task.evaluate(model)
    random.setstate(states[0])
    np.random.set_state(states[1])
    if not isinstance(found, Mapping) or not set(_REQUIRED) <= set(found):
        raise ValueError(f"{trial}: evaluate() must give 'target' and 'retained', it gave {found!r}.")
    nameless = [name for name in found if not isinstance(name, str)]
    if nameless:
        raise ValueError(f"{trial}: evaluate() must name each metric by a string, it gave {nameless[0]!r}.")
    taken = sorted(set(found) & set(COLUMNS) - set(_REQUIRED))
    if taken:
        raise ValueError(f"{trial}: evaluate() gave {taken[0]!r}, which is another column of the table; rename it.")
    return {name: _number(found[name], name, trial) for name in (*_REQUIRED, *sorted(set(found) - set(_REQUIRED)))}


def _number(value: Any, name: str, trial: object) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{trial}: evaluate() must give numbers, {name} is {value!r}.") from None


def _weights(base: nn.Module, task: Task) -> dict[str, Tensor]:
    """The pretrained weights ``(out, in)`` of the fully trained layers, by path; adapted ones know their own."""
    targets = find_targets(base, task.config, modules_to_save=find_modules_to_save(base, task.config), values=False)
    return {t.name: source_matrix(get_layer(base, t.name), t.name, None).weight for t in targets}


def rate_groups(model: nn.Module, trial: Trial) -> list[dict[str, Any]]:
    """The parameter groups of ``trial``; for a model without adapted layers one group of all that trains.

    Matched rates are those of the factors: fully trained modules beside them have the grid's rate with every method.
    """
    if not adapted_layers(model):
        return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": trial.lr_used, "name": "full"}]
    match = "sqrt-sigma" if trial.comparison == "sqrt-sigma" else None
    groups = param_groups(model, trial.lr_used, match=match)
    for group in groups:
        if group["name"] == "modules_to_save":
            group["lr"] = trial.lr
    return groups


def seed_everything(seed: int) -> None:
    """Seed the random generators of torch, NumPy and Python."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _row(
    trial: Trial,
    parameters: list[nn.Parameter],
    step: int | None,
    early: float | None,
    update: float,
    metrics: dict[str, float],
) -> Row:
    numbers = {"update": update, **metrics}
    lost = [name for name, value in numbers.items() if not math.isfinite(value)]
    status = f"failed: diverged, {', '.join(lost)} is no finite number" if lost else "ok"
    return {
        "method": trial.method,
        "kind": baselines.kind_of(trial.method),
        "position": baselines.position_of(trial.method),
        "comparison": trial.comparison,
        "lr": trial.lr,
        "lr_used": trial.lr_used,
        "seed": trial.seed,
        "step": step,
        "status": status,
        "trainable": sum(p.numel() for p in parameters),
        "early_update": early if early is not None and math.isfinite(early) else None,
        **(dict.fromkeys(numbers) if lost else numbers),
    }
