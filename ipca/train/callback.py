"""Callbacks of transformers' Trainer: forgetting at every evaluation, its budget, and progress."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterable, Mapping
from copy import copy
from typing import Any

from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback

from ipca.analysis.without_adapter import check_base
from ipca.train.keep import Kept, as_kept

log = logging.getLogger("ipca.train")
WITHIN = "loss_within_budget"


class KeepCallback(TrainerCallback):
    """Measure at every evaluation how far a model has moved from its base on data that it should keep.

    ::

        trainer.add_callback(KeepCallback(trainer, batches, max_kl=0.1))

    ``eval_keep_kl`` and ``eval_keep_loss_rise`` join the metrics of the evaluation, the log history, and whatever
    ``report_to`` names; with several evaluation sets they are measured once a step, and join the metrics of each. The
    base is the model without its adapter, so there is no second model.

    With a budget, the checkpoint that ``load_best_model_at_end`` loads is the best one on the evaluation data within
    it, by ``metric_for_best_model``, and training stops after ``patience`` evaluations in a row above it.

    Args:
        trainer: a Trainer of a PeftModel, or of a model of :func:`ipca.apply_pc`.
        kept: batches with ``input_ids`` and ``labels``, as of :func:`ipca.train.token_batches`; or an object with
            ``measure(model)``.
        max_kl: the budget in nats per token; needs ``load_best_model_at_end=True``.
        patience: evaluations in a row above the budget.

    Raises:
        ValueError: the model has no adapter, or one that has changed the base weights; a budget without
            ``load_best_model_at_end``, or for something that has no such number; when training begins, a budget by the
            metric of no evaluation set.
    """

    def __init__(
        self,
        trainer: Any,
        kept: Kept | Iterable[Mapping[str, Tensor]],
        *,
        max_kl: float | None = None,
        patience: int = 3,
    ) -> None:
        self._trainer, self.kept, self.budget, self.patience = trainer, as_kept(kept), max_kl, patience
        self._measured: tuple[int, dict[str, float]] | None = None
        check_base(trainer.model)
        if max_kl is None:
            return
        if self.kept.metric is None:
            raise ValueError(f"there is no budget for {self.kept.description}.")
        arguments = trainer.args = copy(trainer.args)  # another trainer may have them too
        if not arguments.load_best_model_at_end:
            raise ValueError("a budget keeps the best checkpoint within it: pass load_best_model_at_end=True.")
        best = arguments.metric_for_best_model or "loss"
        self._best = best if best.startswith("eval_") else f"eval_{best}"
        self._worst = -math.inf if arguments.greater_is_better else math.inf
        arguments.metric_for_best_model = f"eval_{WITHIN}"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measured = None
        handler = self._trainer.callback_handler  # first, as others read the metrics: EarlyStoppingCallback
        handler.callbacks = [self, *(each for each in handler.callbacks if each is not self)]
        sets = self._trainer.eval_dataset
        if self.budget is None or not isinstance(sets, Mapping):
            return
        if not any(self._best.startswith(f"eval_{name}_") for name in sets):
            raise ValueError(
                f"the budget goes by {self._best!r}, and the evaluation sets are {', '.join(map(str, sets))}; set "
                f"metric_for_best_model to one of a set, as eval_{next(iter(sets))}_loss."
            )

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        metrics: dict[str, float] = kwargs["metrics"]
        if self.budget is not None and self._best not in metrics:
            if self._trainer.is_in_train and not self._several:
                raise ValueError(
                    f"the budget goes by {self._best!r}, and the evaluation gives {', '.join(metrics)}; set "
                    "metric_for_best_model to one of these."
                )
            return  # of another one of several evaluation sets
        if not self._several or self._measured is None or self._measured[0] != state.global_step:
            measured = {f"eval_{name}": value for name, value in self.kept.measure(self._trainer.model).items()}
            self._measured = state.global_step, measured
            self._trainer.log(dict(measured))
        found = self._measured[1]
        metrics |= found
        if self.budget is None:
            return
        name = f"eval_{self.kept.metric}"
        metrics[f"eval_{WITHIN}"] = metrics[self._best] if found[name] <= self.budget else self._worst  # that of NaN
        history = self._trainer.state.log_history  # which a resumed run has from its checkpoint
        above = 0
        for value in {entry["step"]: entry[name] for entry in history if name in entry}.values():
            above = 0 if value <= self.budget else above + 1
        if above >= self.patience and self._trainer.is_in_train and 0 < state.global_step < state.max_steps:
            log.warning(
                "stopping at step %d: %d evaluations in a row above the budget of %g",
                state.global_step,
                above,
                self.budget,
            )
            control.should_training_stop = True

    @property
    def _several(self) -> bool:
        """Whether this is one of several evaluations of a step."""
        return self._trainer.is_in_train and isinstance(self._trainer.eval_dataset, Mapping)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.budget is not None and state.best_model_checkpoint is None and state.global_step > 0:
            log.warning(
                "no evaluation was within the budget of %g: the model is that of the last step. Scale its change down, "
                "train at a lower rate, or raise the budget",
                self.budget,
            )


class EvaluateLast(TrainerCallback):
    """Evaluate and save after the last step, whatever the number of steps between evaluations."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = control.should_evaluate = control.should_save = True


class Progress(TrainerCallback):
    """A bar with the losses and what is forgotten; a line an evaluation where there is no terminal."""

    def __init__(self, metric: str | None, show: bool = True) -> None:
        self._name, self._show = metric, show
        self._bar: Any = None
        self._shown: dict[str, str] = {}
        self._last: dict[str, float] = {}
        self._began = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._show and state.is_world_process_zero and sys.stderr.isatty():
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="Training", unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs["logs"]
        if "train_runtime" in logs or not self._show or not state.is_world_process_zero:
            return
        self._last |= logs
        names = {
            "loss": "loss",
            "eval_loss": "held-out",
            "eval_accuracy": "accuracy",
            f"eval_{self._name}": str(self._name),
        }
        self._shown |= {words: f"{logs[name]:.4g}" for name, words in names.items() if name in logs}
        if self._bar is not None:
            self._bar.set_postfix(self._shown)
        elif f"eval_{self._name}" in logs or (self._name is None and "eval_loss" in logs):
            words = "  ".join(f"{name} {value}" for name, value in self._shown.items())
            log.info(
                "step %d of %d  %s  (%.0f s)", state.global_step, state.max_steps, words, time.monotonic() - self._began
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
