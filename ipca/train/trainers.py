"""The trainer of a task: TRL's SFTTrainer for causal language models, and transformers' Trainer otherwise."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from ipca.analysis.retention import IGNORED
from ipca.train.data import Data
from ipca.train.examples import Examples
from ipca.train.models import Loaded
from ipca.train.settings import TrainSettings
from ipca.train.sources import DataError

log = logging.getLogger("ipca.train")
_EVALUATED = 8
"""Rows of a forward pass in evaluations at most. The loss of a language model is a mean over passes."""


def build_trainer(
    model: Any, examples: Examples, settings: TrainSettings, loaded: Loaded, data: Data, out: Path
) -> Any:
    """The trainer of the task, which writes its checkpoints to ``out``."""
    import transformers

    if data.layout.task == "causal-lm":
        from trl.trainer.sft_config import SFTConfig
        from trl.trainer.sft_trainer import SFTTrainer

        answers = settings.loss_on == "answers"
        arguments = SFTConfig(
            **_arguments(settings, out),
            max_length=settings.max_length,
            packing=settings.packing and not data.whole,
            completion_only_loss=answers if "prompt" in examples.train.column_names else None,
            assistant_only_loss=answers and "messages" in examples.train.column_names,
        )
        trainer = SFTTrainer(
            model,
            args=_on_one_device(arguments),
            train_dataset=examples.train,
            eval_dataset=examples.held_out,
            processing_class=loaded.processor,
        )
        _check_dropped(examples, trainer, settings)
        return _silent(trainer)
    collators: dict[str, Any] = {
        "sequence-classification": lambda: transformers.DataCollatorWithPadding(loaded.processor),
        "token-classification": lambda: transformers.DataCollatorForTokenClassification(loaded.processor),
        "image-classification": lambda: ImageCollator(loaded.processor),
    }
    options: dict[str, Any] = {"label_names": ["labels"], "remove_unused_columns": False}
    return _silent(
        ClassifierTrainer(
            model,
            args=_on_one_device(transformers.TrainingArguments(**_arguments(settings, out), **options)),
            data_collator=collators[data.layout.task](),
            train_dataset=examples.train,
            eval_dataset=examples.held_out,
            processing_class=loaded.processor,
            compute_loss_func=mean_loss,
            compute_metrics=_accuracy,
        )
    )


def _on_one_device(arguments: Any) -> Any:
    """``arguments`` for one GPU a process: Trainer would take all that there are, and a batch of rows for each."""
    if arguments.n_gpu > 1:
        log.warning(
            "one of %d GPUs is used; torchrun --nproc-per-node %d -m ipca train … uses all",
            *(arguments.n_gpu, arguments.n_gpu),
        )
        arguments._n_gpu = 1
    return arguments


def _check_dropped(examples: Examples, trainer: Any, settings: TrainSettings) -> None:
    """Say of how many rows nothing trains, as no token of their answers is within ``max_length``; or raise."""
    parts = {"held out": (examples.held_out, trainer.eval_dataset)}
    if examples.train is not examples.held_out:
        parts = {"trained on": (examples.train, trainer.train_dataset), **parts}
    for what, (given, made) in parts.items():
        left = _answered(made)
        if not left:
            raise DataError(
                f"{settings.data}: no row that is {what} has an answer within {settings.max_length} tokens; pass a "
                "larger --max-length, shorten the prompts, or train with --loss-on all."
            )
        if left < len(given):
            log.warning(
                "%d of %d rows %s count nothing: their answers begin after %d tokens; pass a larger --max-length",
                len(given) - left,
                len(given),
                what,
                settings.max_length,
            )


def _answered(rows: Any) -> int:
    """How many of a language model's rows have labels: TRL drops the others, or packs them."""
    if "seq_lengths" not in rows.column_names:
        return len(rows)
    packed = (torch.tensor(row["labels"], device="cpu").split(row["seq_lengths"]) for row in rows)
    return sum(bool((each != IGNORED).any()) for parts in packed for each in parts)


