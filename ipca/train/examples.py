"""Examples of a run: rows as the trainers take them, and which of them are held out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ipca.analysis.retention import IGNORED
from ipca.train.data import Data
from ipca.train.models import Loaded
from ipca.train.settings import TrainSettings
from ipca.train.sources import DataError

log = logging.getLogger("ipca.train")
HELD_OUT = 512
"""Rows, or sequences, of an evaluation at most."""


@dataclass(frozen=True)
class Examples:
    """Data sets as the trainer takes them."""

    train: Any
    held_out: Any


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
    asked = max(round(float(settings.held_out) * count), 1)
    share = min(asked, HELD_OUT, count - 1)
    if share == HELD_OUT < asked:
        log.info("%d rows are held out and not %d: give a file as --held-out for more", HELD_OUT, asked)
    share -= share % (64 if share >= 64 else 16 if share >= 16 else 1)  # whole passes, for up to eight processes
    return Examples(*reversed(parted(made, share, settings.seed)))


def parted(rows: Any, count: int, seed: int) -> tuple[Any, Any]:
    """``count`` random rows, and the others, both in their order."""
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed), device="cpu").tolist()
    return rows.select(sorted(chosen[:count])), rows.select(sorted(chosen[count:]))


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
    if not _keeps_spaces(processor):
        raise ValueError(
            f"the tokenizer of {settings.model} loses the space before a word of a list, so that its tokens are not "
            "those of a text; for token classification choose a model whose tokenizer keeps it, such as BERT."
        )
    return rows.map(align, batched=True, remove_columns=rows.column_names)


def _keeps_spaces(tokenizer: Any) -> bool:
    """Whether the second of two words has the tokens that it has in a text."""
    text, words = tokenizer("a b", return_offsets_mapping=True), tokenizer(["a", "b"], is_split_into_words=True)
    ends = [end for _, end in text["offset_mapping"]]
    after = [token for token, end in zip(text["input_ids"], ends, strict=True) if end > 1]
    return after == [token for token, word in zip(words["input_ids"], words.word_ids(0), strict=True) if word == 1]


def blocks(texts: Iterable[str], tokenizer: Any, length: int) -> Any:
    """Running text as sequences of ``length`` tokens; the last one of a text may be shorter."""
    import datasets

    found = [ids for ids in pieces(texts, tokenizer, length) if len(ids) > 1]
    if not found:
        raise DataError("the text has fewer than two tokens.")
    return datasets.Dataset.from_dict({"input_ids": found})


def pieces(texts: Iterable[str], tokenizer: Any, length: int) -> Iterator[list[int]]:
    """The token ids of each text, without special tokens, ``length`` at a time."""
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        yield from (ids[k : k + length] for k in range(0, len(ids), length))


def with_break(prompt: str) -> str:
    """``prompt`` with white space at its end, so that it does not run into the completion."""
    return prompt if prompt[-1].isspace() else f"{prompt}\n"


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
    if "prompt" in rows.column_names:
        return rows.map(lambda row: {"prompt": with_break(row["prompt"])})
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
