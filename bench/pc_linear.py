"""Benchmark of the fused linear against a bare ``nn.Linear`` and stock PEFT: forward, backward, both.

    python -m bench.pc_linear --out DIR          the grid; resumes an interrupted run
    python -m pytest bench/pc_linear.py          one small cell under pytest-benchmark

See bench/README.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.config as dynamo_config
import torch._functorch.config as functorch_config
from torch import Tensor
from tqdm import tqdm

from bench.checks import check, truth_of
from bench.grid import Cell, cells_for
from bench.providers import ARMS, FORMS, Provider, Sample, active, layer_call, providers_for, trained
from bench.result_tables import pc_linear_table
from bench.rows import FACTS, RESULTS, Row, append_rows, device_name, facts, read_rows, same_run, slug
from bench.timing import Call, Timing, measure, peak_mib, rotation, runner, saved_mib, side_stream, synchronize
from ipca.nn import LinearPC, backends, explain

MODES = ("forward", "backward", "full")
MATRIX_PRODUCTS = {
    "forward": 1,
    "graph": 1,
    "backward": 1,
    "full": 2,
}  # of a frozen linear layer, without a weight gradient
BASELINES = {"ratio_linear": "linear", **{f"ratio_peft_{arm}": f"peft-{arm}" for arm in ARMS}}
COLUMNS = (
    *("op", "mode", "M", "N", "K", "rank", "dtype", "form", "dropout", "provider", "backend", "compiled", "status"),
    *("median_ms", "p20_ms", "p80_ms", "tflops", *BASELINES, "peak_mib", "saved_mib", "saved_with_x_mib", "timer"),
    *FACTS,
)
SECONDS = {"cuda": 1.0, "cpu": 3.0}
"""Time for the rounds of one mode of one cell."""
EXPECTED_FLOPS = 6e14  # of a GPU, to estimate how many short calls fit into one replay
DEVICE_LOST, UNFINISHED = 3, 4
"""Exit statuses after which another call resumes: with the next cell, or with those that time did not allow."""
SMALL = Cell(64, 256, 256, dtype="float32")
"""The cell that pytest-benchmark runs."""


class DeviceLostError(RuntimeError):
    """The GPU no longer responds in this process."""


def bench_cell(cell: Cell, device: torch.device, seconds: float | None = None) -> list[Row]:
    """All rows of one cell; providers that cannot run, are wrong or fail have a status and no time."""
    torch._dynamo.reset()
    # Every layer and mode must compile, never fall back silently; a backward timed alone reuses its saved tensors.
    compiling = {"recompile_limit": 64, "fail_on_recompile_limit_hit": True}
    with dynamo_config.patch(compiling), functorch_config.patch(donated_buffer=False):
        rows = bench_modes(cell, device, seconds or SECONDS[device.type], providers_for(cell))
    # In a torch.compile cell the others are timed only for the ratios; their rows belong to the cell without it.
    return [row for row in rows if row["compiled"] == int(cell.compiled)]


def bench_modes(
    cell: Cell, device: torch.device, seconds: float, who: Sequence[Provider], modes: Sequence[str] = MODES
) -> list[Row]:
    """The rows of these providers and modes."""
    input_bytes = (cell.M * cell.K + cell.N * cell.K) * cell.torch_dtype.itemsize
    samples = [Sample(cell, device, seed) for seed in range(rotation(input_bytes, device))]
    status = statuses(who, samples[0])
    return [row for mode in modes for row in bench_mode(cell, mode, status, samples, seconds)]


def statuses(who: Sequence[Provider], sample: Sample) -> dict[Provider, str]:
    """For each provider "ok", or the reason it is not timed: "refused: …", "wrong: …" or "failed: …"."""
    truths = {form: truth_of(sample, form) for form in ("", *FORMS)}
    found = {}
    for provider in who:
        truth = truths["residual" if provider.name.startswith("peft") else provider.form]
        try:
            reason = unsupported_reason(provider, sample)
            complaint = "" if reason else check(provider, sample, truth)
            found[provider] = f"refused: {reason}" if reason else f"wrong: {complaint}" if complaint else "ok"
        except Exception as error:  # one failure must not lose the rows of the others
            found[provider] = failure(provider, sample.device, error)
    return found


def unsupported_reason(provider: Provider, sample: Sample) -> str:
    """The reason why the provider's backend cannot run here; empty if it can."""
    layer = sample.layer(provider)
    if not isinstance(layer, LinearPC) or provider.backend == "auto":
        return ""
    return backends(layer, sample.x)[str(provider.backend)]


