"""A trial evaluates what was trained, alike for every method, and follows the optimizer from outside."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from ipca.lab import baselines, sweep
from ipca.lab.sweep import Task
from ipca.lab.sweep.trial import Trial, base_row, build_base, evaluate_task, rate_groups, run_trial, watch_optimizer
from ipca.svd import SpectralCache
from tests.helpers import sweep_task

TRIAL = Trial("0.5", "same", 1e-3, 1e-3, 1)


def row_of(task, tmp_path, trial=TRIAL, base=None):
    base = build_base(task) if base is None else base
    return run_trial(task, base, trial, cache=SpectralCache(tmp_path), early=2, checkpoints=())[-1]


def judged_by(evaluate, model=None):
    return evaluate_task(replace(sweep_task.task(), evaluate=evaluate), model or nn.Linear(2, 2), "this trial")


def refuse_to_judge(model):
    raise AssertionError("a diverged model was judged")


@pytest.mark.parametrize("lost", ["body.lora_A", "head.bias"])
def test_a_model_that_diverged_is_not_judged(lost, tmp_path):
    def train(model, groups, seed):
        sweep_task.train(model, groups, seed)
        with torch.no_grad():
            model.get_parameter(lost).fill_(float("inf"))

    row = row_of(replace(sweep_task.task(), train=train, evaluate=refuse_to_judge), tmp_path)
    assert row["status"].endswith("target, retained is not finite")
    assert row["target"] is row["retained"] is row["update"] is None
    assert row["early_update"] > 0


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ({"target": 1.0}, "this trial: evaluate\\(\\) must return 'target' and 'retained'"),
        ({"target": 1.0, "retained": 1.0, "lr": 3.0}, "this trial: evaluate\\(\\) returned 'lr', a column"),
        ({"target": "high", "retained": 1.0}, "this trial: evaluate\\(\\) must return numbers, target is 'high'"),
        ({"target": 1.0, "retained": 1.0, "drift": None}, "must return numbers, drift is None"),
        ({"target": 1.0, "retained": 1.0, 3: 1.0}, "must name each metric by a string, got 3"),
    ],
)
def test_wrong_metrics_are_refused_by_name(found, says):
    with pytest.raises(ValueError, match=says):
        judged_by(lambda model: found)


def test_what_evaluate_draws_is_the_same_for_every_model_and_changes_nothing():
    models = nn.Linear(2, 2), nn.Linear(3, 2)
    torch.manual_seed(7)
    expected = torch.rand(())
    torch.manual_seed(7)
    found = [judged_by(lambda model: {"target": torch.rand(()).item(), "retained": 0.0}, model) for model in models]
    assert found[0] == found[1]
    assert torch.rand(()) == expected


def test_judging_the_untrained_model_leaves_it_as_it_is():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = copy.deepcopy(model.state_dict())

    def evaluate(model):
        return {"target": model(torch.randn(5, 3)).sum().item(), "retained": 0.0}

    base_row(replace(sweep_task.task(), evaluate=evaluate), model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_another_metric_of_the_untrained_model_may_be_undefined():
    task = replace(sweep_task.task(), evaluate=lambda model: {"target": 0.0, "retained": 1.0, "corr": float("nan")})
    row = base_row(task, nn.Linear(3, 2))
    assert (row["status"], row["target"], row["corr"]) == ("ok", 0.0, None)


def test_a_head_that_build_draws_is_the_same_every_time():
    task = replace(sweep_task.task(), build=sweep_task.Student)
    first, second = build_base(task), build_base(task)
    assert torch.equal(first.head.weight, second.head.weight)


@pytest.mark.parametrize("comparison", ["same", "sqrt-sigma", "update"])
def test_the_head_has_the_rate_of_the_grid_in_every_comparison(comparison):
    model = baselines.apply(sweep_task.build(), "1.0", sweep_task.SETTINGS)
    trial = Trial("1.0", comparison, 1e-3, 5e-3 if comparison == "update" else 1e-3, 0)
    rates = {group["name"]: group["lr"] for group in rate_groups(model, trial)}
    assert rates.pop("modules_to_save") == 1e-3
    assert (set(rates.values()) == {5e-3}) == (comparison == "update")


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.norm(self.body(x)))

    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state):
        assert state == {"version": 3}


def train_normed(model, groups, seed):
    optimizer = torch.optim.AdamW(groups)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()


def test_a_model_with_counters_and_other_state_is_swept(tmp_path):
    from ipca.lab import sweep
    from ipca.model import AdapterSettings

    def evaluate(model):
        return {"target": model(torch.randn(4, 6)).sum().item(), "retained": 0.0}

    task = Task(Normed, train_normed, evaluate, AdapterSettings(rank=2, targets=("body",)))
    options = {"windows": (0.0,), "lrs": (1e-3,), "seeds": 1, "methods": (), "comparisons": ("same",), "early": 1}
    rows = sweep.run(task, tmp_path, **options, progress=False, report=False)
    assert [row["status"] for row in rows] == ["ok", "ok"]


def test_a_window_in_a_null_space_has_no_matched_rate_and_says_so(tmp_path):
    def build():
        model = sweep_task.build()
        with torch.no_grad():
            model.out.weight[2:] = 0
        return model

    options = {"lrs": (1e-3,), "seeds": 1, "methods": (), "comparisons": ("same", "sqrt-sigma"), "early": 2}
    task = replace(sweep_task.task(), build=build)
    with pytest.warns(UserWarning, match="components that are 0 in the window: 2 of 2 of out"):
        rows = sweep.run(task, tmp_path, windows=(0.0, 1.0), progress=False, report=False, **options)
    statuses = {(row["method"], row["comparison"]): row["status"] for row in rows[1:]}
    assert statuses.pop(("1.0", "sqrt-sigma")).startswith("failed: out: the singular values it starts from are ")
    assert set(statuses.values()) == {"ok"}


def steps(optimizer, model, count):
    for _ in range(count):
        model(torch.randn(2, 3)).sum().backward()
        optimizer.step()


def groups_of(model, lr=0.1):
    return [{"params": list(model.parameters()), "lr": lr}]


def test_calls_come_after_the_steps_that_were_given():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    with watch_optimizer(groups_of(model), {2, 4}, lambda step: seen.append((step, model.weight.clone()))) as watch:
        steps(optimizer, model, 5)
    assert [step for step, _ in seen] == [2, 4]
    assert not torch.equal(seen[0][1], seen[1][1])
    assert watch.steps == 5


def test_other_optimizers_are_not_counted_and_the_hook_goes_away():
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    mine, second = (torch.optim.SGD([p], lr=0.1) for p in model.parameters())
    foreign = torch.optim.SGD(other.parameters(), lr=0.1)
    with watch_optimizer(groups_of(model), {1}, lambda step: None) as watch:
        steps(foreign, other, 3)
        steps(mine, model, 2)
        steps(second, model, 2)
    assert watch.steps == 2
    steps(mine, model, 2)
    assert watch.steps == 2


def by_hand(optimizer, step):
    optimizer.param_groups[0]["lr"] = 0.1 * min(1.0, (step + 1) / 4)


@pytest.mark.parametrize(
    ("own", "schedule", "at_rate", "first"),
    [
        (None, None, True, [0.1]),
        (0.3, None, False, [0.3]),
        (None, lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: (step + 1) / 100), True, [0.1]),
        (None, by_hand, True, [0.025]),  # a warm-up that nobody noted reaches the rate at its end
    ],
)
def test_whether_the_rate_was_ever_that_of_the_groups(own, schedule, at_rate, first):
    model = nn.Linear(3, 2)
    groups = groups_of(model)
    optimizer = torch.optim.SGD(groups if own is None else groups_of(model, own))
    scheduler = schedule(optimizer) if schedule not in (None, by_hand) else None
    with watch_optimizer(groups_of(model), (), print) as watch:
        for step in range(6):
            if schedule is by_hand:
                by_hand(optimizer, step)
            steps(optimizer, model, 1)
            if scheduler is not None:
                scheduler.step()
    assert (watch.at_rate, watch.rates) == (at_rate, first)


def test_one_group_at_its_rate_is_enough():
    model = nn.Linear(3, 2)
    own = [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.7}]
    with watch_optimizer(groups_of(model), (), print) as watch:
        steps(torch.optim.SGD(own), model, 1)
    assert watch.at_rate
    assert watch.rates == [0.1, 0.7]
