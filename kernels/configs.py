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
        Config(128, 128, 32, 8, 4, SUBTILE=2),
        Config(64, 128, 64, 4, 4, SUBTILE=2),
        Config(64, 64, 64, 4, 3),
    ),
    ("linear", "tf32"): (
        Config(128, 128, 32, 8, 3, SUBTILE=4),
        Config(128, 64, 32, 8, 3, SUBTILE=2),
        Config(64, 64, 32, 4, 3),
    ),
    ("linear", "float32"): (Config(32, 32, 16, 4, 2),),
    ("few_tokens", "16-bit"): (
        Config(16, 32, 256, 4, 4),
        Config(16, 64, 128, 4, 4),
        Config(16, 32, 128, 4, 3),
        Config(32, 64, 128, 4, 4),
        Config(64, 64, 128, 4, 3),
        Config(64, 128, 64, 8, 4),
        Config(16, 32, 32, 4, 3),
    ),
    ("few_tokens", "tf32"): (Config(16, 32, 64, 4, 3), Config(32, 64, 32, 4, 3), Config(16, 32, 32, 4, 2)),
    ("few_tokens", "float32"): (Config(16, 32, 32, 4, 2), Config(16, 16, 16, 4, 2)),
    ("project", "16-bit"): (
        Config(32, 0, 128, 4, 4),
        Config(16, 0, 256, 4, 4),
        Config(64, 0, 128, 4, 4),
        Config(64, 0, 64, 4, 4),
        Config(128, 0, 64, 8, 3),
        Config(32, 0, 32, 4, 3),
    ),
    ("project", "tf32"): (Config(32, 0, 64, 4, 3), Config(64, 0, 32, 8, 3), Config(16, 0, 32, 4, 2)),
    ("project", "float32"): (Config(32, 0, 32, 8, 2), Config(16, 0, 16, 4, 2)),
    ("products", "16-bit"): (
        Config(64, 256, 0, 8, 3),
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


def arithmetic(x: Tensor) -> str:
    """The matrix instructions for rows like those of ``x``: ``"16-bit"``, ``"tf32"`` or ``"float32"`` (none)."""
    if x.element_size() == 2:
        return "16-bit"
    precision = torch.backends.cuda.matmul.fp32_precision
    precision = getattr(torch.backends, "fp32_precision", "none") if precision == "none" else precision
    return "tf32" if precision == "tf32" else "float32"


def padded_rank(R: int, limit: int) -> int:
    """The power of two from 16 to ``limit`` that holds ``R`` components, or ``limit`` where several passes do."""
    return min(limit, max(16, 1 << (R - 1).bit_length()))


def subtiles(config: Config, kind: str, *, frozen: bool, dropout: bool) -> int:
    """The number of parts into which the linear kernel's epilogue cuts a tile's columns: few values a thread at once.

    Only the accumulator takes up to 128 registers; frozen factors need two more, dropout its random words.
    """
    if not (frozen or dropout):
        return config.SUBTILE
    values = 32 * config.num_warps * {"16-bit": 8 if dropout else 16, "tf32": 8, "float32": 4}[kind]
    return min(8, max(config.SUBTILE, config.BLOCK_N // max(16, values // config.BLOCK_M)))


def linear_rank_block(R: int, kind: str) -> int:
    """The components that the linear kernel's epilogue multiplies at once: both operands pass through registers."""
    return padded_rank(R, 16 if kind == "float32" else 32)


def most_components_at_once(kind: str) -> int:
    """The largest rank that the kernel for few tokens takes: it holds all of ``h``."""
    return 32 if kind == "float32" else 128


def precision(x: Tensor) -> str:
    """Triton's name of the precision in which :func:`arithmetic` multiplies float32."""
    return "tf32" if arithmetic(x) == "tf32" else "ieee"


def shared_bytes(kernel: str, config: Config, kind: str, R: int, pairs: int) -> int:
    """Shared memory that the pipelined tiles take: what a stage holds, times the stages; factors count as float32."""
    size = 2 if kind == "16-bit" else 4
    rank = padded_rank(R, config.BLOCK_R)
    M, N, K = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K
    stage = {
        "linear": (M + N) * K * size,
        "few_tokens": (M + N) * K * size + rank * pairs * K * 4,
        "project": M * K * size + rank * pairs * K * 4,
        "products": M * (N + rank) * size,
        "outer": M * (K + rank) * size,
    }[kernel]
    return stage * config.num_stages


class Limits(NamedTuple):
    """A device's limits for one block: bytes of shared memory; columns of tensor memory, 0 where there is none."""

    shared: int
    tensor_columns: int


def fitting(
    kernel: str, kind: str, R: int, limits: Limits, *, frozen: bool, dropout: bool, tma: bool = False
) -> tuple[Config, ...]:
    """The configurations that fit the device, and the registers with their epilogue; the smallest one if none does."""
    every = CONFIGS[kernel, kind]
    return tuple(c for c in every if _fits(c, kernel, kind, R, limits, frozen, dropout, tma)) or every[-1:]


def _fits(
    config: Config, kernel: str, kind: str, R: int, limits: Limits, frozen: bool, dropout: bool, tma: bool
) -> bool:
    if shared_bytes(kernel, config, kind, R, 1 + frozen) > limits.shared:
        return False
    if kernel != "linear":
        return True
    # Tensor memory: the accumulator and each low-rank product have columns of their own for the whole tile.
    if limits.tensor_columns and (2 + frozen) * config.BLOCK_N > limits.tensor_columns:
        return False
    if limits.tensor_columns and frozen and dropout and config.BLOCK_M > 64:
        return False
    most = 128 * 128 * (32 if frozen or dropout else 64)  # addresses take registers, too
    return tma or most >= config.BLOCK_M * config.BLOCK_N * config.BLOCK_K


def untuned(kernel: str, fit: tuple[Config, ...], M: int, N: int, K: int, programs: int) -> Config:
    """The first configuration, in the order above, with a tile for every multiprocessor; else that with most tiles."""

    def tiles(config: Config) -> int:
        wide = {"linear": config.BLOCK_N, "few_tokens": config.BLOCK_N, "products": config.BLOCK_N}.get(kernel)
        return -(-M // config.BLOCK_M) * (1 if wide is None else -(-N // wide))

    return next((config for config in fit if tiles(config) >= programs), max(fit, key=tiles))
