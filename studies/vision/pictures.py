"""The pictures in the downloaded packages, uint8 ``(3, side, side)``, in an order of hashes of their names."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from studies.vision.packages import PHOTOGRAPHS, TEXTILES, VENDORS

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 84
"""Pixels: 6 x 6 patches; the emoji have 64."""
KINDS = ("nominal", "global", "local")
"""Textiles without a defect, and with one all over or in a place."""
SCENES = (
    *("astronaut.png", "chelsea.png", "coffee.png", "coins.png"),
    *("hubble_deep_field.jpg", "motorcycle_left.png", "rocket.jpg"),
)
"""A person, a cat, a cup, coins, galaxies, a motorcycle, a rocket: nothing that the new task has a class of."""


class Emoji(NamedTuple):
    """One emoji; ``pictures`` has one for each vendor, in the order of ``VENDORS``."""

    category: str
    subcategory: str
    pictures: tuple[Tensor, ...]


def emoji(folder: Path) -> list[Emoji]:
    """All emoji that both vendors draw."""
    pictures: dict[str, dict[str, Tensor]] = {}
    entries: dict[str, Any] = {}
    for vendor, package in VENDORS.items():
        with tarfile.open(fileobj=io.BytesIO(package.read(folder))) as archive:
            files = {member.name: member for member in archive.getmembers()}
            entries |= {entry["unified"]: entry for entry in json.loads(_data(archive, files["package/emoji.json"]))}
            for code, entry in entries.items():
                file = files.get(f"package/img/{vendor}/64/{entry['image']}")
                if file is not None:
                    pictures.setdefault(code, {})[vendor] = _tensor(_open(_data(archive, file)))
    shared = sorted((code for code, found in pictures.items() if len(found) == len(VENDORS)), key=_hash)
    return [
        Emoji(entries[c]["category"], entries[c]["subcategory"], tuple(pictures[c][v] for v in VENDORS)) for c in shared
    ]


def textiles(folder: Path, each: int) -> Tensor:
    """``(3 · each, 3, side, side)``: ``each`` of every one of :data:`KINDS`."""
    with zipfile.ZipFile(io.BytesIO(TEXTILES.read(folder))) as archive:
        names = [name for name in archive.namelist() if name.endswith(".jpg")]
        chosen = [sorted((n for n in names if f"/simulated/{kind}/" in n), key=_hash)[:each] for kind in KINDS]
        return torch.stack([_tensor(_open(archive.read(name))) for kind in chosen for name in kind])


def photographs(folder: Path, each: int) -> Tensor:
    """``(7 · each, 3, side, side)``: square crops of :data:`SCENES`, of 40 to 100 % of the shorter side."""
    generator = torch.Generator().manual_seed(0)
    with zipfile.ZipFile(io.BytesIO(PHOTOGRAPHS.read(folder))) as archive:
        scenes = [_open(archive.read(f"skimage/data/{name}")) for name in SCENES]
    return torch.stack([_tensor(crop) for scene in scenes for crop in _crops(scene, each, generator)])


def _crops(image: Image, count: int, generator: torch.Generator) -> Iterator[Image]:
    for share, x, y in torch.rand(count, 3, generator=generator).tolist():
        side = int(min(image.size) * (0.4 + 0.6 * share))
        left, top = int(x * (image.size[0] - side)), int(y * (image.size[1] - side))
        yield image.crop((left, top, left + side, top + side))


def _tensor(image: Image) -> Tensor:
    """Resized by bicubic interpolation; what is transparent becomes white."""
    from PIL import Image as images

    picture = image.convert("RGBA")
    opaque = images.alpha_composite(images.new("RGBA", picture.size, "white"), picture).convert("RGB")
    scaled = opaque.resize((SIDE, SIDE), images.Resampling.BICUBIC)
    return torch.frombuffer(bytearray(scaled.tobytes()), dtype=torch.uint8).view(SIDE, SIDE, 3).permute(2, 0, 1)


def pillow_version() -> str:
    """The version of pillow, which decides the bits of a resized picture.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import PIL
    except ImportError as error:
        raise ImportError("the study reads pictures with pillow; run: pip install -c constraints.txt pillow") from error
    return str(PIL.__version__)


def _open(data: bytes) -> Image:
    from PIL import Image as images

    return images.open(io.BytesIO(data))


def _data(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None
    return file.read()


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
