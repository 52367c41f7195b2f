"""Small models and the snapshot that shows a model has not changed, for several test files."""

from typing import Any

import torch
from torch import nn

import ipca
from ipca._hashing import tensor_sha256


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(20, 12), nn.Linear(12, 20), nn.Linear(20, 5)

    def forward(self, x):
        return self.head(self.b(self.a(x).relu()))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(20, 12), nn.Linear(12, 20), nn.LayerNorm(20)


def adapted(model: nn.Module) -> nn.Module:
    ipca.apply_pc(model, rank=3, modules_to_save=["norm"], progress=False)
    with torch.no_grad():
        for parameter in ipca.adapter_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """Which modules and parameters stand where, whether they train, and every bit of them."""
    parameters = list(model.named_parameters(remove_duplicate=False)) + list(model.named_buffers())
    return (
        [(name, id(module), module.training) for name, module in model.named_modules(remove_duplicate=False)],
        [(name, id(p), p.requires_grad, "" if p.is_meta else tensor_sha256(p)) for name, p in parameters],
    )
