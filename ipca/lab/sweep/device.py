"""The devices of a sweep: which there are, what they are called, and the same bits from every run on one."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def check_devices(devices: Iterable[str]) -> None:
    """Raise ValueError where one of ``devices`` is no device, or torch sees none of that name here."""
    for name in devices:
        try:
            device = torch.device(name)
        except RuntimeError:
            raise ValueError(f"devices holds {name!r}, which names no device; write 'cuda:0' or 'cpu'.") from None
        count = torch.cuda.device_count()
        if device.type == "cuda" and (device.index or 0) >= count:
            raise ValueError(f"devices holds {name!r}, but torch sees {count} CUDA devices here; name one of those.")


def use_device(name: str | None) -> None:
    """Make the device ``name`` this process's current one; None leaves that as it is.

    To be called before anything is computed: what cuBLAS needs to round alike in every run is read once in a process.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if name is not None and torch.device(name).type == "cuda" and torch.device(name).index is not None:
        torch.cuda.set_device(name)


def see_only(name: str | None) -> str | None:
    """Make the CUDA device ``name`` the only one that this process sees, and return what it is called then.

    For a process that has not used CUDA yet. Trainers that spread over all the GPUs they see then keep to theirs.
    """
    if name is None or torch.device(name).type != "cuda":
        return name
    seen = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
    index = torch.device(name).index or 0
    os.environ["CUDA_VISIBLE_DEVICES"] = seen[index] if seen else str(index)
    return "cuda:0"


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter of ``model`` is."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def device_name(device: torch.device) -> str:
    """What the hardware is called: ``"NVIDIA H100 80GB HBM3"``, ``"cpu x86_64"``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Within the block torch computes with ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def same_bits(device: torch.device) -> Iterator[None]:
    """Within the block the same computation on a CUDA ``device`` gives the same bits; on others nothing changes.

    An operation that has no such implementation raises RuntimeError in torch's words. Who can live without the same
    bits says ``torch.use_deterministic_algorithms(False)`` within the block; afterward it is as it was before.
    """
    if device.type != "cuda":
        yield
        return
    settings: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # a kernel for every new tensor, and nobody reads what is not written
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        settings.fill_uninitialized_memory = before[1]
