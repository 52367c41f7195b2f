"""Plain LoRA from task to task, and O-LoRA's penalty, by hand."""

import copy

import pytest
import torch

import ipca
from ipca.lab import baselines
from ipca.lab.continual import METHODS, ContinualLearner
from ipca.lab.continual.lora import overlap
from tests.helpers.continual import CONFIG, learn, plain, train


def test_one_lora_goes_on_where_it_was():
    learner = learn(ContinualLearner(plain(), "lora", CONFIG), 1)
    A = learner.model.a.lora_A
    learner.begin_task()
    assert learner.model.a.lora_A is A
    assert learner.model.a.lora_B.any()


def test_the_first_task_is_the_baseline():
    learner = ContinualLearner(plain(), "lora", CONFIG, seed=7)
    learner.begin_task()
    expected = baselines.apply(plain(), "lora", CONFIG, seed=7)
    assert torch.equal(learner.model.a.lora_A, expected.a.lora_A)


@pytest.mark.parametrize("method", ["lora-fresh", "o-lora", "sd-lora"])
def test_every_task_draws_factors_of_its_own(method):
    learner = ContinualLearner(plain(), method, CONFIG)
    drawn = []
    for _ in range(3):
        learner.begin_task()
        drawn.append(learner.model.a.lora_A.detach().clone())
        assert not learner.model.a.lora_B.any()
        train(learner)
        learner.end_task()
    assert not any(torch.equal(drawn[i], drawn[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_the_penalty_is_the_sum_of_absolute_products_by_hand():
    learner = ContinualLearner(plain(), "o-lora", CONFIG)
    learner.begin_task()
    layer = learner.model.a
    with torch.no_grad():
        layer.lora_A.zero_()
        layer.lora_A[0, 0], layer.lora_A[1, 1] = 2.0, -3.0
    earlier = torch.zeros(3, 20)
    earlier[0, 0], earlier[2, 0], earlier[1, 1] = 5.0, -1.0, 4.0
    # A A_oldᵀ has the entries 2 · 5, 2 · −1 and −3 · 4
    assert overlap({"a": layer}, [{"a": earlier}], 0.5).item() == 0.5 * (10 + 2 + 12)
    assert overlap({"a": layer}, [{"a": earlier}] * 2, 0.5).item() == 24.0


def test_the_penalty_sums_over_layers_and_all_earlier_tasks():
    learner = ContinualLearner(plain(), "o-lora", CONFIG, orthogonality=0.25)
    earlier, expected = [], 0.0
    for _ in range(3):
        learner.begin_task()
        layers = {"a": learner.model.a, "b": learner.model.b}
        expected = sum((layers[n].lora_A @ task[n].mT).abs().sum().item() for task in earlier for n in layers)
        assert learner.penalty().item() == pytest.approx(0.25 * expected, rel=1e-6)
        train(learner)
        earlier.append({name: layer.lora_A.detach().clone() for name, layer in layers.items()})
        learner.end_task()
    assert expected > 0


def test_the_model_may_be_cast_or_moved_between_tasks():
    learner = learn(ContinualLearner(plain(), "o-lora", CONFIG), 1)
    learner.model.double()
    learner.begin_task()
    penalty = learner.penalty()
    assert penalty.dtype == learner.model.a.lora_A.dtype == torch.float64
    assert penalty > 0


def test_a_lora_that_somebody_took_out_is_missed():
    learner = learn(ContinualLearner(plain(), "lora", CONFIG), 1)
    ipca.unload(learner.model)
    with pytest.raises(ValueError, match="this Plain has no LinearPC layer"):
        learner.begin_task()


def test_training_the_penalty_alone_makes_the_rows_orthogonal():
    learner = learn(ContinualLearner(plain(), "o-lora", CONFIG), 1)
    learner.begin_task()
    start = learner.penalty().item()
    optimizer = torch.optim.SGD([learner.model.a.lora_A, learner.model.b.lora_A], lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        learner.penalty().backward()
        optimizer.step()
    assert learner.penalty().item() < 0.1 * start


@pytest.mark.parametrize("method", [name for name in METHODS if name != "o-lora"])
def test_other_methods_have_no_penalty(method):
    learner = learn(ContinualLearner(plain(), method, CONFIG, tasks=2), 1)
    learner.begin_task()
    assert learner.penalty().item() == 0


def test_without_a_penalty_o_lora_is_fresh_lora():
    weights = []
    for method in ("lora-fresh", "o-lora"):
        options = {"orthogonality": 0.0} if method == "o-lora" else {}
        torch.manual_seed(2)
        learner = learn(ContinualLearner(copy.deepcopy(plain()), method, CONFIG, **options), 2)
        weights.append(learner.model.a.weight)
    assert torch.equal(*weights)
