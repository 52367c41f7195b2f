"""A vision transformer for 8 × 8 images, 0.5 M parameters, with the classifier of its pretraining and a new head.

images (M, 8, 8) → 16 patches of 2 × 2 and a class token → 4 blocks → the class token's state (M, 128).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, INTERMEDIATE, LAYERS, HEADS, CLASSES = 128, 256, 4, 4, 10
LINEAR_LAYERS = ("query", "key", "value", "output", "intermediate")
"""Every linear layer of the blocks; ``"output"`` is the attention's and the feed-forward part's."""


class Attention(nn.Module):
    """Self-attention ``(M, tokens, 128)`` to the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))

    def forward(self, states: Tensor) -> Tensor:
        projections = (self.query(states), self.key(states), self.value(states))
        query, key, value = (p.unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in projections)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.output(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a feed-forward part, each on the normalised sum of what came before."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_before, self.norm_after = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.attention = Attention()
        self.intermediate, self.output = nn.Linear(HIDDEN, INTERMEDIATE), nn.Linear(INTERMEDIATE, HIDDEN)

    def forward(self, states: Tensor) -> Tensor:
        states = states + self.attention(self.norm_before(states))
        return states + self.output(F.gelu(self.intermediate(self.norm_after(states))))


class ViT(nn.Module):
    """``forward`` gives the new task's logits, ``classifier(features(images))`` those of the pretraining task.

    The new ``head`` is zero: before training it knows nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(4, HIDDEN)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, HIDDEN))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 17, HIDDEN))
        self.layer = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(HIDDEN)
        self.classifier, self.head = nn.Linear(HIDDEN, CLASSES), nn.Linear(HIDDEN, CLASSES)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, images: Tensor) -> Tensor:
        """The class token's last state, ``(M, 128)``."""
        patches = images.unflatten(2, (4, 2)).unflatten(1, (4, 2)).transpose(2, 3).reshape(-1, 16, 4)
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), self.patches(patches)], dim=1)
        states = tokens + self.positions
        for block in self.layer:
            states = block(states)
        return self.norm(states)[:, 0]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))
