"""Measurements of a tuned model: cross-entropy on every text, and the divergence from the base on the kept ones.

The quantities are those of ``ipca.analysis.retention``, by token and without a second copy of the base in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipca.model.batches import evaluating

CHUNK = 4
"""Sequences of one forward pass."""
NEW = "new"
"""The name of the held-out text of the new task beside those of the kept texts."""
ITEMS = {"ce": (NEW, "samples"), "kl": ("samples",)}
"""What is kept of every token at λ = 1."""


class ScoredTexts(Protocol):
    """Token ids ``(M, length)`` on which models are measured: held out of the new task, and kept, by name."""

    @property
    def new(self) -> Tensor: ...

    @property
    def kept(self) -> dict[str, Tensor]: ...

    def scored(self, ids: Tensor) -> Tensor:
        """Whether each token but the first is predicted, bool ``(M, length − 1)``."""


@dataclass(frozen=True)
class Measurement:
    """Values of every predicted token ``(M, length − 1)`` in nats, by text.

    Attributes:
        ce: cross-entropy, ``−log p(token)``.
        kl: ``KL(base ‖ tuned)`` over the whole vocabulary; of the kept texts only.
        scored: False for padding, whose values mean nothing.
    """

    ce: dict[str, Tensor]
    kl: dict[str, Tensor]
    scored: dict[str, Tensor]

    def means(self) -> dict[str, float | None]:
        """Means over the tokens, ``ce_new``, ``kl_samples``, …; None where they are not finite."""
        found = {f"ce_{name}": values for name, values in self.ce.items()}
        found |= {f"kl_{name}": values for name, values in self.kl.items()}
        means = {name: float(v[self.scored[name[3:]]].double().mean()) for name, v in found.items()}
        return {name: value if math.isfinite(value) else None for name, value in means.items()}

    def items(self) -> dict[str, Tensor]:
        """What :data:`ITEMS` names, as float16, NaN for padding: rounding is far below the spread between tokens."""
        return {
            f"{kind}_{name}": getattr(self, kind)[name].masked_fill(~self.scored[name], math.nan).half()
            for kind, names in ITEMS.items()
            for name in names
        }


class Reference:
    """The base model's predictions on the kept texts, kept as its last hidden states.

    Log-probabilities of 8,000 tokens over 49,152 words would take 1.6 GB; from the hidden states they are computed
    again, to the same bits, with the output head that no arm changes.

    Args:
        model: the base.
        texts: of the task.

    Raises:
        ValueError: the model computes its logits otherwise than by its output head from its last hidden states.
    """

    def __init__(self, model: nn.Module, texts: ScoredTexts) -> None:
        self.texts = texts
        with evaluating(model):
            self._states = {name: list(self._hidden(model, ids)) for name, ids in texts.kept.items()}
            ids = next(iter(texts.kept.values()))[:CHUNK].to(_device(model))
            ours = _head(model)(next(iter(self._states.values()))[0])
            if not torch.equal(ours, model(input_ids=ids).logits[:, :-1]):
                raise ValueError(f"{type(model).__name__} does more to its logits than its output head; not supported")

    def measure(self, model: nn.Module) -> Measurement:
        """``model`` against the base; one and the same model gives exactly 0."""
        ce, kl = {}, {}
        scored = {name: self.texts.scored(ids) for name, ids in ((NEW, self.texts.new), *self.texts.kept.items())}
        with evaluating(model):
            head = _head(model)
            ce[NEW] = torch.cat([_cross_entropy(p, ids) for p, ids in self._predictions(model, self.texts.new)])
            for name, ids in self.texts.kept.items():
                entropies, divergences = [], []
                for states, (found, part) in zip(self._states[name], self._predictions(model, ids), strict=True):
                    known = head(states).float().log_softmax(-1)
                    entropies.append(_cross_entropy(found, part))
                    divergences.append(F.kl_div(found, known, reduction="none", log_target=True).sum(-1).cpu())
                ce[name], kl[name] = torch.cat(entropies), torch.cat(divergences)
        return Measurement(ce, kl, scored)

    def _predictions(self, model: nn.Module, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Log-probabilities ``(4, length − 1, V)`` of the next token, with the ids, chunk by chunk."""
        head = _head(model)
        for states, part in zip(self._hidden(model, ids), ids.split(CHUNK), strict=True):
            yield head(states).float().log_softmax(-1), part

    def _hidden(self, model: nn.Module, ids: Tensor) -> Iterator[Tensor]:
        for part in ids.split(CHUNK):
            yield _body(model)(input_ids=part.to(_device(model))).last_hidden_state[:, :-1]


def _cross_entropy(found: Tensor, ids: Tensor) -> Tensor:
    return -found.gather(-1, ids[:, 1:, None].to(found.device)).squeeze(-1).cpu()


def _body(model: Any) -> nn.Module:
    body: nn.Module = model.base_model
    return body


def _head(model: Any) -> nn.Module:
    head: nn.Module = model.get_output_embeddings()
    return head


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
