"""Paired timing of callables on CPU and GPU, and memory of one call.

All callables that are compared are timed in turn, round by round, so that drift of the machine's speed affects them
equally; a ratio is the median over rounds of two times taken in the same round.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Call = Callable[[], object]
Setting = Callable[[], AbstractContextManager[None]]

WARM_UP = 2
LEAST_ROUNDS, MOST_ROUNDS = 7, 50
REPLAY_SECONDS = 5e-4  # below this the events around a replay would be a significant part of it
RUN_SECONDS = 4e-3  # on a CPU: repeated, so that a call finds the caches as calls of its own kind leave them


@dataclass(frozen=True)
class Runner:
    """One timed unit: ``run`` makes ``calls`` calls; ``timer`` is "clock", "graph" or "events".

    ``setting`` is a context entered around each run, outside of the timing. ``keeps`` keeps the memory alive that a
    graph's replay reads.
    """

    run: Call
    calls: int
    timer: str
    setting: Setting = nullcontext
    keeps: Sequence[Call] = ()


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call, by round."""

    rounds: tuple[float, ...]

    def quantile(self, q: float) -> float:
        return float(np.quantile(self.rounds, q))

    def ratio(self, other: Timing) -> float:
        """The median over rounds of this time over the other's."""
        return float(np.median(np.divide(self.rounds, other.rounds)))


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Use a side stream of a GPU within the block, since a CUDA graph cannot be captured on the default stream."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield


def rotation(input_bytes: int, device: torch.device) -> int:
    """The number of sets of inputs to rotate through, so that none is in the L2 cache when it is used again."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, math.floor(3 * cache / input_bytes) + 1)


def runner(
    calls: Sequence[Call], device: torch.device, expected_seconds: float = 0.0, setting: Setting = nullcontext
) -> Runner:
    """A runner that makes every call in turn, warmed up; on a GPU as a CUDA graph if it can be captured.

    Args:
        calls: one for each set of inputs.
        expected_seconds: rough duration of one call; of a GPU; short calls are repeated within one run.
        setting: context of a run.
    """
    with setting():
        for call in [*calls] * WARM_UP:
            call()
        began = time.perf_counter()
        calls[0]()
        took = time.perf_counter() - began
    passes = max(1, math.ceil(RUN_SECONDS / max(took * len(calls), 1e-6)))
    if device.type == "cuda":
        passes = max(1, math.ceil(REPLAY_SECONDS / max(expected_seconds * len(calls), 1e-6)))
    repeated = [*calls] * passes

    def run() -> None:
        for call in repeated:
            call()

    if device.type != "cuda":
        return Runner(run, len(repeated), "clock", setting)
    try:
        with setting():
            return Runner(_capture(run), len(repeated), "graph", setting, calls)
    except RuntimeError as error:
        print(f"no CUDA graph, timed with events: {str(error).splitlines()[0]}")
        return Runner(run, len(repeated), "events", setting)


def measure(runners: Sequence[Runner], device: torch.device, seconds: float) -> list[Timing]:
    """Time all runners in each round, for about ``seconds``; the first round is discarded."""
    began = time.perf_counter()
    _rounds(runners, device, 1)
    one = time.perf_counter() - began
    count = min(MOST_ROUNDS, max(LEAST_ROUNDS, int(seconds / one)))
    return [Timing(tuple(times)) for times in _rounds(runners, device, count)]


def peak_mib(call: Call, device: torch.device) -> float | None:
    """Peak memory of one call above what is allocated before it; None on a CPU, where it is not tracked."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def saved_mib(call: Callable[[], Tensor], existing: Iterable[Tensor]) -> float:
    """Memory that a forward saves for its backward, excluding the tensors ``existing``; each storage counts once."""
    known = {tensor.untyped_storage().data_ptr() for tensor in existing}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = call()  # keep it alive until all is counted, so that no address is reused
    total = sum(saved.values()) / 2**20
    del kept
    return total


def synchronize(device: torch.device) -> None:
    """Wait for the device; raises its pending errors."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rounds(runners: Sequence[Runner], device: torch.device, count: int) -> list[list[float]]:
    """Milliseconds per call, by runner and round, in random order: a runner is affected by the previous one."""
    stop = _events if device.type == "cuda" else _clock
    waiting: list[list[Callable[[], float]]] = [[] for _ in runners]
    random = np.random.default_rng(0)
    for _ in range(count):
        for index in random.permutation(len(runners)):
            with runners[index].setting():
                waiting[index].append(stop(runners[index]))
    synchronize(device)
    return [[milliseconds() for milliseconds in row] for row in waiting]


def _clock(runner: Runner) -> Callable[[], float]:
    began = time.perf_counter()
    runner.run()
    milliseconds = (time.perf_counter() - began) * 1e3 / runner.calls
    return lambda: milliseconds


def _events(runner: Runner) -> Callable[[], float]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    runner.run()
    end.record()
    return lambda: start.elapsed_time(end) / runner.calls


def _capture(run: Call) -> Call:
    """The replay of ``run`` as a CUDA graph, captured on the current stream."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # a capture allocates new memory and cannot free any
    try:
        graph.capture_begin()
        run()
        graph.capture_end()
    except BaseException:
        with suppress(RuntimeError):
            graph.capture_end()
        # After a failed capture the generator stays in capture mode and would refuse every later random number.
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(torch.Generator("cuda").graphsafe_get_state())
        raise
    return graph.replay
