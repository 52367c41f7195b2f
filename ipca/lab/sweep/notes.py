"""Where an error came from, said beside its own message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def noted(words: str) -> Iterator[None]:
    """Within the block an error that is raised gets ``words`` as a note, which tracebacks show under its message."""
    try:
        yield
    except Exception as error:
        vars(error).setdefault("__notes__", []).append(words)  # error.add_note of Python 3.11
        raise
