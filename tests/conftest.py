"""Threads are pinned before torch is imported: contention between OpenMP teams has made runs 25 times slower."""

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; to be said before triton is imported


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def kernel_masks(monkeypatch):
    """Dropout in plain PyTorch draws the masks of the kernels on a CPU too, to be compared with the interpreter."""
    from ipca.ops import dropout

    monkeypatch.setattr(dropout, "keep_mask", dropout.kernel_mask)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
