"""Task T of the study: a language model pretrained on prose learns C++ headers.

A byte-level LLaMA-shaped model, pretrained here, once, on strings of Python and torch, learns torch's headers. It needs
only torch and transformers and downloads nothing. ``ipca sweep studies/window_position/language_model.py`` runs the
tiny size on a CPU.

The size "base" is for a GPU and has not been run. Estimated, pretraining takes about 75 seconds of an H100 (3,000 steps
of 2.5 TFLOP) and one run 3: 80 steps of 4,096 bytes through 25 M parameters are 50 TFLOP and the evaluation of 2,000
sequences 26, two seconds in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipca._hashing import tensor_sha256
from ipca.lab.sweep import Task
from ipca.lab.sweep.device import device_of
from ipca.model import AdapterSettings
from studies.cached_tensors import cached
from studies.corpus import load_corpus
from studies.window_position.pretraining import Pretraining, device_record
from studies.window_position.pretraining import pretrain as trained
from studies.window_position.train_loop import fit, shuffled_batches

BATCH, CHUNK, BYTES = 16, 50, 256


@dataclass(frozen=True)
class Size:
    """A LLaMA-shaped model, its text and its pretraining.

    Attributes:
        length: bytes of a sequence.
        held_out: number of sequences of each test set.
        files: number of files read of each kind; None for all.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    length: int
    held_out: int
    files: int | None
    pretraining: Pretraining


SIZES = {
    "tiny": Size(64, 160, 2, 4, 48, 40, 60, Pretraining(steps=100, batch=16, rate=3e-3, warm_up=10)),
    "base": Size(512, 1376, 8, 8, 256, 1000, None, Pretraining(steps=3000, rate=6e-4, warm_up=200)),
}
"""0.1 M parameters, for a CPU and tests; 26 M, for a GPU."""


@dataclass(frozen=True)
class Texts:
    """Sequences of bytes ``(M, length)`` of each kind, int64."""

    prose_train: Tensor
    prose_test: Tensor
    headers_train: Tensor
    headers_test: Tensor


def task(size: str = "tiny", device: str = "cpu", steps: int = 80) -> Task:
    """All linear layers of the blocks at rank 16; ``steps`` batches of 16 sequences.

    Args:
        size: one of :data:`SIZES`.
        device: where the model is pretrained and starts, "cpu" or "cuda".

    Raises:
        ValueError: an unknown size.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}; got {size!r}.")
    count, length = SIZES[size].held_out, SIZES[size].length
    return Task(
        build=partial(build, size, device),
        train=partial(train, size, steps),
        evaluate=partial(evaluate, size, device),
        settings=AdapterSettings(rank=16, window="middle", form="residual"),
        calibration=partial(calibration, size),
        labels={
            "target": f"minus cross-entropy on C++ headers, nats a byte, {count:,} sequences of {length} bytes",
            "retained": f"minus cross-entropy on prose, nats a byte, {count:,} sequences of {length} bytes",
            "kl": "KL divergence from the untrained model's predictions on the same prose, nats a byte",
        },
    )


def build(size: str, device: str) -> nn.Module:
    """The pretrained model on ``device``; its weights are cached in a file."""
    with torch.random.fork_rng(devices=[]):
        model = llama(size)
    known = {**asdict(SIZES[size]), "text": tensor_sha256(texts(size).prose_train), **device_record(device)}
    model.load_state_dict(cached("text-llama", known, partial(pretrain, size, device)))
    return model.to(device).eval()


def train(size: str, steps: int, model: nn.Module, groups: list[dict[str, Any]], seed: int) -> None:
    """Train on headers; ``seed`` determines the order of the sequences. There is no new head."""
    shown = texts(size, device_of(model)).headers_train
    torch.manual_seed(seed)
    fit(
        model,
        None,
        groups,
        shuffled_batches(len(shown), BATCH, steps),
        lambda batch: cross_entropy(model, shown[batch]),
    )


def evaluate(size: str, device: str, model: nn.Module) -> dict[str, float]:
    """The metrics of :func:`task`, on the two test sets."""
    data = texts(size, device_of(model))
    model.eval()
    with torch.inference_mode():
        target = sum(float(_likelihood(found, ids)) for found, ids in predictions(model, data.headers_test))
        retained = divergence = 0.0
        for (found, ids), known in zip(predictions(model, data.prose_test), before(size, device), strict=True):
            retained += float(_likelihood(found, ids))
            divergence += float(F.kl_div(found, known.to(found.device), reduction="sum", log_target=True))
    count = data.prose_test[:, 1:].numel()
    return {"target": target / count, "retained": retained / count, "kl": divergence / count}


def calibration(size: str) -> list[dict[str, Tensor]]:
    """Four batches of training headers."""
    shown = texts(size).headers_train[: 4 * BATCH]
    return [{"input_ids": ids} for ids in shown.split(BATCH)]


def predictions(model: nn.Module, sequences: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probabilities ``(M, length − 1, 256)`` of the next byte, and the sequences ``(M, length)``, in chunks."""
    for ids in sequences.split(CHUNK):
        yield model(input_ids=ids).logits[:, :-1].float().log_softmax(-1), ids


def cross_entropy(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean over the bytes of ``ids (M, length)`` but the first of each sequence, in nats."""
    logits = model(input_ids=ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@cache
def texts(size: str, device: torch.device | str = "cpu") -> Texts:
    """The sequences on ``device``."""
    shape = SIZES[size]
    found = load_corpus(shape.length, shape.held_out, shape.files)
    return Texts(**{name: sequences.to(device).long() for name, sequences in found.items()})


@cache
def before(size: str, device: str) -> tuple[Tensor, ...]:
    """Predictions of the pretrained model on the held-out prose, by chunk."""
    model, data = build(size, device), texts(size, device)
    with torch.no_grad():
        return tuple(found for found, _ in predictions(model, data.prose_test))


def llama(size: str) -> nn.Module:
    """An untrained ``LlamaForCausalLM`` over bytes, initialized with torch's global generator."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SIZES[size]
    config = LlamaConfig(
        vocab_size=BYTES,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.length,
        use_cache=False,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def pretrain(size: str, device: str) -> dict[str, Tensor]:
    """The state dict of a model trained on prose."""
    shown = texts(size, device).prose_train

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return cross_entropy(model, shown[batch])

    return trained(partial(llama, size), SIZES[size].pretraining, device, len(shown), loss)


def _likelihood(found: Tensor, ids: Tensor) -> Tensor:
    """The summed log-probability of the actual bytes."""
    return found.gather(-1, ids[:, 1:, None]).double().sum()
