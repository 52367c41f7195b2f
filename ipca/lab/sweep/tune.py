"""The best rate of each method, by Optuna, on seeds that are used for nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean
from types import ModuleType
from typing import TYPE_CHECKING

from ipca.lab.sweep.plan import Grid
from ipca.lab.sweep.trial import Row, Trial

if TYPE_CHECKING:
    from optuna import Study

SEEDS = (1_000_000, 1_000_001)
"""Of the runs that rates are chosen by."""
_BEYOND = 4.0


def tuned_trials(grid: Grid, rounds: int, done: Callable[[Sequence[Trial]], Sequence[Row]]) -> list[Trial]:
    """The trials of every method at its best rate for the grid's seeds.

    In each round Optuna's TPE sampler proposes one rate for each method, between a quarter of the grid's lowest rate
    and four times its highest; it is told the mean ``target`` over :data:`SEEDS`, and of a rate at which a run failed
    only that. The same rows give the same proposals, so that a tuning that was stopped goes on where it was. A method
    that failed at every rate has no trials.

    Args:
        rounds: rates to try for each method.
        done: runs trials, each at most once, and gives their rows.

    Raises:
        ImportError: Optuna is not installed.
    """
    states = require_optuna().trial.TrialState
    studies = {method: _study() for method in grid.all_methods()}
    low, high = grid.lrs[0] / _BEYOND, grid.lrs[-1] * _BEYOND
    for _ in range(rounds):
        asked = {method: study.ask() for method, study in studies.items()}
        rates = {m: float(f"{asked[m].suggest_float('lr', low, high, log=True):.3g}") for m in asked}
        rows = done([Trial(method, "tuning", lr, lr, seed) for method, lr in rates.items() for seed in SEEDS])
        for method, trial in asked.items():
            targets = [row["target"] for row in rows if _ends(row, method, rates[method])]
            if None in targets:
                studies[method].tell(trial, state=states.PRUNED)  # worse than whatever ended well
            else:
                studies[method].tell(trial, mean(targets))
    known = {method: study for method, study in studies.items() if study.get_trials(states=[states.COMPLETE])}
    best = {method: float(f"{study.best_params['lr']:.3g}") for method, study in known.items()}
    return [Trial(method, "tuned", lr, lr, seed) for method, lr in best.items() for seed in grid.seeds]


def _ends(row: Row, method: str, lr: float) -> bool:
    return row["method"] == method and row["lr"] == lr and row["step"] is None


def require_optuna() -> ModuleType:
    """The package; ImportError says how to install it."""
    try:
        import optuna
    except ImportError:
        raise ImportError("tuning needs Optuna; run: pip install 'ipca-lora[sweep]', or leave tuning out") from None
    return optuna


def _study() -> Study:
    optuna = require_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
