"""Text of the demo: human-rated sentences of four sources, from the source distribution of vaderSentiment 3.3.2.

C. J. Hutto & E. Gilbert, "VADER: A parsimonious rule-based model for sentiment analysis of social media text",
ICWSM 2014. Ratings are means over annotators, from −4 to 4. The archive is MIT-licensed; it is read, not copied.
"""

from __future__ import annotations

import hashlib
import io
import random
import tarfile
from dataclasses import dataclass
from pathlib import Path

ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
FETCH = f"pip download --no-deps --no-binary :all: vaderSentiment==3.3.2  (then pass --text path/to/{ARCHIVE})"
_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_SHA256 = "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa"
SOURCES = {
    "tweet": "tweets",
    "movie": "movieReviewSnippets",
    "Amazon": "amazonReviewSnippets",
    "NYT": "nytEditorialSnippets",
}


@dataclass(frozen=True)
class Labeled:
    """Sentences and their class indices."""

    texts: list[str]
    labels: list[int]


@dataclass(frozen=True)
class Text:
    """Disjoint sets of sentences: the new task (sentiment) and the earlier ability (source classification).

    Attributes:
        learned: the class of the probe's sets whose source the task learns, too.
    """

    train: Labeled
    test: Labeled
    probe_train: Labeled
    probe_test: Labeled
    learned: int

    def kept(self) -> list[str]:
        """The probe's held-out sentences of the other sources: learning the task should leave them alone."""
        labeled = zip(self.probe_test.texts, self.probe_test.labels, strict=True)
        return [text for text, label in labeled if label != self.learned]


def load_text(archive: Path, *, train: int = 2000, test: int = 400, probe: int = 400, source: str = "movie") -> Text:
    """Split the archive's sentences deterministically.

    The label of the sentiment task is the sign of the rating; sentences rated between −0.5 and 0.5 are excluded.

    Args:
        archive: the source distribution of vaderSentiment 3.3.2.
        train, test: numbers of sentences of the sentiment task.
        probe: number of sentences in the probe's test set and in half of its training set, balanced over the sources.
        source: of the sentiment task, one of :data:`SOURCES`.

    Raises:
        FileNotFoundError: the archive is missing; the message says how to download it.
        ValueError: a different archive, too few sentences, or an unknown source.
    """
    if source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}; got {source!r}.")
    if min(train, test) < 1 or probe < len(SOURCES):
        raise ValueError(f"each set needs a sentence, and the probe one of each source; got {train}, {test}, {probe}.")
    rated = read_sentences(archive)
    rng = random.Random(0)
    for sentences in rated.values():
        rng.shuffle(sentences)
    each = probe // len(SOURCES)
    sets: list[Labeled] = []
    for count in (each, 2 * each):
        taken = [(text, k) for k, name in enumerate(SOURCES) for _, text in _take(rated[name], count)]
        sets.append(_labeled(taken))
    clear = [(text, int(rating > 0)) for rating, text in rated[source] if abs(rating) > 0.5]
    if len(clear) < train + test:
        raise ValueError(
            f"the text does not have {train} + {test} {source} sentences besides a probe of {probe}; request fewer."
        )
    learned = list(SOURCES).index(source)
    return Text(_labeled(clear[:train]), _labeled(clear[train : train + test]), sets[1], sets[0], learned)


def _take(items: list[tuple[float, str]], count: int) -> list[tuple[float, str]]:
    if len(items) < count:
        raise ValueError(f"a source has {len(items)} sentences left, but {count} are needed; request fewer.")
    taken = items[:count]
    del items[:count]
    return taken


def _labeled(pairs: list[tuple[str, int]]) -> Labeled:
    texts, labels = zip(*pairs, strict=True)
    return Labeled(list(texts), list(labels))


def read_sentences(archive: Path) -> dict[str, list[tuple[float, str]]]:
    """``{source: [(rating, sentence), …]}``, in the archive's order.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_text`.
    """
    if not archive.is_file():
        raise FileNotFoundError(f"no demo text at {archive}; run: {FETCH}")
    try:
        with tarfile.open(archive) as outer:
            inner = outer.extractfile(_INNER)
            packed = inner.read() if inner else b""
    except (tarfile.TarError, KeyError) as error:
        raise ValueError(f"{archive} is not {ARCHIVE}: {error}") from None
    if hashlib.sha256(packed).hexdigest() != _SHA256:
        raise ValueError(f"{archive} contains a different text than {ARCHIVE} as published; run: {FETCH}")
    rated = {}
    with tarfile.open(fileobj=io.BytesIO(packed)) as files:
        for name, stem in SOURCES.items():
            file = files.extractfile(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt")
            assert file is not None
            rows = [line.split("\t") for line in file.read().decode("utf-8", "replace").splitlines()]
            rated[name] = [(float(row[1]), row[2].strip()) for row in rows if len(row) == 3]
    return rated
