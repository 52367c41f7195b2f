"""Atomic replacement of a file, of several files in a folder or of a folder, checksummed files, and locked folders."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ipca._hashing import tensor_sha256

TEMPORARY = ".tmp-"
LEFT_BEHIND = re.compile(re.escape(TEMPORARY) + "[0-9a-f]{16}")
"""The name of a file that is not complete yet, or whose process was killed."""
_STAGE = ".ipca-"
Record = dict[str, Any]


class CorruptFileError(ValueError):
    """The file is truncated, was changed after it was written, or never was a checksummed one."""


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


@contextmanager
def staged_files(
    folder: str | os.PathLike[str],
    *,
    replaced: Callable[[str], bool] = lambda name: False,
    merged: Collection[str] = (),
) -> Iterator[Path]:
    """A temporary folder whose files replace those of the same names in ``folder`` when the block succeeds.

    Args:
        folder: made if missing.
        replaced: whether an entry of ``folder`` is removed then although nothing of its name was written.
        merged: folders in it that are not replaced as a whole: their files are, each as a file of ``folder`` is, and
            ``replaced`` is asked about ``"name/file"``.

    Raises:
        OSError: ``folder`` cannot be made or written; nothing in it has changed.
    """
    check_writable(folder)
    target = _resolved(folder)
    with _explained(target):
        existed = target.is_dir()
        target.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=_STAGE, dir=target))
        try:
            yield stage
            fsync_files(stage)
            with uninterrupted():
                exchange(stage, target, stage / ".old", replaced=replaced, merged=merged)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            if not existed:
                with suppress(OSError):
                    target.rmdir()  # only if it is empty: somebody else may have written there
            raise
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def staged_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder that becomes ``folder`` when the block succeeds; ``folder`` must be new or empty.

    An empty one gets the files of a temporary folder inside it: its parent may not be writable, or it may be the place
    of a mounted file system.

    Raises:
        OSError: ``folder`` holds files, or cannot be made; nothing has changed.
    """
    check_writable(folder, empty=True)
    target = _resolved(folder)
    if target.is_dir():
        with staged_files(target) as stage:
            yield stage
        return
    with _explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            yield stage
            fsync_files(stage)
            stage.chmod(0o755)
            os.replace(stage, target)
            fsync_folder(target.parent)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise


def exchange(
    stage: Path,
    target: Path,
    old: Path,
    *,
    replaced: Callable[[str], bool] = lambda name: False,
    merged: Collection[str] = (),
) -> None:
    """Move everything in ``stage`` into ``target``, and what it replaces there into the folder ``old``.

    Entries of ``target`` whose name is ``replaced`` are moved to ``old`` too. Of the folders ``merged`` the files are
    moved, not the folder.
    Where one move fails, those before it are undone. Where the process is killed, the same call moves the rest.
    """
    new = folder_entries(stage, merged)
    names = sorted(new | {name for name in folder_entries(target, merged) if replaced(name)}, key=_order)
    made = [target / name for name in merged if (stage / name).is_dir() and not (target / name).is_dir()]
    for folder in (old, *(old / name for name in merged), *made):
        folder.mkdir(exist_ok=True)
    begun = []
    try:
        for name in names:
            begun.append(name)
            if (target / name).exists():
                os.replace(target / name, old / name)
            if name in new:
                os.replace(stage / name, target / name)
    except OSError:
        for name in begun:
            if name in new and (target / name).exists() and not (stage / name).exists():
                os.replace(target / name, stage / name)
            if (old / name).exists():
                os.replace(old / name, target / name)
        for folder in made:
            folder.rmdir()
        raise
    for folder in (target, *(target / name for name in merged)):
        if folder.is_dir():
            fsync_folder(folder)


def _order(name: str) -> tuple[bool, str]:
    """``config.json`` comes last: without it a model that is half moved does not load."""
    return name == "config.json", name


def folder_entries(folder: Path, merged: Collection[str]) -> set[str]:
    """The names in ``folder``, with the files of the folders ``merged`` instead of these."""
    inside = {
        f"{name}/{path.name}" for name in merged if (folder / name).is_dir() for path in (folder / name).iterdir()
    }
    return {path.name for path in folder.iterdir() if not (path.name in merged and path.is_dir())} | inside


def check_writable(folder: str | os.PathLike[str], *, empty: bool = False) -> None:
    """Raise OSError now where writing ``folder`` later would fail, before hours of work go into it.

    Args:
        folder: where files are to be written; need not exist.
        empty: whether it must be new or empty.
    """
    target, real = Path(folder).absolute(), _resolved(folder)
    if empty and real.is_dir() and any(real.iterdir()):
        raise FileExistsError(f"{target} {not_empty(real)}.")
    existing = next(path for path in (real, *real.parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"cannot write {target}: {existing} is not a folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write {target}: no permission to write in {existing}.")


def not_empty(folder: Path) -> str:
    """Words for a folder that must be new or empty and holds something."""
    names = sorted(path.name for path in folder.iterdir())
    if all(name.startswith(_STAGE) for name in names):
        return f"holds {names[0]}, of a process that writes there or was killed; delete it, or choose a new folder"
    return "is not empty; choose a new folder"


def _resolved(folder: str | os.PathLike[str]) -> Path:
    """The absolute path behind links, which need not lead anywhere yet."""
    return Path(os.path.realpath(folder))


def fsync_files(folder: Path) -> None:
    """Put all files below ``folder`` on disk, readable as the process's other files: safetensors writes mode 0600."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)
            with path.open("rb") as file:
                os.fsync(file.fileno())


@contextmanager
def locked_folder(folder: Path, does: str) -> Iterator[None]:
    """Let no other process, and no other call here, work in ``folder`` within the block; a killed process lets go.

    Args:
        folder: made if missing, and removed again if the block leaves it empty.
        does: who works there, for the message: ``"sweep runs"``.

    Raises:
        RuntimeError: another one works there.
        OSError: ``folder`` cannot be made.
    """
    existed = folder.is_dir()
    if not existed:
        check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _flock(folder, does) if os.name == "posix" else nullcontext():
        try:
            yield
        finally:
            if not existed:
                with suppress(OSError):
                    folder.rmdir()  # only if it is empty


def take_lock(handle: int) -> bool:
    """Lock the open file ``handle``, on POSIX; False where another process has. Without locks everyone gets in."""
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system has no locks
        return True
    return True


@contextmanager
def _flock(folder: Path, does: str) -> Iterator[None]:
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        if not take_lock(handle):
            raise RuntimeError(f"another {does} in {folder}; wait for it, or choose another folder.")
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # a forked process may have the handle, too
        os.close(handle)


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"cannot write {target}: {error}") from None
    except OSError as error:
        raise type(error)(f"cannot write {target}: {error.strerror}") if error.strerror else error from None


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the block is done; elsewhere than in the main thread there is nothing to hold."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pending.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)  # None: set outside Python
        if pending:
            signal.raise_signal(signal.SIGINT)
