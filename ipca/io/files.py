"""Writing that leaves the old files or the new ones: complete first, then exchanged in one go."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from ipca._atomic import fsync_folder
from ipca.model import uninterrupted


@contextmanager
def staged_files(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder whose files replace those of the same names in ``folder`` when the block succeeds.

    Raises:
        OSError: ``folder`` cannot be made or written; nothing in it has changed.
    """
    target = Path(folder)
    check_writable(target)
    with _explained(target):
        existed = target.is_dir()
        target.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=".ipca-", dir=target))
        try:
            yield stage
            _fsync(stage)
            with uninterrupted():
                _exchange(stage, target)
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

    Raises:
        OSError: ``folder`` holds files, or cannot be made; nothing has changed.
    """
    target = Path(folder).absolute()
    check_writable(target, empty=True)
    with _explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            yield stage
            _fsync(stage)
            stage.chmod(0o755)
            os.replace(stage, target)
            fsync_folder(target.parent)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise


def _exchange(stage: Path, target: Path) -> None:
    """Move the files of ``stage`` into ``target``; where one move fails, undo those before it."""
    new, old = sorted(stage.iterdir()), stage / ".old"
    old.mkdir()
    done = []
    try:
        for path in new:
            done.append(path.name)
            if (target / path.name).exists():
                os.replace(target / path.name, old / path.name)
            os.replace(path, target / path.name)
    except OSError:
        for name in done:
            if (old / name).exists():
                os.replace(old / name, target / name)
        raise
    fsync_folder(target)


def check_writable(folder: str | os.PathLike[str], *, empty: bool = False) -> None:
    """Raise OSError now where writing ``folder`` later would fail, before hours of work go into it.

    Args:
        folder: where files are to be written; need not exist.
        empty: whether it must be new or empty.
    """
    target = Path(folder).absolute()
    if empty and target.is_dir() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty; choose a new folder.")
    existing = next(path for path in (target, *target.parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"cannot write {target}: {existing} is not a folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write {target}: no permission to write in {existing}.")


def _fsync(folder: Path) -> None:
    """Put the files on disk, readable as the process's other files are: safetensors keeps its own to the owner."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)
            with path.open("rb") as file:
                os.fsync(file.fileno())


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"cannot write {target}: {error}") from None
    except OSError as error:
        raise type(error)(f"cannot write {target}: {error.strerror}") if error.strerror else error from None
