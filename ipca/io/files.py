"""Writing that leaves either the old files or the new ones, never something between."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def staged_files(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder whose files replace those of the same names in ``folder`` when the block succeeds.

    Raises:
        OSError: ``folder`` cannot be made or written; nothing in it has changed.
    """
    target = Path(folder)
    with _explained(target):
        existed = target.is_dir()
        target.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=".ipca-", dir=target))
        try:
            yield stage
            _fsync(stage)
            for path in sorted(stage.iterdir()):
                os.replace(path, target / path.name)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            if not existed:
                shutil.rmtree(target, ignore_errors=True)
            raise
        stage.rmdir()


@contextmanager
def staged_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder that becomes ``folder`` when the block succeeds; ``folder`` must be new or empty.

    Raises:
        OSError: ``folder`` holds files, or cannot be made; nothing has changed.
    """
    target = Path(folder).absolute()
    with _explained(target):
        if target.is_dir() and any(target.iterdir()):
            raise FileExistsError(f"{target} is not empty; choose a new folder.")
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            yield stage
            _fsync(stage)
            stage.chmod(0o755)
            os.replace(stage, target)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise


def _fsync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
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
