"""Threads for independent decompositions, and the memory that each needs.

One core for each matrix: the products of a small one are too small to share, and the reduction of a large one waits for
memory. SciPy's BLAS has one thread in every decomposition, see :func:`ipca.svd.lapack.one_thread`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from ipca.window import Window

Item = TypeVar("Item")
Result = TypeVar("Result")
_BUSY = threading.Lock()
TOGETHER = 512 * 2**20
"""Bytes of workspace that items running side by side may have between them."""


def workspace(shape: Sequence[int], windows: Iterable[Window]) -> float:
    """Bytes that the decomposition of one matrix ``(m, n)`` needs beside it, the full SVD of a tie excepted.

    Gram matrix, its reduction or factor, and a copy; vectors on both sides; for a rule that looks at the spectrum the
    matrix twice in float64. Measured for every path at d from 1024 to 3072.
    """
    (m, n), windows = shape, list(windows)
    entries = 3.5 * min(m, n) ** 2 + 5 * max(window.rank for window in windows) * (m + n)
    if any(window.needs_spectrum for window in windows):
        entries = max(entries, 2 * m * n)
    return 8 * entries


def thread_map(work: Callable[[Item], Result], items: Sequence[Item], workspaces: Sequence[float]) -> Iterator[Result]:
    """``work(item)`` for each item, in order, as many at a time as there are threads and room for.

    While several run, each has an equal share of PyTorch's threads, and the inference mode of the caller. Where the
    largest workspace, in bytes, leaves no room for two, items run one after another with all threads.

    Raises:
        Whatever ``work`` raises, at its item's turn; items behind it that have not begun never begin.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(items), int(TOGETHER // max(workspaces, default=1)))
    if workers < 2 or not _BUSY.acquire(blocking=False):  # another thread's work is being shared out
        yield from map(work, items)
        return
    inference = torch.is_inference_mode_enabled()

    def run(item: Item) -> Result:
        with torch.inference_mode(inference):
            return work(item)

    try:
        torch.set_num_threads(threads // workers)  # for the pool's threads too, as these are new
        with ThreadPoolExecutor(workers, thread_name_prefix="ipca") as pool:
            yield from pool.map(run, items)
    finally:
        torch.set_num_threads(threads)
        _BUSY.release()
