"""Folders named by a path, or by the id of a repository on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

MODEL = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "ipca.json")
_PICKLES = ("*.bin",)
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def model_folder(name: str | os.PathLike[str]) -> Path:
    """The folder of a model: ``name`` itself, or the snapshot of the repository ``name`` in the Hub's local cache.

    Where it is not cached it is downloaded, as transformers does: weights in safetensors, else in pickles.

    Raises:
        FileNotFoundError: there is neither such a folder nor such a repository that can be reached.
    """
    path = _find(name, MODEL)
    if path.is_dir() and path != Path(name) and not any(path.glob("*.safetensors")):
        path = _find(name, (*MODEL, *_PICKLES))
    return path


def config_file(name: str | os.PathLike[str]) -> Path:
    """The ``config.json`` of a model, which need not exist; of a repository it is the only file that is downloaded.

    Raises:
        FileNotFoundError: as :func:`model_folder`.
    """
    return _find(name, ("config.json",)) / "config.json"


def adapter_folder(name: str | os.PathLike[str]) -> Path:
    """The folder of an adapter, as :func:`model_folder`; a repository's name has an owner, ``"owner/name"``."""
    return _find(name, ADAPTER) if "/" in Path(name).as_posix() else Path(name)


def _find(name: str | os.PathLike[str], patterns: tuple[str, ...]) -> Path:
    path = Path(name)
    repository = os.fspath(name).replace(os.sep, "/")
    if path.exists() or _ID.fullmatch(repository) is None:
        return path
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return path
    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns), ignore_patterns=["*/*"]))
    except (OSError, HFValidationError) as error:  # OSError: of the network, of the Hub, nothing cached while offline
        why = " ".join(str(error).split())
        raise FileNotFoundError(
            f"there is no folder {path}, and the Hugging Face Hub or its local cache has no such repository: {why}"
        ) from None
