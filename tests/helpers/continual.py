"""A small model, settings that fit it, and a way to train, for the tests of continual learning."""

import torch

from ipca.model import AdapterSettings
from tests.helpers.models import Plain

SETTINGS = AdapterSettings(rank=3, targets=("a", "b"), modules_to_save=("head",))
SHAPES = ((12, 20), (20, 12))  # of the layers a and b


def plain():
    torch.manual_seed(5)
    return Plain()


def train(learner, steps=3, lr=0.02):
    """Adam on random data, for the task that is running."""
    parameters = [p for p in learner.model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for _ in range(steps):
        loss = learner.model(torch.randn(8, 20)).square().mean() + learner.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def learn(learner, tasks):
    """Begin, train and end so many tasks."""
    for _ in range(tasks):
        learner.begin_task()
        train(learner)
        learner.end_task()
    return learner
