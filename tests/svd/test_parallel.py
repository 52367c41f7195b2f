import threading
import time

import pytest
import torch

from ipca import Window, window_svd
from ipca.svd.parallel import TOGETHER, thread_map, workspace


@pytest.fixture
def threads():
    """Set PyTorch's threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def run(count, seen, *, room=1.0, threads_each=None):
    lock = threading.Lock()
    running = 0

    def work(i):
        nonlocal running
        with lock:
            running += 1
            seen.append((running, torch.get_num_threads(), threading.current_thread().name))
        time.sleep(0.1 * ((i % 2) + 1))
        with lock:
            running -= 1
        return i

    return list(thread_map(work, range(count), [room] * count))


@pytest.mark.parametrize(("available", "count", "workers"), [(1, 5, 1), (2, 1, 1), (2, 5, 2), (4, 2, 2), (4, 9, 4)])
def test_results_come_in_order_from_as_many_workers_as_fit(threads, available, count, workers):
    threads(available)
    seen = []
    assert run(count, seen) == list(range(count))
    assert max(together for together, *_ in seen) == workers
    assert {each for _, each, _ in seen} == {available // workers}
    assert torch.get_num_threads() == available
    assert any(name.startswith("ipca") for *_, name in seen) is (workers > 1)


@pytest.mark.parametrize(("room", "workers"), [(TOGETHER, 1), (TOGETHER / 2, 2), (TOGETHER / 3.5, 3)])
def test_workspaces_bound_how_many_run(threads, room, workers):
    threads(4)
    seen = []
    run(8, seen, room=room)
    assert max(together for together, *_ in seen) == workers


def test_an_error_comes_at_its_turn_and_ends_the_rest(threads):
    threads(2)
    began = []

    def work(i):
        began.append(i)
        if i == 2:
            raise ValueError("two")
        return i

    results = []
    with pytest.raises(ValueError, match="two"):
        results.extend(thread_map(work, range(50), [1.0] * 50))
    assert results == [0, 1]
    assert len(began) < 6
    assert torch.get_num_threads() == 2


def test_a_long_item_keeps_no_other_worker_waiting(threads):
    threads(2)
    last = threading.Event()

    def work(i):
        if i == 0:
            assert last.wait(timeout=30)
        if i == 5:
            last.set()
        return i

    assert list(thread_map(work, range(6), [1.0] * 6)) == list(range(6))


def test_the_workspace_grows_with_the_rank_and_with_the_matrix_where_its_spectrum_decides():
    narrow, wide = workspace((1024, 1024), [Window.middle(16)]), workspace((1024, 1024), [Window.middle(256)])
    assert 3 * 8 * 1024**2 < narrow < 4 * 8 * 1024**2
    assert wide > 5.6 * 8 * 1024**2
    assert workspace((1024, 1024), [Window.middle(16), Window.minor(256)]) == wide
    assert workspace((64, 4096), [Window.middle(16)]) < 8 * 64 * 4096 * 2
    assert workspace((64, 4096), [Window("energy=0.9", 16)]) >= 8 * 64 * 4096 * 2


def test_nothing_to_do():
    assert list(thread_map(lambda i: i, [], [])) == []


def test_a_stack_gives_the_same_bits_in_parallel_as_one_by_one(threads):
    W = torch.randn(5, 260, 270)
    threads(1)
    alone = window_svd(W, Window.middle(6))
    threads(2)
    together = window_svd(W, Window.middle(6))
    assert torch.equal(alone.U, together.U)
    assert torch.equal(alone.Vh, together.Vh)


def test_two_callers_at_once_leave_the_thread_count_alone(threads):
    threads(2)
    callers = [threading.Thread(target=run, args=(6, [])) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("inference", [False, True])
def test_results_are_of_the_callers_inference_mode(threads, inference):
    threads(2)
    with torch.inference_mode(inference):
        found = list(thread_map(lambda _: torch.ones(1).is_inference(), range(4), [1.0] * 4))
    assert found == [inference] * 4
