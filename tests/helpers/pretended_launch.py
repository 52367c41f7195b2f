"""Launch a layer's kernels on a pretended GPU and print how many were launched and how many had to be compiled.

python -m tests.helpers.pretended_launch RANK
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from triton.runtime.driver import driver

from bench import precompile
from bench.grid import cells_for
from ipca.ops import op


class Unguarded(TorchFunctionMode):
    """Columns and copies of fake tensors without the device guard, which torch's build for CPUs does not have."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__getitem__ and isinstance(args[1], tuple):
            columns = args[1][1]
            start, stop, _ = columns.indices(args[0].shape[1])
            return args[0].narrow(1, start, stop - start)
        if func is torch.Tensor.contiguous:
            return args[0] if args[0].is_contiguous() else args[0].clone(memory_format=torch.contiguous_format)
        return func(*args, **(kwargs or {}))


def cubins():
    return sum(1 for _ in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin"))


def main():
    """Forward and backward of both forms with two backends."""
    cell, rank = cells_for("cuda")[0], int(sys.argv[1])
    launched = []

    def launch(kernel, grid, *args, **options):
        driver.active.utils = SimpleNamespace(
            load_binary=lambda *_: (0, 0, 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 232_448, "warpSize": 32},
        )
        driver.active.launcher_cls = lambda src, metadata: lambda *given: launched.append(kernel)
        return kernel.run(*args, grid=grid, warmup=False, **options)

    before = cubins()
    with precompile.pretended_gpu(90, 132, launch), Unguarded(), torch.no_grad():

        def tensor(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device="cuda")

        x, dy = tensor(cell.M, cell.K, dtype=torch.bfloat16), tensor(cell.M, cell.N, dtype=torch.bfloat16)
        A, B = tensor(rank, cell.K), tensor(cell.N, rank)
        weight = tensor(cell.N, cell.K, dtype=torch.bfloat16)
        for frozen in ((None, None), (tensor(rank, cell.K), tensor(cell.N, rank))):
            layer = op.Layer(weight, A, B, None, *frozen, 1.0)
            for backend in ("triton", "addmm"):
                plan = op.plan_for(backend, x, layer, 0.0, True)
                h = op.forward(x, layer, None, 0.0, plan, True)[1]
                op.backward(dy, x, h, layer, None, 0.0, plan, op.Needs(True, False, True, True, False))
    print(len(launched), cubins() - before)


if __name__ == "__main__":
    main()
