"""A task for `ipca sweep`: a language model learns a text, and must not forget how it writes of its own accord.

    ipca sweep --example lm > task.py
    ipca sweep task.py --windows 0.0 0.5 1.0 --lrs 2e-4 1e-3 --seeds 3 -o sweep-out --dry-run

Needs pip install 'ipca-lora[hf,sweep]'. Put your own in place of MODEL, SETTINGS and text().
"""

from functools import cache
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ipca.analysis import kl_to_base
from ipca.lab import sweep
from ipca.model import AdapterSettings

MODEL = "HuggingFaceTB/SmolLM2-135M"  # a folder, or an id on the Hugging Face Hub
SETTINGS = AdapterSettings(rank=16, targets="all-linear")
STEPS, BATCH, LENGTH = 50, 4, 128
logging.disable_progress_bar()  # of loading, in every process


def text() -> str:
    """The text to learn: the language reference that is part of every Python."""
    return "\n".join(topics.values())


def build() -> nn.Module:
    """The pretrained model."""
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def train(model: nn.Module, groups: list[dict[str, Any]], seed: int) -> None:
    """Train with the rates of ``groups``; weight decay would pull a window to 0, not to where it began."""
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    learned, _ = rows()
    draw = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(STEPS):
        batch = learned[torch.randint(len(learned), (BATCH,), generator=draw, device="cpu")].to(device_of(model))
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def evaluate(model: nn.Module) -> dict[str, float]:
    """Larger is better for both: log-likelihood of held-out text, minus the divergence from the pretrained model."""
    at = device_of(model)
    _, held_out = rows()
    losses = [model(input_ids=part, labels=part).loss.item() for part in held_out.to(at).split(BATCH)]
    kept = [{"input_ids": part} for part in own_texts().to(at).split(BATCH)]
    return {"target": -sum(losses) / len(losses), "retained": -kl_to_base(model, base().to(at), kept)}


@cache
def rows() -> tuple[Tensor, Tensor]:
    """Rows of tokens to learn from, and a few held out."""
    tokens = AutoTokenizer.from_pretrained(MODEL)(text(), verbose=False, return_tensors="pt").input_ids[0]
    found = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    return found[: -4 * BATCH], found[-4 * BATCH :]


@cache
def base() -> nn.Module:
    """A second copy of the pretrained model, to compare with."""
    return build().eval()


@cache
def own_texts() -> Tensor:
    """Texts that the pretrained model writes: what it must not forget."""
    model: Any = base()
    first = model.config.bos_token_id or 0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = torch.full((4 * BATCH, 1), first, device=model.device)
        return model.generate(start, do_sample=True, min_new_tokens=LENGTH - 1, max_new_tokens=LENGTH - 1)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model, which `ipca sweep --devices` chooses."""
    return next(model.parameters()).device


def task() -> sweep.Task:
    """What `ipca sweep` reads."""
    labels = {"target": "log-likelihood of held-out text (nats a token)", "retained": "−KL to the base (nats a token)"}
    return sweep.Task(build, train, evaluate, SETTINGS, labels=labels)
