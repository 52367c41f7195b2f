"""Block sizes of each kernel: candidates, those that fit a device, and the rule for shapes never measured."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Config(NamedTuple):
    """Block sizes and launch options; a kernel reads those it has."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    BLOCK_R: int = 128  # at most so many components at once
    GROUP_M: int = 8
    SUBTILE: int = 1

    def describe(self) -> str:
        """A short text."""
        blocks = " × ".join(str(size) for size in self[:3] if size)
        return f"{blocks}, {self.num_warps} warps, {self.num_stages} stages"


CONFIGS: dict[tuple[str, str], tuple[Config, ...]] = {
    ("linear", "16-bit"): (
        Config(128, 256, 64, 8, 4, SUBTILE=4),
        Config(128, 256, 64, 8, 3, SUBTILE=4),
        Config(128, 128, 64, 8, 4, SUBTILE=2),
        Config(128, 128, 32, 8, 3, SUBTILE=2),
        Config(64, 128, 64, 4, 4, SUBTILE=2),
        Config(64, 64, 64, 4, 3),
    ),
    ("linear", "tf32"): (
        Config(128, 128, 32, 8, 2, SUBTILE=4),
        Config(128, 64, 32, 8, 3, SUBTILE=2),
        Config(64, 64, 64, 4, 2),
    ),
    ("linear", "float32"): (Config(32, 32, 32, 4, 3),),
    ("few_tokens", "16-bit"): (
        Config(16, 32, 256, 8, 4),
        Config(16, 64, 128, 4, 4),
        Config(16, 32, 128, 4, 3),
        Config(32, 64, 128, 4, 4),
        Config(64, 64, 128, 4, 3),
        Config(64, 128, 64, 8, 4),
        Config(16, 32, 32, 4, 3),
    ),
    ("few_tokens", "tf32"): (Config(16, 32, 64, 4, 3), Config(32, 64, 32, 4, 3), Config(16, 32, 32, 4, 2)),
    ("few_tokens", "float32"): (Config(16, 32, 32, 8, 2), Config(16, 16, 16, 2, 2)),
    ("project", "16-bit"): (
        Config(32, 0, 128, 4, 4),
        Config(16, 0, 256, 4, 4),
        Config(64, 0, 128, 4, 4),
        Config(64, 0, 64, 4, 4),
        Config(128, 0, 64, 8, 3, BLOCK_R=64),
        Config(32, 0, 32, 4, 3),
    ),
    ("project", "tf32"): (Config(32, 0, 64, 4, 3), Config(64, 0, 32, 8, 3), Config(16, 0, 32, 4, 2)),
    ("project", "float32"): (Config(32, 0, 32, 8, 3), Config(16, 0, 16, 4, 2)),
    ("products", "16-bit"): (
        Config(64, 256, 0, 8, 2),
        Config(64, 128, 0, 4, 4),
        Config(128, 128, 0, 8, 3),
        Config(32, 64, 0, 4, 3),
    ),
    ("products", "tf32"): (Config(64, 128, 0, 8, 2), Config(32, 64, 0, 4, 2)),
    ("products", "float32"): (Config(16, 32, 0, 8, 2),),
    ("outer", "16-bit"): (
        Config(64, 0, 128, 4, 4),
        Config(128, 0, 128, 8, 3),
        Config(64, 0, 256, 8, 3),
        Config(64, 0, 64, 4, 4),
        Config(32, 0, 64, 4, 3),
    ),
    ("outer", "tf32"): (Config(64, 0, 64, 8, 2), Config(32, 0, 64, 4, 2)),
    ("outer", "float32"): (Config(16, 0, 32, 4, 2),),
}
CONFIGS |= {("input_grad", kind): CONFIGS["linear", kind] for kind in ("16-bit", "tf32", "float32")}


def arithmetic(x: Tensor) -> str:
    """The matrix instructions for rows like those of ``x``: ``"16-bit"``, ``"tf32"`` or ``"float32"`` (none)."""
    return arithmetic_of(x.element_size())


def arithmetic_of(itemsize: int) -> str:
    """:func:`arithmetic` of a dtype with so many bytes."""
    if itemsize == 2:
        return "16-bit"
    precision = torch.backends.cuda.matmul.fp32_precision
    precision = getattr(torch.backends, "fp32_precision", "none") if precision == "none" else precision
    return "tf32" if precision == "tf32" else "float32"


