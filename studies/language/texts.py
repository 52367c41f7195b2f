"""Texts of the study: German manual pages, C++ source, English prose, and samples of the model itself, as token ids.

Everything is a sequence of :data:`LENGTH` tokens. Pieces of text are deduplicated, ordered by their hashes and split
between training and held-out sequences, so that no piece is in both and nothing depends on an order of files.
"""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ipca.lab.demo.data import ARCHIVE, read_sentences
from studies.corpus import headers
from studies.debian import package_files
from studies.frontier.texts import Texts
from studies.language.model import DOWNLOADS

LENGTH = 128
"""Tokens of a sequence."""
TRAIN = 1024
"""Training sequences of a task: 240 steps of four need 960, so none is seen twice."""
HELD_OUT, SAMPLES, PROSE = 32, 32, 16
"""Held-out sequences of a task, samples of the model, and sequences of English prose."""
PIECE = 4000
"""Maximum characters taken of one page or one header, so that many of them are seen."""
MAN_PAGES = (
    "http://deb.debian.org/debian/pool/main/m/manpages-l10n/manpages-de_4.18.1-1_all.deb",
    "37d2e7ee51f22952aecec3af93647ff59194a3c74bb7a694560f49c7f7ab3978",
)
"""Debian's package of German manual pages, and its SHA-256."""
_SECTIONS = re.compile(r"\./usr/share/man/de/man[1-8]/[^/]+\.gz")
_FONT_MACRO = re.compile(r"^[.'](?:B|I|R|BI|BR|IB|IR|RB|RI|SM|SB)\s+")
_ESCAPE = re.compile(r"\\(?:f\[[^\]]*\]|f\(..|f.|s[+-]?\d|\*?\[[^\]]*\]|\*?\(..|.)")
_CHARACTERS = {r"\(lq": '"', r"\(rq": '"', r"\*(lq": '"', r"\*(rq": '"', r"\-": "-", r"\(hy": "-", r"\(mi": "-"}
_CHARACTERS |= {r"\e": "\\", r"\(rs": "\\", r"\~": " ", r"\ ": " "}

Tokenize = Callable[[str], list[int]]


def task_texts(tokenize: Tokenize, archive: Path, samples: Tensor) -> dict[str, Texts]:
    """The texts of each task, ``german`` and ``cpp``; each is kept text of the other one.

    Args:
        tokenize: a text's token ids without special tokens.
        archive: the source distribution of vaderSentiment 3.3.2, for its sentences of newspaper editorials.
        samples: ``(32, 128)``, drawn from the model, see :func:`studies.frontier.texts.draw_samples`.

    Raises:
        FileNotFoundError, ValueError, OSError: a text is missing, another one than expected, or too short.
    """
    german = _split(man_pages(), tokenize, "German manual pages")
    cpp = _split((piece.decode("utf-8", "ignore") for piece in headers(None)), tokenize, "C++ headers")
    prose = _cut([" ".join(text for _, text in read_sentences(archive)["NYT"])], tokenize, PROSE)
    return {
        name: Texts(train, new, {"prose": prose, "samples": samples, "other": other[: HELD_OUT // 2]})
        for name, (train, new), other in (("german", german, cpp[1]), ("cpp", cpp, german[1]))
    }


def man_pages() -> Iterator[str]:
    """German manual pages as plain text, without markup; the package is downloaded once.

    Raises:
        OSError: it cannot be downloaded.
        ValueError: another file than Debian's.
    """
    for page in package_files(*MAN_PAGES, _SECTIONS):
        yield plain_text(zlib.decompress(page, wbits=31).decode("utf-8", "ignore"))


def plain_text(page: str) -> str:
    """The running text of a manual page: macros and escapes of roff are removed, spaces collapsed."""
    lines = []
    for line in page.splitlines():
        text = _FONT_MACRO.sub("", line)
        if not text.startswith((".", "'", '\\"')):
            lines.append(text)
    text = _ESCAPE.sub(lambda found: _CHARACTERS.get(found[0], ""), " ".join(lines))
    return re.sub(r"\s+", " ", text).strip()


def archive_path() -> Path:
    """``$IPCA_DEMO_TEXT``, else where ``make`` puts the archive."""
    return Path(os.environ.get("IPCA_DEMO_TEXT") or DOWNLOADS / ARCHIVE)


def _split(pieces: Iterable[str], tokenize: Tokenize, what: str) -> tuple[Tensor, Tensor]:
    """Training and held-out sequences; the pieces of the held-out ones are not trained on."""
    short = {piece[:PIECE] for piece in pieces if len(piece) >= PIECE // 4}
    ordered = sorted(short, key=lambda piece: hashlib.sha256(piece.encode()).digest())
    held_out, first = 0, 0
    while first < len(ordered) and held_out < HELD_OUT * LENGTH:
        held_out += len(tokenize(ordered[first] + "\n\n"))
        first += 1
    try:
        return _cut(ordered[first:], tokenize, TRAIN), _cut(ordered[:first], tokenize, HELD_OUT)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def _cut(pieces: list[str], tokenize: Tokenize, count: int) -> Tensor:
    """The first ``count`` sequences of the joined pieces."""
    ids: list[int] = []
    for piece in pieces:
        if len(ids) >= count * LENGTH:
            break
        ids += tokenize(piece + "\n\n")
    if len(ids) < count * LENGTH:
        raise ValueError(f"{count} sequences of {LENGTH} tokens are needed; there are {len(ids):,} tokens")
    return torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)
