"""One layer as a training loop runs it: time without a CUDA graph, its kernels, and the same under torch.compile.

A row holds one quantity of a provider; a step is forward and backward.

    quantity    ms                                          calls                        name
    wall        of a step                                   steps of a round
    host        of a step, until the host has queued it     steps of a round
    kernel      in a step                                   in a step                    of the kernel
    silu        of a step between two SiLUs, eager          steps of a round
    compiled    the same under torch.compile                buffers of (M, K) or (M, N)  "forward + backward" of them
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch._inductor.config as inductor_config
import torch.nn.functional as F
from torch import Tensor
from torch._C._autograd import DeviceType
from torch._inductor.utils import run_and_get_code
from torch.profiler import ProfilerActivity, profile

from bench.grid import Cell
from bench.pc_linear import UNFINISHED, call_of, statuses
from bench.providers import ARMS, Provider, Sample, active, layer_call, trained
from bench.rows import FACTS, Row, append_rows, facts, read_rows, same_run
from bench.timing import synchronize
from ipca.nn import LinearPC, explain

PROBLEM = ("M", "N", "K", "rank", "dtype")
COLUMNS = (*PROBLEM, "quantity", "provider", "form", "backend", "status", "name", "ms", "calls", *FACTS)
EAGER = (
    Provider("linear"),
    *(Provider(f"ipca-{backend}", form) for form in ("residual", "intact") for backend in ("auto", "triton", "addmm")),
    *(Provider(f"peft-{arm}") for arm in ARMS),
)
COMPILED = (
    Provider("linear"),
    Provider("ipca-auto", "residual"),
    Provider("peft-default"),
    Provider("ipca-auto", "intact"),
    Provider("ipca-triton", "residual"),
    Provider("peft-bf16"),
    Provider("ipca-addmm", "residual"),
)
"""Most important first: a compilation takes seconds."""
Seconds = tuple[float, float]
"""Of a step, and until the host has queued it."""
WARM_UP, ROUNDS, CALLS = 3, 7, 10


def eager(cell: Cell, path: Path, device: torch.device, seconds: float, count: int = CALLS) -> int:
    """Rows of wall, host and kernels that ``path`` lacks, with rounds of ``count`` steps.

    Returns:
        The exit status, see :mod:`bench.pc_linear`.
    """
    deadline, about = time.perf_counter() + seconds, facts(device)
    if not (left := _missing(EAGER, "wall", cell, path, device)):
        return 0
    sample = Sample(cell, device, seed=0)
    found = statuses(left, sample)
    calls = {who: call_of("full", who, sample) for who in left if found[who] == "ok"}
    times = walls(calls, device, count)
    for who in left:
        rows = [new_row(who, sample, quantity, found[who]) for quantity in ("wall", "host")]
        if who in calls:
            for row, values in zip(rows, zip(*times[who], strict=True), strict=True):
                row |= {"ms": f"{1e3 * median(values):.5f}", "calls": count}
            rows += [new_row(who, sample, "kernel") | kernel for kernel in kernels(calls[who], who, device, count)]
        append_rows(path, [row | about for row in rows], COLUMNS)
        if time.perf_counter() > deadline:
            return UNFINISHED
    return int(any(not words.startswith(("ok", "refused")) for words in found.values()))


def walls(
    calls: Mapping[Provider, Callable[[], object]], device: torch.device, count: int = CALLS
) -> dict[Provider, list[Seconds]]:
    """The times of every provider by round, in which they take turns."""
    times: dict[Provider, list[Seconds]] = {who: [] for who in calls}
    for number in range(ROUNDS + 1):
        for who, call in calls.items():
            with active(who):
                for _ in range(0 if number else WARM_UP):
                    call()
                synchronize(device)
                began = time.perf_counter()
                for _ in range(count):
                    call()
                queued = time.perf_counter() - began
                synchronize(device)
                times[who].append(((time.perf_counter() - began) / count, queued / count))
    return {who: rounds[1:] for who, rounds in times.items()}


def kernels(call: Callable[[], object], who: Provider, device: torch.device, count: int) -> Iterator[Row]:
    """The kernels of a step, on a CPU its ops, the longest first."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with active(who), profile(activities=activities) as profiler:
        for _ in range(count):
            call()
        synchronize(device)
    events = [event for event in profiler.key_averages() if (event.device_type != DeviceType.CPU) == on_gpu]

    def took(event: Any) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)

    for event in sorted(events, key=took, reverse=True):
        ms, launches = took(event) / 1e3 / count, event.count / count
        yield {"name": event.key[:200], "ms": f"{ms:.5f}", "calls": f"{launches:g}"}


