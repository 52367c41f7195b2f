"""Correctness of a provider: its output and all gradients against float64, checked before anything is timed.

Tolerance: an error of at most twice that of plain PyTorch in the same dtype, or one epsilon of the largest value, about
the cost of rounding the exact result and one intermediate sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.providers import Provider, Sample, active, layer_call, trained
from ipca.nn import LinearPC

Results = dict[str, Tensor]


@dataclass
class Truth:
    """Exact results of one function, and the tolerance derived from the error of plain PyTorch."""

    exact: Results
    bounds: dict[str, float]

    def complaint(self, found: Results) -> str:
        """A description of the error in ``found``; empty if there is none."""
        assert found.keys() == self.exact.keys()
        for name, value in found.items():
            if not torch.isfinite(value).all():
                return f"{name} is not finite"
            error = largest(value - self.exact[name])
            if not error <= self.bounds[name]:
                return f"{name} is off by {error:.1e}, allowed {self.bounds[name]:.1e}"
        return ""


def truth_of(sample: Sample, form: str) -> Truth:
    """The function of ``form``, or of the bare layer if it is empty, on the sample's tensors."""
    layer = sample.layer(Provider("ipca-auto", form or "residual"))
    assert isinstance(layer, LinearPC)
    factors: list[Tensor] = []
    if form:
        factors = [layer.lora_A, layer.lora_B, *([layer.lora_A0, layer.lora_B0] if form == "intact" else [])]

    def run(dtype: torch.dtype) -> Results:
        x, dy, weight = (t.detach().to(dtype) for t in (sample.x, sample.dy, layer.base_weight))
        cast = [factor.detach().to(dtype) for factor in factors]
        leaves = [x, *cast[:2]]
        for leaf in leaves:
            leaf.requires_grad_()
        return results(lambda x: plain(x, weight, *cast), x, dy, leaves[1:])

    exact, rounded = run(torch.float64), run(sample.cell.torch_dtype)
    eps = torch.finfo(sample.cell.torch_dtype).eps
    bounds = {n: max(2 * largest(rounded[n] - exact[n]), eps * largest(exact[n])) for n in exact}
    return Truth(exact, bounds)


def plain(x: Tensor, weight: Tensor, *factors: Tensor) -> Tensor:
    """``x Wᵀ + x Aᵀ Bᵀ − x A0ᵀ B0ᵀ``, with the terms of the given factors."""
    y = F.linear(x, weight)
    for sign, A, B in zip((1, -1), factors[::2], factors[1::2], strict=False):
        y = y + sign * F.linear(F.linear(x, A), B)
    return y


def results(call: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, parameters: Sequence[Tensor]) -> Results:
    """``y`` and the gradients of ``x`` and of the factors, for the output gradient ``dy``."""
    y = call(x)
    gradients = torch.autograd.grad(y, [x, *parameters], dy)
    return {"y": y.detach(), **dict(zip(("dx", "dA", "dB"), gradients, strict=False))}


def check(provider: Provider, sample: Sample, truth: Truth) -> str:
    """A description of the provider's error; empty if there is none. With dropout only finiteness is checked."""
    layer, call = sample.layer(provider), layer_call(provider, sample)
    x, dy, parameters = sample.x, sample.dy, trained(layer)
    with active(provider):
        layer.train(not sample.cell.dropout)
        found = truth.complaint(results(call, x, dy, parameters))
        layer.train()
        if found or not sample.cell.dropout:
            return found
        infinite = [name for name, value in results(call, x, dy, parameters).items() if not torch.isfinite(value).all()]
    return f"{infinite[0]} is not finite with dropout" if infinite else ""


def largest(difference: Tensor) -> float:
    """The largest absolute entry."""
    return float(difference.abs().max())
