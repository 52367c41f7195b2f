"""Continual learning on scikit-learn's digits: five two-class tasks in sequence, with windows and baselines.

    python examples/continual_digits.py --out digits

A small network is pretrained on mirrored digits; then it learns the upright ones two at a time, each pair with its own
head. The example measures how each method affects the earlier pairs and the mirrored digits. All methods share one
untuned learning rate, and OSF trains several times as many parameters, so one run does not rank them.
"""

import argparse
import copy
from functools import partial
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from ipca.lab.continual import METHODS, ContinualLearner, StreamTask, draw_stream, run_stream
from ipca.model import AdapterSettings

PAIRS = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
RANK = 8


class Network(nn.Module):
    """Three layers, with a head for the mirrored digits and one for each pair."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 96))
        self.heads = nn.ModuleList([nn.Linear(96, 2) for _ in PAIRS])
        self.mirrored = nn.Linear(96, 10)

    def forward(self, x, head):
        return head(self.body(x).relu())


def digits():
    """Images in [0, 1] and labels: two thirds for training, one third for testing."""
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    test = torch.arange(len(x)) % 3 == 0
    return (x[~test], y[~test]), (x[test], y[test])


def mirror(x):
    """The images, mirrored left to right."""
    return x.view(-1, 8, 8).flip(2).flatten(1)


def fit(model, head, parameters, x, y, steps, lr, penalty=None):
    """AdamW on random batches of 64."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,))
        loss = nn.functional.cross_entropy(model(x[batch], head), y[batch])
        if penalty is not None:
            loss = loss + penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def accuracy(x, y, head_of, model):
    """Accuracy of the head ``head_of(model)`` on ``x``."""
    return (model(x, head_of(model)).argmax(1) == y).float().mean().item()


def pair_task(index, train, test, steps, lr):
    """The task of distinguishing the two digits of a pair."""
    low, high = PAIRS[index]

    def select(x, y):
        mine = (y == low) | (y == high)
        return x[mine], (y[mine] == high).long()

    def fit_pair(learner, seed):
        model = learner.model
        trained = [p for p in model.parameters() if p.requires_grad]
        fit(model, model.heads[index], trained, *select(*train), steps, lr, learner.penalty)

    evaluate = partial(accuracy, *select(*test), lambda model: model.heads[index])
    return StreamTask(f"{low} or {high}", fit_pair, evaluate)


def main(steps, lr, out):
    """Pretrain, run every method from the same network, print tables and draw a figure."""
    torch.manual_seed(0)
    train, test = digits()
    base = Network()
    fit(base, base.mirrored, base.parameters(), mirror(train[0]), train[1], 10 * steps, 1e-3)
    tasks = [pair_task(i, train, test, steps, lr) for i in range(len(PAIRS))]
    retained = partial(accuracy, mirror(test[0]), test[1], lambda model: model.mirrored)
    settings = AdapterSettings(
        rank=RANK, window="middle", targets=["body.0", "body.2", "body.4"], modules_to_save=["heads"]
    )

    results = []
    for method in METHODS:
        learner = ContinualLearner(copy.deepcopy(base), method, settings, tasks=len(tasks), seed=0)
        results.append(run_stream(learner, tasks, retained=retained))
        learner.finish()
        print(results[-1], end="\n\n")
    for result in results:
        result.to_csv(Path(out) / f"{result.method}.csv")
    draw_stream(results, Path(out) / "digits.png")
    print("method      ACC     BWT     FM   retained")
    for r in results:
        print(f"{r.method:10} {r.matrix.acc:.3f}  {r.matrix.bwt:+.3f}  {r.matrix.forgetting:.3f}  {r.retained[-1]:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="training steps of each task")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of every method")
    parser.add_argument("--out", default="digits", help="folder of the tables and the figure")
    main(**vars(parser.parse_args()))
