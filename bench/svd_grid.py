"""The cells of the window SVD's bench, the most important first, as a deadline may cut the rest.

On a CPU five windows of square and 4:1 matrices with outliers, d from 64 to 4096, of rank 8, 16, 64 and d / 4, and of
half the components up to d = 1024; from 3072 on tall ones only of rank 64; a model's weights; other spectra at 384,
1024 and 2048.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.svd_matrices import MINILM

WINDOWS = ("principal", "0.25", "middle", "0.75", "minor")
NAMED = ("principal", "middle", "minor")
SIZES = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
SMALL_RANKS, ASPECT, HUGE = (8, 16, 64), 4, 3072
OURS, YARDSTICK, EIGH = "ipca", "torch.linalg.svd", "torch.linalg.eigh"
RANGE, LOWRANK = "scipy.linalg.eigh", "torch.svd_lowrank"
EXACT = (YARDSTICK, EIGH, RANGE)
"""Rivals that find any window to full accuracy."""
RANDOMIZED, ARPACK, PROPACK = "sklearn.randomized_svd", "scipy.svds arpack", "scipy.svds propack"
FORCED = {f"ipca-{path}": path for path in ("top", "interior", "bottom", "tridiagonal", "gram_eigh", "full")}
PEFT = {"peft-pissa": "principal", "peft-pissa_niter_4": "principal", "peft-mica": "minor"}
"""PEFT's initializations and the window that each of them takes."""
SQUARE, WIDE = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj")
"""Layers of the model that gets its adapter."""
LLAMA = ((4096, 4096, 128), (11008, 4096, 64), (4096, 11008, 32))
"""The 224 projections of LLaMA-2-7B: ``m, n`` and how many."""

Task = tuple[str, str]
"""Window and provider."""


OPS = ("window_svd", "llama-2-7b", "initialize")
"""The values of the column ``op``, see :class:`Cell`."""


@dataclass(frozen=True)
class Cell:
    """One matrix ``(m, n)``, or a stack of ``batch``, and a rank: its windows and providers are timed in turn.

    Attributes:
        op: ``"window_svd"``; ``"llama-2-7b"``, a group of that model's projections; or ``"initialize"``, a model of
            four layers ``n × n`` and two ``m × n`` that gets its adapter.
        rounds: in which ours and the yardstick are timed at the least.
        only: the providers to time; all by default.
    """

    m: int
    n: int
    spectrum: str
    rank: int
    windows: tuple[str, ...] = WINDOWS
    op: str = "window_svd"
    batch: int = 1
    rounds: int = 3
    only: tuple[str, ...] = ()

    @property
    def d(self) -> int:
        return min(self.m, self.n)

    @property
    def name(self) -> str:
        stack = f"{self.batch} of " if self.batch > 1 else ""
        return f"{self.op} {stack}{self.m}x{self.n} {self.spectrum} r={self.rank}"

    @property
    def components(self) -> int:
        """The number of a provider's components whose indices are checked."""
        return self.rank * (len(SQUARE) + len(WIDE) if self.op == "initialize" else 1)

    @property
    def matrices(self) -> str:
        """In words."""
        if self.op == "initialize":
            return f"{len(SQUARE)} × {self.n} × {self.n}, {len(WIDE)} × {self.m} × {self.n}"
        return f"{self.m} × {self.n}" if self.batch == 1 else f"{self.batch} × {self.m} × {self.n}"

    @property
    def yardstick(self) -> str:
        """The provider whose time the others' are divided by."""
        return "peft-pissa" if self.op == "initialize" else YARDSTICK


INITIALIZE = Cell(5632, 2048, "outliers", 16, NAMED, "initialize")
MIDDLE, LARGE = Cell(2048, 2048, "outliers", 64), Cell(4096, 4096, "outliers", 64, rounds=2)
PRINCIPAL = replace(MIDDLE, rank=16)


def grid(device: str) -> list[Cell]:
    """Every cell for a device of the type ``device``."""
    return gpu_grid() if device == "cuda" else cpu_grid()


def must_show() -> list[Cell]:
    """The README's claims: only ours and the yardstick, and whole models."""
    both = (OURS, YARDSTICK)
    return [
        replace(MIDDLE, windows=("middle",), only=both),
        replace(LARGE, windows=("middle",), only=both),
        replace(PRINCIPAL, windows=("principal",), only=both),
        INITIALIZE,
    ]


