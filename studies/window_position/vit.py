"""A vision transformer for 8 × 8 images, with the classifier of its pretraining and a new head.

images (M, 8, 8), enlarged for larger shapes → patches and a class token → blocks → final state of the class token
(M, hidden).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10
LINEAR_LAYERS = ("query", "key", "value", "output", "intermediate")
"""Every linear layer of the blocks; ``"output"`` matches that of the attention and of the feed-forward part."""


@dataclass(frozen=True)
class Shape:
    """Size of a :class:`ViT`; images of ``side × side`` pixels in patches of ``patch × patch``."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    side: int
    patch: int

    @property
    def grid(self) -> int:
        """Patches in a row."""
        return self.side // self.patch


SHAPES = {"small": Shape(128, 256, 4, 4, side=8, patch=2), "base": Shape(768, 3072, 12, 12, side=64, patch=16)}
"""0.5 M parameters; 85 M, the shape of ViT-B/16."""


class Attention(nn.Module):
    """Self-attention ``(M, tokens, hidden)`` to the same shape."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.query, self.key, self.value, self.output = (nn.Linear(shape.hidden, shape.hidden) for _ in range(4))

    def forward(self, states: Tensor) -> Tensor:
        projections = (self.query(states), self.key(states), self.value(states))
        query, key, value = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in projections)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.output(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm attention and feed-forward part with residual connections."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm_before, self.norm_after = nn.LayerNorm(shape.hidden), nn.LayerNorm(shape.hidden)
        self.attention = Attention(shape)
        self.intermediate = nn.Linear(shape.hidden, shape.intermediate)
        self.output = nn.Linear(shape.intermediate, shape.hidden)

    def forward(self, states: Tensor) -> Tensor:
        states = states + self.attention(self.norm_before(states))
        return states + self.output(F.gelu(self.intermediate(self.norm_after(states))))


class ViT(nn.Module):
    """``forward`` returns the new task's logits, ``classifier(features(images))`` those of the pretraining task.

    The new ``head`` is initialized to zero.

    Args:
        size: one of :data:`SHAPES`.
    """

    def __init__(self, size: str = "small") -> None:
        super().__init__()
        self.shape = shape = SHAPES[size]
        hidden = shape.hidden
        self.patches = nn.Linear(shape.patch**2, hidden)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, hidden))
        self.positions = nn.Parameter(0.02 * torch.randn(1, shape.grid**2 + 1, hidden))
        self.layer = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(hidden)
        self.classifier, self.head = nn.Linear(hidden, CLASSES), nn.Linear(hidden, CLASSES)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, images: Tensor) -> Tensor:
        """The class token's last state, ``(M, hidden)``, of ``images (M, 8, 8)``."""
        patches = self.cut(self.enlarged(images))
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), self.patches(patches)], dim=1)
        states = tokens + self.positions
        for block in self.layer:
            states = block(states)
        return self.norm(states)[:, 0]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def enlarged(self, images: Tensor) -> Tensor:
        """``images (M, 8, 8)`` as ``(M, side, side)``, bilinear."""
        side = self.shape.side
        if images.shape[-1] == side:
            return images
        return F.interpolate(images[:, None], size=(side, side), mode="bilinear", align_corners=False)[:, 0]

    def cut(self, images: Tensor) -> Tensor:
        """The patches ``(M, grid², patch²)`` of images ``(M, side, side)``, row by row."""
        grid, patch = self.shape.grid, self.shape.patch
        squares = images.unflatten(2, (grid, patch)).unflatten(1, (grid, patch)).transpose(2, 3)
        return squares.reshape(-1, grid**2, patch**2)
