"""An optimiser is followed from outside."""

import torch
from torch import nn

from ipca.sweep.watch import watched


def steps(optimizer, model, count):
    for _ in range(count):
        model(torch.randn(2, 3)).sum().backward()
        optimizer.step()


def test_calls_come_after_the_steps_that_were_asked_for():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    with watched(model.parameters(), {2, 4}, lambda step: seen.append((step, model.weight.clone()))) as count:
        steps(optimizer, model, 5)
    assert [step for step, _ in seen] == [2, 4]
    assert not torch.equal(seen[0][1], seen[1][1])
    assert count.steps == 5


def test_other_optimisers_are_not_counted_and_the_hook_goes_away():
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    mine, second = (torch.optim.SGD([p], lr=0.1) for p in model.parameters())
    foreign = torch.optim.SGD(other.parameters(), lr=0.1)
    with watched(model.parameters(), {1}, lambda step: None) as count:
        steps(foreign, other, 3)
        steps(mine, model, 2)
        steps(second, model, 2)
    assert count.steps == 2
    steps(mine, model, 2)
    assert count.steps == 2
