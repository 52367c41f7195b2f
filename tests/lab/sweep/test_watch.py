"""An optimizer is followed from outside."""

import pytest
import torch
from torch import nn

from ipca.lab.sweep.watch import watched


def steps(optimizer, model, count):
    for _ in range(count):
        model(torch.randn(2, 3)).sum().backward()
        optimizer.step()


def groups_of(model, lr=0.1):
    return [{"params": list(model.parameters()), "lr": lr}]


def test_calls_come_after_the_steps_that_were_asked_for():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    with watched(groups_of(model), {2, 4}, lambda step: seen.append((step, model.weight.clone()))) as watch:
        steps(optimizer, model, 5)
    assert [step for step, _ in seen] == [2, 4]
    assert not torch.equal(seen[0][1], seen[1][1])
    assert watch.steps == 5


def test_other_optimizers_are_not_counted_and_the_hook_goes_away():
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    mine, second = (torch.optim.SGD([p], lr=0.1) for p in model.parameters())
    foreign = torch.optim.SGD(other.parameters(), lr=0.1)
    with watched(groups_of(model), {1}, lambda step: None) as watch:
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
    with watched(groups_of(model), (), print) as watch:
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
    with watched(groups_of(model), (), print) as watch:
        steps(torch.optim.SGD(own), model, 1)
    assert watch.at_rate
    assert watch.rates == [0.1, 0.7]
