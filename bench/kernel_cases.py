"""Cases of the offline compilation: every kernel in every shipped configuration, with argument types.

Each case is the most demanding of its kind: with dropout if the kernel supports it, 128 components and 16, float32
factors on a bf16 weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from ipca.kernels.configs import (
    CONFIGS,
    Config,
    Limits,
    fitting,
    linear_rank_block,
    most_components_at_once,
    padded_rank,
    subtiles,
)
from ipca.kernels.few_tokens import _few_tokens_kernel
from ipca.kernels.linear import _linear_kernel
from ipca.kernels.outer import _outer_kernel
from ipca.kernels.products import MOST_COMPONENTS as FUSED_COMPONENTS
from ipca.kernels.products import _products_kernel
from ipca.kernels.project import _project_kernel
from ipca.kernels.reduce import _add_up_kernel

LIMITS = {
    80: Limits(166_912, 0),
    86: Limits(101_376, 0),
    89: Limits(101_376, 0),
    90: Limits(232_448, 0),
    100: Limits(232_448, 512),
    103: Limits(232_448, 512),
    120: Limits(101_376, 0),
}
COMPILED = (80, 90, 100)
SMALL = (86, 89, 120)  # their code is that of others, their limits are not: only the ends of what fits
KERNELS = {
    "linear": _linear_kernel,
    "few_tokens": _few_tokens_kernel,
    "project": _project_kernel,
    "products": _products_kernel,
    "outer": _outer_kernel,
}
POINTERS = {  # w: the weight's dtype, f: a factor, always float32 here, p: a float32 partial sum
    "linear": {"a": "w", "w": "w", "l": "w", "c": "f", "bias": "w", "out": "w"},
    "few_tokens": {"x": "w", "w": "w", "d": "f", "e": "f", "bias": "w", "y": "w", "h": "w"},
    "project": {"x": "w", "d": "f", "h": "w"},
    "products": {"dy": "w", "e": "f", "h": "w", "g": "p", "db": "p", "dbias": "p"},
    "outer": {"g": "w", "x": "w", "out": "p"},
}


class Case(NamedTuple):
    """One compilation: ``args`` maps every argument to a type such as ``"*bf16"`` or to a constant."""

    kernel: Any
    name: str
    variant: str
    config: Config
    args: dict[str, Any]
    archs: tuple[int, ...]
    matrix: bool


def shipped() -> Iterator[Case]:
    """Every case."""
    for (name, kind), configs in CONFIGS.items():
        for config in configs if name in KERNELS else ():
            ends = config == configs[0], config == configs[-1]
            for variant, archs, options in variants(name, kind, *ends):
                fits = tuple(a for a in archs if _fits(name, kind, config, a, options))
                if fits:
                    args = arguments(name, kind, config, options)
                    yield Case(KERNELS[name], name, variant, config, args, fits, kind != "float32")
    args = {
        "partial_ptr": "*fp32",
        "out_ptr": "*bf16",
        "numel": "i32",
        "splits": "i32",
        "scaling": "fp32",
        "BLOCK": 1024,
    }
    yield Case(_add_up_kernel, "reduce", "bf16", Config(0, 0, 0, 4, 1), args, COMPILED, False)


def _fits(name: str, kind: str, config: Config, arch: int, options: dict[str, Any]) -> bool:
    hard = {"dropout": options["DROPOUT"], "tma": options["TMA"]}
    fit = fitting(name, kind, options["R"], LIMITS[arch], **hard)
    return config in (fit if arch in COMPILED else (fit[0], fit[-1]))


def variants(name: str, kind: str, first: bool, last: bool) -> Iterator[tuple[str, tuple[int, ...], dict[str, Any]]]:
    """The variants of one kernel: description, architectures, and the options other than block sizes.

    Small kernels have the light variant only for the first configuration; pointers on architectures with TMA are
    compiled only for the last.
    """
    rank = {"products": FUSED_COMPONENTS // 2, "few_tokens": most_components_at_once(kind)}.get(name, 128)
    light = {"R": 16, "S": 16, "DROPOUT": False, "HAS_BIAS": False, "NEEDS_BIAS": False}
    heavy = {"R": rank, "S": 2 * rank, "DROPOUT": True, "HAS_BIAS": True, "NEEDS_BIAS": True}
    every = (*COMPILED, *SMALL) if kind == "16-bit" else COMPILED
    hows = ((False, "pointers, "), (True, "TMA, ")) if name == "linear" else ((False, ""),)
    for tma, how in hows if kind != "float32" else hows[:1]:
        both = {"PRECISION": "tf32" if kind == "tf32" else "ieee", "TMA": tma, "TMA_STORE": tma}
        forward = {**both, "ROWS_ARE_N": True}
        aligned = tuple(arch for arch in every if 90 <= arch < 120)
        both_ways = last or name != "linear" or kind == "float32"
        archs = aligned if tma else tuple(arch for arch in every if both_ways or arch not in aligned)
        if first or name == "linear":
            yield f"{kind}, {how}r={light['R']}", archs, {**light, **forward}
        if name == "linear":
            backward = {**both, "ROWS_ARE_N": False, "HAS_BIAS": False}
            yield f"{kind}, {how}r={rank}", archs, {**heavy, **forward, "DROPOUT": False}
            yield f"{kind}, {how}r={rank}, dx", archs, {**heavy, **backward, "DROPOUT": False}
            yield f"{kind}, {how}r={rank}, dropout, dx", archs, {**heavy, **backward}
        else:
            yield f"{kind}, r={rank}, dropout", archs, {**heavy, **forward}


def arguments(name: str, kind: str, config: Config, options: dict[str, Any]) -> dict[str, Any]:
    """A value for every argument of the kernel, in order; unit strides are the constant 1, as in a launch."""
    kinds = {"w": "*bf16" if kind == "16-bit" else "*fp32", "f": "*fp32", "p": "*fp32"}
    contiguous = {"linear": ("ak", "wk", "cr") if options.get("ROWS_ARE_N") else ("ak", "wn", "cn")}
    unit = contiguous.get(name, ("xk", "wk", "dk", "er", "es", "dyn", "ok"))
    values: dict[str, Any] = {f"{pointer}_ptr": kinds[kind] for pointer, kind in POINTERS[name].items()}
    values |= {"seed_ptr": "*i64", "scaling": "fp32", "keep_scale": "fp32", "threshold": "i32", "rows_each": "i32"}
    values |= dict.fromkeys("MNK", "i32") | options | config._asdict()
    values["SUBTILE"] = subtiles(config, kind, dropout=options["DROPOUT"])
    R = options["R"]
    values["BLOCK_R"] = (
        linear_rank_block(R, kind, tma=options["TMA"]) if name == "linear" else padded_rank(R, config.BLOCK_R)
    )
    values |= {"PROGRAMS": 132, "BLOCK_S": padded_rank(options["S"], config.BLOCK_R)}
    chosen = {}
    for argument in KERNELS[name].arg_names:
        stride = argument.removeprefix("stride_") if argument.startswith("stride_") else None
        chosen[argument] = values[argument] if stride is None else (1 if stride in unit else "i32")
    return chosen
