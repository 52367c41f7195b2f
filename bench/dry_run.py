"""A stand-in for a GPU in dry runs of bench/gpu.py: a CPU whose kernels Triton interprets, under another name.

It has no speed: a configuration's "time" is that of one interpreted call.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch

from bench import rows, timing
from bench.gpu import DRY_RUN

CAPABILITY = (9, 0)


def pretend() -> None:
    """Make this process's CPU the device: before the other modules of bench, which import these names."""
    import triton.testing

    from ipca.kernels import tables, tuning

    def device_name(device: Any = None) -> str:
        return DRY_RUN

    def once(call: Callable[[], object], **_: Any) -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    def own(device: torch.device) -> Any:
        return tables._tables_for(DRY_RUN, CAPABILITY, tables.cache_file(device))

    changes: list[tuple[Any, str, Any]] = [
        (rows, "device_name", device_name),
        (torch.cuda, "get_device_name", device_name),
        (torch.cuda, "get_device_capability", lambda device=None: CAPABILITY),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (tables, "tables_for", own),
        (tuning, "autotunes", lambda x: os.environ.get("IPCA_AUTOTUNE") == "1"),
        (triton.testing, "do_bench", once),
        (triton.testing, "do_bench_cudagraph", once),
        (timing, "WARM_UP", 1),
        (timing, "RUN_SECONDS", 0.0),
        (timing, "LEAST_ROUNDS", 1),
        (timing, "MOST_ROUNDS", 1),
    ]
    for module, name, value in changes:
        setattr(module, name, value)
