"""Hugging Face model folders: load the model, hash it, copy the files beside its weights."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".index.json")


def read_config(folder: Path) -> tuple[Any, Any]:
    """The class that transformers loads the model in ``folder`` with, and its configuration.

    Raises:
        FileNotFoundError: ``folder`` holds no model.
        ImportError: transformers is missing.
        ValueError: transformers cannot read the configuration.
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
        names = getattr(config, "architectures", None) or []
        model_class = getattr(transformers, names[0], None) if names else None
    return model_class or transformers.AutoModel, config


def load_model(folder: Path) -> Any:
    """The transformers model in ``folder``, in the class and the dtype it was saved with, in evaluation mode.

    Raises:
        FileNotFoundError, ImportError: as :func:`read_config`.
        ValueError: transformers cannot load it.
    """
    return load_with_missing(folder)[0]


def load_with_missing(folder: Path) -> tuple[Any, set[str]]:
    """As :func:`load_model`, and the names of weights that the folder lacks, initialized at random by transformers."""
    model_class, _ = read_config(folder)
    with _explained(folder):
        options = {"dtype": "auto", "trust_remote_code": False, "output_loading_info": True}
        model, found = model_class.from_pretrained(folder, **options)
    return model.eval(), set(found["missing_keys"])


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
    """Copy the small files beside the weights (tokenizer, templates, license) that ``target`` does not have yet."""
    for path in sorted(source.iterdir()):
        other = (
            path.name.startswith((".", "adapter_")) or path.name.endswith(WEIGHT_ENDINGS) or path.name == "ipca.json"
        )
        wanted = path.is_file() and not other
        if wanted and not (target / path.name).exists():
            shutil.copy2(path, target / path.name)
