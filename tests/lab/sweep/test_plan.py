"""The grid, the rates of equal updates, and the search for a method's best rate."""

import math

import numpy as np
import pytest

from ipca.lab.sweep.plan import TUNING_SEEDS, Grid, matched_rates, steps_of, tuned_trials
from ipca.window import Window

OPTIONS = {
    "windows": (0.0, 0.5, "minor"),
    "lrs": (2e-3, 1e-3),
    "seeds": 2,
    "methods": ("lora", "haar"),
    "comparisons": ("same", "sqrt-sigma", "update"),
    "reference": "middle",
}


def row(method, lr, early, comparison="same", step=None):
    return {"method": method, "comparison": comparison, "lr": lr, "step": step, "early_update": early}


def test_every_method_meets_every_rate_and_seed_once():
    grid = Grid.of(**OPTIONS)
    trials = grid.direct_trials()
    assert len(trials) == len(set(trials)) == (5 + 3) * 2 * 2
    assert {(t.method, t.comparison) for t in trials if t.comparison == "sqrt-sigma"} == {
        (window, "sqrt-sigma") for window in ("0.0", "0.5", "1.0")
    }
    assert [t.lr for t in trials[:4]] == [1e-3, 1e-3, 2e-3, 2e-3]
    assert len({t.key for t in trials}) == len(trials)


def test_matched_rates_of_a_power_law():
    lrs = (1e-3, 2e-3, 4e-3)
    rows = [row("0.5", lr, 5 * lr) for lr in lrs] + [row("0.0", lr, 20 * lr) for lr in lrs]
    rates = matched_rates(rows, "0.0", "0.5", lrs)
    assert rates == {1e-3: 2.5e-4, 2e-3: 5e-4, 4e-3: 1e-3}


def test_matched_rates_lie_on_the_line_between_own_runs_and_average_over_seeds():
    rows = [row("0.5", 1e-3, 0.02), row("lora", 1e-3, 0.005), row("lora", 1e-3, 0.015), row("lora", 4e-3, 0.04)]
    expected = 1e-3 * 4 ** (math.log(2) / math.log(4))  # half-way in log, the mean at 1e-3 being 0.01
    assert matched_rates(rows, "lora", "0.5", (1e-3, 4e-3)) == {1e-3: pytest.approx(expected, rel=5e-3)}


def test_other_comparisons_checkpoints_and_diverged_runs_do_not_count():
    rows = [row("0.5", 1e-3, 0.02), row("0.0", 1e-3, 0.02), row("0.0", 1e-3, 9.0, step=5)]
    rows += [row("0.0", 1e-3, 9.0, comparison="sqrt-sigma"), row("0.0", 2e-3, None), row("1.0", 1e-3, None)]
    assert matched_rates(rows, "0.0", "0.5", (1e-3, 2e-3)) == {1e-3: 1e-3}
    assert matched_rates(rows, "1.0", "0.5", (1e-3,)) == {}


def test_update_trials_leave_the_reference_out():
    grid = Grid.of(**OPTIONS)
    rows = [row(m, lr, lr * k) for k, m in enumerate(("0.0", "0.5", "1.0", "lora"), 1) for lr in grid.lrs]
    trials = grid.update_trials(rows)
    assert {t.method for t in trials} == {"0.0", "1.0", "lora"}
    assert {(t.lr, t.lr_used) for t in trials if t.method == "0.0"} == {(1e-3, 2e-3), (2e-3, 4e-3)}
    assert sum(grid.counts()["update"].values()) == len(trials)


