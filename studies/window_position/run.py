"""Run the experiments of PROTOCOL.md and copy their rows to ``results``.

    python -m studies.window_position.run --out study-out V1 M1 M5      (default: all, in this order)
    python -m studies.window_position.run --out study-out --extensions  (exploratory rows: wider grids, by source)
    python -m studies.window_position.run --out study-out --gpu         (G1 and G2, which are not included in all)

Interrupted experiments resume. ``make study`` runs everything, then writes tables, figures and the page;
``make study-gpu OUT=folder`` runs G1 and G2 on a GPU for 9 minutes; call it again until it reports that they are
complete. They are exploratory: no claim of the protocol depends on them. A run is estimated at 2 to 3 seconds of an
H100, so that G1 and G2 take about 3 hours one run at a time, and less with several processes per GPU; this has not been
measured.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ipca.lab import sweep
from ipca.lab.baselines import CONTROLS
from ipca.lab.sweep.plan import Grid
from studies.window_position import digits, minilm, stream
from studies.window_position import language_model as text
from studies.window_position.rows import KNOWN_INPUTS, NEW_INPUTS

RESULTS = Path(__file__).resolve().parent / "results"
WINDOWS = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
GPU_WINDOWS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
GPU_RATES = (2.5e-4, *RATES)
PER_DEVICE = 6
"""Default number of processes per GPU: a single one mostly waits for Python. An estimate."""


@dataclass(frozen=True)
class Experiment:
    """One sweep of the protocol.

    Attributes:
        name: name of its file of rows.
        folder: folder of the sweep; experiments with the same folder share their trials.
        task: returns the sweep's task.
        grid: arguments of :func:`ipca.lab.sweep.run`.
    """

    name: str
    folder: str
    task: Callable[[], sweep.Task]
    grid: dict[str, Any] = field(default_factory=dict)


def _grid(
    windows: tuple[float | str, ...], methods: tuple[str, ...], lrs: tuple[float, ...], seeds: int
) -> dict[str, Any]:
    return {"windows": windows, "methods": methods, "lrs": lrs, "seeds": seeds, "comparisons": ("same",)}


_FEED_FORWARD = partial(minilm.task, "intermediate")
_BESIDE = ("lora", "full", "auto")
_EVERY = ("same", "sqrt-sigma", "update")
EXPERIMENTS = (
    Experiment(
        "V1",
        "digits",
        digits.task,
        _grid((0.0, 0.125, 0.25, 0.5, 0.75, 0.875, 1.0), (*_BESIDE, *CONTROLS), (1e-3, 2e-3, 4e-3), 10)
        | {"comparisons": _EVERY},
    ),
    Experiment("M1", "feed-forward", _FEED_FORWARD, _grid(WINDOWS, _BESIDE, RATES, 10)),
    Experiment(
        "M5", "tweets", partial(_FEED_FORWARD, source="tweet"), _grid((0.0, 0.5, 1.0), ("lora", "auto"), (2e-3,), 10)
    ),
    Experiment("M4", "long", partial(_FEED_FORWARD, steps=320), _grid((0.5,), ("lora",), (1e-3, 2e-3), 10)),
    Experiment(
        "M3",
        "feed-forward",
        _FEED_FORWARD,
        _grid(WINDOWS, ("lora", *CONTROLS), (1e-3, 2e-3), 5) | {"comparisons": _EVERY},
    ),
    Experiment("M2-query-value", "query-value", partial(minilm.task, "query-value"), _grid(WINDOWS, _BESIDE, RATES, 5)),
    Experiment("M2-all", "all-linear", partial(minilm.task, "all"), _grid(WINDOWS, _BESIDE, RATES, 5)),
)
_AGAIN, _MORE = "feed-forward-by-source", "digits-more"
EXTENSIONS = (
    Experiment("M1-low", _AGAIN, _FEED_FORWARD, _grid((0.0,), (), (1e-4, 2.5e-4), 10)),
    Experiment("M1-lower", _AGAIN, _FEED_FORWARD, _grid((0.0,), (), (1.25e-5, 3e-5, 6e-5), 10)),
    Experiment("M1-middle", _AGAIN, _FEED_FORWARD, _grid((0.5,), (), (5e-4,), 5)),
    Experiment("M1-others", _AGAIN, _FEED_FORWARD, _grid((1.0,), ("lora",), (1e-3,), 5)),
    Experiment("M1-rates", _AGAIN, _FEED_FORWARD, _grid((0.5, 1.0), ("lora",), (1e-4, 2.5e-4), 10)),
    Experiment("V1-low", _MORE, digits.task, _grid((0.0,), ("full",), (1e-4, 2.5e-4, 5e-4), 10)),
    Experiment(
        "V1-high",
        _MORE,
        digits.task,
        _grid((0.75, 0.875, 1.0), ("auto", "frozen-A", "frozen-B"), (8e-3, 1.6e-2), 10),
    ),
    Experiment("V1-middle", _MORE, digits.task, _grid((0.5,), ("lora",), (2.5e-4, 5e-4, 8e-3), 10)),
    Experiment("V1-minor", _MORE, digits.task, _grid((1.0,), ("frozen-A", "frozen-B"), (5e-4,), 10)),
    Experiment("V1-inputs", _MORE, digits.task, _grid((NEW_INPUTS,), (), (1e-4, 2.5e-4, *RATES), 10)),
    Experiment(
        "V1-null",
        "digits-null",
        partial(digits.task, known=True),
        _grid((KNOWN_INPUTS,), (), (2.5e-4, *RATES, 8e-3), 10),
    ),
    Experiment("M1-frozen", _AGAIN, _FEED_FORWARD, _grid((0.5,), ("frozen-A", "frozen-B"), (1e-3, 2e-3, 4e-3), 6)),
    Experiment(
        "M1-frozen-rates", _AGAIN, _FEED_FORWARD, _grid((0.5,), ("frozen-A", "frozen-B"), (2.5e-4, 5e-4, 8e-3), 6)
    ),
    Experiment("M1-inputs", _AGAIN, _FEED_FORWARD, _grid((NEW_INPUTS,), (), (5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2e-3), 6)),
    Experiment(
        "M1-null",
        "feed-forward-null",
        partial(_FEED_FORWARD, known=True),
        _grid((KNOWN_INPUTS,), (), (2.5e-4, *RATES, 8e-3), 6),
    ),
)
"""Exploratory, after all others (PROTOCOL.md, Changes): wider grids, options of windows, and retention by source."""


def gpu_experiments(devices: Sequence[str], seeds: int = 10) -> tuple[Experiment, ...]:
    """G1, a digits ViT of ViT-B's shape, and G2, a language model; every window, method, rate and comparison."""
    kind = devices[0].split(":")[0]
    grid = _grid(GPU_WINDOWS, (*_BESIDE, *CONTROLS), GPU_RATES, seeds) | {"comparisons": _EVERY, "devices": devices}
    return (
        Experiment("G1", "digits-base", partial(digits.task, "base", kind), grid),
        Experiment("G2", "text-base", partial(text.task, "base", kind), grid),
    )


