"""Hugging Face model folders: load one whole, write one, copy what belongs beside the weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".index.json")


def load_model(folder: Path) -> Any:
    """The transformers model in ``folder``, in the class and the dtype it was saved with, in evaluation mode.

    Raises:
        FileNotFoundError: ``folder`` holds no model.
        ImportError: transformers is missing.
        ValueError: transformers cannot load it.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; give a folder that save_pretrained wrote.")
    try:
        import transformers
    except ImportError:
        raise ImportError("this command reads Hugging Face folders; run: pip install 'ipca-lora[hf]'") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        names = getattr(config, "architectures", None) or []
        model_class = getattr(transformers, names[0], None) if names else None
        model = (model_class or transformers.AutoModel).from_pretrained(folder, dtype="auto")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"transformers cannot load {folder}: {str(error).splitlines()[0]}") from None
    return model.eval()


def copy_companions(source: Path, target: Path) -> None:
    """Copy the small files beside the weights (tokenizer, templates, licence) that ``target`` does not have yet."""
    for path in sorted(source.iterdir()):
        other = (
            path.name.startswith((".", "adapter_")) or path.name.endswith(WEIGHT_ENDINGS) or path.name == "ipca.json"
        )
        wanted = path.is_file() and not other
        if wanted and not (target / path.name).exists():
            shutil.copy2(path, target / path.name)
