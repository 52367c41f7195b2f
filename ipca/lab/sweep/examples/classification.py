"""A task for `ipca sweep`: a text classifier learns opinions, and must not forget what other sentences mean.

    ipca sweep --example classification > task.py
    ipca sweep task.py --windows 0.0 0.5 1.0 --lrs 2e-4 1e-3 --seeds 3 -o sweep-out --dry-run

Needs pip install 'ipca-lora[hf,sweep]'. Put your own in place of MODEL, SETTINGS, CLASSES, labeled() and others().
"""

from functools import cache
from itertools import product
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from ipca.lab import sweep
from ipca.model import AdapterSettings

MODEL = "distilbert/distilbert-base-uncased"  # a folder, or an id on the Hugging Face Hub
SETTINGS = AdapterSettings(rank=16, targets="all-linear")  # the head is trained too, without being named
CLASSES = ("bad", "good")
STEPS, BATCH = 50, 16
logging.set_verbosity_error()  # else every process reports its new head and its loading
logging.disable_progress_bar()


def labeled() -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Sentences with the index of their class, to learn from and held out; here made up, with words of their own."""
    things = ("film", "book", "meal", "hotel", "phone", "lesson", "song", "game", "trip", "coat")
    learned = (("awful", "dull", "broken", "sad", "cold"), ("lovely", "clever", "superb", "kind", "warm"))
    held_out = (("terrible", "boring", "ugly"), ("great", "delightful", "pleasant"))

    def sentences(words: tuple[tuple[str, ...], ...]) -> list[tuple[str, int]]:
        pairs = [(word, k) for k, some in enumerate(words) for word in some]
        return [(f"I thought the {thing} was rather {word}.", k) for thing, (word, k) in product(things, pairs)]

    return sentences(learned), sentences(held_out)


def others() -> list[str]:
    """Sentences of another kind, whose embeddings must stay: from the language reference that every Python has."""
    found = [" ".join(part.split()) for text in topics.values() for part in text.split(". ")]
    return [sentence for sentence in found if 40 < len(sentence) < 200][:64]


def build() -> nn.Module:
    """The pretrained model with a new head."""
    return AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=len(CLASSES), dtype=torch.float32)


def train(model: nn.Module, groups: list[dict[str, Any]], seed: int) -> None:
    """Train with the rates of ``groups``; weight decay would pull a window to 0, not to where it began."""
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    learned, _ = labeled()
    draw = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(STEPS):
        batch = [learned[k] for k in torch.randint(len(learned), (BATCH,), generator=draw, device="cpu")]
        model(**inputs_of(model, [words for words, _ in batch]), labels=labels_of(model, batch)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def evaluate(model: nn.Module) -> dict[str, float]:
    """Larger is better for both: accuracy on held-out sentences, similarity of other embeddings to the pretrained."""
    _, held_out = labeled()
    predicted = model(**inputs_of(model, [words for words, _ in held_out])).logits.argmax(-1)
    right = (predicted == labels_of(model, held_out)).double().mean().item()
    similar = torch.cosine_similarity(embeddings(model), pretrained_embeddings().to(predicted.device))
    return {"target": right, "retained": similar.double().mean().item()}


def embeddings(model: Any) -> Tensor:
    """The mean hidden state of each of the other sentences."""
    inputs = inputs_of(model, others())
    weight = inputs["attention_mask"].unsqueeze(-1)
    return (model.base_model(**inputs).last_hidden_state * weight).sum(1) / weight.sum(1)


@cache
def pretrained_embeddings() -> Tensor:
    """Those of the pretrained model."""
    return embeddings(build().eval())


@cache
def tokenizer() -> Any:
    """The model's tokenizer."""
    return AutoTokenizer.from_pretrained(MODEL)


def inputs_of(model: nn.Module, texts: list[str]) -> Any:
    """Tokens, on the device of the model, which `ipca sweep --devices` chooses."""
    return tokenizer()(texts, padding=True, return_tensors="pt").to(next(model.parameters()).device)


def labels_of(model: nn.Module, batch: list[tuple[str, int]]) -> Tensor:
    """The classes of ``batch``."""
    return torch.tensor([k for _, k in batch], device=next(model.parameters()).device)


def task() -> sweep.Task:
    """What `ipca sweep` reads."""
    labels = {"target": "accuracy, held-out sentences", "retained": "similarity of other embeddings (cosine)"}
    return sweep.Task(build, train, evaluate, SETTINGS, labels=labels)
