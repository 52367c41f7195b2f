"""Notes on errors of the user's own code: what called it, and the line that raised."""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def error_note(text: str) -> Iterator[None]:
    """Add ``text`` as a note to any exception raised within the block; tracebacks print notes after the message.

    Its attribute ``place`` is the file and line of the user's code that it came from, also where the exception is sent
    from another process without its traceback; None where only ipca's own code ran.
    """
    try:
        yield
    except Exception as error:
        vars(error).setdefault("__notes__", []).append(text)  # error.add_note needs Python 3.11
        vars(error).setdefault("place", _place_in_user_code(error))
        raise


def _place_in_user_code(error: Exception) -> str | None:
    """``file:line`` of the innermost call outside ipca, installed packages and the standard library."""
    others = (str(Path(__file__).parent), *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(("<", *(f"{folder}{os.sep}" for folder in others)))
    ]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None
