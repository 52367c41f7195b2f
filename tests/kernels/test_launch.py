from types import SimpleNamespace

import pytest
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode

from ipca.kernels import launch


class Kernel:
    """Stands for a compiled kernel: keeps what it is launched with, and the allocator that it finds."""

    def __getitem__(self, grid):
        return lambda *args, **options: (grid, args, options, triton.runtime._allocation._allocator.get())


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launch, "JITFunction", Kernel)
    monkeypatch.setattr(torch.library, "wrap_triton", lambda kernel: {(1,): "traced"})
    return Kernel()


def test_a_kernel_is_wrapped_only_while_tracing(kernel):
    assert launch.grid_of(kernel, (1,))(2, num_warps=4)[:3] == ((1,), (2,), {"num_warps": 4, "enable_fp_fusion": True})
    with FakeTensorMode():
        assert launch.grid_of(kernel, (1,)) == "traced"


def test_descriptors_get_memory_and_leave_the_allocator_of_others(kernel, monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda size, **options: SimpleNamespace(size=size, **options))
    set_by = triton.runtime._allocation._allocator
    token = set_by.set("the user's")
    try:
        allocate = launch.grid_of(kernel, (1,), descriptors=True)()[3]
        assert launch.grid_of(kernel, (1,))()[3] == set_by.get() == "the user's"
    finally:
        set_by.reset(token)
    memory = allocate(256, 128, None)
    assert (memory.size, memory.device) == (256, "cuda")
