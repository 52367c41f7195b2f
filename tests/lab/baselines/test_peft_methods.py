"""Methods that PEFT implements: seeded, put into the right layers, undone where they fail, and named where unfit."""

import copy
import sys

import pytest
import torch
from torch import nn

from ipca.lab import baselines
from ipca.model import AdapterSettings
from tests.helpers.models import Plain, snapshot

METHODS = ("mica", "kasa", "osf", "oft", "corda-ipm", "corda-kpm")
SETTINGS = AdapterSettings(rank=3, targets=("a", "b"), modules_to_save=("head",))


def adapted(method, settings=SETTINGS, seed=0):
    torch.manual_seed(5)
    model = Plain()
    return baselines.apply(model, method, settings, seed=seed, calibration=[torch.randn(30, 20)])


@pytest.mark.parametrize("method", METHODS)
def test_only_the_adapter_and_the_modules_to_save_train(method):
    model = adapted(method)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"head.weight", "head.bias"} < trains
    assert not any("base_layer" in name for name in trains)
    assert {name.split(".")[0] for name in trains} == {"a", "b", "head"}
    assert not any("lora_B" in name for name in trains) or method != "mica"


@pytest.mark.parametrize("method", METHODS)
def test_what_trains_beside_a_16_bit_weight_is_float32_but_of_osf(method):
    model = baselines.apply(Plain().bfloat16(), method, SETTINGS, calibration=[torch.randn(30, 20).bfloat16()])
    trains = {p.dtype for name, p in model.named_parameters() if p.requires_grad and not name.startswith("head")}
    assert trains == {torch.bfloat16 if method == "osf" else torch.float32}
    model(torch.randn(4, 20).bfloat16()).sum().backward()
    if method == "osf":
        layer = model.a
        gradient = layer.osf_svd_params["default"]["U_low"].grad.float()
        assert gradient.norm() > 0
        U = torch.linalg.svd(layer.base_layer.weight.detach().float(), full_matrices=False)[0][:, :6]
        assert (U.mT @ gradient).norm() < 0.02 * gradient.norm(), "its projection is in place"


def test_the_seed_decides_what_is_drawn_and_nothing_else_is_moved():
    first, again, other = (adapted("kasa", seed=seed).a.lora_A["default"].weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    before = torch.get_rng_state()
    baselines.apply(Plain(), "mica", SETTINGS)  # Plain() itself draws
    torch.set_rng_state(before)
    Plain()
    expected = torch.get_rng_state()
    torch.set_rng_state(before)
    baselines.apply(Plain(), "kasa", SETTINGS)
    assert torch.equal(torch.get_rng_state(), expected)


def test_ranks_and_alphas_of_patterns_are_those_of_the_exact_layers():
    model = nn.ModuleDict({"b": nn.Linear(8, 8), "a": nn.ModuleDict({"b": nn.Linear(8, 8)})})
    settings = AdapterSettings(rank=2, alpha=4, targets=("b", "a.b"), rank_pattern={"a.b": 3}, alpha_pattern={"a.b": 9})
    baselines.apply(model, "mica", settings)
    assert (model["b"].r, model["b"].scaling) == ({"default": 2}, {"default": 2.0})
    assert (model["a"]["b"].r, model["a"]["b"].scaling) == ({"default": 3}, {"default": 3.0})


def test_inputs_of_any_shape_reach_corda_as_rows():
    x = torch.randn(6, 5, 20)
    one = baselines.apply(copy.deepcopy(base := Plain().eval()), "corda-kpm", SETTINGS, calibration=[x])
    other = baselines.apply(copy.deepcopy(base), "corda-kpm", SETTINGS, calibration=[x.flatten(0, 1)])
    assert torch.equal(one.a.lora_A["default"].weight, other.a.lora_A["default"].weight)
    assert torch.allclose(one(x), base(x), atol=1e-5)
    assert not vars(one.a.base_layer).keys() & {"eigens", "covariance_matrix", "rank"}


@pytest.mark.parametrize(
    ("method", "settings", "says"),
    [
        ("kasa", AdapterSettings(rank=12, targets="a"), "smaller than min"),
        ("corda-ipm", SETTINGS, "at least 2 inputs"),
        ("oft", AdapterSettings(rank=3, targets=("a", "b"), rank_pattern={"a": 2}), "'oft' has one block size"),
    ],
)
def test_a_failure_leaves_the_model_alone(method, settings, says):
    model = Plain()
    before = snapshot(model)
    with pytest.raises(ValueError, match=says):
        baselines.apply(model, method, settings, calibration=[torch.randn(20, 20), torch.randn(1, 20)])
    assert snapshot(model) == before
    assert not hasattr(model, "peft_config")
    assert not vars(model.a).keys() & {"eigens", "covariance_matrix", "sample_count", "corda_method", "rank"}


def test_a_failure_half_way_puts_the_weights_back():
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 8))
    before = snapshot(model)
    with pytest.raises(ValueError, match="smaller than min"):  # the first layer has been cut by then
        baselines.apply(model, "kasa", AdapterSettings(rank=8, targets=("0", "1")))
    assert snapshot(model) == before


def test_layers_that_peft_does_not_adapt_are_named():
    model = nn.Sequential(nn.Embedding(9, 8))
    with pytest.raises(TypeError, match=r"0 is a layer of the kind 'embedding'; PEFT's kasa is for linear layers"):
        baselines.apply(model, "kasa", AdapterSettings(rank=2, targets="0"))


@pytest.mark.parametrize("method", ["corda-kpm", "lora-null"])
def test_inputs_that_are_missing_are_asked_for(method):
    with pytest.raises(ValueError, match=f"method '{method}' needs calibration"):
        baselines.apply(Plain(), method, SETTINGS)


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"method 'osf' needs PEFT .*; pip install 'ipca-lora\[peft\]'"):
        baselines.apply(Plain(), "osf", SETTINGS)


def test_only_kasa_has_a_penalty():
    assert baselines.penalty(Plain()) == baselines.penalty(adapted("mica")) == baselines.penalty(adapted("osf")) == 0.0
    found = baselines.penalty(adapted("kasa"))
    assert found.requires_grad
    assert found > 0
