"""Hugging Face model folders: load the model, hash it, copy the files beside its weights."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ipca.io.adapter_folder import read_labels, stored_shapes
from ipca.io.labels import class_names
from ipca.io.peft_format import CONFIG, PREFIX, WEIGHTS

_AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
"""The class of a base by PEFT's ``task_type``, beside which PEFT names none."""
WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".index.json")
_OTHER_PROGRAMS = (
    *(".gguf", ".ggml", ".llamafile", ".ot", ".ckpt", ".onnx_data", ".onnx.data", ".npz", ".keras", ".tflite", ".pb"),
    *(".mlmodel", ".pdparams", ".pte", ".engine", ".nemo"),
)
"""Endings of weights that nothing here reads or writes, such as those of llama.cpp, rust-bert and ONNX."""
_LARGEST_COMPANION = 100 * 2**20
"""Bytes; the largest tokenizers have 40 MB."""


def read_config(folder: Path, model_class: str | None = None) -> tuple[Any, Any]:
    """The class that transformers loads the model in ``folder`` with, and its configuration.

    Args:
        model_class: the class's name, where it is not the one that ``config.json`` names.

    Raises:
        FileNotFoundError: ``folder`` holds no model.
        ImportError: transformers is missing.
        ValueError: transformers cannot read the configuration, or has no such class.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; give a Hugging Face model folder.")
    try:
        import transformers
    except ImportError:
        raise ImportError("this command reads Hugging Face folders; run: pip install 'ipca-lora[hf]'") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with _explained(folder):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if model_class is not None and not _fits(model_class, config):
        raise ValueError(
            f"transformers has no class {model_class!r} for a model of the type {config.model_type!r}; an example is "
            f"{example_class(config)}."
        )
    names = [model_class] if model_class else getattr(config, "architectures", None) or []
    return (getattr(transformers, names[0], None) if names else None) or transformers.AutoModel, config


def _fits(model_class: str, config: Any) -> bool:
    """Whether transformers has a class of this name that builds models from ``config`` or a part of it."""
    import transformers

    cls = getattr(transformers, model_class, None)
    wanted = getattr(cls, "config_class", None)
    if wanted is None:
        return hasattr(cls, "_model_mapping")  # an AutoModel
    return isinstance(config, wanted) or wanted in getattr(config, "sub_configs", {}).values()


def example_class(config: Any) -> str:
    """The name of a class with a head for models of this configuration."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as classes

    with suppress(KeyError):
        found: Any = classes[type(config)]
        return str(found.__name__)
    return "AutoModelForImageClassification"


def load_model(folder: Path, model_class: str | None = None, adapter: Path | None = None) -> Any:
    """The transformers model in ``folder``, in the class and the dtype it was saved with, in evaluation mode.

    Args:
        model_class: as for :func:`read_config`.
        adapter: the folder of an adapter for it, whose class and labels count where they are known.

    Raises:
        FileNotFoundError, ImportError: as :func:`read_config`.
        ValueError: transformers cannot load it.
    """
    return load_with_missing(folder, model_class, adapter)[0]


def load_with_missing(
    folder: Path, model_class: str | None = None, adapter: Path | None = None
) -> tuple[Any, set[str]]:
    """As :func:`load_model`, and the names of weights that the folder lacks, initialized at random by transformers.

    A head of another number of classes than that of ``adapter``, which holds it, is one of them.
    """
    cls, config = read_config(folder, model_class)
    own = None if model_class or adapter is None else class_of_adapter(adapter)
    if own is not None and _fits(own, config):
        cls, config = read_config(folder, own)
    labels = {} if adapter is None else _labels(cls, config, adapter)
    with _explained(folder):
        options = {"dtype": "auto", "trust_remote_code": False, "output_loading_info": True}
        model, found = cls.from_pretrained(folder, **options, **labels)
    other = {key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]}
    held = {} if adapter is None else stored_shapes(adapter / WEIGHTS)
    if lost := sorted(key for key in other if f"{PREFIX}{key}" not in held):
        raise ValueError(
            f"{folder} holds {', '.join(lost[:3])} for another number of classes than the head of the adapter has, "
            "which does not hold it; give the model that the adapter was trained on."
        )
    return model.eval(), set(found["missing_keys"]) | other


