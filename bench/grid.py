"""Cells of the pc_linear benchmark, most important first, since a deadline drops the last; the first is the goal."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096))
"""``N, K`` of GPU cells: attention and both feed-forward layers of LLaMA-2-7B, the wider one of LLaMA-3-8B."""
TOKENS = (8192, 4096, 16384, 1024, 256)
RANKS = (16, 64, 128, 8)
DROPOUT = 0.05

CellShape = tuple[int, tuple[int, int], int, float]
"""``M, (N, K), rank, dropout``."""


@dataclass(frozen=True)
class Cell:
    """One problem: ``x (M, K)``, ``weight (N, K)``. ``compiled``: its rows are those of torch.compile."""

    M: int
    N: int
    K: int
    rank: int = 16
    dropout: float = 0.0
    dtype: str = "bfloat16"
    compiled: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype


def cells_for(device: str) -> list[Cell]:
    """All cells for a device type, "cuda" or "cpu"."""
    return _gpu_cells() if device == "cuda" else _cpu_cells()


def _gpu_cells() -> list[Cell]:
    """bf16: one parameter varied at a time around the goal, then all combinations, and torch.compile in four cells."""
    M, shape, rank = TOKENS[0], SHAPES[0], RANKS[0]
    around: list[CellShape] = [(m, shape, rank, 0.0) for m in TOKENS]
    around += [(M, s, rank, 0.0) for s in SHAPES[1:]]
    around += [(M, shape, r, 0.0) for r in RANKS[1:]]
    around += [(M, s, rank, DROPOUT) for s in SHAPES]
    rest: list[CellShape] = [(m, s, r, p) for r in RANKS for p in (0.0, DROPOUT) for s in SHAPES for m in TOKENS]
    compiled = [replace(_cell((M, s, rank, 0.0)), compiled=True) for s in SHAPES]
    cells = [*map(_cell, around), compiled[0], *map(_cell, rest), *compiled]
    return list(dict.fromkeys(cells))


def _cpu_cells() -> list[Cell]:
    """float32: a few cells around 512 tokens and a square weight of 1024."""
    goal = Cell(512, 1024, 1024, dtype="float32")
    varied = [{"M": 128}, {"M": 1024}, {"N": 2816}, {"rank": 64}, {"dropout": DROPOUT}]
    return [goal, replace(goal, compiled=True), *(replace(goal, **change) for change in varied)]  # type: ignore[arg-type]


def _cell(choice: CellShape) -> Cell:
    M, (N, K), rank, dropout = choice
    return Cell(M, N, K, rank, dropout)
