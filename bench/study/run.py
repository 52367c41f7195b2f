"""Run the study's experiments, as PROTOCOL.md fixes them, and put their rows into bench/results/study.

    python bench/study/run.py --out study-out V1 M1 M5      (none named: all, in this order)

An experiment that was stopped goes on where it was. `make study` runs everything, then makes tables and figures.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import digits
import minilm
import stream

from ipca import sweep
from ipca.baselines import CONTROLS

RESULTS = Path(__file__).parents[1] / "results" / "study"
WINDOWS = (0, 0.125, 0.25, 0.5, 0.75, 1)
RATES = (5e-4, 1e-3, 2e-3, 4e-3)


@dataclass(frozen=True)
class Experiment:
    """One sweep of the protocol.

    Attributes:
        name: of its rows' file.
        folder: of the sweep; experiments with one folder share their trials.
        task: makes what is trained and judged.
        grid: arguments of :func:`ipca.sweep.run`.
    """

    name: str
    folder: str
    task: Callable[[], sweep.Task]
    grid: dict[str, Any] = field(default_factory=dict)


def _feed_forward() -> sweep.Task:
    return minilm.task("intermediate")


def _query_value() -> sweep.Task:
    return minilm.task("query-value")


def _all() -> sweep.Task:
    return minilm.task("all")


def _long() -> sweep.Task:
    return minilm.task("intermediate", steps=320)


def _tweets() -> sweep.Task:
    return minilm.task("intermediate", source="tweet")


def _grid(windows: tuple[float, ...], methods: tuple[str, ...], lrs: tuple[float, ...], seeds: int) -> dict[str, Any]:
    return {"windows": windows, "methods": methods, "lrs": lrs, "seeds": seeds, "comparisons": ("same",)}


_BESIDE = ("lora", "full", "auto")
_EVERY = ("same", "sqrt-sigma", "update")
EXPERIMENTS = (
    Experiment(
        "V1",
        "digits",
        digits.task,
        _grid((0, 0.125, 0.25, 0.5, 0.75, 0.875, 1), (*_BESIDE, *CONTROLS), (1e-3, 2e-3, 4e-3), 10)
        | {"comparisons": _EVERY},
    ),
    Experiment("M1", "feed-forward", _feed_forward, _grid(WINDOWS, _BESIDE, RATES, 10)),
    Experiment("M5", "tweets", _tweets, _grid((0, 0.5, 1), ("lora", "auto"), (2e-3,), 10)),
    Experiment("M4", "long", _long, _grid((0.5,), ("lora",), (1e-3, 2e-3), 10)),
    Experiment(
        "M3",
        "feed-forward",
        _feed_forward,
        _grid(WINDOWS, ("lora", *CONTROLS), (1e-3, 2e-3), 5) | {"comparisons": _EVERY},
    ),
    Experiment("M2-query-value", "query-value", _query_value, _grid(WINDOWS, _BESIDE, RATES, 5)),
    Experiment("M2-all", "all-linear", _all, _grid(WINDOWS, _BESIDE, RATES, 5)),
)


def run(experiment: Experiment, out: Path, workers: int) -> None:
    """Run one experiment and copy its rows, settings and seconds to the results."""
    began = time.perf_counter()
    folder = out / experiment.folder
    sweep.run(experiment.task(), folder, workers=workers, **{"report": False, **experiment.grid})
    RESULTS.mkdir(parents=True, exist_ok=True)
    for source, ending in (("rows.csv", ".csv"), ("settings.json", ".json")):
        shutil.copy(folder / source, RESULTS / f"{experiment.name}{ending}")
    print(f"{experiment.name}: {time.perf_counter() - began:.0f} s", flush=True)


def main() -> None:
    """Run what the command line names."""
    names = [experiment.name for experiment in EXPERIMENTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", metavar="NAME", help=f"of {', '.join([*names, 'V2'])} (default: all)")
    parser.add_argument("--out", type=Path, default=Path("study-out"), help="folder of the sweeps (default study-out)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    args = parser.parse_args()
    unknown = sorted(set(args.experiments) - {*names, "V2"})
    if unknown:
        parser.error(f"no experiment {unknown[0]}; there are {', '.join([*names, 'V2'])}")
    for experiment in EXPERIMENTS:
        if experiment.name in (args.experiments or names):
            run(experiment, args.out, args.workers)
    if not args.experiments or "V2" in args.experiments:
        stream.run(args.out / "stream", RESULTS, args.workers)


if __name__ == "__main__":
    main()
