"""A safetensors file with a JSON record and one checksum over both, written in one go: whole and true, or not there."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ipca._hashing import tensor_sha256

TEMPORARY = ".tmp-"
Record = dict[str, Any]


class CorruptFileError(ValueError):
    """The file is truncated, was changed after it was written, or was never a sealed one."""


def write_checksummed(path: Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write ``record`` and ``tensors`` to ``path``; its folder is made where missing.

    The file appears complete or not at all, also when the process is killed, and several processes may write the same
    path at once: the last complete one stays.

    Raises:
        OSError: the folder cannot be written, or the disk is full; nothing has changed.
    """
    text = json.dumps(record)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(plain, metadata={"record": text, "sha256": _seal(text, plain)})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)


def read_checksummed(path: Path) -> tuple[Record, dict[str, Tensor]]:
    """The record and the tensors that :func:`write_checksummed` was given, on the CPU.

    Raises:
        OSError: the file is not there or cannot be read.
        CorruptFileError: it is not what was written.
    """
    data = path.read_bytes()
    try:
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size])["__metadata__"]
        record = json.loads(metadata["record"])
        tensors = safetensors.torch.load(data)
        true = metadata["sha256"] == _seal(metadata["record"], tensors)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"{path} is damaged: {error}") from None
    if not true or not isinstance(record, dict):
        raise CorruptFileError(f"{path} is damaged: its checksum differs")
    return record, tensors


def write_atomic(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path``, on disk and in one go; the folder exists."""
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Put the folder's list of names on disk, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _seal(record: str, tensors: Mapping[str, Tensor]) -> str:
    parts = [record, sorted((name, tensor_sha256(tensor)) for name, tensor in tensors.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
