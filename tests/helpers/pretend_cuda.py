"""A CUDA device that answers what is asked before a kernel runs. No kernel runs on it."""

from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch._subclasses import fake_tensor

from bench.offline import cuda_answers
from ipca.kernels import few_tokens, linear, outer, products, project, reduce, tables, tuning
from ipca.kernels.configs import Limits
from ipca.ops import backend

NAME = "Test GPU 80GB"
DEVICE = torch.device("cuda", 0)
FACTS = SimpleNamespace(
    name=NAME, major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, L2_cache_size=50 << 20
)


def pretend_cuda(monkeypatch, tmp_path):
    """Pretend an H100-like device with a cache of its own and no shipped table; returns the folder of its cache."""
    for name, answer in cuda_answers(FACTS).items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(tuning, "limits", lambda device: Limits(232_448, 0))
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(tables, "driver_version", lambda: "13.0")
    monkeypatch.setattr(backend, "_warned", set())
    monkeypatch.setenv("IPCA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("IPCA_AUTOTUNE", raising=False)
    tables.forget()
    return tmp_path / "cache"


@contextmanager
def without_kernels(monkeypatch):
    """Tensors on the device without values, and launches that do nothing: the list of kernels that were launched."""
    launched = []

    def grid_of(kernel, grid, **launch):
        return lambda *args, **options: launched.append(kernel.__name__)

    for module in (few_tokens, linear, outer, products, project, reduce):
        monkeypatch.setattr(module, "grid_of", grid_of)
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda device: None)
    with fake_tensor.FakeTensorMode():
        yield launched
