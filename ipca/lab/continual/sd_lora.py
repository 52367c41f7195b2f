"""SD-LoRA: earlier tasks leave normalized directions, whose magnitudes go on training beside the new task's factors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipca._atomic import uninterrupted
from ipca.lab.baselines import plain_lora_start
from ipca.lab.baselines.initialization import layer_generator
from ipca.lab.continual.method import Method, Setup, leave
from ipca.model.apply import train_only_adapter
from ipca.nn.initialization import add_low_rank
from ipca.nn.layer_kinds import build_layer, layer_kind, read_layer
from ipca.nn.registry import set_layer


class DirectionsLinear(nn.Module):
    """A linear layer with ``t`` earlier directions of fixed shape and learnable size, and a LoRA for the task at hand.

        y = x Wᵀ + bias + Σ_{i < t} m_i · (x Â_iᵀ) B̂_iᵀ + scaling · (x Aᵀ) Bᵀ,      ‖B̂_i Â_i‖_F = 1

    Trained are ``lora_A``, ``lora_B`` and the magnitudes ``m (t,)``; all else is frozen.

    Shapes: ``weight (out, in)``, ``lora_A (rank, in)``, ``lora_B (out, rank)``, ``directions_A (t · rank, in)``,
    ``directions_B (out, t · rank)``.

    A magnitude starts at the size that the update had when its task ended, ``‖scaling · B A‖_F``, so that a new task
    begins with the function of the last one.

    Source: "SD-LoRA: Scalable Decoupled Low-Rank Adaptation for Class Incremental Learning", arXiv 2501.13198.
    """

    def __init__(self, kind: str, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, *, scaling: float) -> None:
        super().__init__()
        self.kind, self.scaling = kind, scaling
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)
        self.magnitudes = nn.Parameter(A.new_empty(0))
        self.register_buffer("directions_A", A.new_empty(0, A.shape[1]))
        self.register_buffer("directions_B", B.new_empty(B.shape[0], 0))
        self.directions_A: Tensor
        self.directions_B: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y, z = F.linear(x, self.weight, self.bias), x.to(self.lora_A.dtype)
        low = self.scaling * F.linear(F.linear(z, self.lora_A), self.lora_B)
        if len(self.magnitudes):
            low = low + F.linear(F.linear(z, self.directions_A) * self._sizes(), self.directions_B)
        return y + low.to(y.dtype)

    def _sizes(self) -> Tensor:
        """The magnitude of every row of ``directions_A``."""
        return self.magnitudes.repeat_interleave(self.lora_A.shape[0])

    @torch.no_grad()
    def next(self, A: Tensor, B: Tensor) -> DirectionsLinear:
        """The layer of the next task, which starts from ``A`` and ``B = 0``: the update of this one is a direction."""
        norm = self.scaling * product_norm(self.lora_B, self.lora_A)
        root = (norm or 1.0) ** 0.5  # a layer that did not move leaves the direction 0
        layer = DirectionsLinear(self.kind, self.weight.detach(), self.bias, A, B, scaling=self.scaling)
        layer.directions_A = torch.cat([self.directions_A, self.lora_A.detach() / root])
        layer.directions_B = torch.cat([self.directions_B, self.lora_B.detach() * (self.scaling / root)], dim=1)
        layer.magnitudes = nn.Parameter(torch.cat([self.magnitudes.detach(), A.new_tensor([norm])]))
        return layer.train(self.training)

    @torch.no_grad()
    def to_plain(self) -> nn.Module:
        """A frozen layer of the original type with all of it in its weight, rounded once."""
        terms = [(self.scaling, self.lora_B, self.lora_A), (1.0, self.directions_B * self._sizes(), self.directions_A)]
        bias = None if self.bias is None else self.bias.detach().clone()
        plain = build_layer(self.kind, add_low_rank(self.weight, terms), bias)
        return plain.train(self.training).requires_grad_(False)


def product_norm(B: Tensor, A: Tensor) -> float:
    """``‖B A‖_F`` in float64, from the Gram matrices of the factors: ``√ Σ (BᵀB) ∘ (A Aᵀ)``."""
    B, A = B.detach().double(), A.detach().double()
    return ((B.mT @ B) * (A @ A.mT)).sum().clamp(min=0).sqrt().item()


def sd_lora(setup: Setup) -> Method:
    """Directions of earlier tasks with learnable magnitudes, see :class:`DirectionsLinear`."""
    return Method(begin=lambda model, index: _begin(model, setup, index), end=leave, finish=_finish)


def _begin(model: nn.Module, setup: Setup, index: int) -> None:
    layers = {}
    for target in setup.targets:
        old = model.get_submodule(target.name)
        generator = layer_generator(setup.seed_of(index), target.name)
        weight, bias = (old.weight.detach(), None) if isinstance(old, DirectionsLinear) else read_layer(old)
        dtype = setup.config.factor_dtype(weight.dtype)
        start = plain_lora_start(weight, target.window.rank, generator, adapter_dtype=dtype)
        if isinstance(old, DirectionsLinear):
            layers[target.name] = old.next(start.A0, start.B0)
            continue
        kind, scaling = layer_kind(old), target.alpha / target.window.rank
        assert kind is not None
        new = DirectionsLinear(kind, weight, bias, start.A0, start.B0, scaling=scaling)
        layers[target.name] = new.train(old.training)
    with uninterrupted():
        train_only_adapter(model, setup.modules_to_save)
        for name, layer in layers.items():
            set_layer(model, name, layer)


def _finish(model: nn.Module) -> None:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, DirectionsLinear)}
    for name, layer in layers.items():
        set_layer(model, name, layer.to_plain())
