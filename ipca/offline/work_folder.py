"""The work folder of an offline decomposition: one checksummed file for each finished layer, and the final exchange.

    OUT/.ipca-init/job.json                    the model and the settings; a different run is refused
                  /lock                        held by the running process
                  /layers/00007.safetensors
                  /final/                      the files of OUT, as they become complete
                  /ready                       final/ is complete and only has to be moved; names of what it replaces

Every file is written atomically, so that an interrupted run can be resumed from here.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ipca._atomic import (
    CorruptFileError,
    exchange,
    fsync_files,
    fsync_folder,
    read_checksummed,
    take_lock,
    uninterrupted,
    write_atomic,
    write_checksummed,
)
from ipca.io.output_folder import is_adapter_file

WORK, DONE = ".ipca-init", ".ipca-done"
Record = dict[str, Any]


class WorkFolder:
    """The work folder in ``out``; nothing is made before :meth:`open`.

    Args:
        overwrite: discard the finished layers of a different run.
    """

    def __init__(self, out: Path, *, overwrite: bool = False) -> None:
        self.out, self.overwrite = Path(os.path.realpath(out)), overwrite
        self.folder = self.out / WORK
        self.final = self.folder / "final"
        self._lock: int | None = None
        self._made_out = self._opened = False

    @property
    def ready(self) -> bool:
        """Whether ``final`` is complete and only has to be moved."""
        return (self.folder / "ready").exists()

    def open(self, record: Mapping[str, Any]) -> None:
        """Start or resume the run that ``record`` describes in JSON values.

        Raises:
            FileExistsError: the folder holds finished layers of a different run, or another process uses it.
            OSError: it cannot be made.
        """
        with self.writing():
            self._made_out = not self.out.exists()
            (self.folder / "layers").mkdir(parents=True, exist_ok=True)
            self._take_lock()
            shutil.rmtree(self.out / DONE, ignore_errors=True)
            path, text = self.folder / "job.json", json.dumps(record, indent=2, sort_keys=True)
            if self.count() or self.ready:
                try:
                    self._check_same(path, json.loads(text))
                except FileExistsError:
                    if not self.overwrite:
                        raise
                    self._discard()
            if not (self.count() or self.ready):
                write_atomic(path, text.encode())
            self._opened = True

    def finished(self, count: int) -> list[int]:
        """The indices below ``count`` of finished layers; a damaged file is removed with a warning and made again."""
        done = []
        for index in range(count):
            try:
                self.read_layer(index)
                done.append(index)
            except FileNotFoundError:
                continue
            except CorruptFileError as error:
                warnings.warn(f"{error}; the layer is made again.", RuntimeWarning, stacklevel=2)
                self._layer_file(index).unlink()
        return done

    def count(self) -> int:
        """The number of finished layers, by the names of their files."""
        with suppress(FileNotFoundError):
            return sum(1 for path in (self.folder / "layers").iterdir() if path.suffix == ".safetensors")
        return 0

    def write_layer(self, index: int, record: Record, tensors: Mapping[str, Tensor]) -> None:
        """Write a finished layer."""
        with self.writing():
            write_checksummed(self._layer_file(index), record, tensors)

    def read_layer(self, index: int) -> tuple[Record, dict[str, Tensor]]:
        """The record and the tensors given to :meth:`write_layer`."""
        return read_checksummed(self._layer_file(index))

    def finish(self) -> None:
        """Move everything in ``final`` into ``out``, replacing files of the same names, and remove the work folder.

        Where a move fails, those before it are undone; where the process is killed, the next run moves the rest.
        """
        with self.writing(), uninterrupted():
            if not self.ready:
                fsync_files(self.final)
                new = {path.name for path in self.final.iterdir()}
                stale = [
                    path.name for path in self.out.iterdir() if is_adapter_file(path.name) and path.name not in new
                ]
                write_atomic(self.folder / "ready", json.dumps(stale).encode())
            stale = json.loads((self.folder / "ready").read_text())
            exchange(self.final, self.out, self.folder / "old", replaced=lambda name: name in stale)
            os.replace(self.folder, self.out / DONE)  # from here on there is nothing to resume
            fsync_folder(self.out)
            shutil.rmtree(self.out / DONE, ignore_errors=True)
        self.close()

    def abandon(self) -> int:
        """Remove the work folder if no layer in it is finished, else leave it to be resumed.

        Returns:
            The number of finished layers that are left there.
        """
        kept = self.count() if self._opened else 0
        if self._opened and not self.ready and not kept:
            shutil.rmtree(self.folder, ignore_errors=True)
            if self._made_out:
                with suppress(OSError):
                    self.out.rmdir()
        self.close()
        return kept

    def close(self) -> None:
        """Release the folder to other processes."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Name the folder in a system error that names no file, such as a full disk."""
        try:
            yield
        except OSError as error:
            if error.strerror and not error.filename:
                raise type(error)(f"cannot write {self.out}: {error.strerror}") from None
            raise

    def _check_same(self, path: Path, record: Record) -> None:
        try:
            before = json.loads(path.read_text())
            names = [name for name in {**before, **record} if before.get(name) != record.get(name)]
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise FileExistsError(f"{path} cannot be read ({error}); start over with --force.") from None
        if names:
            pairs = [(name, _brief(before.get(name)), _brief(record.get(name))) for name in names[:3]]
            changes = "; ".join(f"{name} {old}, now {new}" for name, old, new in pairs)
            raise FileExistsError(
                f"{self.folder} holds the finished layers of a different run ({changes}); repeat that one to finish "
                f"it, choose another folder, or start over with --force."
            )

    def _discard(self) -> None:
        """Remove the finished layers and files of a different run."""
        (self.folder / "ready").unlink(missing_ok=True)
        shutil.rmtree(self.final, ignore_errors=True)
        shutil.rmtree(self.folder / "layers")
        (self.folder / "layers").mkdir()

    def _take_lock(self) -> None:
        if os.name != "posix":  # two processes at once would only do everything twice
            return
        self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        if not take_lock(self._lock):
            self.close()
            raise FileExistsError(f"another process is running in {self.folder}; wait until it has ended.")

    def _layer_file(self, index: int) -> Path:
        return self.folder / "layers" / f"{index:05}.safetensors"


def _brief(value: object, width: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= width else text[: width - 1] + "…"
