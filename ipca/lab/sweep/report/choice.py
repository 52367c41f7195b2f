"""Which method and rate to use: the one that keeps most among those that learn as well as the best.

A *setting* is a method at a comparison and rate; windows, auto windows and plain LoRA count, and only where no seed
failed. Among the settings whose mean ``target`` is within one standard error of the best (Breiman et al., 1984, section
3.4.3), the one with the largest mean ``retained`` is suggested. It is chosen and judged on the same seeds, so its
figures flatter it. Fewer than three seeds have no standard error to go by, and nothing is suggested.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import mean, stdev

from ipca.lab.sweep.report.data import Sweep
from ipca.lab.sweep.report.words import Finding, name, number, seeds

_KINDS = ("window", "auto", "lora")
_SEEDS = 3


@dataclass(frozen=True)
class Setting:
    """A method at one rate, with its metrics over seeds in one order."""

    method: str
    comparison: str
    lr: float
    lr_used: float
    target: list[float]
    retained: list[float]

    def __str__(self) -> str:
        how = {
            "sqrt-sigma": ', divided by √σ in each layer (ipca.param_groups with match="sqrt-sigma")',
            "update": f", fully trained modules at {self.lr:g}",
        }
        return f"{name(self.method)}, learning rate {self.lr_used:g}{how.get(self.comparison, '')}"


def suggestion(sweep: Sweep) -> Finding | None:
    """The finding; None where a metric is missing."""
    question = "Which window and rate to use?"
    if not {"target", "retained"} <= set(sweep.metrics):
        return None
    if len(sweep.seeds) < _SEEDS:
        return Finding(question, f"No suggestion from {seeds(len(sweep.seeds))}; it takes {_SEEDS}.")
    found = settings(sweep)
    if not found:
        return Finding(question, "None: no setting ended well with every seed.")
    chosen = choose(found)
    lines = [f"Among what learns as well as the best, it keeps most: {_figures(chosen)}, {seeds(len(chosen.target))}."]
    rival = [setting for setting in found if setting.method == "lora"]
    if chosen.method != "lora" and rival:
        lines.append(f"By the same rule {choose(rival)}: {_figures(choose(rival))}.")
    lines.append("Chosen and judged on the same seeds: confirm it on others.")
    return Finding(question, f"{str(chosen)[0].upper()}{str(chosen)[1:]}.", tuple(lines))


def choose(found: list[Setting]) -> Setting:
    """The setting with the largest mean ``retained`` within one standard error of the best mean ``target``."""
    best = max(found, key=lambda setting: mean(setting.target))
    floor = mean(best.target) - stdev(best.target) / math.sqrt(len(best.target))
    return max((s for s in found if mean(s.target) >= floor), key=lambda setting: mean(setting.retained))


def settings(sweep: Sweep) -> list[Setting]:
    """Those that ended well with every seed of the sweep."""
    runs: dict[tuple[str, str, float, float], list[tuple[float, float]]] = {}
    for run in sweep.ends:
        if run.kind in _KINDS and run.lr is not None and {"target", "retained"} <= set(run.metrics):
            key = (run.method, run.comparison, run.lr, run.lr_used or run.lr)
            runs.setdefault(key, []).append((run.metrics["target"], run.metrics["retained"]))
    return [
        Setting(*key, [target for target, _ in found], [retained for _, retained in found])
        for key, found in runs.items()
        if len(found) == len(sweep.seeds)
    ]


def _figures(setting: Setting) -> str:
    return f"target {number(mean(setting.target))}, retained {number(mean(setting.retained))}"
