"""The arms of a study as models: adapt, scale the change, and pull it toward the start."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ipca.analysis import update_norm
from ipca.lab import baselines
from ipca.model import AdapterSettings
from ipca.model.apply import adapted_layers
from ipca.svd import SpectralCache
from studies.frontier.design import Arm


class Tuned:
    """A model that is being fine-tuned by an arm, all linear layers of its blocks.

    Args:
        model: the base; it is adapted in place.
        arm: how.
        rank: of the adapter.
        seed: of what the arm draws.
        cache: of decompositions.
    """

    def __init__(self, model: nn.Module, arm: Arm, rank: int, seed: int, cache: SpectralCache) -> None:
        settings = AdapterSettings(rank=rank, window=arm.reference, alpha=arm.scaling * rank)
        self.arm = arm
        self.model = baselines.apply(model, arm.method, settings, seed=seed, cache=cache)
        self.trained: dict[str, nn.Parameter] = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self._layers = adapted_layers(self.model)
        self._keeps_start = not self._layers or arm.pull > 0
        self._start = {n: p.detach().clone() for n, p in self.trained.items()} if self._keeps_start else {}

    @torch.no_grad()
    def pull(self, rate: float) -> None:
        """AdamW's decoupled decay after a step at ``rate``, toward the start instead of toward 0."""
        if self.arm.pull:
            for name, parameter in self.trained.items():
                parameter.lerp_(self._start[name], rate * self.arm.pull)

    @contextmanager
    def scaled(self, scale: float) -> Iterator[nn.Module]:
        """Within the block, the model with ``W + scale · ΔW`` in every layer: 0 is the base and 1 the tuned model."""
        if self._layers:
            alphas = {layer: layer.alpha for layer in self._layers.values()}
            for layer, alpha in alphas.items():
                layer.alpha = scale * alpha
            try:
                yield self.model
            finally:
                for layer, alpha in alphas.items():
                    layer.alpha = alpha
            return
        tuned = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        try:
            self._set({name: self._start[name].lerp(tuned[name], scale) for name in tuned})
            yield self.model
        finally:
            self._set(tuned)

    def update(self) -> float:
        """``‖ΔW‖ / ‖W‖``, Frobenius norms over all adapted layers together."""
        if self._layers:
            return update_norm(self.model)
        pairs = [(parameter.detach(), self._start[name]) for name, parameter in self.trained.items()]
        changes, norms = zip(*(((p - w).norm().item(), w.norm().item()) for p, w in pairs), strict=True)
        return math.hypot(*changes) / math.hypot(*norms)

    @torch.no_grad()
    def _set(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(values[name])
