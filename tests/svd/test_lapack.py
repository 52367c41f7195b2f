import ctypes
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.linalg import cython_lapack

from ipca import Window, window_svd
from ipca.svd import lapack


def test_a_routine_that_scipy_does_not_export_is_none():
    assert lapack.routine("dnothing") is None
    assert lapack.available("dsytrd", "dstemr", "dormtr", "dsyrk")
    assert not lapack.available("dsytrd", "dnothing")


def test_a_routine_with_other_types_is_not_called(monkeypatch):
    monkeypatch.setitem(cython_lapack.__pyx_capi__, "made_up", cython_lapack.__pyx_capi__["cgetrf"])
    assert lapack.routine("made_up") is None


def test_an_error_of_lapack_is_raised():
    call, one = lapack.routine("dsterf"), np.ones(1)
    call(1, one, one)
    with pytest.raises(np.linalg.LinAlgError, match="dsterf ended with info=-1"):
        call(-1, one, one)


@pytest.mark.parametrize(
    "layout", ["rows", "columns", "part of rows", "part of columns", "strided", "a row", "a column"]
)
def test_the_gram_matrix_of_any_layout(layout):
    A = {
        "rows": lambda: torch.randn(9, 7),
        "columns": lambda: torch.randn(7, 9).mT,
        "part of rows": lambda: torch.randn(9, 20)[:, 3:10],
        "part of columns": lambda: torch.randn(7, 30).mT[4:13],
        "strided": lambda: torch.randn(18, 14)[::2, ::2],
        "a row": lambda: torch.randn(1, 7),
        "a column": lambda: torch.randn(9, 1),
    }[layout]().double()
    G = torch.zeros(A.shape[1], A.shape[1], dtype=torch.float64)
    lapack.add_gram_(G, A)
    torch.testing.assert_close(G, (A.mT @ A).triu(), rtol=1e-14, atol=1e-14)
    lapack.add_gram_(G, A)
    torch.testing.assert_close(G, 2 * (A.mT @ A).triu(), rtol=1e-14, atol=1e-14)


def test_rows_times_a_symmetric_matrix_of_which_one_triangle_is_known():
    G = torch.randn(7, 7, dtype=torch.float64)
    rows = np.random.default_rng(0).standard_normal((3, 7))
    product = lapack.multiply_rows(rows, G)
    torch.testing.assert_close(torch.from_numpy(product), torch.from_numpy(rows) @ (G.triu() + G.triu(1).mT))


@pytest.fixture
def openblas():
    """The functions that read and set the threads of SciPy's OpenBLAS, and two threads for one test."""
    calls = lapack._thread_calls()
    if calls is None:
        pytest.skip("needs a SciPy with an OpenBLAS of its own threads")
    before = calls[0]()
    calls[1](2)
    yield calls
    calls[1](before)


def test_openblas_has_one_thread_until_the_last_block_ends(openblas):
    threads, _ = openblas
    first, second = lapack.one_thread(), lapack.one_thread()
    first.__enter__()
    second.__enter__()
    assert threads() == 1
    first.__exit__(None, None, None)  # as in another thread, which ends first
    assert threads() == 1
    second.__exit__(None, None, None)
    assert threads() == 2
    with pytest.raises(ValueError, match="within"), lapack.one_thread():
        raise ValueError("within")
    assert threads() == 2


def test_openblas_has_one_thread_in_every_decomposition(openblas, monkeypatch):
    threads, seen, plain = openblas[0], [], lapack.routine

    def noted(name):
        seen.append(threads())
        return plain(name)

    monkeypatch.setattr(lapack, "routine", noted)
    for W in (torch.randn(160, 150), torch.randn(3, 150, 160)):
        window_svd(W, Window.middle(4))
    assert set(seen) == {1}
    assert threads() == 2


@pytest.mark.parametrize("library", [object(), SimpleNamespace(openblas_get_parallel=lambda: 2)], ids=["MKL", "OpenMP"])
def test_another_blas_keeps_its_threads(library, monkeypatch):
    for name in ("openblas_get_num_threads", "openblas_set_num_threads"):
        if isinstance(library, SimpleNamespace):
            setattr(library, name, lambda *_: pytest.fail("called"))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    lapack._thread_calls.cache_clear()
    with lapack.one_thread():
        pass
    lapack._thread_calls.cache_clear()


def test_another_thread_runs_during_a_call():
    n, counted, running = 700, 0, threading.Event()
    A = np.random.default_rng(0).standard_normal((n, n))
    A += A.T
    done = threading.Event()

    def work():
        d, e, tau = np.empty(n), np.empty(n - 1), np.empty(n - 1)
        running.set()
        lapack.with_workspace("dsytrd", b"L", n, A, n, d, e, tau)
        done.set()

    worker = threading.Thread(target=work)
    worker.start()
    running.wait()
    while not done.is_set():
        counted += 1
    worker.join()
    assert counted > 1000  # a held GIL lets through a handful before and after the call