def class_of_adapter(folder: Path) -> str | None:
    """The name of the base's class in an adapter's configuration, None where it names none."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        name = (config.get("auto_mapping") or {}).get("base_model_class") or _AUTO.get(config.get("task_type"))
    except (OSError, ValueError, AttributeError):  # reading the adapter will say what is wrong with it
        return None
    return name if isinstance(name, str) else None


def _labels(cls: Any, config: Any, adapter: Path) -> dict[str, Any]:
    """Options for the head that the adapter holds, where the configuration has other classes; names where it has them.

    Raises:
        ValueError: the adapter's ``ipca.json`` is damaged.
    """
    if names := read_labels(adapter):
        if names == class_names(config):
            return {}
        named = {"id2label": dict(enumerate(names)), "label2id": {name: k for k, name in enumerate(names)}}
        return {"num_labels": len(names), **named, "ignore_mismatched_sizes": True}
    held = stored_shapes(adapter / WEIGHTS)
    build = getattr(cls, "_from_config", None) or cls.from_config  # AutoModel has the latter
    with torch.device("meta"), suppress(RuntimeError, TypeError, AttributeError):  # not every model can be built so
        for key, value in build(config).state_dict().items():
            here, there = tuple(value.shape), held.get(f"{PREFIX}{key}", ())
            if there and here[0] == config.num_labels != there[0] and here[1:] == there[1:]:
                return {"num_labels": there[0], "ignore_mismatched_sizes": True}
    return {}


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        why = str(error)
        if "trust_remote_code" in why:
            why = "it comes with code of its own, which is not run here; load it in Python"
        raise ValueError(f"transformers cannot load {folder}: {why.splitlines()[0]}") from None


def model_digest(folder: Path) -> str:
    """A hash of ``config.json`` and of name, size and time of every file of weights, to recognize the model again."""
    files = [path for path in sorted(folder.iterdir()) if path.name.endswith(WEIGHT_ENDINGS) and path.is_file()]
    status = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    texts = [path.read_text() for path in files if path.name.endswith(".index.json")]
    config = (folder / "config.json").read_text()
    return hashlib.sha256(json.dumps([config, texts, status]).encode()).hexdigest()[:16]


def copy_companions(source: Path, target: Path) -> None:
    """Copy the small files beside the weights (tokenizer, templates, license) that ``target`` does not have yet.

    Weights stay behind in every format: they are those of the model as it was.

    Warns:
        RuntimeWarning: the model is there in other formats than that of the new weights; the message names the files.
    """
    files = [path for path in sorted(source.iterdir()) if path.is_file()]
    read = ".safetensors" if any(path.suffix == ".safetensors" for path in files) else ".bin"
    left_out = []
    for path in files:
        if path.name.startswith((".", "adapter_")) or path.name == "ipca.json":
            continue
        if is_weights_of_any_program(path.name) or path.stat().st_size > _LARGEST_COMPANION:
            usual = path.name.endswith((read, ".index.json")) or path.name == "training_args.bin"  # no weights
            left_out += [] if usual else [path.name]
        elif not (target / path.name).exists():
            shutil.copy2(path, target / path.name)
    if left_out:
        warnings.warn(
            f"left out, as they are weights of {source} before the change or larger than 100 MB: "
            f"{', '.join(left_out)}; convert the new model where you need it in these formats.",
            RuntimeWarning,
            stacklevel=2,
        )


def is_weights_of_any_program(name: str) -> bool:
    """Whether ``name`` is that of weights in some format, also of those that transformers does not read."""
    return name.lower().endswith(WEIGHT_ENDINGS + _OTHER_PROGRAMS)