def compiled(cell: Cell, path: Path, device: torch.device, seconds: float, most: int | None = None) -> int:
    """Rows of the first ``most`` providers between two SiLUs that ``path`` lacks; the exit status as above."""
    deadline, about, bad = time.perf_counter() + seconds, facts(device), False
    sample = Sample(cell, device, seed=0)
    for who in _missing(COMPILED[:most], "compiled", cell, path, device):
        if time.perf_counter() > deadline:
            return UNFINISHED
        try:
            rows = compile_between(who, sample)
        except Exception as error:  # one failure must not lose the rows of the others
            status = f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
            rows = [new_row(who, sample, "compiled", status)]
        append_rows(path, [row | about for row in rows], COLUMNS)
        bad |= any(row["status"] != "ok" for row in rows)
    return int(bad)


def compile_between(who: Provider, sample: Sample) -> list[Row]:
    """The rows "silu" and "compiled"; "wrong" where the two differ by more than their roundings."""
    layer, x, dy = layer_call(who, sample), sample.x, sample.dy
    wanted = [x, *trained(sample.layer(who))]

    def forward(x: Tensor) -> Tensor:
        return F.silu(layer(F.silu(x)))

    faster = torch.compile(forward, fullgraph=who.backend is not None, dynamic=False)
    steps: dict[Provider, Callable[[], Any]] = {
        who: lambda: torch.autograd.grad(forward(x), wanted, dy),
        replace(who, compiled=True): lambda: torch.autograd.grad(faster(x), wanted, dy),
    }
    with active(who), inductor_config.patch(force_disable_caches=True):  # a cached graph shows no code
        found, codes = run_and_get_code(steps[replace(who, compiled=True)])
        status, eps = "ok", torch.finfo(x.dtype).eps
        for name, value, plain in zip(("dx", "dA", "dB"), found, steps[who](), strict=False):
            error = float((value.double() - plain.double()).norm() / plain.double().norm())
            status = f"wrong: {name} is off by {error:.1e} of its norm" if not error <= 4 * eps else status
    rows = [new_row(who, sample, "silu"), new_row(who, sample, "compiled", status)]
    rows[1]["name"] = " + ".join(str(buffers(code, sample.cell)) for code in codes)
    rows[1]["calls"] = sum(buffers(code, sample.cell) for code in codes)
    for row, rounds in zip(rows, walls(steps, sample.device).values(), strict=True):
        row["ms"] = f"{1e3 * median(wall for wall, _ in rounds):.5f}"
    return rows


def buffers(code: str, cell: Cell) -> int:
    """The number of buffers of ``(M, K)`` or ``(M, N)`` that Inductor's ``code`` allocates."""
    return len(re.findall(rf"empty_strided_\w+\(\({cell.M}, (?:{cell.K}|{cell.N})\)", code))


def new_row(who: Provider, sample: Sample, quantity: str, status: str = "ok") -> Row:
    """A row before anything is timed."""
    layer, backend = sample.layer(who), ""
    if isinstance(layer, LinearPC) and not status.startswith("refused"):
        with active(who):
            backend = explain(layer, sample.x).backend
    shape = {name: getattr(sample.cell, name) for name in PROBLEM}
    about = {"provider": who.name, "form": who.form, "backend": backend, "status": status}
    return {**shape, "quantity": quantity, **about}


def table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """A line for each provider: times of a step, and buffers under torch.compile."""
    lines = [
        "| provider | backend | wall, ms | host, ms | kernels, ms | launches | SiLUs, ms | compiled, ms | buffers |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["provider"], row["form"]), []).append(row)
    for (provider, form), group in groups.items():
        of = {row["quantity"]: row for row in group if row["status"] == "ok"}
        ran = [row for row in group if row["quantity"] == "kernel"]
        times = [_ms(of.get(name)) for name in ("wall", "host", "silu", "compiled")]
        total, launches = (sum(float(row[name]) for row in ran) for name in ("ms", "calls"))
        columns = [*times[:2], f"{total:.3f}" if ran else "–", f"{launches:g}" if ran else "–", *times[2:]]
        columns += [of["compiled"]["name"] if "compiled" in of else "–"]
        lines.append(f"| {' | '.join([f'{provider} {form}'.strip(), group[0]['backend'], *columns])} |")
    bad = [row for row in rows if row["status"].startswith(("wrong", "failed"))]
    return lines + [f"{row['provider']} {row['form']}, {row['quantity']}: {row['status']}" for row in bad]


def _ms(row: Mapping[str, str] | None) -> str:
    return f"{float(row['ms']):.3f}" if row and row["ms"] else "–"


def _missing(who: Sequence[Provider], quantity: str, cell: Cell, path: Path, device: torch.device) -> list[Provider]:
    """Those that ``path`` has no such row of, for this cell, device and commit."""
    about = facts(device)
    shape = {name: str(getattr(cell, name)) for name in PROBLEM}
    done = {
        (row["provider"], row["form"])
        for row in same_run(read_rows(path), about["device"], about["commit"])
        if row["quantity"] == quantity and shape.items() <= row.items()
    }
    return [provider for provider in who if (provider.name, provider.form) not in done]