def cpu_grid() -> list[Cell]:
    """The grid that the module's docstring describes."""
    claims = [MIDDLE, PRINCIPAL, LARGE, INITIALIZE]
    cells: list[Cell] = []
    for d in SIZES:
        ranks = [rank for rank in sorted({*SMALL_RANKS, d // 4, d // 2 if d <= 1024 else 8}) if rank <= d // 2]
        for m in (d, ASPECT * d):
            few = [64] if d >= HUGE and m > d else ranks
            cells += [Cell(m, d, "outliers", rank, rounds=3 if d < 2048 else 1) for rank in few]
    for spectrum in ("gaussian", "heavy"):
        cells += [Cell(d, d, spectrum, rank) for d in (384, 1024) for rank in (16, 64)]
        cells += [Cell(2048, 2048, spectrum, 64, NAMED, rounds=1)]
    cells += [Cell(1536 if "inter" in name else 384, 384, name, rank) for name in MINILM for rank in (*SMALL_RANKS, 96)]
    return claims + [cell for cell in cells if cell.name not in {claim.name for claim in claims}]


def stacks(d: int = 4096, rank: int = 64, batches: Sequence[int] = (1, 8, 32)) -> list[Cell]:
    """One window of a square matrix and of stacks of it, by ours and the yardstick: what a model's layers cost."""
    one = Cell(d, d, "outliers", rank, ("middle",), rounds=1, only=(OURS, YARDSTICK))
    return [replace(one, batch=batch) for batch in batches]


def gpu_grid() -> list[Cell]:
    """Three shapes of LLaMA models, single and in stacks of 32, and all the projections of LLaMA-2-7B."""
    shapes = ((4096, 4096), (11008, 4096), (14336, 4096))
    single = [Cell(m, n, "outliers", 64, NAMED, rounds=2) for m, n in shapes]
    many = [replace(cell, batch=32, rounds=1) for cell in single]
    llama = [Cell(m, n, "outliers", 64, ("middle",), "llama-2-7b", count, rounds=1) for m, n, count in LLAMA]
    return [single[0], many[0], *llama, *single[1:], *many[1:]]


def quick_grid() -> list[Cell]:
    """A smoke test of half a minute."""
    small = Cell(384, 384, "outliers", 16)
    return [small, replace(small, m=tall(384)), replace(INITIALIZE, m=tall(384), n=384, rounds=1)]


def tall(d: int) -> int:
    """The long side of LLaMA-2-7B's feed-forward layers, 2.7 d."""
    return d * 11008 // 4096


def tasks(cell: Cell, device: str) -> list[Task]:
    """Every window and provider of ``cell``. What does not depend on the window is timed once for all of them.

    Left out for their time: the paths that were not chosen, except at rank 16 up to d = 2048; our full SVD above 512,
    the eigendecomposition from 3072 on; in stacks all but ours.
    """
    if cell.op == "initialize":
        found = [(window, OURS) for window in cell.windows] + [(window, name) for name, window in PEFT.items()]
    else:
        found = [(window, name) for window in cell.windows for name in _providers(cell, window, device)]
    return [task for task in found if not cell.only or task[1] in cell.only]


def _providers(cell: Cell, window: str, device: str) -> list[str]:
    names = [OURS, YARDSTICK]
    if cell.batch > 1:
        return names
    on_cpu, first = device == "cpu", window == "principal"
    if cell.d < HUGE or (not on_cpu and (window == "middle" or cell.d < 4096)):
        names += [EIGH]
    names += [RANGE] * on_cpu
    names += [LOWRANK] * (first or not on_cpu) + [RANDOMIZED, ARPACK, PROPACK] * (on_cpu and first)
    if on_cpu and (cell.rank != 16 or cell.d > 2048):
        return names
    names += ["ipca-top"] * first + ["ipca-interior"] + ["ipca-bottom"] * (window == "minor")
    return names + ["ipca-tridiagonal", "ipca-gram_eigh"] * on_cpu + ["ipca-full"] * (on_cpu and cell.d <= 512)
