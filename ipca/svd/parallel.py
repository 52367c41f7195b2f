"""Threads for independent decompositions of small matrices, and the memory that each needs.

One core for each matrix: the products of a small one are too small to share.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
_BUSY = threading.Lock()
TOGETHER = 256 * 2**20
"""Bytes of workspace that items running side by side may have between them."""
_MATRICES = 3.5
"""Float64 matrices ``(d, d)`` that a decomposition needs: Gram matrix, factor, and what the steps keep."""


def workspace(shape: Sequence[int]) -> float:
    """Bytes that the decomposition of one matrix needs beside it, the full SVD excepted."""
    return _MATRICES * 8 * min(shape) ** 2


def thread_map(work: Callable[[Item], Result], items: Sequence[Item], workspaces: Sequence[float]) -> Iterator[Result]:
    """``work(item)`` for each item, in order, as many at a time as there are threads and room for.

    While several run, each has an equal share of PyTorch's threads. Where the largest workspace, in bytes, leaves no
    room for two, items run one after another with all threads.

    Raises:
        Whatever ``work`` raises, at its item's turn; items behind it that have not begun never begin.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(items), int(TOGETHER // max(workspaces, default=1)))
    if workers < 2 or not _BUSY.acquire(blocking=False):  # another thread's work is being shared out
        yield from map(work, items)
        return
    try:
        yield from _in_threads(work, items, workers, threads)
    finally:
        torch.set_num_threads(threads)
        _BUSY.release()


def _in_threads(work: Callable[[Item], Result], items: Sequence[Item], workers: int, threads: int) -> Iterator[Result]:
    pool = ThreadPoolExecutor(workers, thread_name_prefix="ipca")
    waiting = iter(items)
    running: deque[Future[Result]] = deque()
    torch.set_num_threads(threads // workers)  # for the pool's threads too, as these are new
    try:
        for item in waiting:
            running.append(pool.submit(work, item))
            if len(running) == workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
