"""Token ids of a task: what is trained on, what is held out, and the texts on which the model shall stay as it is."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ipca._hashing import tensor_sha256
from studies.frontier.measure import Reference

_SHOWN, _SEED_OF_SHOWN = 32, 1_000_003
"""Sequences that an arm is shown which looks at inputs; the seed is that of no other sample."""
IGNORED = -100
"""The label of a token that is not predicted."""


@dataclass(frozen=True)
class Texts:
    """Token ids ``(M, length)``, int64; lengths may differ between the texts.

    Attributes:
        train: of the new task.
        new: held out of the new task.
        kept: by name, the texts on which the model shall stay as it is; one of them is ``samples``.
        padding: the id that fills the end of short sequences and is not predicted; None if there is none.
    """

    train: Tensor
    new: Tensor
    kept: dict[str, Tensor]
    padding: int | None = None
    kind: ClassVar[str] = "text"

    def scored(self, ids: Tensor) -> Tensor:
        """Whether each token but the first is predicted, bool ``(M, length − 1)``."""
        return torch.ones_like(ids[:, 1:], dtype=torch.bool) if self.padding is None else ids[:, 1:] != self.padding

    def labels(self, chosen: Tensor) -> Tensor:
        """The labels of the training sequences ``chosen``."""
        ids = self.train[chosen]
        return ids if self.padding is None else ids.masked_fill(ids == self.padding, IGNORED)

    def loss(self, model: Any, chosen: Tensor) -> Tensor:
        """The mean cross-entropy of the training sequences ``chosen``."""
        device = next(model.parameters()).device
        found: Tensor = model(input_ids=self.train[chosen].to(device), labels=self.labels(chosen).to(device)).loss
        return found

    def reference(self, model: nn.Module) -> Reference:
        """The base's predictions on these texts."""
        return Reference(model, self)

    def inputs(self, of: str, model: nn.Module) -> list[dict[str, Tensor]]:
        """32 sequences: the first of the ``"new"`` task, or such that are drawn from the ``"base"`` for this alone."""
        ids = self.train[:_SHOWN]
        if of == "base":
            ids = draw_samples(model, _SEED_OF_SHOWN, _SHOWN, self.train.shape[1], self.padding)
        elif of != "new":
            raise ValueError(f"inputs are of the 'new' task or of the 'base', not {of!r}.")
        mask = torch.ones_like(ids) if self.padding is None else (ids != self.padding).long()
        return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(8), mask.split(8), strict=True)]

    def sha256(self) -> str:
        """A hash of all token ids."""
        parts = [tensor_sha256(ids) for ids in (self.train, self.new, *(self.kept[name] for name in sorted(self.kept)))]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()


@torch.no_grad()
def draw_samples(model: nn.Module, seed: int, count: int, length: int, padding: int | None = None) -> Tensor:
    """``(count, length)`` token ids drawn from ``model`` at temperature 1, from its first token on.

    Args:
        padding: what follows the model's end token; None to go on after it.
    """
    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((count, 1), config.bos_token_id or 0)
    past = None
    device = next(model.parameters()).device
    for _ in tqdm(range(length - 1), desc="Samples", unit="token"):
        found = model(input_ids=ids[:, -1:].to(device), past_key_values=past, use_cache=True)
        past = found.past_key_values
        probabilities = found.logits[:, -1].float().softmax(-1).cpu()
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        if padding is not None:
            ended = (ids[:, -1:] == config.eos_token_id) | (ids[:, -1:] == padding)
            drawn = drawn.masked_fill(ended, padding)
        ids = torch.cat([ids, drawn], dim=1)
    return ids
