"""The search for a method's best rate."""

from ipca.lab.sweep.plan import Grid
from ipca.lab.sweep.tune import SEEDS, tuned_trials

GRID = Grid.of((0.5,), (1e-3, 1e-2), 2, ("lora",), ("same",), "0.5")


def search(target, rounds=8):
    def done(trials):
        return [
            {"method": t.method, "lr": t.lr, "seed": t.seed, "step": None, "target": target(t.method, t.lr)}
            for t in trials
        ]

    return tuned_trials(GRID, rounds, done)


def test_a_rate_that_failed_is_not_the_best_where_targets_are_negative():
    trials = search(lambda method, lr: None if lr > 4e-3 else -3.0 + lr)
    assert {trial.method for trial in trials} == {"0.5", "lora"}
    assert all(trial.lr <= 4e-3 for trial in trials)


def test_a_method_that_failed_at_every_rate_has_no_trials():
    trials = search(lambda method, lr: None if method == "lora" else -lr, rounds=3)
    assert [(trial.method, trial.seed) for trial in trials] == [("0.5", 0), ("0.5", 1)]


def test_the_rates_are_chosen_on_other_seeds():
    seen = set()

    def done(trials):
        seen.update(trial.seed for trial in trials)
        return [{"method": t.method, "lr": t.lr, "seed": t.seed, "step": None, "target": t.lr} for t in trials]

    trials = tuned_trials(GRID, 2, done)
    assert seen == set(SEEDS)
    assert not seen & {trial.seed for trial in trials}
