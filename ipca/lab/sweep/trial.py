"""One trial of a sweep: adapt a copy of the model, train it at one rate with one seed, evaluate it."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ipca._error_note import error_note
from ipca.analysis import update_norm
from ipca.lab import baselines
from ipca.lab.baselines.adapt import layer_weights
from ipca.lab.baselines.methods import needs_inputs
from ipca.lab.sweep.device import deterministic, device_of
from ipca.lab.sweep.task import Task
from ipca.model.apply import adapt, adapted_layers
from ipca.model.batches import evaluating
from ipca.model.optim import param_groups
from ipca.model.settings import AdapterSettings
from ipca.svd import SpectralCache

Row = dict[str, Any]
COLUMNS = (
    *("method", "kind", "position", "comparison", "lr", "lr_used", "seed", "step", "status"),
    *("trainable", "early_update", "update", "target", "retained"),
)
"""Columns of every row, in this order; other metrics follow in alphabetical order."""
_REQUIRED = COLUMNS[-2:]
"""Metrics that every task has."""


@dataclass(frozen=True)
class Trial:
    """A method at one rate with one seed.

    Attributes:
        method: see :func:`ipca.lab.baselines.apply`.
        comparison: ``"same"`` (the rate as given), ``"sqrt-sigma"`` (scaled in each layer by
            :func:`ipca.param_groups`) or ``"update"`` (chosen so that the first steps change the weights as much as
            those of the reference).
        lr: the rate of the grid.
        lr_used: of the factors; for ``"sqrt-sigma"`` before the scaling. Fully trained modules use ``lr``.
        seed: of all randomness in adapting and training.
    """

    method: str
    comparison: str
    lr: float
    lr_used: float
    seed: int

    @property
    def key(self) -> str:
        """A file name unique to this trial."""
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

    A trial without a √σ-matched rate, because its window lies in a null space, is not trained; its row says so.

    Args:
        base: the pretrained model; not changed.
        early: number of steps after which ``early_update`` is measured.
        checkpoints: numbers of steps after which the model is evaluated during training.
        auto: for trials of ``"auto"``, the settings with the window of each layer.

    Raises:
        ValueError: training took no step over the parameters, fewer than ``early``, or none at a rate of the trial; or
            a metric is missing. The message names the trial.
        Exception: any error raised by the task.
    """
    seed_everything(trial.seed)
    model = copy.deepcopy(base)
    if trial.method == "auto":
        assert auto is not None
        adapt(model, auto, cache=cache, progress=False)
    else:
        inputs = task.calibration() if task.calibration and needs_inputs(trial.method) else None
        baselines.apply(model, trial.method, task.settings, seed=trial.seed, cache=cache, calibration=inputs)
    parameters = [p for p in model.parameters() if p.requires_grad]
    try:
        groups = rate_groups(model, trial)
    except ValueError as error:
        if trial.comparison != "sqrt-sigma":
            raise
        nothing = dict.fromkeys(_REQUIRED, math.nan)  # a window in a null space has no matching rate
        return [_row(trial, parameters, None, None, math.nan, nothing) | {"status": f"failed: {error}"}]
    before = None if adapted_layers(model) else layer_weights(base, task.settings)
    rows: list[Row] = []
    updates: dict[int, float] = {}
    metrics_of = partial(evaluate_task, task, trial=trial, seed=trial.seed)

    def after_step(step: int) -> None:
        updates[step] = update_norm(model, before)
        if step in checkpoints:
            rows.append(_row(trial, parameters, step, updates.get(early), updates[step], metrics_of(model)))

    seed_everything(trial.seed)
    with deterministic(device_of(model)), watch_optimizer(groups, {early, *checkpoints}, after_step) as watch:
        task.train(model, groups, trial.seed)
    _check_training(trial, watch, early)
    final = _row(trial, parameters, None, updates[early], update_norm(model, before), metrics_of(model))
    return [*rows, final]


def _check_training(trial: Trial, watch: OptimizerWatch, early: int) -> None:
    """Raise ValueError unless ``train()`` took ``early`` steps, at a rate of its parameter groups at least once."""
    if watch.steps < early:
        raise ValueError(
            f"{trial}: train() took {watch.steps} optimizer steps over the parameters it was given, fewer than "
            f"early={early}; build the optimizer from `groups`, train longer, or lower early."
        )
    if not watch.at_rate:
        raise ValueError(
            f"{trial}: train() used the learning rates {', '.join(f'{lr:g}' for lr in watch.rates)} and none of those "
            "in `groups`; build the optimizer from `groups`, and let a schedule start or peak at their rates."
        )


def build_base(task: Task) -> nn.Module:
    """The pretrained model, built from a fixed seed: a new head is the same every time.

    Raises:
        TypeError: ``build`` did not return a module.
    """
    seed_everything(0)
    with error_note("In build()."):
        model = task.build()
    if not isinstance(model, nn.Module):
        raise TypeError(f"build() must return the pretrained model, an nn.Module; it returned {model!r}.")
    return model


