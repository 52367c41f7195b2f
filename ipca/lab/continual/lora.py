"""Methods that train LoRA: one adapter for all tasks, a new one per task, O-LoRA, and SD-LoRA."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipca._atomic import uninterrupted
from ipca.lab.baselines import apply, plain_lora_factors
from ipca.lab.baselines.initialization import layer_generator
from ipca.lab.continual.method import Adapter, Method, Setup, fold, fold_nothing
from ipca.model.apply import adapted_layers, train_only_adapter
from ipca.model.merge import require_adapted, unload
from ipca.nn.initialization import add_low_rank
from ipca.nn.layer_kinds import build_layer, read_layer
from ipca.nn.registry import set_layer


def one_lora(setup: Setup) -> Method:
    """One LoRA (arXiv 2106.09685) that keeps training from task to task."""

    def begin(model: nn.Module, index: int) -> None:
        if index == 0:
            _apply_lora(model, setup, index)
        require_adapted(model)

    return Method(begin=begin, end=fold_nothing, finish=unload)


def fresh_lora(setup: Setup) -> Method:
    """A new LoRA for every task, folded into the weights after it."""
    return Method(begin=lambda model, index: _apply_lora(model, setup, index))


def o_lora(setup: Setup) -> Method:
    """A new LoRA for every task, whose rows are pushed to be orthogonal to those of all earlier tasks.

        penalty = λ Σ_layers Σ_{i < t} Σ |A_t A_iᵀ|

    The sum of absolute entries follows the authors' code, with λ = 0.5; the paper writes squares. Earlier updates
    ``B_i A_i`` are frozen, and here folded into the weight; their ``A_i`` are kept for the penalty.

    Source: "Orthogonal Subspace Learning for Language Model Continual Learning", arXiv 2310.14152.
    """
    earlier: list[dict[str, Tensor]] = []

    def end(model: nn.Module) -> Adapter:
        layers = fold(model)
        earlier.append({name: layer.lora_A.detach() for name, layer in layers.items()})
        return layers

    return Method(
        begin=lambda model, index: _apply_lora(model, setup, index),
        end=end,
        penalty=lambda model: overlap(adapted_layers(model), earlier, setup.orthogonality),
        state=lambda: [A for task in earlier for A in task.values()],
    )


def overlap(layers: Adapter, earlier: list[dict[str, Tensor]], weight: float) -> Tensor | None:
    """``weight · Σ |A A_oldᵀ|`` over layers, earlier tasks and entries; None if there are none. ``A (…, rank, in)``."""
    terms = [
        (layer.lora_A @ task[name].to(layer.lora_A).mT).abs().sum()  # the model may have moved to another device
        for task in earlier
        for name, layer in layers.items()
    ]
    return weight * sum(terms[1:], start=terms[0]) if terms else None


def _apply_lora(model: nn.Module, setup: Setup, index: int) -> None:
    apply(model, "lora", setup.settings, seed=setup.seed_of(index))


class DirectionsLinear(nn.Module):
    """A linear layer with ``t`` fixed unit-norm directions, their learnable magnitudes, and a LoRA for this task.

        y = x Wᵀ + bias + Σ_{i < t} m_i · (x Â_iᵀ) B̂_iᵀ + scaling · (x Aᵀ) Bᵀ,      ‖B̂_i Â_i‖_F = 1

    ``lora_A``, ``lora_B`` and the magnitudes ``m (t,)`` are trained; everything else is frozen.

    Shapes: ``weight (out, in)``, ``lora_A (rank, in)``, ``lora_B (out, rank)``, ``directions_A (t · rank, in)``,
    ``directions_B (out, t · rank)``.

    A magnitude is initialized to the norm of its task's update, ``‖scaling · B A‖_F``, so that a new task starts from
    the function of the previous one.

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
            low = low + F.linear(F.linear(z, self.directions_A) * self._row_magnitudes(), self.directions_B)
        return y + low.to(y.dtype)

    def _row_magnitudes(self) -> Tensor:
        """The magnitude of every row of ``directions_A``."""
        return self.magnitudes.repeat_interleave(self.lora_A.shape[0])

    @torch.no_grad()
    def next(self, A: Tensor, B: Tensor) -> DirectionsLinear:
        """The layer of the next task, with this task's update as a direction, starting from ``A`` and ``B = 0``."""
        norm = self.scaling * product_norm(self.lora_B, self.lora_A)
        root = (norm or 1.0) ** 0.5  # a layer that did not move has a zero direction
        layer = DirectionsLinear(self.kind, self.weight.detach(), self.bias, A, B, scaling=self.scaling)
        layer.directions_A = torch.cat([self.directions_A, self.lora_A.detach() / root])
        layer.directions_B = torch.cat([self.directions_B, self.lora_B.detach() * (self.scaling / root)], dim=1)
        layer.magnitudes = nn.Parameter(torch.cat([self.magnitudes.detach(), A.new_tensor([norm])]))
        return layer.train(self.training)

    @torch.no_grad()
    def to_plain(self) -> nn.Module:
        """A frozen layer of the original type with all updates in its weight, rounded once."""
        terms = [
            (self.scaling, self.lora_B, self.lora_A),
            (1.0, self.directions_B * self._row_magnitudes(), self.directions_A),
        ]
        bias = None if self.bias is None else self.bias.detach().clone()
        plain = build_layer(self.kind, add_low_rank(self.weight, terms), bias)
        return plain.train(self.training).requires_grad_(False)


def product_norm(B: Tensor, A: Tensor) -> float:
    """``‖B A‖_F`` in float64, from the Gram matrices of the factors: ``√ Σ (BᵀB) ∘ (A Aᵀ)``."""
    B, A = B.detach().double(), A.detach().double()
    return ((B.mT @ B) * (A @ A.mT)).sum().clamp(min=0).sqrt().item()


def sd_lora(setup: Setup) -> Method:
    """Directions of earlier tasks with learnable magnitudes, see :class:`DirectionsLinear`."""
    return Method(
        begin=lambda model, index: _begin_sd_lora(model, setup, index), end=fold_nothing, finish=_finish_sd_lora
    )


def _begin_sd_lora(model: nn.Module, setup: Setup, index: int) -> None:
    layers = {}
    for target in setup.targets:
        old = model.get_submodule(target.name)
        generator = layer_generator(setup.seed_of(index), target.name)
        weight, bias = (old.weight.detach(), None) if isinstance(old, DirectionsLinear) else read_layer(old)
        dtype = setup.settings.factor_dtype(weight.dtype)
        initial = plain_lora_factors(weight, target.window.rank, generator, adapter_dtype=dtype)
        if isinstance(old, DirectionsLinear):
            layers[target.name] = old.next(initial.A0, initial.B0)
            continue
        assert target.kind is not None
        new = DirectionsLinear(target.kind, weight, bias, initial.A0, initial.B0, scaling=target.scaling)
        layers[target.name] = new.train(old.training)
    with uninterrupted():
        train_only_adapter(model, setup.modules_to_save)
        for name, layer in layers.items():
            set_layer(model, name, layer)


def _finish_sd_lora(model: nn.Module) -> None:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, DirectionsLinear)}
    for name, layer in layers.items():
        set_layer(model, name, layer.to_plain())
