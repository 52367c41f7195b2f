"""Corpus of the language model: two kinds of text installed with torch, prose in Python files and C++ headers.

Sequences of bytes (M, length), uint8. Pieces of text are deduplicated, ordered by their hashes and joined; the first
are held out for tests, so that no piece is in both sets.
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

from studies.cached_tensors import cached

TORCH = Path(torch.__file__).parent
HEADERS = ("torch/csrc", "c10", "ATen/core", "ATen/native")
"""Folders of torch's handwritten headers; the others are generated."""
NO_PROSE = {"site-packages", "dist-packages", "test", "tests", "idlelib"}
SHORTEST, LONGEST = 200, 20_000
"""Minimum characters of a string that counts as prose; maximum bytes read of a header."""
LIMIT = 8_000_000
"""Maximum training bytes of each kind."""


def load_corpus(length: int, held_out: int, files: int | None = None) -> dict[str, Tensor]:
    """``prose_train``, ``prose_test``, ``headers_train``, ``headers_test``; cached.

    Args:
        length: bytes of a sequence.
        held_out: number of sequences of each test set.
        files: number of files read of each kind, selected by the hashes of their names; None for all.

    Raises:
        ValueError: there is too little text; the message says what was searched.
    """
    settings = {"python": platform.python_version(), "length": length, "held_out": held_out, "files": files}
    return cached("corpus", settings, partial(_corpus, length, held_out, files))


def prose(files: int | None) -> Iterator[bytes]:
    """Strings in Python's standard library and in torch that are mostly words: docstrings and documentation."""
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
            f"{held_out} test sequences of {length} bytes, and more to train on, were looked for in {kind}, where "
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
    """A selection of ``(root, path)`` that does not depend on where they are installed."""

    def order(item: tuple[Path, Path]) -> bytes:
        root, path = item
        return hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()

    return [path for _, path in sorted(paths, key=order)][:files]


def _strings(source: bytes) -> Iterator[str]:
    """Every string in a Python file; none if it does not parse with this version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's code
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _cut(pieces: list[bytes], length: int) -> Tensor:
    """``pieces`` joined by empty lines, cut into sequences; the remainder is dropped."""
    joined = bytearray(b"\n\n".join(pieces))
    count = len(joined) // length
    if not count:
        return torch.empty(0, length, dtype=torch.uint8)
    return torch.frombuffer(joined, dtype=torch.uint8)[: count * length].reshape(count, length)
