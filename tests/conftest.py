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

from tests.helpers import refusals

pytest.raises = refusals.raises


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist
        session.config.workeroutput["refusals"] = refusals.count


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    refusals.count += getattr(node, "workeroutput", {}).get("refusals", 0)


def pytest_terminal_summary(terminalreporter):
    if refusals.count:
        terminalreporter.write_line(f"{refusals.count} models stood beside a refused call, and are as they were")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def kernel_masks(monkeypatch):
    """Dropout in plain PyTorch draws the masks of the kernels on a CPU too, to be compared with the interpreter."""
    from ipca.ops import dropout

    monkeypatch.setattr(dropout, "cpu_mask", dropout.kernel_mask)


@pytest.fixture
def decomposed(monkeypatch):
    """The shapes that this process decomposed by way of the cache, as models and the command line do."""
    import ipca.svd.cache

    shapes, plain = [], ipca.svd.cache.window_svd

    def counted(weight, *args, **options):
        shapes.append(tuple(weight.shape))
        return plain(weight, *args, **options)

    monkeypatch.setattr(ipca.svd.cache, "window_svd", counted)
    return shapes


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were written."""
    from matplotlib.figure import Figure

    figures, plain = [], Figure.savefig

    def kept(figure, *args, **options):
        figures.append(figure)
        return plain(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", kept)
    return figures


ON_A_GPU = ("tests/kernels/", *(f"tests/ops/test_{name}.py" for name in ("backends", "cuda_ops", "self_check")))
"""What runs on a GPU where there is one, and in Triton's interpreter elsewhere; the offline compiler needs neither."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if torch.cuda.is_available():
            if any(part in item.path.as_posix() for part in ON_A_GPU) and item.path.name != "test_compile.py":
                item.add_marker(pytest.mark.gpu)
        elif item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)  # no worker is left with a long test at the end
