"""The tasks: the model that each one trains, the examples it is given, and its trainer.

Training is TRL's SFTTrainer for causal language models, and transformers' Trainer otherwise.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ipca.io.hub import model_folder
from ipca.train.data import Data, DataError
from ipca.train.settings import TrainSettings

log = logging.getLogger("ipca.train")
IGNORED = -100
_EVALUATED = 8
"""Rows of a forward pass in evaluations. The loss is a mean over passes, so it must not depend on the processes."""
_MODELS = {
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "image-classification": "AutoModelForImageClassification",
}
_PEFT_TASKS = {
    "causal-lm": "CAUSAL_LM",
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "image-classification": None,
}


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer or image processor."""

    model: Any
    processor: Any


@dataclass(frozen=True)
class Examples:
    """Data sets as the trainer takes them."""

    train: Any
    held_out: Any


def load_model(settings: TrainSettings, task: str, labels: tuple[str, ...]) -> Loaded:
    """The pretrained model with a head for ``task``, and its tokenizer or image processor.

    Raises:
        FileNotFoundError: there is no such folder, and no such repository on the Hub.
        ValueError: it is not a model for this task.
    """
    import transformers

    folder = model_folder(settings.model)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; give a Hugging Face model folder.")
    options: dict[str, Any] = {}
    if labels:
        options = {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "problem_type": None}
        options |= {"label2id": {name: k for k, name in enumerate(labels)}, "ignore_mismatched_sizes": True}
    dtype = settings.dtype or ("auto" if torch.cuda.is_available() else "float32")
    torch.manual_seed(settings.seed)
    try:
        model = getattr(transformers, _MODELS[task]).from_pretrained(folder, dtype=dtype, **options)
        if task == "image-classification":
            processor: Any = transformers.AutoImageProcessor.from_pretrained(folder)
        else:
            processor = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{settings.model} cannot be loaded for the task {task}: {why}") from None
    if task == "causal-lm" and _reads_both_ways(model.config):
        raise ValueError(
            f"{settings.model} is an encoder ({model.config.model_type}), not a causal language model. For "
            "classification name the columns, such as --columns text=review label=stars."
        )
    if task != "image-classification" and processor.pad_token is None:
        if processor.eos_token is None:
            raise ValueError(f"the tokenizer of {settings.model} has neither a padding nor an end token; set one.")
        processor.pad_token = processor.eos_token
    if task == "sequence-classification":
        model.config.pad_token_id = processor.pad_token_id  # decoders look for the last token before it
    return Loaded(model, processor)


def _reads_both_ways(config: Any) -> bool:
    """Whether a model with a causal head lets tokens see later ones, as BERT does: its loss would mean nothing."""
    from transformers.models.auto import modeling_auto

    masked = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return config.model_type in masked and not (
        getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    )


def fitting_length(settings: TrainSettings, loaded: Loaded) -> TrainSettings:
    """``settings`` with a ``max_length`` that the model and its tokenizer have positions for."""
    limits = [
        getattr(loaded.processor, "model_max_length", None),
        getattr(loaded.model.config, "max_position_embeddings", None),
    ]
    for name, module in loaded.model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)  # RoBERTa counts from the padding on
    least = min(limit for limit in (settings.max_length, *limits) if limit)
    if least < settings.max_length:
        log.warning("sequences have %d tokens: %s has no more positions", least, settings.model)
    return replace(settings, max_length=least)


def adapt(loaded: Loaded, settings: TrainSettings, task: str, progress: bool) -> Any:
    """The PeftModel that trains the window; processes of a group share the decompositions.

    Raises:
        TypeError, ValueError: as :class:`ipca.peft.PCConfig`, or as :func:`ipca.peft.prepare`.
    """
    from peft import get_peft_model

    from ipca.peft import PCConfig, prepare

    config = PCConfig(
        r=settings.rank,
        window=settings.window,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        target_modules="all-linear" if settings.targets is None else list(settings.targets),
        task_type=_PEFT_TASKS[task],
    )
    with warnings.catch_warnings():  # a float alpha, which PEFT scales with
        warnings.filterwarnings("ignore", message=".*lora_alpha.*")
        model = get_peft_model(loaded.model, prepare(loaded.model, config, progress=progress))
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):  # no adapter file holds its running statistics
            module.register_forward_pre_hook(_frozen)
    return model


def _frozen(module: Any, inputs: Any) -> None:
    module.training = False


def split(data: Data, settings: TrainSettings, loaded: Loaded, held_out: Data | None = None) -> Examples:
    """Training and held-out examples; without a set of its own, a share of the rows is held out.

    Raises:
        DataError: there is too little data.
    """
    made = examples(data.rows, data, settings, loaded)
    if (other := held_out.rows if held_out else data.held_out) is not None:
        return Examples(made, examples(other, held_out or data, settings, loaded))
    count = len(made)
    if count < 2:
        what = f"sequence of {settings.max_length} tokens" if data.whole else "row"
        raise DataError(
            f"{settings.data}: {count} {what} is too little to train on and to evaluate; give more, or a file as "
            "held-out data."
        )
    share = min(max(round(float(settings.held_out) * count), 1), 512, count - 1)
    share -= share % (64 if share >= 64 else 16 if share >= 16 else 1)  # whole passes, for up to eight processes
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed)).tolist()
    return Examples(made.select(sorted(chosen[share:])), made.select(sorted(chosen[:share])))


