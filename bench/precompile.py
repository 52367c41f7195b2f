"""A Triton cache for the first run on a GPU, compiled without one.

    python -m bench.precompile --out DIR [--ranks 16 ...] [--checks] [--arch 90 --multiprocessors 132] [--triton FOLDER]

Compiles every kernel of the goal cell in every configuration that fits the GPU, for both forms, as ``ipca tune`` and
the layer launch them, and those of ``ipca doctor``. On the GPU, bench/gpu.py takes DIR where it lies as
``triton-cache`` in its own ``--out``; elsewhere set TRITON_CACHE_DIR. A launch finds a kernel there only if these are
the same: kernel sources, architecture, number of multiprocessors, and the very files of triton, which differ between
its versions and those of Python.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    from bench.grid import Cell

MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
"""Of A100, H100 SXM and H200, B200."""


@contextmanager
def pretended_gpu(arch: int, multiprocessors: int, launch: Callable[..., object]) -> Iterator[None]:
    """Within the block CUDA tensors are fake, and ``launch(kernel, grid, *args, **options)`` stands for every launch.

    It gets CPU tensors for the fake ones, aligned as CUDA's are: what a launch sees of a tensor is dtype and alignment.
    """
    import torch
    from torch._subclasses import fake_tensor
    from triton.runtime.driver import driver

    from bench.kernel_cases import LIMITS
    from bench.offline import Driver, cuda_answers
    from ipca.kernels import tuning

    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.int64)
    real = {dtype: torch.empty(16, dtype=dtype) for dtype in dtypes}

    class Launcher:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., object]:
            def run(*args: Any, **options: Any) -> object:
                tensors = [argument for argument in args if isinstance(argument, torch.Tensor)]
                assert all(tensor.storage_offset() * tensor.element_size() % 16 == 0 for tensor in tensors)
                given = [real[arg.dtype] if isinstance(arg, torch.Tensor) else arg for arg in args]
                return launch(self.kernel, grid, *given, **options)

            return run

    major, minor = divmod(arch, 10)
    facts = SimpleNamespace(name=f"sm_{arch}", major=major, minor=minor, multi_processor_count=multiprocessors)
    changes: dict[Any, dict[str, Any]] = {
        torch.cuda: cuda_answers(facts),
        torch.library: {"wrap_triton": Launcher},
        fake_tensor: {"init_gpu_context": lambda device: None},
        tuning: {"limits": lambda device: LIMITS[arch], "may_measure": lambda x: True},
        driver: {"_active": Driver(arch)},
    }
    with ExitStack() as stack:
        for module, values in changes.items():
            stack.enter_context(patch.multiple(module, **values))
        stack.enter_context(fake_tensor.FakeTensorMode())
        yield


def precompile(cells: Sequence[Cell], arch: int, multiprocessors: int, *, checks: bool) -> int:
    """Compile the kernels of the cells, and of ``ipca doctor`` if ``checks``, into Triton's cache; their number."""
    import torch
    from tqdm import tqdm

    from ipca.device import check_cases, self_check, tune
    from ipca.kernels import tuning

    hashes: set[str] = set()
    device = torch.device("cuda", 0)

    def compiled(kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
        hashes.add(kernel.warmup(*args, grid=grid, **options).hash)

    def every_one(fit: Any, of: Any, shape: Any, device: Any, rerun: Callable[[], object]) -> Any:
        for config in fit:
            with tuning.force(of[0], config):
                rerun()
        return tuning.look_up(fit, of, shape, device)

    with pretended_gpu(arch, multiprocessors, compiled), patch.object(tuning, "measure", every_one):
        shapes = [tune.Cell(cell.M, cell.N, cell.K, cell.rank, cell.dtype) for cell in cells]
        tune.measure_configs(shapes, device)
        for case in tqdm(check_cases.cases(device) if checks else [], desc="Checks", unit="case"):
            with self_check._multiplying(case.arithmetic):
                check_cases.run_kernel(case, check_cases.draw(case, device))
    return len(hashes)


def main() -> int:
    """Compile, and print the number of kernels, seconds and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the cache's folder")
    parser.add_argument("--checks", action="store_true", help="the kernels of ipca doctor, too")
    parser.add_argument("--arch", type=int, choices=MULTIPROCESSORS, default=90, help="architecture (default: 90)")
    parser.add_argument("--multiprocessors", type=int, help="of the GPU (default: the largest of its architecture)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16], help="(default: 16)")
    parser.add_argument("--triton", type=Path, help="folder that holds the package triton (default: the installed one)")
    args = parser.parse_args()
    os.environ["TRITON_CACHE_DIR"] = str(args.out.resolve())
    os.environ.pop("TRITON_INTERPRET", None)
    if args.triton:
        sys.path.insert(0, str(args.triton.resolve()))
    import triton

    began = time.monotonic()
    from bench.grid import cells_for

    cells = [replace(cells_for("cuda")[0], rank=rank) for rank in args.ranks]
    count = precompile(cells, args.arch, args.multiprocessors or MULTIPROCESSORS[args.arch], checks=args.checks)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    python = ".".join(map(str, sys.version_info[:2]))
    print(
        f"{count} kernels for sm_{args.arch}, triton {triton.__version__} of Python {python}: "
        f"{time.monotonic() - began:.0f} s, {size / 2**20:.1f} MiB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
