"""Two kinds of text that every machine with torch has: the prose in Python files, and headers in C++.

Sequences of bytes (M, length), uint8. Pieces of text are unique, ordered by their hashes and joined; the first are held
out for tests, so that no piece is on both sides.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import platform
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from studies.window_position.cached_tensors import kept

TORCH = Path(torch.__file__).parent
HEADERS = ("torch/csrc", "c10", "ATen/core", "ATen/native")
"""Folders of torch's headers that people wrote; the others are generated."""
NO_PROSE = {"site-packages", "dist-packages", "test", "tests", "idlelib"}
SHORTEST, LONGEST = 200, 20_000
"""Characters of a string that counts as prose; bytes of a header that are taken."""
LIMIT = 8_000_000
"""Bytes for training, of each kind."""


def corpus(length: int, held_out: int, files: int | None = None) -> dict[str, Tensor]:
    """``prose_train``, ``prose_test``, ``headers_train``, ``headers_test``; made once.

    Args:
        length: bytes of a sequence.
        held_out: sequences of each test set.
        files: how many of each kind are read, chosen by the hashes of their names; None: all.

    Raises:
        ValueError: there is too little text here; the message says what was looked for.
    """
    settings = {"python": platform.python_version(), "length": length, "held_out": held_out, "files": files}
    return kept("corpus", settings, partial(_corpus, length, held_out, files))


def prose(files: int | None) -> Iterator[bytes]:
    """Strings of Python's standard library and of torch that are mostly words: docstrings and documentation."""
    roots = (Path(sysconfig.get_path("stdlib")), TORCH)
    paths = [(root, p) for root in roots for p in root.rglob("*.py") if not NO_PROSE & set(p.relative_to(root).parts)]
    for path in _some(paths, files):
        for text in _strings(path.read_bytes()):
            if len(text) >= SHORTEST and sum(c.isalpha() or c == " " for c in text) >= 0.8 * len(text):
                yield inspect.cleandoc(text).encode()


def headers(files: int | None) -> Iterator[bytes]:
    """The beginnings of torch's C++ headers."""
    include = TORCH / "include"
    paths = [(include, p) for folder in HEADERS for p in (include / folder).rglob("*.h")]
    for path in _some(paths, files):
        yield path.read_bytes()[:LONGEST]


def sequences(pieces: Iterable[bytes], length: int, held_out: int, kind: str) -> tuple[Tensor, Tensor]:
    """Training and test sequences ``(M, length)``, ``(held_out, length)`` of ``pieces``; raises as :func:`corpus`."""
    ordered = sorted(set(pieces), key=lambda piece: hashlib.sha256(piece).digest())
    needed, taken, first = held_out * length, 0, 0
    while first < len(ordered) and taken < needed:
        taken += len(ordered[first])
        first += 1
    train = _cut(ordered[first:], length)[: LIMIT // length]
    if taken < needed or not len(train):
        raise ValueError(
            f"{held_out} test sequences of {length} bytes, and some more to train on, were looked for in {kind}, where "
            f"there are {sum(map(len, ordered))} bytes; install torch from its wheel and Python with its sources."
        )
    return train, _cut(ordered[:first], length)[:held_out]


def _corpus(length: int, held_out: int, files: int | None) -> dict[str, Tensor]:
    where = f"the headers of {TORCH / 'include'}"
    prose_train, prose_test = sequences(prose(files), length, held_out, "the strings of Python's and torch's .py files")
    headers_train, headers_test = sequences(headers(files), length, held_out, where)
    return {
        "prose_train": prose_train,
        "prose_test": prose_test,
        "headers_train": headers_train,
        "headers_test": headers_test,
    }


def _some(paths: list[tuple[Path, Path]], files: int | None) -> list[Path]:
    """The same files of ``(root, path)`` wherever they are installed."""

    def order(item: tuple[Path, Path]) -> bytes:
        root, path = item
        return hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()

    return [path for _, path in sorted(paths, key=order)][:files]


def _strings(source: bytes) -> Iterator[str]:
    """Every string in a Python file; none of one that is written for another version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes that are not ours
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _cut(pieces: list[bytes], length: int) -> Tensor:
    """``pieces`` with an empty line between them, in sequences; what is left over is dropped."""
    joined = bytearray(b"\n\n".join(pieces))
    count = len(joined) // length
    if not count:
        return torch.empty(0, length, dtype=torch.uint8)
    return torch.frombuffer(joined, dtype=torch.uint8)[: count * length].reshape(count, length)