def examples(rows: Any, data: Data, settings: TrainSettings, loaded: Loaded) -> Any:
    """``rows`` as the task's trainer takes them."""
    task, processor = data.layout.task, loaded.processor
    if data.whole:
        return blocks(rows["text"], processor, settings.max_length)
    if task == "causal-lm":
        return _for_sft(rows, settings, processor)
    if task == "image-classification":
        return rows
    if task == "sequence-classification":

        def encode(batch: Mapping[str, Any]) -> dict[str, Any]:
            return {
                **processor(batch["text"], truncation=True, max_length=settings.max_length),
                "labels": batch["label"],
            }

        return rows.map(encode, batched=True, remove_columns=rows.column_names)

    def align(batch: Mapping[str, Any]) -> dict[str, Any]:
        options = {"truncation": True, "max_length": settings.max_length, "is_split_into_words": True}
        found = processor(batch["tokens"], **options)
        labels = []
        for k, tags in enumerate(batch["tags"]):
            words = found.word_ids(k)
            first = [word if word is not None and words.index(word) == i else None for i, word in enumerate(words)]
            labels.append([IGNORED if word is None else tags[word] for word in first])
        return {**found, "labels": labels}

    if not processor.is_fast:
        raise ValueError(
            f"the tokenizer of {settings.model} does not tell words; token classification needs a fast one."
        )
    return rows.map(align, batched=True, remove_columns=rows.column_names)


def blocks(texts: list[str], tokenizer: Any, length: int) -> Any:
    """Running text as sequences of ``length`` tokens; the last one of a text may be shorter."""
    import datasets

    found = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        found += [ids[k : k + length] for k in range(0, len(ids), length)]
    found = [ids for ids in found if len(ids) > 1]
    if not found:
        raise DataError("the text has fewer than two tokens.")
    return datasets.Dataset.from_dict({"input_ids": found})


def _for_sft(rows: Any, settings: TrainSettings, tokenizer: Any) -> Any:
    """Prompts and completions as conversations where the tokenizer has a template for them."""
    if "messages" in rows.column_names and tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {settings.model} has no chat template for the messages of {settings.data}; use a model "
            "that was tuned for chats, or columns with prompt and completion."
        )
    if "prompt" in rows.column_names and tokenizer.chat_template is not None:
        return rows.map(
            lambda row: {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "completion": [{"role": "assistant", "content": row["completion"]}],
            },
            remove_columns=rows.column_names,
        )
    if "prompt" in rows.column_names:  # words of the two must not run together
        return rows.map(lambda row: {"prompt": row["prompt"] if row["prompt"][-1].isspace() else row["prompt"] + "\n"})
    if "messages" in rows.column_names and settings.loss_on == "answers" and not _has_answer_mask(tokenizer):
        if all(_is_single_turn(messages) for messages in rows["messages"]):
            return rows.map(
                lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]},
                remove_columns=rows.column_names,
            )
        raise ValueError(
            f"the chat template of {settings.model} does not mark the answers, and {settings.data} has conversations "
            "of several turns: pass --loss-on all, or split them into prompt and completion."
        )
    return rows


def _has_answer_mask(tokenizer: Any) -> bool:
    """Whether TRL can tell the tokens of the assistant."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    try:
        return has_generation_markers(tokenizer.chat_template) or get_training_chat_template(tokenizer) is not None
    except ValueError:  # TRL knows no variant of this template
        return False


def _is_single_turn(messages: list[dict[str, str]]) -> bool:
    answers = [k for k, each in enumerate(messages) if each["role"] == "assistant"]
    return answers == [len(messages) - 1]


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
            args=arguments,
            train_dataset=examples.train,
            eval_dataset=examples.held_out,
            processing_class=loaded.processor,
        )
        made: Any = {"trained on": trainer.train_dataset, "held out": trainer.eval_dataset}
        for what, rows in made.items():
            if not len(rows):  # TRL drops them
                raise DataError(
                    f"{settings.data}: no row that is {what} has an answer within {settings.max_length} tokens; pass a "
                    "larger --max-length, shorten the prompts, or train with --loss-on all."
                )
        return _silent(trainer)
    collators: dict[str, Any] = {
        "sequence-classification": lambda: transformers.DataCollatorWithPadding(loaded.processor),
        "token-classification": lambda: transformers.DataCollatorForTokenClassification(loaded.processor),
        "image-classification": lambda: ImageCollator(loaded.processor),
    }
    return _silent(
        transformers.Trainer(
            model,
            args=transformers.TrainingArguments(
                **_arguments(settings, out), label_names=["labels"], remove_unused_columns=False
            ),
            data_collator=collators[data.layout.task](),
            train_dataset=examples.train,
            eval_dataset=examples.held_out,
            processing_class=loaded.processor,
            compute_metrics=_accuracy,
        )
    )


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
        return {"pixel_values": pixels, "labels": torch.tensor([row["label"] for row in rows])}


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
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    counts = prediction.label_ids != IGNORED
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids)[counts].mean())}
