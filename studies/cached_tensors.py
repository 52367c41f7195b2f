"""File cache of tensors that are slow to compute, keyed by their settings."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ipca._atomic import CorruptFileError, read_checksummed, write_checksummed


def cached(name: str, settings: Mapping[str, object], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The result of ``make()``, read from the file of an earlier call with the same ``name`` and ``settings``.

    The file is a safetensors file in :func:`cache_folder`, written atomically. The version of torch is part of the key,
    since other versions round differently.

    Args:
        settings: everything the tensors depend on, as JSON values.

    Raises:
        ValueError: the file is damaged; the message names it.
    """
    record = {**settings, "torch": torch.__version__}
    key = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_folder() / f"{name}-{key}.safetensors"
    if path.exists():
        try:
            return read_checksummed(path)[1]
        except CorruptFileError as error:
            raise ValueError(f"{error}; delete the file to compute it again") from None
    tensors = make()
    write_checksummed(path, record, tensors)
    return tensors


def cache_folder() -> Path:
    """``$IPCA_STUDY_CACHE``, else ``~/.cache/ipca-study``."""
    return Path(os.environ.get("IPCA_STUDY_CACHE") or "~/.cache/ipca-study").expanduser()