def test_without_equal_updates_all_trials_are_known():
    grid = Grid.of(**{**OPTIONS, "comparisons": ("same",)})
    assert sum(grid.counts()["same"].values()) == len(grid.direct_trials()) == 5 * 2 * 2
    assert list(grid.counts()) == ["same"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"windows": ()}, "needs at least one of windows"),
        ({"lrs": (0.0,)}, "learning rates must be positive, got 0.0"),
        ({"lrs": (1e-3, 1e-3)}, "lrs contains a value twice: 0.001, 0.001"),
        ({"windows": (0.5, "0.50")}, "windows contains a value twice"),
        ({"seeds": ()}, "needs at least one of seeds"),
        ({"seeds": (0, -1)}, r"seeds must be from 0 to 2\*\*32 - 1, got 0, -1"),
        ({"seeds": -1}, "seeds must be a number of at least 1, or a list of seeds; got -1"),
        ({"windows": (1.5,)}, r"The fraction in window '1\.5' must lie in \[0, 1\]"),
        ({"windows": ("midle",)}, 'Unknown window \'midle\': use "principal", "middle"'),
        ({"windows": (1,)}, "window 1 is ambiguous, an index or a fraction: write 'start=1' .* '1.0' for the fraction"),
        ({"windows": ("256",)}, "window 256 is ambiguous, an index or a fraction: write 'start=256'"),
        ({"windows": (Window(5, 8),), "rank": 4}, "has rank 8, but rank=4 was given too"),
        ({"windows": ("lora",)}, "'lora' is in the wrong list"),
        ({"methods": ("0.3",)}, "'0.3' is in the wrong list"),
        ({"methods": ("pissa",)}, "unknown method 'pissa'"),
        ({"comparisons": ("update",)}, "comparisons are 'same' and any of sqrt-sigma, update"),
        ({"comparisons": ("same", "tuned")}, "comparisons are 'same' and any of"),
        ({"reference": "0.25"}, "equal updates are those of the reference window '0.25', which is not among"),
    ],
)
def test_bad_grids_say_what_is_wrong(change, says):
    with pytest.raises(ValueError, match=says):
        Grid.of(**{**OPTIONS, **change})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"windows": "middle"}, r"windows must be a list, got 'middle'; pass \['middle'\] for a single one"),
        ({"methods": "lora"}, "methods must be a list, got 'lora'"),
        ({"comparisons": "same"}, "comparisons must be a list, got 'same'"),
        ({"lrs": 1e-3}, "lrs must be a list, got 0.001"),
        ({"lrs": ("fast",)}, "lrs must be learning rates, positive numbers; got 'fast'"),
        ({"seeds": "8"}, "seeds must be a list, got '8'"),
        ({"seeds": (0.5,)}, "seeds must be whole numbers, got 0.5"),
        ({"seeds": (True,)}, "seeds must be whole numbers, got True"),
        ({"seeds": 2.0}, "seeds must be a whole number, or a list of seeds, got 2.0"),
        ({"seeds": True}, "seeds must be a whole number, or a list of seeds, got True"),
    ],
)
def test_options_of_another_kind_are_named(change, says):
    with pytest.raises(TypeError, match=says):
        Grid.of(**{**OPTIONS, **change})


def test_numbers_of_numpy_are_numbers():
    grid = Grid.of(**{**OPTIONS, "seeds": np.arange(2), "lrs": np.array([1e-3]), "windows": np.array([0.5])})
    assert (grid.seeds, grid.lrs, grid.windows) == ((0, 1), (1e-3,), ("0.5",))
    assert Grid.of(**{**OPTIONS, "seeds": np.int64(2)}).seeds == (0, 1)


def test_checkpoints_are_steps():
    assert steps_of((9, 3, 9)) == (3, 9)
    with pytest.raises(TypeError, match="checkpoints must be a list, got 5"):
        steps_of(5)
    with pytest.raises(ValueError, match="counted from 1; got 0"):
        steps_of((0, 3))


TUNED = Grid.of((0.5,), (1e-3, 1e-2), 2, ("lora",), ("same",), "0.5")


def search(target, rounds=8):
    def run(trials):
        return [
            {"method": t.method, "lr": t.lr, "seed": t.seed, "step": None, "target": target(t.method, t.lr)}
            for t in trials
        ]

    return tuned_trials(TUNED, rounds, run)


def test_a_rate_that_failed_is_not_the_best_where_targets_are_negative():
    trials = search(lambda method, lr: None if lr > 4e-3 else -3.0 + lr)
    assert {trial.method for trial in trials} == {"0.5", "lora"}
    assert all(trial.lr <= 4e-3 for trial in trials)


def test_a_method_that_failed_at_every_rate_has_no_trials():
    trials = search(lambda method, lr: None if method == "lora" else -lr, rounds=3)
    assert [(trial.method, trial.seed) for trial in trials] == [("0.5", 0), ("0.5", 1)]


def test_the_rates_are_chosen_on_other_seeds():
    seen = set()

    def run(trials):
        seen.update(trial.seed for trial in trials)
        return [{"method": t.method, "lr": t.lr, "seed": t.seed, "step": None, "target": t.lr} for t in trials]

    trials = tuned_trials(TUNED, 2, run)
    assert seen == set(TUNING_SEEDS)
    assert not seen & {trial.seed for trial in trials}
