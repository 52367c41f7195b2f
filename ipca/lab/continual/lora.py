"""Methods that train plain LoRA: one adapter through all tasks, a new one for each, and O-LoRA."""

from __future__ import annotations

from torch import Tensor, nn

from ipca.lab import baselines
from ipca.lab.continual.method import Adapter, Method, Setup, fold, leave
from ipca.model.apply import adapted_layers
from ipca.model.merge import require_adapted, unload


def one_lora(setup: Setup) -> Method:
    """One LoRA (arXiv 2106.09685) that goes on training from task to task."""

    def begin(model: nn.Module, index: int) -> None:
        if index == 0:
            _apply(model, setup, index)
        require_adapted(model)

    return Method(begin=begin, end=leave, finish=unload)


def fresh_lora(setup: Setup) -> Method:
    """A new LoRA for every task, folded into the weights after it."""
    return Method(begin=lambda model, index: _apply(model, setup, index))


def o_lora(setup: Setup) -> Method:
    """A new LoRA for every task, whose rows are driven away from those of every earlier one.

        penalty = λ Σ_layers Σ_{i < t} Σ |A_t A_iᵀ|

    The sum of absolute entries is that of the authors' program, with λ = 0.5; the paper writes squares. Earlier
    updates ``B_i A_i`` are frozen and here folded into the weight; their ``A_i`` stay, for the penalty.

    Source: "Orthogonal Subspace Learning for Language Model Continual Learning", arXiv 2310.14152.
    """
    earlier: list[dict[str, Tensor]] = []

    def end(model: nn.Module) -> Adapter:
        layers = fold(model)
        earlier.append({name: layer.lora_A.detach() for name, layer in layers.items()})
        return layers

    return Method(
        begin=lambda model, index: _apply(model, setup, index),
        end=end,
        penalty=lambda model: overlap(adapted_layers(model), earlier, setup.orthogonality),
        state=lambda: [A for task in earlier for A in task.values()],
    )


def overlap(layers: Adapter, earlier: list[dict[str, Tensor]], weight: float) -> Tensor | None:
    """``weight · Σ |A A_oldᵀ|`` over layers, earlier tasks and entries; None without any. ``A (…, rank, in)``."""
    terms = [
        (layer.lora_A @ task[name].to(layer.lora_A).mT).abs().sum()  # the model may have moved since
        for task in earlier
        for name, layer in layers.items()
    ]
    return weight * sum(terms[1:], start=terms[0]) if terms else None


def _apply(model: nn.Module, setup: Setup, index: int) -> None:
    baselines.apply(model, "lora", setup.config, seed=setup.seed_of(index))
