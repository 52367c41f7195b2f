"""Devices of a sweep: validation, selection, names, and deterministic computation."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def check_devices(devices: Iterable[str]) -> None:
    """Raise ValueError if one of ``devices`` is not a device, or is not available to torch on this machine."""
    for name in devices:
        try:
            device = torch.device(name)
        except RuntimeError:
            raise ValueError(
                f"devices contains {name!r}, which is not a device; use names such as 'cuda:0' or 'cpu'."
            ) from None
        count = torch.cuda.device_count()
        if device.type == "cuda" and (device.index or 0) >= count:
            raise ValueError(f"devices contains {name!r}, but torch sees {count} CUDA devices on this machine.")


def use_device(name: str | None) -> None:
    """Make ``name`` the current device of this process; None changes nothing.

    Call it before any computation: cuBLAS reads the setting that makes it deterministic once per process.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if name is not None and torch.device(name).type == "cuda" and torch.device(name).index is not None:
        torch.cuda.set_device(name)


def see_only(name: str | None) -> str | None:
    """Hide all CUDA devices but ``name`` from this process, and return the name it has then.

    For a process that has not used CUDA yet. Trainers that use all visible GPUs then use only this one.
    """
    if name is None or torch.device(name).type != "cuda":
        return name
    seen = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
    index = torch.device(name).index or 0
    os.environ["CUDA_VISIBLE_DEVICES"] = seen[index] if seen else str(index)
    return "cuda:0"


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter of ``model``."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def device_name(device: torch.device) -> str:
    """The name of the hardware: ``"NVIDIA H100 80GB HBM3"``, ``"cpu x86_64"``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Use ``count`` torch threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Use deterministic algorithms on a CUDA ``device`` within the block; no effect on other devices.

    Operations without a deterministic implementation raise torch's RuntimeError. A task may opt out by calling
    ``torch.use_deterministic_algorithms(False)`` within the block; the previous mode is restored afterward.
    """
    if device.type != "cuda":
        yield
        return
    settings: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = (
        False  # it costs a kernel per new tensor, and no code reads uninitialized memory
    )
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        settings.fill_uninitialized_memory = before[1]