def padded_rank(R: int, limit: int) -> int:
    """The power of two from 16 to ``limit`` that holds ``R`` components, or ``limit`` where several passes do."""
    return min(limit, max(16, 1 << (R - 1).bit_length()))


def subtiles(config: Config, kind: str, *, dropout: bool) -> int:
    """The number of parts in which the linear kernel stores a tile's columns: few values a thread at once.

    The accumulator takes up to 128 registers; dropout needs another one, and its random words.
    """
    if not dropout:
        return config.SUBTILE
    values = 32 * config.num_warps * {"16-bit": 8, "tf32": 4, "float32": 4}[kind]
    return min(8, max(config.SUBTILE, config.BLOCK_N // max(16, values // config.BLOCK_M)))


def linear_rank_block(R: int, kind: str, *, tma: bool) -> int:
    """The components that the linear kernel adds at once: both operands pass through registers, beside addresses."""
    return padded_rank(R, 32 if tma and kind != "float32" else 16)


def most_components_at_once(kind: str) -> int:
    """The largest rank that the kernel for few tokens takes: it holds all of ``h``."""
    return 16 if kind == "float32" else 128


def precision(x: Tensor) -> str:
    """Triton's name of the precision in which :func:`arithmetic` multiplies float32."""
    return "tf32" if arithmetic(x) == "tf32" else "ieee"


def shared_bytes(kernel: str, config: Config, kind: str, R: int) -> int:
    """Shared memory that the pipelined tiles take: what a stage holds, times the stages; factors count as float32."""
    size = 2 if kind == "16-bit" else 4
    rank = padded_rank(R, config.BLOCK_R)
    M, N, K = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K
    stage = {
        "linear": (M + N) * K * size,
        "input_grad": (M + N) * K * size,
        "few_tokens": (M + N) * K * size + rank * K * 4,
        "project": M * K * size + rank * K * 4,
        "products": M * (N + rank) * size,
        "outer": M * (K + rank) * size,
    }[kernel]
    return stage * config.num_stages


class Limits(NamedTuple):
    """A device's limits for one block: bytes of shared memory; columns of tensor memory, 0 where there is none."""

    shared: int
    tensor_columns: int


def fitting(
    kernel: str, kind: str, R: int, limits: Limits, *, dropout: bool = False, tma: bool = False
) -> tuple[Config, ...]:
    """The configurations that fit the device, and the registers with their epilogue; the smallest one if none does."""
    every = CONFIGS[kernel, kind]
    return tuple(config for config in every if _fits(config, kernel, kind, R, limits, dropout, tma)) or every[-1:]


def _fits(config: Config, kernel: str, kind: str, R: int, limits: Limits, dropout: bool, tma: bool) -> bool:
    if shared_bytes(kernel, config, kind, R) > limits.shared:
        return False
    if kernel not in ("linear", "input_grad"):
        return True
    # Tensor memory: the accumulator, and under dropout the low-rank product, have columns of their own.
    if limits.tensor_columns and (1 + dropout) * config.BLOCK_N > limits.tensor_columns:
        return False
    # Without descriptors addresses take registers, too; those of tf32 twice as many.
    tile, warps = config.BLOCK_M * config.BLOCK_N, config.num_warps
    if not tma and tile * config.BLOCK_K > 65_536 * warps:
        return False
    tight = kind == "tf32" and (not tma or (dropout and limits.tensor_columns > 0))
    return not tight or tile <= 1024 * warps


def untuned(kernel: str, fit: tuple[Config, ...], M: int, N: int, K: int, programs: int) -> Config:
    """A configuration for a shape that was never measured.

    The first one, in the order above, whose tiles nearly fill the device once; else that with most tiles. ``outer``
    splits its rows until the device is full, so that the first one always serves it; and with many components
    ``project`` takes large tiles, as every tile reads all of the factor.
    """
    if kernel == "outer":
        return fit[0]
    if kernel == "project" and N >= 64:
        return next((config for config in fit if config.BLOCK_M >= 64), fit[0])

    def tiles(config: Config) -> int:
        wide = kernel in ("linear", "input_grad", "few_tokens", "products")
        return -(-M // config.BLOCK_M) * (-(-N // config.BLOCK_N) if wide else 1)

    return next((config for config in fit if tiles(config) >= 0.9 * programs), max(fit, key=tiles))
