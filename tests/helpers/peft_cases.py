"""How the models of peft_models are wrapped and trained, and how far two outputs are apart."""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from ipca.peft import PCConfig
from tests.helpers.peft_models import Small, ids


def output(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return y if isinstance(y, Tensor) else y.logits


def wrap(base: nn.Module, config: LoraConfig | None = None, **options: Any) -> nn.Module:
    """``base``, untouched, in PEFT: a PCConfig of rank 3 unless ``config`` is given."""
    return get_peft_model(copy.deepcopy(base), config or PCConfig(**{"r": 3, "target_modules": ["a", "b"], **options}))


def train(model: nn.Module, x: Tensor, steps: int = 2, optimizer: torch.optim.Optimizer | None = None) -> list[float]:
    """The losses of some steps of AdamW."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = output(model, x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def disturb(model: nn.Module) -> None:
    """Move everything that trains."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn_like(parameter))


def randomize(model):
    """Let every stock adapter of ``model`` do something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and not parameter.any():
                parameter.normal_()


@torch.no_grad()
def off(x: Tensor, y: Tensor) -> float:
    """The largest difference relative to the largest entry of ``y``."""
    return ((x.double() - y.double()).abs().max() / y.double().abs().max()).item()


def saved(folder: Path, base: nn.Module | None = None, **options: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """A base, its adapted model, trained and saved to ``folder``, and an input."""
    torch.manual_seed(0)
    base, x = base or Small(), ids()
    model = wrap(base, **options)
    train(model, x)
    model.save_pretrained(folder)
    return base, model, x
