"""Tensors that are slow to make, kept in a file: made once for the same settings."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ipca._atomic import CorruptFileError, read_checksummed, write_checksummed


def kept(name: str, settings: Mapping[str, object], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What ``make()`` gives, read from the file of an earlier call with the same ``name`` and ``settings``.

    The file is a safetensors file in :func:`cache_folder` and appears complete or not at all. The version of torch
    belongs to the settings, since another one rounds differently.

    Args:
        settings: what the tensors depend on; JSON must hold it.

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
            raise ValueError(f"{error}; delete the file and it is made again") from None
    tensors = make()
    write_checksummed(path, record, tensors)
    return tensors


def cache_folder() -> Path:
    """``$IPCA_STUDY_CACHE``, else ``~/.cache/ipca-study``."""
    return Path(os.environ.get("IPCA_STUDY_CACHE") or "~/.cache/ipca-study").expanduser()
