"""The cases of the self check: kernels, shapes, dtypes and configurations, with inputs and their results in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ipca.kernels import tuning
from ipca.kernels.configs import Config, fitting, most_components_at_once
from ipca.kernels.few_tokens import few_tokens
from ipca.kernels.launch import has_descriptors
from ipca.kernels.linear import input_grad, linear
from ipca.kernels.outer import outer
from ipca.kernels.products import products
from ipca.kernels.project import project
from ipca.ops import torch_kernels
from ipca.ops.dropout import kernel_mask

Shape = tuple[int, int, int, int]
"""``M, N, K, R``."""

SHAPES: tuple[Shape, ...] = ((130, 128, 256, 16), (37, 70, 133, 5), (5, 41, 25, 5), (130, 87, 135, 24))
"""Aligned, then odd: partial tiles in every direction, fewer than a tile, more components than a block."""
DTYPES = {"16-bit": (torch.bfloat16, torch.float16), "tf32": (torch.float32,), "float32": (torch.float32,)}
SCALING = 0.7
DROPOUT = 0.3
Run = Callable[[Any, Any], Sequence[Tensor]]
"""The results of one kernel, by a namespace of functions (Triton's or PyTorch's) from a namespace of tensors."""


class Family(NamedTuple):
    """A kernel in one of its uses; ``dropout`` None alternates."""

    name: str
    kernel: str
    run: Run
    tma: bool = False
    dropout: bool | None = False


class Case(NamedTuple):
    """One check: a family at a shape, in one configuration. ``R`` components may be fewer than a shape has."""

    family: Family
    arithmetic: str
    dtype: torch.dtype
    shape: Shape
    dropout: bool
    config: Config


def _linear(ops: Any, t: Any) -> Sequence[Tensor]:
    return (ops.linear(t.x, t.weight, t.h, t.E, t.bias, scaling=SCALING),)


def _input_grad(ops: Any, t: Any) -> Sequence[Tensor]:
    return (ops.input_grad(t.dy, t.weight, t.g, t.D, *t.dropout),)


def _project(ops: Any, t: Any) -> Sequence[Tensor]:
    return (ops.project(t.x, t.D, *t.dropout, scaling=SCALING),)


def _products(ops: Any, t: Any) -> Sequence[Tensor]:
    return ops.products(t.dy, t.h, t.E_intact, t.E.dtype, scaling=SCALING, needs_bias=True)


def _outer(ops: Any, t: Any) -> Sequence[Tensor]:
    return (
        ops.outer(t.g, t.x, t.D.dtype, *t.dropout, scaling=SCALING),
        ops.outer(t.h, t.dy, t.E.dtype, scaling=SCALING, transposed=True),
    )


def _few_tokens(ops: Any, t: Any) -> Sequence[Tensor]:
    return ops.few_tokens(t.x, t.weight, t.D, t.E, t.bias, *t.dropout, scaling=SCALING)


FAMILIES = (
    Family("linear, TMA", "linear", _linear, tma=True),
    Family("linear, pointers", "linear", _linear),
    Family("input_grad, TMA", "input_grad", _input_grad, tma=True),
    Family("input_grad, TMA, dropout", "input_grad", _input_grad, tma=True, dropout=True),
    Family("input_grad, pointers", "input_grad", _input_grad),
    Family("input_grad, pointers, dropout", "input_grad", _input_grad, dropout=True),
    Family("project", "project", _project, dropout=None),
    Family("products", "products", _products),
    Family("outer", "outer", _outer, dropout=None),
    Family("few_tokens", "few_tokens", _few_tokens, dropout=None),
)
"""``reduce`` is the second half of ``products`` and ``outer``."""


def cases(device: torch.device, arithmetics: Sequence[str] = tuple(DTYPES)) -> list[Case]:
    """All checks for a device: every family at every shape, and its configurations in turns."""
    return [case for kind in arithmetics for family in FAMILIES for case in _cases_of(family, kind, device)]


def _cases_of(family: Family, kind: str, device: torch.device) -> Iterator[Case]:
    """Dtypes share the configurations, and two shapes of one rank share a compilation where there are few."""
    if family.tma and (kind == "float32" or (device.type == "cuda" and not has_descriptors(device))):
        return
    # Triton's interpreter takes bfloat16 for raw bits.
    dtypes = [dtype for dtype in DTYPES[kind] if device.type == "cuda" or dtype != torch.bfloat16]
    for place, dtype in enumerate(dtypes):
        for turn, shape in enumerate(SHAPES):
            dropout = turn in (1, 2) if family.dropout is None else family.dropout
            M, N, K, R = _taken(family, kind, dtype, shape)
            rank = 2 * R if family.kernel == "products" else R
            fit = fitting(family.kernel, kind, rank, tuning.limits(device), dropout=dropout, tma=family.tma)
            own = fit[place :: len(dtypes)] or fit
            config = own[min(turn if len(own) > 3 else (0, 1, 1, 2)[turn], len(own) - 1)]
            yield Case(family, kind, dtype, (M, N, K, R), dropout, config)


def _taken(family: Family, kind: str, dtype: torch.dtype, shape: Shape) -> Shape:
    """The shape with rows of 16 bytes for descriptors, and the rank that ``few_tokens`` takes."""
    M, N, K, R = shape
    if family.kernel == "few_tokens":
        R = min(R, most_components_at_once(kind))
    if family.tma:
        step = 16 // dtype.itemsize
        K = -(-K // step) * step
        N = -(-N // step) * step if family.kernel == "input_grad" else N
    return M, N, K, R


def draw(case: Case, device: torch.device) -> SimpleNamespace:
    """Random inputs, the same for each case: 16-bit or float32 with float32 factors, as layers have them."""
    M, N, K, R = case.shape
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = case.dtype, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, device="cpu")).to(device, dtype)

    factors = partial(normal, dtype=torch.float32)
    seed = torch.tensor([0x1234_5678_9ABC_DEF0], device=device)
    return SimpleNamespace(
        x=normal(M, K),
        dy=normal(M, N),
        weight=normal(N, K, scale=K**-0.5),
        bias=normal(N),
        D=factors(R, K, scale=K**-0.5),
        E=factors(N, R, scale=R**-0.5),
        E_intact=factors(N, 2 * R, scale=R**-0.5),
        h=normal(M, R),
        g=normal(M, R),
        dropout=(seed, DROPOUT) if case.dropout else (None, 0.0),
    )


def _triton(tma: bool) -> SimpleNamespace:
    large = {"linear": partial(linear, tma=tma), "input_grad": partial(input_grad, tma=tma)}
    return SimpleNamespace(**large, project=project, products=products, outer=outer, few_tokens=few_tokens)


def _few_tokens_in_pytorch(
    x: Tensor, weight: Tensor, D: Tensor, E: Tensor, bias: Tensor, noise: Tensor | None, p: float, *, scaling: float
) -> tuple[Tensor, Tensor]:
    h = torch_kernels.project(x, D, noise, p)
    return torch_kernels.linear_base_first(x, weight, h, E, bias, scaling=scaling), h


PYTORCH = SimpleNamespace(
    linear=torch_kernels.linear_base_first,
    input_grad=torch_kernels.input_grad_base_first,
    project=torch_kernels.project,
    products=torch_kernels.products,
    outer=torch_kernels.outer,
    few_tokens=_few_tokens_in_pytorch,
)


def run_kernel(case: Case, given: SimpleNamespace) -> Sequence[Tensor]:
    """The results of the kernel; dropout has a seed."""
    with tuning.force(case.family.kernel, case.config):
        return case.family.run(_triton(case.family.tma), given)


def run_pytorch(case: Case, given: SimpleNamespace, dtype: torch.dtype | None = None) -> Sequence[Tensor]:
    """The same in PyTorch, of all inputs as ``dtype`` if one is given."""
    noise, p = given.dropout
    mask = (None, 0.0) if noise is None else (kernel_mask(noise, case.shape[0], case.shape[2], p), p)
    tensors = {name: value.to(dtype or value.dtype) for name, value in vars(given).items() if isinstance(value, Tensor)}
    return case.family.run(PYTORCH, SimpleNamespace(**tensors, dropout=mask))
