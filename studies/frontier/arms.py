"""The arms of a study as models: adapt, scale the change, and pull it toward the start."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from ipca.analysis import update_norm
from ipca.lab import baselines
from ipca.lab.baselines.adapt import layer_weights
from ipca.model import AdapterSettings
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
        inputs: batches, for an arm that looks at inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        arm: Arm,
        rank: int,
        seed: int,
        cache: SpectralCache,
        inputs: Sequence[Any] | None = None,
    ) -> None:
        settings = AdapterSettings(rank=rank, window=arm.reference, alpha=arm.scaling * rank, **arm.options)
        self.arm = arm
        keeps = baselines.kind_of(arm.method) in ("full", "baseline")  # the others' layers hold their base
        self._base = {n: w.clone() for n, w in layer_weights(model, settings).items()} if keeps else None
        self.model = baselines.apply(model, arm.method, settings, seed=seed, cache=cache, calibration=inputs)
        self.trained: dict[str, nn.Parameter] = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self._start = {n: p.detach().clone() for n, p in self.trained.items()} if arm.pull else {}

    @torch.no_grad()
    def pull(self, rate: float) -> None:
        """AdamW's decoupled decay after a step at ``rate``, toward the start instead of toward 0."""
        for name, start in self._start.items():
            self.trained[name].lerp_(start, rate * self.arm.pull)

    def scaled(self, scale: float) -> AbstractContextManager[nn.Module]:
        """Within the block, the model with ``W + scale · ΔW`` in every layer: 0 is the base and 1 the tuned model."""
        return baselines.scaled(self.model, scale, self._base)

    def update(self) -> float:
        """``‖ΔW‖ / ‖W‖``, Frobenius norms over all adapted layers together."""
        return update_norm(self.model, self._base)
