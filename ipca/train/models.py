"""The model of a task: loaded with a head for it and its tokenizer or image processor, and adapted by PEFT."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ipca.io.hub import model_folder
from ipca.train.settings import TrainSettings

log = logging.getLogger("ipca.train")
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
        options["return_dict"] = True  # the loss is that of the outputs' logits
        options |= {"label2id": {name: k for k, name in enumerate(labels)}, "ignore_mismatched_sizes": True}
    dtype = settings.dtype or ("auto" if torch.cuda.is_available() else "float32")
    torch.manual_seed(settings.seed)
    try:
        model = getattr(transformers, _MODELS[task]).from_pretrained(folder, dtype=dtype, **options)
        if task == "image-classification":
            processor: Any = transformers.AutoImageProcessor.from_pretrained(folder)
        else:
            words = {"add_prefix_space": True} if task == "token-classification" else {}
            processor = transformers.AutoTokenizer.from_pretrained(folder, **words)
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
    if task == "token-classification" and processor.is_fast:
        _put_spaces_before_words(processor.backend_tokenizer.pre_tokenizer)
    if task == "sequence-classification":
        model.config.pad_token_id = processor.pad_token_id  # decoders look for the last token before it
    return Loaded(model, processor)


@contextmanager
def as_it_was(processor: Any) -> Iterator[None]:
    """Within the block a fast tokenizer cuts and pads as it is asked to; saved, it would do so for every reader."""
    backend = getattr(processor, "backend_tokenizer", None)
    before = None if backend is None else (backend.truncation, backend.padding)
    try:
        yield
    finally:
        if backend is not None and before is not None:
            backend.no_truncation()
            backend.no_padding()
            if before[0] is not None:
                backend.enable_truncation(**before[0])
            if before[1] is not None:
                backend.enable_padding(**before[1])


def _put_spaces_before_words(step: Any) -> None:
    """Let the byte-level parts of a step before tokenization, which may be a sequence, mark the space before a word.

    Tokenizers that transformers has no class for do not take ``add_prefix_space``.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Sequence

    if isinstance(step, Sequence):
        for part in step:  # type: ignore[attr-defined]
            _put_spaces_before_words(part)
    elif isinstance(step, ByteLevel):
        step.add_prefix_space = True


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
    least = min(limit for limit in (settings.max_length, *limits) if limit and limit > 0)  # XLNet's -1 is none
    if least < settings.max_length:
        log.warning("sequences have %d tokens: %s has no more positions", least, settings.model)
    return replace(settings, max_length=least)


def adapt(
    loaded: Loaded, settings: TrainSettings, task: str, progress: bool, calibration: Iterable[Any] | None = None
) -> Any:
    """The PeftModel that trains the window; processes of a group share the decompositions.

    Heads train in float32 beside weights of 16 bits, as the factors do: these would lose small steps.

    Args:
        calibration: inputs, for a window that is found from them.

    Raises:
        TypeError, ValueError: as :class:`ipca.peft.PCConfig`, or as :func:`ipca.peft.prepare`.
    """
    from peft import get_peft_model
    from peft.utils import ModulesToSaveWrapper

    from ipca.peft import PCConfig, prepare

    config = PCConfig(
        r=settings.rank,
        window=settings.window,
        train=settings.train,
        magnitude=settings.magnitude,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        target_modules="all-linear" if settings.targets is None else list(settings.targets),
        task_type=_PEFT_TASKS[task],
    )
    with warnings.catch_warnings():  # a float alpha, which PEFT scales with
        warnings.filterwarnings("ignore", message=".*lora_alpha.*")
        config = prepare(loaded.model, config, calibration=calibration, progress=progress)
        model = get_peft_model(loaded.model, config)
    for module in list(model.modules()):
        if isinstance(module, ModulesToSaveWrapper):
            for head in module.modules_to_save.values():
                _widen(head)
        if isinstance(module, torch.nn.modules.batchnorm._NormBase):  # no adapter file holds its running statistics
            module.register_forward_pre_hook(_frozen)
    return model


def _widen(head: torch.nn.Module) -> None:
    """Let ``head`` compute in float32 where it has 16 bits; its inputs and outputs stay those of the model."""
    dtype = next((each.dtype for each in head.parameters() if each.is_floating_point()), torch.float32)
    if dtype.itemsize > 2:
        return
    head.float()
    head.register_forward_pre_hook(lambda module, args, kwargs: _cast((args, kwargs), torch.float32), with_kwargs=True)
    head.register_forward_hook(lambda module, args, output: _cast(output, dtype))


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(Tensor, lambda value: value.to(dtype) if value.is_floating_point() else value, values)


def _frozen(module: Any, inputs: Any) -> None:
    module.training = False
