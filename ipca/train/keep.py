"""What a model must not forget: kept data, and the measurement of a tuned model on it against its base."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ipca._error_note import error_note
from ipca.analysis.retention import embedding_drift, forgetting
from ipca.analysis.without_adapter import without_adapter
from ipca.model.batches import as_batches, evaluating
from ipca.train.data import Data, read_data
from ipca.train.examples import pieces, with_break
from ipca.train.models import Loaded
from ipca.train.settings import TrainSettings
from ipca.train.sources import DataError, Source, check_image, find_source, read_image, with_bar
from ipca.window import Window

BATCH_TOKENS = 512
"""Tokens of a forward pass: its logits, and the base's, are in memory at once."""
ITEM_TOKENS = 64
"""What an item counts of ``keep_tokens`` where it is measured as a whole."""
ITEMS = 16
"""Items of a forward pass."""
SAMPLE_TOKENS = 128
"""Tokens of a sample that is drawn from the model."""
_TEXT = ("messages", "prompt", "completion", "text")
"""Roles of columns that hold text."""


Function = Callable[[nn.Module, Any], Mapping[str, float]]
"""A user's ``measure(model, processor)``."""


class Kept(Protocol):
    """What is measured on kept data.

    Attributes:
        metric: the name of the number that a budget limits; None where a budget means nothing.
        description: with its unit, for axes and tables.
    """

    @property
    def metric(self) -> str | None: ...

    @property
    def description(self) -> str: ...

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Numbers by name; larger is more forgotten, 0 the base."""


@dataclass(frozen=True)
class KeptTokens:
    """``keep_kl``, the mean KL(base ‖ model) per token, and ``keep_loss_rise``, both in nats.

    Args:
        batches: mappings with ``input_ids``, ``attention_mask`` and ``labels``.
    """

    batches: Sequence[Mapping[str, Tensor]]
    metric = "keep_kl"
    description = "KL(base ‖ tuned), nats per token"

    def measure(self, model: nn.Module) -> dict[str, float]:
        found = forgetting(model, None, _on_device(model, self.batches))
        return {"keep_kl": found.kl, "keep_loss_rise": found.loss_rise}


@dataclass(frozen=True)
class KeptItems:
    """``keep_drift``, the mean ``1 − cos`` between the embeddings of an item by the base and by the model.

    Args:
        batches: mappings of the model's inputs, without labels.
    """

    batches: Sequence[Mapping[str, Tensor]]
    metric = "keep_drift"
    description = "drift of embeddings, mean 1 − cos"

    def measure(self, model: nn.Module) -> dict[str, float]:
        return {"keep_drift": embedding_drift(model, None, _on_device(model, self.batches))}


class KeptTask:
    """Numbers of a user's function ``measure(model, processor)``, such as accuracies: those of the model, ``keep_…``,
    and how far they are from the base's, ``keep_…_change``.

    Args:
        function: returns finite numbers, the same names each time; an error says so.
        processor: its second argument.
        file: that holds the function, for messages.
    """

    metric: str | None = None
    description = "the task's own measure"

    def __init__(self, function: Function, processor: Any, file: str | None = None) -> None:
        self._function, self._processor = function, processor
        self._place = "measure()" + (f" of {file}" if file else "")
        self._base: dict[str, float] | None = None

    def measure(self, model: nn.Module) -> dict[str, float]:
        if self._base is None:
            with evaluating(model), without_adapter(model):
                self._base = self._numbers(model)
        with evaluating(model):
            now = self._numbers(model)
        if now.keys() != self._base.keys():
            names = " and then ".join(", ".join(each) for each in (self._base, now))
            raise ValueError(f"{self._place} returned {names}; it must return the same names each time.")
        changes = {f"keep_{name}_change": value - self._base[name] for name, value in now.items()}
        return {f"keep_{name}": value for name, value in now.items()} | changes

    def _numbers(self, model: nn.Module) -> dict[str, float]:
        with error_note(f"In {self._place}, which must return numbers by name."):
            found = self._function(model, self._processor)
        numbers: dict[str, float] = {}
        with suppress(AttributeError, RuntimeError, TypeError, ValueError):
            numbers = {str(name): float(value) for name, value in found.items()}
        if not numbers:
            got = repr(found)[:60]
            raise TypeError(
                f"{self._place} returned {got}; it must return numbers by name, such as {{'accuracy': 0.9}}."
            )
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise ValueError(f"{self._place} returned {value} for {name!r}; each number must be finite.")
        return numbers


KeepSource = Function | Data | list[str] | list[Path] | None
"""A function, the data of a language model, texts or images of an encoder; None for samples, or for nothing."""


def read_keep(settings: TrainSettings, task: str, *, progress: bool = False) -> KeepSource:
    """Read what ``settings.keep`` names, before the model is loaded.

    Args:
        progress: show a bar where this takes long.

    Raises:
        DataError, FileNotFoundError, ValueError: there is nothing, or not what the task can measure.
    """
    text_model = task == "causal-lm"
    if settings.max_kl is not None and not text_model:
        raise ValueError(f"a model for {task} has no distribution to keep: use --max-drift instead of --max-kl.")
    if settings.max_drift is not None and text_model:
        raise ValueError("a language model is limited by --max-kl, not by --max-drift.")
    found_from_inputs = Window(settings.window, settings.rank).needs_calibration
    if found_from_inputs and (str(settings.keep).endswith(".py") or (settings.keep is None and not text_model)):
        raise ValueError(f"the window {settings.window!r} is found from inputs to keep: give text or images as --keep.")
    if settings.keep is None:
        if settings.budget is not None and not text_model:
            raise ValueError(f"a budget needs --keep: nothing is measured by default for the task {task}.")
        return None
    if settings.keep.endswith(".py"):
        if settings.budget is not None:
            raise ValueError(
                f"a budget limits KL or drift, which {settings.keep} does not measure; give text or images."
            )
        return _measure_of(Path(settings.keep))
    source = find_source(settings.keep)
    if (source.kind == "images") != (task == "image-classification"):
        what = "images" if source.kind == "images" else "text"
        raise ValueError(f"{settings.keep} holds {what}, which a model for {task} does not take.")
    if source.kind == "images":
        files = list(source.files[: _items(settings)])  # the others are not measured
        for path in with_bar(files, "image", progress):
            check_image(path, str(path))
        return files
    data = _rows(source, settings.columns, ("causal-lm",) if text_model else ("causal-lm", "token-classification"))
    return data if text_model else _texts(data)


def _rows(source: Source, columns: Mapping[str, str], tasks: Iterable[str]) -> Data:
    """The text of ``source`` as data of one of ``tasks``, in the ``columns`` of the training data or in its own."""
    named = {role: name for role, name in columns.items() if role in _TEXT}
    why = ""
    for given, task in product((named, {}), tasks):
        try:
            return read_data(source, task, given)
        except DataError:
            raise
        except ValueError as error:  # no such columns
            why = str(error)
    raise ValueError(
        f"{why.partition(';')[0]}; what is kept needs text, messages, or prompt + completion: rename a column to text."
    )


def build_keep(
    source: KeepSource, settings: TrainSettings, task: str, loaded: Loaded, samples: Tensor | None
) -> Kept | None:
    """What is measured; None where there is nothing to measure.

    Args:
        source: of :func:`read_keep`.
        samples: drawn from the model by :func:`draw_samples`, where there is no source.

    Raises:
        DataError: there are fewer than two tokens.
    """
    if samples is not None:
        return _kept_tokens(samples.tolist(), settings, loaded.processor)
    if source is None:
        return None
    if isinstance(source, Data):
        return _kept_tokens(_sequences(source, settings, loaded.processor), settings, loaded.processor)
    if not isinstance(source, list):
        return KeptTask(source, loaded.processor, settings.keep)
    items: list[Any] = source[: _items(settings)]
    options = {"padding": True, "truncation": True, "max_length": settings.max_length}
    if task == "image-classification":
        items, options = [read_image(path) for path in items], {}
    groups = (items[k : k + ITEMS] for k in range(0, len(items), ITEMS))
    return KeptItems([dict(loaded.processor(group, return_tensors="pt", **options)) for group in groups])


def _items(settings: TrainSettings) -> int:
    """How many items are measured at most."""
    return max(settings.keep_tokens // ITEM_TOKENS, 1)


def _kept_tokens(sequences: Iterable[list[int]], settings: TrainSettings, tokenizer: Any) -> KeptTokens:
    return KeptTokens(list(_batches(_cut(sequences, settings.keep_tokens), tokenizer)))


@torch.no_grad()
def draw_samples(model: Any, tokenizer: Any, settings: TrainSettings) -> Tensor:
    """``(keep_tokens // 128, 128)`` token ids drawn from ``model`` at temperature 1, from its first token on.

    They are shorter where ``max_length`` is.
    """
    from transformers import GenerationConfig

    own_start = getattr(model.config, "bos_token_id", None)
    known = [x for x in (tokenizer.bos_token_id, own_start, tokenizer.eos_token_id) if x is not None]
    vocabulary = model.get_input_embeddings().num_embeddings
    start = next((x for x in known if x < vocabulary), 0)
    length = min(SAMPLE_TOKENS, settings.max_length)
    count = max(settings.keep_tokens // length, 1)
    first = torch.full((count, 1), start, device=next(model.parameters()).device)
    options: Any = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length - 1,
        eos_token_id=None,  # a text may end and another begin
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    own, model.generation_config = model.generation_config, options  # whose settings would fill in what is None
    try:
        with evaluating(model):
            torch.manual_seed(settings.seed)
            drawn = [model.generate(part, attention_mask=torch.ones_like(part)) for part in first.split(16)]
    finally:
        model.generation_config = own
    return torch.cat(drawn).cpu()


def token_batches(
    texts: Iterable[str], tokenizer: Any, *, max_length: int = 512, tokens: int = 8192
) -> list[dict[str, Tensor]]:
    """``texts`` as batches of token ids with labels, for :class:`ipca.train.KeepCallback`.

    Args:
        texts: documents of any length; a string is one of them.
        tokenizer: of transformers.
        max_length: tokens of a sequence; longer texts go on in the next one.
        tokens: of all sequences.

    Raises:
        ValueError: there is no text.
    """
    documents = [texts] if isinstance(texts, str) else texts
    return list(_batches(_cut(pieces(documents, tokenizer, max_length), tokens), tokenizer))


def _sequences(data: Data, settings: TrainSettings, tokenizer: Any) -> Iterator[list[int]]:
    if data.whole:
        yield from pieces(data.rows["text"], tokenizer, settings.max_length)
        return
    for row in data.rows:
        if "text" in row:
            ids = tokenizer(row["text"])["input_ids"]
        elif "prompt" in row and tokenizer.chat_template is None:
            ids = tokenizer(with_break(row["prompt"]) + row["completion"])["input_ids"]
        else:
            messages = row.get("messages") or [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
            ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        yield ids[: settings.max_length]


def _texts(data: Data) -> list[str]:
    """Lines of text files, and the text of each row of others."""
    if data.whole:
        return [line for text in data.rows["text"] for line in text.splitlines() if line.strip()]
    return list(map(_text, data.rows))


def _text(row: Mapping[str, Any]) -> str:
    if "messages" in row:
        return "\n".join(message["content"] for message in row["messages"])
    if "prompt" in row:
        return with_break(row["prompt"]) + row["completion"]
    return str(row["text"]) if "text" in row else " ".join(row["tokens"])


def _cut(sequences: Iterable[list[int]], tokens: int) -> list[list[int]]:
    """The first sequences, ``tokens`` in all; those of one token predict nothing."""
    found, count = [], 0
    for ids in sequences:
        if count >= tokens:
            break
        ids = ids[: tokens - count]
        if len(ids) > 1:
            found.append(ids)
            count += len(ids)
    if not found:
        raise DataError("the kept data has no sequence of at least two tokens.")
    return found


def _batches(sequences: Sequence[list[int]], tokenizer: Any) -> Iterator[dict[str, Tensor]]:
    """Padded batches of at most :data:`BATCH_TOKENS` tokens, or of one sequence."""
    group: list[list[int]] = []
    for ids in (*sequences, None):
        longest = max(map(len, (*group, ids or [])), default=0)
        if group and (ids is None or longest * (len(group) + 1) > BATCH_TOKENS):
            yield _padded(group, tokenizer.pad_token_id or 0)
            group = []
        if ids is not None:
            group.append(ids)


def _padded(group: list[list[int]], pad: int) -> dict[str, Tensor]:
    length = max(map(len, group))
    ids = torch.tensor([each + [pad] * (length - len(each)) for each in group], device="cpu")
    mask = torch.tensor([[1] * len(each) + [0] * (length - len(each)) for each in group], device="cpu")
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _on_device(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    device = next(model.parameters()).device
    for batch in batches:
        yield {name: value.to(device) for name, value in batch.items()}


def _measure_of(path: Path) -> Function:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    spec = importlib.util.spec_from_file_location(f"_ipca_keep_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with error_note(f"In the file {path}."):
        spec.loader.exec_module(module)
    function: Function | None = getattr(module, "measure", None)
    if not callable(function):
        raise ValueError(f"{path} has no function measure(model, processor), which returns numbers by name.")
    return function


def as_kept(what: Kept | Iterable[Mapping[str, Tensor]]) -> Kept:
    """``what`` itself, or :class:`KeptTokens` of batches.

    Raises:
        TypeError, ValueError: one batch instead of several, or none; or no batches of tensors.
    """
    if hasattr(what, "measure"):
        return cast("Kept", what)
    batches = as_batches(what)
    for batch in batches:
        if not isinstance(batch, Mapping) or not all(
            isinstance(batch.get(name), Tensor) for name in ("input_ids", "labels")
        ):
            raise TypeError(
                "expected batches with the tensors input_ids and labels; ipca.train.token_batches(texts, tokenizer) "
                "makes them of texts."
            )
    return KeptTokens(batches)