class ClassifierTrainer(Trainer):
    """A Trainer whose held-out loss is the mean over all labels, however the rows are split into passes."""

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        found: Any = super().evaluation_loop(*args, **options)
        logits, labels = (torch.from_numpy(each) for each in (_logits(found.predictions), found.label_ids))
        loss = float(mean_loss({"logits": logits}, labels))
        found.metrics[f"{options.get('metric_key_prefix', 'eval')}_loss"] = loss
        return found


def mean_loss(outputs: Mapping[str, Tensor], labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    """The cross-entropy of classes, summed over ``labels`` and divided by the number of all labels of the step.

    Heads of transformers mostly divide by the labels of a pass, so that their losses add up over the passes of a step.
    """
    logits, labels = outputs["logits"].float().flatten(0, -2), labels.flatten()
    count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    total = torch.nn.functional.cross_entropy(logits, labels.to(logits.device), ignore_index=IGNORED, reduction="sum")
    return total / count.to(logits.device)


def _silent(trainer: Any) -> Any:
    """``trainer`` without the callback that prints every log entry."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


@dataclass(frozen=True)
class ImageCollator:
    """Images of a data set as ``pixel_values``."""

    processor: Any

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        pixels = self.processor([row["image"].convert("RGB") for row in rows], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([row["label"] for row in rows], device="cpu")}


def processes() -> int:
    """The number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", 1))


def micro_batches(settings: TrainSettings) -> tuple[int, int]:
    """Rows of a forward pass of one process, and how many passes make its share of a step.

    Raises:
        ValueError: ``batch`` cannot be shared so.
    """
    world = processes()
    if settings.batch % world:
        raise ValueError(f"a batch of {settings.batch} rows cannot be shared by {world} processes; give a multiple.")
    share = settings.batch // world
    micro = min(settings.micro_batch or share, share)
    if share % micro:
        raise ValueError(
            f"{share} rows of a process cannot be split into micro-batches of {micro}; give a divisor of {share}."
        )
    return micro, share // micro


def repeated_rows(settings: TrainSettings, rows: int) -> int:
    """How many of ``rows`` an epoch repeats, so that all processes have equally many full micro-batches."""
    return -rows % (micro_batches(settings)[0] * processes()) if processes() > 1 else 0


def _arguments(settings: TrainSettings, out: Path) -> dict[str, Any]:
    micro, accumulated = micro_batches(settings)
    on_gpu, on_cpu = torch.cuda.is_available(), not torch.accelerator.is_available()
    share_of_run = min(1 / settings.evaluations, 0.999999)  # 1 would be a step
    return {
        "output_dir": str(out),
        "num_train_epochs": settings.epochs,
        "max_steps": settings.steps or -1,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": min(micro, _EVALUATED),
        "gradient_accumulation_steps": accumulated,
        "learning_rate": settings.rate,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": settings.warmup,
        "weight_decay": settings.weight_decay,
        "eval_strategy": "steps",
        "eval_steps": share_of_run,
        "save_strategy": "steps",
        "save_steps": share_of_run,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "logging_steps": share_of_run,
        "eval_on_start": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "report_to": list(settings.report_to) or "none",
        "seed": settings.seed,
        "data_seed": settings.seed,
        "use_cpu": on_cpu,
        "bf16": on_gpu and torch.cuda.is_bf16_supported(),
        "gradient_checkpointing": settings.gradient_checkpointing,
        "disable_tqdm": True,
        "dataloader_pin_memory": on_gpu,
        "ddp_find_unused_parameters": False,
    }


def _accuracy(prediction: Any) -> dict[str, float]:
    counts = prediction.label_ids != IGNORED
    return {"accuracy": float((_logits(prediction.predictions).argmax(-1) == prediction.label_ids)[counts].mean())}


def _logits(predictions: Any) -> Any:
    """The first of what a model returns beside its loss."""
    return predictions[0] if isinstance(predictions, tuple) else predictions
