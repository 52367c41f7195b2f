"""SD-LoRA: the formula, directions that keep their shape, and magnitudes that train."""

import pytest
import torch
from torch import nn

from ipca.lab.continual import ContinualLearner
from ipca.lab.continual.sd_lora import product_norm
from ipca.model import AdapterSettings
from tests.helpers.continual import CONFIG, plain, train


def test_the_output_is_the_formula_of_the_paper():
    config = AdapterSettings(rank=3, alpha=6.0, targets=("a", "b"))  # scaling 2
    model, x = plain(), torch.randn(7, 20)
    W, bias = model.a.weight.detach().double(), model.a.bias.detach()
    learner, directions = ContinualLearner(model, "sd-lora", config), []
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
    learner = ContinualLearner(model, "sd-lora", CONFIG)
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
    learner = ContinualLearner(model, "sd-lora", CONFIG)
    for _ in range(2):
        learner.begin_task()
        learner.end_task()
    assert model.a.magnitudes.item() == 0
    assert not (model.a.directions_B @ model.a.directions_A).any()


def test_a_16_bit_weight_has_factors_in_float32():
    model = plain().bfloat16()
    learner = ContinualLearner(model, "sd-lora", CONFIG)
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
