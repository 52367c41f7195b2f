"""Adapter initialization of whole models: ``ipca.apply_pc`` beside PEFT's initializations by an SVD.

The model has four layers ``n × n`` and two ``m × n``; the layers of a shape are one matrix with its rows in another
order, so that they share their right singular vectors. PEFT's ``"pissa"`` and ``"pissa_niter_4"`` take the principal
window, its ``"mica"`` the left vectors of the minor one.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import ipca
from bench.svd_grid import OURS, SQUARE, WIDE, Cell
from bench.svd_matrices import Accuracy, Found, accuracy, matrix, truth
from bench.svd_providers import Call, Provider
from ipca.model.apply import adapted_layers


def model_of(cell: Cell, device: torch.device) -> nn.Module:
    """The plain model, its layers in float32."""
    generator = torch.Generator().manual_seed(1)

    def linear(m: int) -> nn.Linear:
        order = torch.randperm(m, generator=generator)
        layer = nn.Linear(cell.n, m, bias=False, device="meta")
        layer.weight = nn.Parameter(
            matrix(m, cell.n, cell.spectrum, device, 1)[0][order.to(device)], requires_grad=False
        )
        return layer

    layers = {name: linear(cell.n) for name in SQUARE} | {name: linear(cell.m) for name in WIDE}
    return nn.ModuleDict(layers)


def initializer(name: str, cell: Cell, plain: nn.Module, window: str) -> Provider:
    """The provider ``name``; each call gets a copy of ``plain`` of its own, made outside the time."""
    start = _apply(cell.rank, window) if name == OURS else _peft(cell.rank, name.removeprefix("peft-"))

    def prepare() -> Call:
        model = copy.deepcopy(plain)
        return lambda: start(model)

    return Provider(prepare, lambda model, _: account(model))


def worst(cell: Cell, plain: nn.Module, adapted: nn.Module, start: int) -> Accuracy:
    """Over the layers: the largest residual and angle, and all index errors together."""
    found = []
    for name, layer in plain.named_children():
        W = layer.get_parameter("weight").detach()
        exact = truth(*W.shape, cell.spectrum, W.device, 1)
        found.append(accuracy(W, components(W, *_factors(adapted, name)), exact, start))
    return Accuracy(
        max(one.residual for one in found), max(one.angle for one in found), sum(one.index_errors for one in found)
    )


def components(W: Tensor, A: Tensor, B: Tensor) -> Found:
    """``U, S, V`` from factors ``B = U √S`` and ``A = √S Vᵀ``; where ``A`` is zero, from ``U`` and ``W``."""
    W, A, B = W.double(), A.detach().double(), B.detach().double()
    if not A.any():
        A = B.mT @ W
        return Found(B / B.norm(dim=0), A.norm(dim=1), (A / A.norm(dim=1, keepdim=True)).mT)
    left, right = B.norm(dim=0), A.norm(dim=1)
    return Found(B / left, left * right, (A / right[:, None]).mT)


def _apply(rank: int, window: str) -> Callable[[nn.Module], nn.Module]:
    return lambda model: ipca.apply_pc(model, rank=rank, window=window, targets=[*SQUARE, *WIDE], progress=False)


def _peft(rank: int, initialization: str) -> Callable[[nn.Module], nn.Module]:
    def start(model: nn.Module) -> nn.Module:
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=[*SQUARE, *WIDE],
            init_lora_weights=initialization,  # type: ignore[arg-type]
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it asks for a model's config
            return get_peft_model(model, config)

    return start


def _factors(adapted: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    if ours := adapted_layers(adapted):
        return ours[name].lora_A, ours[name].lora_B
    layer = adapted.get_submodule(f"base_model.model.{name}")
    return layer.get_parameter("lora_A.default.weight"), layer.get_parameter("lora_B.default.weight")


def account(adapted: nn.Module) -> Found:
    """Paths, whether all windows are certified, and operations; :func:`worst` looks at the components."""
    none = torch.empty(0)
    reports = [layer.svd_report for layer in adapted_layers(adapted).values() if layer.svd_report is not None]
    if not reports:
        return Found(none, none, none)
    path = "+".join(sorted({report.path for report in reports}))
    proven, flops = all(report.certified for report in reports), sum(report.flops for report in reports)
    return Found(none, none, none, path, proven, flops)