def bench_mode(
    cell: Cell, mode: str, status: dict[Provider, str], samples: Sequence[Sample], seconds: float
) -> list[Row]:
    """The rows of one mode. All providers are timed in turn, so that machine noise affects them equally."""
    device = samples[0].device
    flops = 2 * cell.M * cell.N * cell.K * MATRIX_PRODUCTS[mode]
    rows = {provider: new_row(cell, mode, provider, words) for provider, words in status.items()}
    runners = {}
    for provider in [provider for provider, words in status.items() if words == "ok"]:
        try:
            with active(provider):
                calls = [call_of(mode, provider, sample) for sample in samples]
                rows[provider] |= about(mode, provider, samples[0], calls[0])
            runners[provider] = runner(calls, device, flops / EXPECTED_FLOPS, partial(active, provider))
        except Exception as error:
            runners.pop(provider, None)
            rows[provider]["status"] = failure(provider, device, error)
    try:
        times = dict(zip(runners, measure([*runners.values()], device, seconds), strict=True))
    except RuntimeError as error:  # each of them had run before
        raise DeviceLostError(Provider("any"), f"failed: while {mode} was timed: {error}".splitlines()[0]) from error
    for provider, own in times.items():
        rows[provider] |= timings(own, times, flops) | {"timer": runners[provider].timer}
    return list(rows.values())


def call_of(mode: str, provider: Provider, sample: Sample) -> Call:
    """One call of ``mode``; its input requires a gradient, as in the middle of a network."""
    layer, x, dy = layer_call(provider, sample), sample.x, sample.dy
    wanted = [x, *trained(sample.layer(provider))]
    if mode == "graph":
        return lambda: layer(x)
    if mode == "full":
        return lambda: torch.autograd.grad(layer(x), wanted, dy)
    if mode == "backward":
        y = layer(x)
        return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)

    def forward() -> Tensor:
        with torch.no_grad():
            return layer(x)

    return forward


def about(mode: str, provider: Provider, sample: Sample, call: Call) -> Row:
    """Columns other than times: memory of one call, saved tensors, and the backend that ``ipca`` ran."""
    module, layer, x = sample.layer(provider), layer_call(provider, sample), sample.x
    call()  # the first call also allocates persistent memory, such as cuBLAS's workspace
    found: Row = {"backend": "", "peak_mib": _number(peak_mib(call, sample.device), 1)}
    if isinstance(module, LinearPC):
        with torch.set_grad_enabled(mode != "forward"):
            found["backend"] = explain(module, x).backend
    if mode == "full":
        owned = [*module.parameters(), *module.buffers()]
        found["saved_mib"] = _number(saved_mib(lambda: layer(x), [*owned, x]), 2)
        found["saved_with_x_mib"] = _number(saved_mib(lambda: layer(x), owned), 2)
    return found


def timings(own: Timing, times: dict[Provider, Timing], flops: int) -> Row:
    """The columns of one provider's times, and the ratios to those of the baselines."""
    median = own.quantile(0.5)
    by_name = {provider.name: time for provider, time in times.items() if not provider.compiled}
    ratios = {column: own.ratio(by_name[name]) if name in by_name else None for column, name in BASELINES.items()}
    return {
        "median_ms": _number(median, 5),
        "p20_ms": _number(own.quantile(0.2), 5),
        "p80_ms": _number(own.quantile(0.8), 5),
        "tflops": _number(flops / median / 1e9, 3),
        **{column: _number(ratio, 4) for column, ratio in ratios.items()},
    }


def new_row(cell: Cell, mode: str, provider: Provider, status: str) -> Row:
    """A row before anything is timed."""
    shape = {name: getattr(cell, name) for name in ("M", "N", "K", "rank", "dtype", "dropout")}
    who = {"provider": provider.name, "form": provider.form, "compiled": int(provider.compiled)}
    return {"op": "pc_linear", "mode": mode, **shape, **who, "status": status}


