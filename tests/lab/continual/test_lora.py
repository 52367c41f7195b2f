"""Plain LoRA from task to task, O-LoRA's penalty and SD-LoRA's formula, by hand."""

import copy

import pytest
import torch
from torch import nn

import ipca
from ipca.lab import baselines
from ipca.lab.continual import METHODS, ContinualLearner
from ipca.lab.continual.lora import overlap, product_norm
from ipca.model import AdapterSettings
from tests.helpers.continual import SETTINGS, learn, plain, train


def test_one_lora_goes_on_where_it_was():
    learner = learn(ContinualLearner(plain(), "lora", SETTINGS), 1)
    A = learner.model.a.lora_A
    learner.begin_task()
    assert learner.model.a.lora_A is A
    assert learner.model.a.lora_B.any()


def test_the_first_task_is_the_baseline():
    learner = ContinualLearner(plain(), "lora", SETTINGS, seed=7)
    learner.begin_task()
    expected = baselines.apply(plain(), "lora", SETTINGS, seed=7)
    assert torch.equal(learner.model.a.lora_A, expected.a.lora_A)


@pytest.mark.parametrize("method", ["lora-fresh", "o-lora", "sd-lora"])
def test_every_task_draws_factors_of_its_own(method):
    learner = ContinualLearner(plain(), method, SETTINGS)
    drawn = []
    for _ in range(3):
        learner.begin_task()
        drawn.append(learner.model.a.lora_A.detach().clone())
        assert not learner.model.a.lora_B.any()
        train(learner)
        learner.end_task()
    assert not any(torch.equal(drawn[i], drawn[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_the_penalty_is_the_sum_of_absolute_products_by_hand():
    learner = ContinualLearner(plain(), "o-lora", SETTINGS)
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
    learner = ContinualLearner(plain(), "o-lora", SETTINGS, orthogonality=0.25)
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
    learner = learn(ContinualLearner(plain(), "o-lora", SETTINGS), 1)
    learner.model.double()
    learner.begin_task()
    penalty = learner.penalty()
    assert penalty.dtype == learner.model.a.lora_A.dtype == torch.float64
    assert penalty > 0


def test_a_lora_that_somebody_took_out_is_missed():
    learner = learn(ContinualLearner(plain(), "lora", SETTINGS), 1)
    ipca.unload(learner.model)
    with pytest.raises(ValueError, match="this Plain has no LinearPC layer"):
        learner.begin_task()


def test_training_the_penalty_alone_makes_the_rows_orthogonal():
    learner = learn(ContinualLearner(plain(), "o-lora", SETTINGS), 1)
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
    learner = learn(ContinualLearner(plain(), method, SETTINGS, tasks=2), 1)
    learner.begin_task()
    assert learner.penalty().item() == 0


def test_without_a_penalty_o_lora_is_fresh_lora():
    weights = []
    for method in ("lora-fresh", "o-lora"):
        options = {"orthogonality": 0.0} if method == "o-lora" else {}
        torch.manual_seed(2)
        learner = learn(ContinualLearner(copy.deepcopy(plain()), method, SETTINGS, **options), 2)
        weights.append(learner.model.a.weight)
    assert torch.equal(*weights)


def test_the_output_is_the_formula_of_the_paper():
    settings = AdapterSettings(rank=3, alpha=6.0, targets=("a", "b"))  # scaling 2
    model, x = plain(), torch.randn(7, 20)
    W, bias = model.a.weight.detach().double(), model.a.bias.detach()
    learner, directions = ContinualLearner(model, "sd-lora", settings), []
    for task in range(3):
        learner.begin_task()
        assert len(model.a.magnitudes) == task
        train(learner)
        layer = model.a
        weight = W + 2 * (layer.lora_B @ layer.lora_A).detach().double()
        for m, direction in zip(layer.magnitudes.detach().double(), directions, strict=True):
            weight = weight + m * direction
        expected = x.double() @ weight.mT + bias
        assert (layer(x) - expected).abs().max() <= 32 * torch.finfo(torch.float32).eps * expected.abs().max()
        update = 2 * (layer.lora_B @ layer.lora_A).detach().double()
        directions.append(update / update.norm())
        learner.end_task()


def test_magnitudes_begin_at_the_size_of_the_update_and_train():
    model = plain()
    learner = ContinualLearner(model, "sd-lora", SETTINGS)
    learner.begin_task()
    train(learner)
    size = (model.a.lora_B @ model.a.lora_A).norm().item()
    learner.end_task()
    learner.begin_task()
    assert model.a.magnitudes.item() == pytest.approx(size, rel=1e-5)
    assert (model.a.directions_B @ model.a.directions_A).norm().item() == pytest.approx(1, rel=1e-5)
    directions = model.a.directions_A.clone(), model.a.directions_B.clone()
    train(learner)
    assert abs(model.a.magnitudes.item() - size) > 1e-3
    assert torch.equal(model.a.directions_A, directions[0])
    assert torch.equal(model.a.directions_B, directions[1])


def test_a_layer_that_did_not_move_leaves_a_direction_of_zero():
    model = plain()
    learner = ContinualLearner(model, "sd-lora", SETTINGS)
    for _ in range(2):
        learner.begin_task()
        learner.end_task()
    assert model.a.magnitudes.item() == 0
    assert not (model.a.directions_B @ model.a.directions_A).any()


def test_a_16_bit_weight_has_factors_in_float32():
    model = plain().bfloat16()
    learner = ContinualLearner(model, "sd-lora", SETTINGS)
    learner.begin_task()
    assert model.a.lora_A.dtype == torch.float32
    assert model(torch.randn(7, 20, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_transposed_layer_keeps_its_type():
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(7, 9))
    x = torch.randn(4, 9)
    before = model(x)
    learner = ContinualLearner(model, "sd-lora", AdapterSettings(rank=2, targets="0"))
    learner.begin_task()
    learner.end_task()
    learner.finish()
    assert type(model[0]) is Conv1D
    assert (model(x) - before).abs().max() <= 8 * torch.finfo(torch.float32).eps * before.abs().max()


def test_the_norm_of_a_product():
    B, A = torch.randn(11, 3), torch.randn(3, 5)
    assert product_norm(B, A) == pytest.approx((B.double() @ A.double()).norm().item(), rel=1e-12)
