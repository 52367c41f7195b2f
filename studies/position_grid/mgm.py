"""The model of the study and what it learns: MGM, a GPT-2 over microbial genera, from microformer-mgm 0.5.8 (MIT).

A community is a sentence: its genera by falling abundance, relative to the mean and the standard deviation of each
genus in MGM's own corpus. The new tasks are real gut communities, and the model's own sentences read
from the rarest genus on.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from studies.debian import package_files
from studies.frontier.texts import Texts

NAME = "mgm-9m"
WHEEL = "microformer_mgm-0.5.8-py3-none-any.whl"
LENGTH = 64
"""Maximum tokens of a sentence, the first and the last one included."""
TRAIN, HELD_OUT, SAMPLES, OTHER = 1024, 32, 32, 16
"""Training and held-out sentences of the reversed task, sentences of the model, and of the other task."""
PADDING, START, END = 0, 2, 3
TWINS = (
    "http://deb.debian.org/debian/pool/main/r/r-bioc-dirichletmultinomial/"
    "r-bioc-dirichletmultinomial_1.40.0-1_amd64.deb",
    "7e02b0b4185d64155d50b8be71d3f502fa96dd19281b25caeb364f576b482cdb",
)
"""Debian's package with the counts of Turnbaugh et al. (Nature 457, 2009), 278 stool samples, and its SHA-256."""
HELD_OUT_PEOPLE = 0.2
"""Share of the people, those with the highest numbers, whose samples are held out."""
_WEIGHTS_SHA256 = "7a83b442dcb0cbe2a4248ea9922de58e15edfa3a1ad71d07519dc8594f4511b8"
_DOWNLOADS = Path(__file__).resolve().parents[2] / ".venv" / "share"
_COUNTS = re.compile(r".*/DirichletMultinomial/extdata/Twins\.csv")
_SAMPLE = re.compile(r"TS(\d+)(?:\.2)?")
_OTHER_NAMES = {"Escherichia/Shigella": "Escherichia"}
_DROPOUT = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


@dataclass(frozen=True)
class Genus:
    """A token.

    Attributes:
        id: of the token.
        mean, std: of its relative abundance in MGM's corpus.
    """

    id: int
    mean: float
    std: float


def load_model(device: str = "cpu") -> nn.Module:
    """MGM in float32, in evaluation mode, without dropout and without a cache of keys and values.

    Raises:
        FileNotFoundError: the wheel is missing; the message says how to download it.
        ValueError: other weights than the published ones.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    data = _read("general_model/pytorch_model.bin")
    if hashlib.sha256(data).hexdigest() != _WEIGHTS_SHA256:
        raise ValueError(f"{_wheel()} does not hold MGM's weights as published")
    settings = json.loads(_read("general_model/config.json")) | dict.fromkeys(_DROPOUT, 0.0) | {"use_cache": False}
    model = GPT2LMHeadModel(GPT2Config(**settings))
    model.load_state_dict(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
    model.config.pad_token_id = None  # padding is at the end, where no other token sees it
    return model.float().to(device).eval()


def load_genera() -> dict[str, Genus]:
    """The tokens after the four special ones, by genus.

    Raises:
        FileNotFoundError: the wheel is missing.
    """
    table = list(csv.reader(io.StringIO(_read("phylogeny.csv").decode())))[1:]
    return {name.removeprefix("g__"): Genus(4 + i, float(m), float(s)) for i, (name, m, s) in enumerate(table)}


def task_texts(genera: dict[str, Genus], samples: Tensor) -> dict[str, Texts]:
    """The texts of both tasks, ``twins`` and ``reversed``; each is kept text of the other one.

    Args:
        samples: ``(SAMPLES + HELD_OUT + TRAIN, LENGTH)``, drawn from the model.

    Raises:
        OSError, ValueError: the counts cannot be downloaded, or are not the expected ones.
    """
    kept, backward = samples[:SAMPLES], reverse(samples[SAMPLES:])
    train, held_out = twin_sentences(genera)
    tasks = {"twins": (train, held_out), "reversed": (backward[HELD_OUT:], backward[:HELD_OUT])}
    return {
        name: Texts(*tasks[name], {"samples": kept, "other": tasks[other][1][:OTHER]}, PADDING)
        for name, other in (("twins", "reversed"), ("reversed", "twins"))
    }


def twin_sentences(genera: dict[str, Genus]) -> tuple[Tensor, Tensor]:
    """Training and held-out sentences of the twins' samples; no person is in both.

    Raises:
        OSError, ValueError: the counts cannot be downloaded, or are not the expected ones.
    """
    (table,) = package_files(*TWINS, _COUNTS)
    head, *lines = csv.reader(io.StringIO(table.decode()))
    names = [_OTHER_NAMES.get(line[0], line[0]) for line in lines]
    people: dict[int, list[list[int]]] = {}
    for column, sample in enumerate(head[1:], start=1):
        found = _SAMPLE.fullmatch(sample)
        if found is None:
            raise ValueError(f"a sample is called {sample}; expected TS and a number")
        counts = {name: float(line[column]) for name, line in zip(names, lines, strict=True)}
        people.setdefault(int(found[1]), []).append(sentence(counts, genera))
    numbers = sorted(people)
    first = len(numbers) - round(HELD_OUT_PEOPLE * len(numbers))
    parts = numbers[:first], numbers[first:]
    train, held_out = (pad(s for number in part for s in people[number]) for part in parts)
    return train, held_out


def sentence(counts: dict[str, float], genera: dict[str, Genus]) -> list[int]:
    """The tokens of a community, by falling ``(share − mean) / std``; genera that MGM does not know are left out."""
    known = {name: count for name, count in counts.items() if count > 0 and name in genera}
    total = sum(known.values())
    ranks = {genera[name].id: (count / total - genera[name].mean) / genera[name].std for name, count in known.items()}
    return [START, *sorted(ranks, key=lambda token: (-ranks[token], token)), END]


def pad(sentences: Iterable[list[int]]) -> Tensor:
    """``(M, length)``, padded at the end to the longest of them, or cut at :data:`LENGTH`."""
    cut = [torch.tensor(one[:LENGTH]) for one in sentences]
    return nn.utils.rnn.pad_sequence(cut, batch_first=True, padding_value=PADDING)


def reverse(ids: Tensor) -> Tensor:
    """Sentences with their genera in reverse; special tokens stay where they are."""
    found = ids.clone()
    for line in found:
        genera = line > END
        line[genera] = line[genera].flip(0)
    return found


def _read(name: str) -> bytes:
    wheel = _wheel()
    if not wheel.exists():
        raise FileNotFoundError(f"no {wheel}; run: pip download --no-deps -d {wheel.parent} microformer-mgm==0.5.8")
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(f"mgm/resources/{name}")


def _wheel() -> Path:
    return Path(os.environ.get("IPCA_STUDY_MGM") or _DOWNLOADS / WHEEL)