def failure(provider: Provider, device: torch.device, error: Exception) -> str:
    """The status of a provider that failed; raises if the GPU no longer responds, so that nothing else can be timed."""
    status = f"failed: {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    try:
        synchronize(device)
    except RuntimeError as lost:
        raise DeviceLostError(provider, status) from lost
    return status


def run_grid(
    cells: Iterable[Cell], path: Path, device: torch.device, seconds: float, rounds: float | None = None
) -> bool:
    """Measure every cell that ``path`` lacks for this device and commit, until time runs out; whether all are there."""
    about_run = facts(device)
    done = {cell_key(row) for row in same_run(read_rows(path), about_run["device"], about_run["commit"])}
    left = [cell for cell in cells if cell_key(vars(cell)) not in done]
    deadline = time.perf_counter() + seconds
    longest = {False: 0.0, True: 60.0}  # without and with torch.compile, which takes about a minute
    bar = tqdm(left, desc="Cells", unit="cell")
    for cell in bar:
        began = time.perf_counter()
        if began + longest[cell.compiled] >= deadline:
            bar.write(f"out of time: {len(left) - bar.n} of {len(left)} cells are left for another call")
            return False
        bar.set_postfix_str(f"M={cell.M} {cell.N}x{cell.K} r={cell.rank}")
        try:
            rows = bench_cell(cell, device, rounds)
        except DeviceLostError as error:
            row = new_row(cell, "full", *error.args) | {"compiled": int(cell.compiled)} | about_run
            append_rows(path, [row], COLUMNS)
            raise
        append_rows(path, [row | about_run for row in rows], COLUMNS)
        longest[cell.compiled] = max(longest[cell.compiled], time.perf_counter() - began)
    return True


def cell_key(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The identity of a cell, from a row or from the cell's fields."""
    compiled = str(int(row["compiled"]))
    return (*(str(row[name]) for name in ("M", "N", "K", "rank", "dropout", "dtype")), compiled)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def pytest_generate_tests(metafunc: Any) -> None:
    """``pytest bench/pc_linear.py``: every provider of one small cell."""
    metafunc.parametrize(
        "provider", providers_for(SMALL), ids=lambda provider: f"{provider.name} {provider.form}".strip()
    )


def test_full(benchmark: Any, provider: Provider) -> None:
    """Forward and backward, as in training."""
    import pytest

    sample = Sample(SMALL, torch.device("cpu"), seed=0)
    if reason := unsupported_reason(provider, sample):
        pytest.skip(reason)
    truth = truth_of(sample, "residual" if provider.name.startswith("peft") else provider.form)
    assert not check(provider, sample, truth)
    with active(provider):
        benchmark(call_of("full", provider, sample))


def measure_cells(cells: Sequence[Cell], out: Path, device: torch.device, seconds: float, **options: Any) -> int:
    """Run the cells into the CSV file of ``device`` in ``out`` and print them; the exit status.

    1 if a provider was wrong or failed, :data:`DEVICE_LOST`, or :data:`UNFINISHED`.
    """
    path, about_run = out / f"pc_linear_{slug(device_name(device))}.csv", facts(device)
    try:
        with side_stream(device):
            complete = run_grid(cells, path, device, seconds, **options)
    except DeviceLostError as error:
        print(f"the device no longer responds after {error}; call again to resume with the next cell", file=sys.stderr)
        return DEVICE_LOST
    of = {cell_key(vars(cell)) for cell in cells}
    rows = [row for row in same_run(read_rows(path), about_run["device"], about_run["commit"]) if cell_key(row) in of]
    print(f"{pc_linear_table(rows)}\n{path}")
    bad = [row for row in rows if row["status"].startswith(("wrong", "failed"))]
    for row in bad:
        print(" ".join(row[name] for name in ("mode", "M", "N", "K", "provider", "form", "status")), file=sys.stderr)
    return 1 if bad else 0 if complete else UNFINISHED


def main() -> int:
    """Run the grid; the exit status of :func:`measure_cells`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file (default: bench/results)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop before the first cell that would exceed this"
    )
    args = parser.parse_args()
    return measure_cells(cells_for(args.device), args.out, torch.device(args.device), args.seconds)


if __name__ == "__main__":
    sys.exit(main())
