"""Checks of transformers' Trainer: checkpoints, resuming, and the best model at the end."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.zoo.case import Case, NotApplicableError, Way, trainable
from tests.zoo.outputs import loss_of

STEPS = 3


class ZooTrainer(Trainer):
    """A Trainer whose loss is that of the zoo; the first evaluation counts as the best."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        return loss_of(model(**inputs))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = {"eval_loss": float(self.state.global_step)}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class Keep(TrainerCallback):
    """Keeps the parameters as they were after each step."""

    def __init__(self) -> None:
        self.steps: list[list[torch.Tensor]] = []

    def on_step_end(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self.steps.append(values(model))


def resume(case: Case, way: Way) -> None:
    """A run that is resumed from its first checkpoint ends with the same bits."""
    whole, resumed = trainer(case, way, "resume"), trainer(case, way, "resume")
    whole.train()
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-1")
    assert_same(values(resumed.model), values(whole.model), "after resuming")


def best_at_end(case: Case, way: Way) -> None:
    """``load_best_model_at_end`` leaves the bits of the best step."""
    kept = Keep()
    made = trainer(
        case, way, "best", load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, callbacks=[kept]
    )
    made.train()
    assert_same(values(made.model), kept.steps[0], "of the best step")


def trainer(case: Case, way: Way, folder: str, callbacks: Any = None, **options: Any) -> ZooTrainer:
    """A Trainer that saves after every step; each step takes the case's inputs as its batch."""
    if not isinstance(case.plain, transformers.PreTrainedModel):
        raise NotApplicableError("is no model of transformers")
    arguments = TrainingArguments(
        str(case.folder / ".".join([folder, *way])),
        max_steps=STEPS,
        save_steps=1,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_strategy="no",
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return ZooTrainer(
        case.adapted(way),
        arguments,
        train_dataset=list(range(STEPS)),
        eval_dataset=[0],
        data_collator=lambda _: dict(case.inputs),
        callbacks=callbacks,
    )


def values(model: nn.Module) -> list[torch.Tensor]:
    """Copies of everything that trains."""
    return [parameter.detach().clone() for parameter in trainable(model)]


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor], when: str) -> None:
    """The same bits."""
    other = sum(not torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert not other, f"{other} of {len(wanted)} parameters are not those {when}"
