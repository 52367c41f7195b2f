"""Outputs of a model: computing, flattening and comparing them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Outputs = list[Tensor]
CACHES = ("past_key_values", "cache_params", "mems")
"""Parts of an output that are no result."""


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Any]) -> Outputs:
    """All float tensors that the model returns."""
    return [tensor.detach().clone() for tensor in _forward(model, inputs)]


def loss(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """A number in which every output counts, with its graph."""
    return loss_of(_forward(model, inputs))


def loss_of(outputs: Any) -> Tensor:
    """The sum of the mean squares of all outputs; infinite entries, of masks, count as 0."""
    parts = [tensor.float().nan_to_num(0, 0, 0).square().mean() for tensor in _tensors(outputs) if tensor.requires_grad]
    return torch.stack(parts).sum()


def difference(found: Outputs, wanted: Outputs) -> float:
    """The largest deviation of any output, relative to that output's largest entry.

    Raises:
        AssertionError: other outputs, other shapes, or other entries that are infinite.
    """
    assert len(found) == len(wanted), f"{len(found)} outputs in the place of {len(wanted)}"
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape, f"an output {tuple(a.shape)} in the place of {tuple(b.shape)}"
        a, b, finite = a.double(), b.double(), torch.isfinite(b)
        assert torch.equal(torch.isfinite(a), finite), "other entries are not finite"
        if finite.any():
            scale = b[finite].abs().max().clamp_min(1e-6)
            worst = max(worst, ((a[finite] - b[finite]).abs().max() / scale).item())
    return worst


def assert_equal(found: Outputs, wanted: Outputs) -> None:
    """The same bits."""
    off = difference(found, wanted)
    assert off == 0, f"differs by {off:.2g}, not the same bits"


def assert_close(found: Outputs, wanted: Outputs, tol: float, told: Sequence[str] = ()) -> None:
    """The same up to rounding; ``told`` is what the user was warned of, for the message."""
    off = difference(found, wanted)
    assert off <= tol, "; told: ".join([f"differs by {off:.2g}", *told])


@torch.no_grad()
def perturb(parameters: Iterable[nn.Parameter]) -> None:
    """Change parameters as training would, each by a fifth of its spread, the same in every call."""
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        spread = parameter.float().std() if parameter.numel() > 1 else 1.0
        spread = spread if spread > 0 else 0.1
        parameter.add_((0.2 * spread * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))


def _forward(model: nn.Module, inputs: dict[str, Any]) -> Outputs:
    torch.manual_seed(0)
    copied = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    return list(_tensors(model(**copied)))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif hasattr(value, "items"):
        for name, inner in value.items():
            if name not in CACHES:
                yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from _tensors(getattr(value, name))
