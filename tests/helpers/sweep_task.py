"""A task small enough to sweep in a test: learn a rotated teacher, keep what the first one said."""

import torch
from torch import nn

from ipca.lab.sweep import Task
from ipca.model.settings import AdapterSettings


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.out = nn.Linear(12, 10), nn.Linear(10, 8)
        self.head = nn.Linear(8, 3)
        self.old = nn.Linear(8, 3)

    def features(self, x):
        return self.out(self.body(x).relu())

    def forward(self, x):
        return self.head(self.features(x))


def _data(seed):
    return torch.randn(48, 12, generator=torch.Generator().manual_seed(seed))


def build():
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return Student()


def _labels(x, seed):
    return (x @ torch.randn(12, 3, generator=torch.Generator().manual_seed(seed))).argmax(1)


def train(model, groups, seed, steps=6):
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    x = _data(1)
    for _ in range(steps):
        batch = torch.randint(48, (16,))
        loss = nn.functional.cross_entropy(model.head(model.features(x[batch])), _labels(x[batch], 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def evaluate(model):
    model.eval()
    x = _data(3)
    features = model.features(x)
    kept = build()
    target = (model.head(features).argmax(1) == _labels(x, 2)).double().mean().item()
    old = kept.old(kept.features(x)).argmax(1)
    retained = (model.old(features).argmax(1) == old).double().mean().item()
    return {"target": target, "retained": retained, "noise": torch.rand(()).item() * 0}


SETTINGS = AdapterSettings(rank=2, targets=("body", "out"), modules_to_save=("head",))


def calibration():
    return [_data(4)]


def task():
    return Task(build, train, evaluate, SETTINGS, labels={"target": "agreement with the new teacher (share)"})