def run_experiment(experiment: Experiment, out: Path, results: Path, workers: int) -> None:
    """Run one experiment and copy its rows and settings to the results."""
    began = time.perf_counter()
    sweep.run(experiment.task(), out / experiment.folder, workers=workers, **{"report": False, **experiment.grid})
    collect(experiment, out, results)
    print(f"{experiment.name}: {time.perf_counter() - began:.0f} s", flush=True)


def collect(experiment: Experiment, out: Path, results: Path) -> None:
    """Copy rows and settings of the folder's latest sweep, complete or not, to ``results``, if there is one."""
    results.mkdir(parents=True, exist_ok=True)
    for source, ending in (("rows.csv", ".csv"), ("settings.json", ".json")):
        if (out / experiment.folder / "rows.csv").exists():
            shutil.copy(out / experiment.folder / source, results / f"{experiment.name}{ending}")


def progress(experiments: Iterable[Experiment], out: Path) -> str:
    """The number of finished runs of each experiment: ``"G1: 812 of at most 1,900 runs, …"``."""
    parts = []
    for experiment in experiments:
        done = sum(1 for _ in (out / experiment.folder / "trials").glob("*.json"))
        names = ("windows", "lrs", "seeds", "methods", "comparisons")
        grid = Grid.of(**{name: experiment.grid[name] for name in names}, reference="middle")
        most = sum(sum(methods.values()) for methods in grid.counts().values())
        parts.append(f"{experiment.name}: {done:,} of at most {most:,} runs")
    return ", ".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command-line entry point."""
    parser = _parser()
    args = parser.parse_args(arguments)
    on_gpu = gpu_experiments(args.devices, args.seeds)
    experiments = {experiment.name: experiment for experiment in (*EXPERIMENTS, *EXTENSIONS, *on_gpu)}
    unknown = sorted(set(args.experiments) - {*experiments, "V2"})
    if unknown:
        parser.error(f"no experiment {unknown[0]}; there are {', '.join([*experiments, 'V2'])}")
    usual = on_gpu if args.gpu else EXTENSIONS if args.extensions else EXPERIMENTS
    names = args.experiments or [*(experiment.name for experiment in usual), *["V2"] * (usual is EXPERIMENTS)]
    chosen = [experiment for name, experiment in experiments.items() if name in names]
    if args.status:
        report_status([experiment for experiment in chosen if experiment in on_gpu], args.out, args.results)
        return
    for experiment in chosen:
        several = PER_DEVICE * len(args.devices) if experiment in on_gpu else os.cpu_count() or 1
        run_experiment(experiment, args.out, args.results, args.workers or several)
    if "V2" in names:
        stream.run_streams(args.out / "stream", args.results, args.workers or os.cpu_count() or 1)
    print(f"complete: {', '.join(names)}")


def report_status(experiments: Sequence[Experiment], out: Path, results: Path) -> None:
    """Copy the rows of ``experiments`` so far, and print how many there are."""
    for experiment in experiments:
        collect(experiment, out, results)
    print(f"{progress(experiments, out)}; stopped: call again with the same folder until it reports complete")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = ", ".join([*(experiment.name for experiment in (*EXPERIMENTS, *EXTENSIONS)), "V2"])
    default = f"the protocol's: {EXPERIMENTS[0].name} to {EXPERIMENTS[-1].name}, V2"
    add("experiments", nargs="*", metavar="NAME", help=f"any of {names}, G1, G2 (default: {default})")
    add("--out", type=Path, default=Path("study-out"), help="folder of the sweeps (default: study-out)")
    add("--results", type=Path, default=RESULTS, help="folder of the tables (default: results beside this file)")
    add("--workers", type=int, help=f"processes (default: all cores; for G1, G2: {PER_DEVICE} per device)")
    add("--extensions", action="store_true", help="run the exploratory extensions if no experiment is named")
    add("--gpu", action="store_true", help="run G1 and G2 if no experiment is named")
    add("--devices", nargs="+", default=["cuda:0"], help="devices of G1 and G2 (default: cuda:0)")
    add("--seeds", type=int, default=10, help="seeds of G1 and G2 (default: 10); more can be added later")
    add("--status", action="store_true", help="copy the rows of G1 and G2 so far and print their number")
    return parser


if __name__ == "__main__":
    main()
