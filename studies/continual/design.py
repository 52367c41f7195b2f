"""The numbers of PROTOCOL.md, the order of the runs, and each method's grid of rates."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

TEXT = Path(__file__).resolve().parent / "PROTOCOL.md"
PAIRS = (0, 2, 4, 6, 8)
"""The tasks, each the first of two neighboring animals, in the order of training."""
STEPS, BATCH, SEEDS = 80, 32, 10
RATES = (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""The lowest was added when there were rows (PROTOCOL.md, Changes), and is in no hash."""
CENTERS = {
    "fresh": 3e-4,
    "pissa": 1e-4,
    "milora": 3e-4,
    "lora-fresh": 3e-4,
    "lora": 3e-4,
    "o-lora": 1e-3,
    "sd-lora": 1e-3,
    "osf": 1e-4,
    "fixed": 3e-4,
    "disjoint": 3e-4,
}
"""Each method's middle rate of the first three. ``"fresh"`` takes a middle window anew for each task, ``"pissa"`` and
``"milora"`` the windows at the ends; see ``ipca.lab.continual``."""
COMPARED = ("pissa", "milora", "lora-fresh", "o-lora", "sd-lora", "osf")
"""Methods that fresh middle windows are compared with."""
Scores = Mapping[float, Mapping[int, float]]
"""ACC by rate and seed; NaN for a run that diverged."""


@dataclass(frozen=True, order=True)
class Run:
    """One stream; ``key`` is its name in files."""

    seed: int
    method: str
    rate: float

    @property
    def key(self) -> str:
        return f"{self.method}-{self.rate:.0e}-seed{self.seed}"


def protocol_sha256() -> str:
    """A hash of the protocol's text but for its list of changes, and of the numbers here."""
    text = TEXT.read_text(encoding="utf-8").partition("\n## Changes")[0]
    numbers = (PAIRS, STEPS, BATCH, SEEDS, RATES[1:], CENTERS, COMPARED)
    return hashlib.sha256(f"{text}\n{numbers!r}".encode()).hexdigest()


def order(scores: Mapping[str, Scores]) -> Iterator[Run]:
    """All runs, seed by seed, so that any beginning compares all methods on the same seeds."""
    for seed in range(SEEDS):
        for place in range(len(RATES)):
            for method in CENTERS:
                rates = grid(method, scores.get(method, {}))
                if place < len(rates):
                    yield Run(seed, method, rates[place])


def grid(method: str, scores: Scores) -> tuple[float, ...]:
    """The rates of a method, ascending.

    Three at first. When all of them have two seeds or more and the best is the lowest or the highest, the next one of
    :data:`RATES` on that side is added, again and again; so is one next to a rate that is best for a seed of ten.
    """
    low = RATES.index(CENTERS[method]) - 1
    high = low + 2
    while all(len(scores.get(rate, {})) > 1 for rate in RATES[low : high + 1]):
        here = {rate: scores[rate] for rate in RATES[low : high + 1]}
        taken = {best_rate(here), *(chosen(here).values() if min(map(len, here.values())) == SEEDS else ())}
        if RATES[low] in taken and low > 0:
            low -= 1
        elif RATES[high] in taken and high < len(RATES) - 1:
            high += 1
        else:
            break
    return RATES[low : high + 1]


def chosen(scores: Scores) -> dict[int, float]:
    """By seed of all rates, the best rate on the *other* seeds; of two seeds or more."""
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in scores.values())))
    others = {s: {rate: {o: by_seed[o] for o in seeds if o != s} for rate, by_seed in scores.items()} for s in seeds}
    return {seed: best_rate(found) for seed, found in others.items()} if len(seeds) > 1 else {}


def best_rate(scores: Scores) -> float:
    """The rate of the highest mean ACC; a run that diverged counts as 0."""
    return max(scores, key=lambda rate: fmean(0.0 if acc != acc else acc for acc in scores[rate].values()))