def base_row(task: Task, base: nn.Module) -> Row:
    """The row of the untrained model; a copy is evaluated, so that trials start from an unchanged ``base``.

    Raises:
        ValueError: as :func:`evaluate_task`, or a required metric is not finite, so that nothing can be compared to it.
        Exception: any error raised by ``evaluate``, with a note.
    """
    with error_note("While evaluating the untrained model."):
        found = evaluate_task(task, copy.deepcopy(base), "the untrained model")
    lost = [name for name in _REQUIRED if not math.isfinite(found[name])]
    if lost:
        raise ValueError(
            f"the untrained model: {lost[0]} is {found[lost[0]]}; evaluate() must return a finite number for it, and "
            "the pretrained weights must not contain NaN or Inf."
        )
    known = {name: value if math.isfinite(value) else None for name, value in found.items()}
    return {**dict.fromkeys(COLUMNS), "method": "base", "kind": "base", "status": "ok", **known}


def evaluate_task(task: Task, model: nn.Module, trial: object, seed: int = 0) -> dict[str, float]:
    """The task's metrics of ``model``; its modes and the states of the random generators are restored.

    Randomness in ``evaluate`` depends only on ``seed``. A diverged model, with a trained weight that is not finite, is
    not evaluated, since some metrics would raise and others would return a number: both required metrics are NaN.

    Raises:
        ValueError: ``target`` or ``retained`` is missing, a value is not a number, or a metric has the name of another
            column; the message starts with ``trial``.
    """
    if not all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad):
        return dict.fromkeys(_REQUIRED, math.nan)
    states = random.getstate(), np.random.get_state()
    with evaluating(model), deterministic(device_of(model)):
        seed_everything(seed)
        found = task.evaluate(model)
    random.setstate(states[0])
    np.random.set_state(states[1])
    if not isinstance(found, Mapping) or not set(_REQUIRED) <= set(found):
        raise ValueError(f"{trial}: evaluate() must return 'target' and 'retained', it returned {found!r}.")
    nameless = [name for name in found if not isinstance(name, str)]
    if nameless:
        raise ValueError(f"{trial}: evaluate() must name each metric by a string, got {nameless[0]!r}.")
    taken = sorted(set(found) & set(COLUMNS) - set(_REQUIRED))
    if taken:
        raise ValueError(f"{trial}: evaluate() returned {taken[0]!r}, a column of the table; rename the metric.")
    return {name: _number(found[name], name, trial) for name in (*_REQUIRED, *sorted(set(found) - set(_REQUIRED)))}


def _number(value: Any, name: str, trial: object) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{trial}: evaluate() must return numbers, {name} is {value!r}.") from None


def rate_groups(model: nn.Module, trial: Trial) -> list[dict[str, Any]]:
    """The parameter groups of ``trial``; one group of all trainable parameters for a model without adapted layers.

    Matched rates apply to the factors: fully trained modules use the grid's rate with every method.
    """
    if not adapted_layers(model):
        return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": trial.lr_used, "name": "full"}]
    match = "sqrt-sigma" if trial.comparison == "sqrt-sigma" else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", 'match="sqrt-sigma" raises')  # rows have the update that came of it
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
    status = f"failed: diverged, {', '.join(lost)} is not finite" if lost else "ok"
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


class OptimizerWatch:
    """The record of a watched optimizer.

    Attributes:
        steps: number of steps taken.
        rates: its learning rates at the first step, before any schedule if a scheduler has recorded them.
        at_rate: whether any parameter ever had the rate of its group.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.rates: list[float] = []
        self.at_rate = False


@contextmanager
def watch_optimizer(
    groups: Sequence[Mapping[str, Any]], steps: Iterable[int], call: Callable[[int], None]
) -> Iterator[OptimizerWatch]:
    """Within the block, call ``call(step)`` after each of ``steps`` of the first optimizer that holds a parameter.

    It hooks into torch's optimizers, so it works with any training loop. Steps count from 1. If several optimizers hold
    these parameters, the one that steps first is watched.

    Args:
        groups: parameter groups, each with ``params`` and ``lr``; read on entry, since schedules change them.
    """
    given: dict[nn.Parameter, float] = {p: float(group["lr"]) for group in groups for p in group["params"]}
    wanted = frozenset(steps)
    watch = OptimizerWatch()
    followed: list[Optimizer] = []

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not followed and any(p in given for group in optimizer.param_groups for p in group["params"]):
            followed.append(optimizer)
        if followed and optimizer is followed[0]:
            watch.steps += 1
            if watch.steps == 1:
                watch.rates = [_unscheduled_rate(group) for group in optimizer.param_groups]
            watch.at_rate = watch.at_rate or any(_is_at_rate(group, given) for group in optimizer.param_groups)
            if watch.steps in wanted:
                call(watch.steps)

    handle = register_optimizer_step_post_hook(after)
    try:
        yield watch
    finally:
        handle.remove()


def _unscheduled_rate(group: Mapping[str, Any]) -> float:
    return float(group.get("initial_lr", group["lr"]))


def _is_at_rate(group: Mapping[str, Any], given: Mapping[nn.Parameter, float]) -> bool:
    """Whether a parameter of ``group`` has the rate it was given, now or before any schedule."""
    rates = float(group["lr"]), _unscheduled_rate(group)
    expected = {given[p] for p in group["params"] if p in given}
    return any(math.isclose(rate, lr, rel_tol=1e-6) for rate in rates for lr in expected)
