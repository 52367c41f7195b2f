"""The processes that share an offline decomposition: a single one, or the ranks that torchrun has started."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
_PATIENCE = timedelta(days=30)  # the default of half an hour would end a run whose shares differ by more
_POLL = 0.05


class PeerFailed(RuntimeError):
    """Another process has ended before its share was done."""


@dataclass(frozen=True)
class Ranks:
    """Process ``rank`` of ``size``; all call :meth:`barrier`, :meth:`sum` and :meth:`broadcast` in the same order."""

    rank: int = 0
    size: int = 1

    @classmethod
    def from_environment(cls, device: str, environment: Mapping[str, str] = os.environ) -> Ranks:
        """The rank and size of torchrun's ``RANK`` and ``WORLD_SIZE``; a single process where they are not set.

        The processes exchange counts and small objects: through gloo, and with ``device="cuda"`` nccl beside it, where
        each takes the GPU of its ``LOCAL_RANK``.

        Raises:
            ValueError: the variables are incomplete, or there are fewer GPUs than processes.
        """
        size = int(environment.get("WORLD_SIZE", 1))
        if size == 1:
            return cls()
        if "RANK" not in environment:
            raise ValueError(f"WORLD_SIZE is {size} but RANK is not set; start the processes with torchrun.")
        if device == "cuda":
            local, count = int(environment.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            if local >= count:
                raise ValueError(f"process {local} of this machine has no GPU: there are {count}; start fewer.")
            torch.cuda.set_device(local)
        dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl", timeout=_PATIENCE)
        return cls(int(environment["RANK"]), size)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait until every process has arrived, calling ``meanwhile`` repeatedly; raises as :meth:`sum`."""
        self.sum(0, meanwhile)

    def sum(self, count: int, meanwhile: Callable[[], None] = lambda: None) -> int:
        """The sum of every process's ``count``, once all have arrived.

        Raises:
            PeerFailed: one of them has ended.
        """
        if self.size == 1:
            return count
        held = torch.tensor([count], device="cpu")
        try:
            work = dist.all_reduce(held, async_op=True)
            while not work.is_completed():
                meanwhile()
                time.sleep(_POLL)
            work.wait()
        except RuntimeError:
            raise PeerFailed("another process of this run has ended; its own message says why.") from None
        meanwhile()
        return int(held)

    def broadcast(self, value: T) -> T:
        """The first process's ``value``, in every process."""
        self.barrier()
        if self.size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def close(self) -> None:
        """Leave the process group when all is done."""
        if self.size > 1:
            with suppress(RuntimeError):
                dist.destroy_process_group()
