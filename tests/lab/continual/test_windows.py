"""Which components each task trains, and what tasks with disjoint windows cannot do to one another."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from ipca.lab.continual import ContinualLearner
from ipca.model import AdapterSettings
from tests.helpers.continual import SETTINGS, learn, plain, train


def starts(method, window, count, **options):
    """Where the layer ``a`` (d = 12) has its window in each task."""
    learner = ContinualLearner(plain(), method, replace(SETTINGS, window=window), **options)
    found = []
    for _ in range(count):
        learner.begin_task()
        found.append(learner.model.a.window.index)
        learner.end_task()
    return found


@pytest.mark.parametrize(
    ("window", "expected"),
    [("principal", [0, 3, 6]), ("middle", [1, 4, 7]), ("minor", [3, 6, 9]), ("start=2", [2, 5, 8])],
)
def test_disjoint_windows_are_adjacent_in_the_block_that_the_window_names(window, expected):
    assert starts("disjoint", window, 3, tasks=3) == expected


@pytest.mark.parametrize(("method", "expected"), [("fresh", 2), ("fixed", 2), ("pissa", 0), ("milora", 9)])
def test_other_methods_stay_at_one_place(method, expected):
    assert starts(method, "start=2", 2) == [expected] * 2


def test_a_block_beyond_the_spectrum_is_refused():
    with pytest.raises(ValueError, match=r"a: 3 windows of rank 3: .* ends at 13, but there are only 12"):
        ContinualLearner(plain(), "disjoint", replace(SETTINGS, window="start=4"), tasks=3)


@pytest.mark.parametrize("method", ["fixed", "disjoint"])
def test_every_task_starts_from_the_components_of_the_pretrained_weights(method):
    model = plain()
    U, S, Vh = torch.linalg.svd(model.a.weight.detach().double(), full_matrices=False)
    learner = ContinualLearner(model, method, replace(SETTINGS, window="principal"), tasks=3)
    for task in range(3):
        learner.begin_task()
        first = 3 * task if method == "disjoint" else 0
        part, layer = slice(first, first + 3), model.a
        component = U[:, part] * S[part] @ Vh[part]
        found = layer.scaling * layer.lora_B0.double() @ layer.lora_A0.double()
        assert (found - component).abs().max() <= 16 * torch.finfo(torch.float32).eps * S[0]
        train(learner)
        learner.end_task()


def test_a_fresh_window_is_that_of_the_weights_as_they_are():
    learner = learn(ContinualLearner(plain(), "fresh", replace(SETTINGS, window="principal")), 1)
    S = torch.linalg.svdvals(learner.model.a.weight.detach().double())
    learner.begin_task()
    layer = learner.model.a
    found = torch.linalg.svdvals(layer.lora_B0.double() @ layer.lora_A0.double())[:3]
    assert (found - S[:3]).abs().max() <= 16 * torch.finfo(torch.float32).eps * S[0]


class Regression:
    """Linear regression with a (7, 9) weight in float64: a task's inputs are what its window reads."""

    def __init__(self, frozen=None):
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(9, 7, bias=False)).double()
        self.U, _, self.Vh = torch.linalg.svd(self.weight, full_matrices=False)
        settings = AdapterSettings(rank=2, window="start=1", targets="0")
        self.learner = ContinualLearner(self.model, "disjoint", settings, tasks=2, frozen=frozen)

    @property
    def weight(self):
        return self.model[0].weight.detach().clone()

    def window(self, task):
        return slice(1 + 2 * task, 3 + 2 * task)

    def learn(self, x, y):
        """Fit ``y`` by the task at hand, to rounding where its parameters can."""
        optimizer = torch.optim.LBFGS(self.learner.begin_task(), max_iter=500, tolerance_grad=1e-14, tolerance_change=0)

        def loss():
            optimizer.zero_grad()
            value = (self.model(x) - y).square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        layer = self.model[0]
        moved = layer.lora_B.detach() - layer.lora_B0, layer.lora_A.detach() - layer.lora_A0
        self.learner.end_task()
        return moved


def test_with_A_frozen_a_task_cannot_touch_what_another_ones_window_reads():
    case = Regression(frozen="A")
    x = torch.randn(5, 2).double() @ case.Vh[case.window(0)]
    y = x @ torch.randn(7, 9).double().mT
    case.learn(x, y)
    assert (case.model(x) - y).abs().max() < 1e-6
    first = case.weight
    case.learn(torch.randn(20, 9).double(), torch.randn(20, 7).double())
    change = case.weight - first
    bound = 100 * torch.finfo(torch.float64).eps * first.norm()
    assert change.norm() > 0.1 * first.norm()
    assert (change @ case.Vh[case.window(0)].mT).norm() <= bound
    assert (case.model(x) - y).abs().max() < 1e-6


def test_with_both_factors_a_task_touches_another_ones_block_to_second_order_alone():
    case = Regression()
    before = case.weight
    dB, dA = case.learn(torch.randn(20, 9).double(), torch.randn(20, 7).double())
    U, Vh = case.U[:, case.window(1)], case.Vh[case.window(1)]
    block = U.mT @ (case.weight - before) @ Vh.mT
    bound = 100 * torch.finfo(torch.float64).eps * before.norm()
    assert block.norm() > 1e3 * bound
    assert (block - U.mT @ dB @ dA @ Vh.mT).norm() <= bound
