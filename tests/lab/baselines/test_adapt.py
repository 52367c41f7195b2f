"""Every method leaves the function as it was, trains what it says, and differs from the reference in one thing."""

import copy

import pytest
import torch
from torch import nn

from ipca.lab import baselines
from ipca.lab.baselines.adapt import needed_windows
from ipca.model import AdapterSettings
from ipca.model.targets import find_targets
from ipca.svd import SpectralCache
from tests.helpers.models import Plain, snapshot
from tests.helpers.quantized_layers import quantized_layer

SETTINGS = AdapterSettings(rank=3, targets=("a", "b"), modules_to_save=("head",))
METHODS = ("principal", "0.25", "start=2", "erank", "lora", "full", "oplora", "lora-null", *baselines.CONTROLS)


def adapted(method, seed=0, settings=SETTINGS, **options):
    torch.manual_seed(5)
    base = Plain()
    calibration = [torch.randn(30, 20)]
    return base, baselines.apply(copy.deepcopy(base), method, settings, seed=seed, calibration=calibration, **options)


@pytest.mark.parametrize("form", ["residual", "intact"])
@pytest.mark.parametrize("method", METHODS)
def test_the_function_is_unchanged_before_training(method, form):
    settings = AdapterSettings(rank=3, targets=("a", "b"), modules_to_save=("head",), form=form)
    base, model = adapted(method, settings=settings)
    x = torch.randn(7, 20)
    bound = 8 * torch.finfo(torch.float32).eps * base(x).abs().max()
    assert (model(x) - base(x)).abs().max() <= bound
    assert all(p.requires_grad for p in model.head.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_one_step_changes_every_layer(method):
    base, model = adapted(method)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):  # plain LoRA's B is zero at first, and so is the gradient of its A
        optimizer.zero_grad()
        model(torch.randn(16, 20)).square().sum().backward()
        optimizer.step()
    for name in ("a", "b"):
        assert not torch.equal(model.get_submodule(name).weight, base.get_submodule(name).weight)
        assert torch.equal(model.get_submodule(name).bias, base.get_submodule(name).bias)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others():
    for method in ("lora", "haar"):
        first, again, other = (adapted(method, seed)[1].a.lora_A for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    starts = {adapted("random-window", seed)[1].a.window.index for seed in range(12)}
    assert len(starts) > 3
    assert max(starts) <= 12 - 3


def test_layers_of_one_shape_draw_different_factors():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    baselines.apply(model, "lora", AdapterSettings(rank=2))
    assert not torch.equal(model[0].lora_A, model[1].lora_A)


def test_plain_lora_is_drawn_as_peft_draws_it():
    weight = torch.randn(30, 40)
    start = baselines.plain_lora_factors(weight, 16, torch.Generator().manual_seed(0), adapter_dtype=torch.float32)
    assert start.A0.shape == (16, 40)
    assert not start.B0.any()
    assert start.B0.shape == (30, 16)
    assert 0.98 / 40**0.5 < start.A0.abs().max() <= 1 / 40**0.5  # 640 uniform numbers come that close to the bound
    generator = torch.Generator().manual_seed(0)
    half = baselines.plain_lora_factors(weight.bfloat16(), 4, generator, adapter_dtype=torch.float32)
    assert half.A0.dtype == torch.float32
    assert torch.equal(half.A0, half.A0.bfloat16().float())


def test_plain_lora_trains_like_peft():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    base = nn.Sequential(nn.Linear(9, 7))
    ours = baselines.apply(copy.deepcopy(base), "lora", AdapterSettings(rank=2, alpha=4))
    theirs = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=["0"]))
    lora = theirs.base_model.model[0]
    with torch.no_grad():
        lora.lora_A["default"].weight.copy_(ours[0].lora_A)
    x, y = torch.randn(5, 9), torch.randn(5, 7)
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (model(x) - y).square().sum().backward()
            optimizer.step()
    assert torch.allclose(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", sorted({*baselines.CONTROLS} - {"random-window"}))
def test_a_control_of_a_window_of_the_inputs_is_refused(method):
    model, settings = Plain(), AdapterSettings(rank=3, targets=("a", "b"), window="inputs:minor")
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"the control '{method}' differs .* one of the weight, not 'inputs:minor'"):
        baselines.apply(model, method, settings, calibration=[torch.randn(30, 20)])
    assert snapshot(model) == before


def test_haar_has_the_reference_s_values_on_other_directions():
    _, reference = adapted("middle")
    _, model = adapted("haar")
    for name in ("a", "b"):
        layer, plain = model.get_submodule(name), reference.get_submodule(name)
        values = torch.linalg.svdvals((layer.lora_B0 @ layer.lora_A0).double())[:3]
        expected = torch.linalg.svdvals((plain.lora_B0 @ plain.lora_A0).double())[:3]
        assert torch.allclose(values, expected, rtol=1e-5)
        assert not torch.allclose(layer.lora_A0, plain.lora_A0, atol=1e-3)
        assert not layer.svd_report.certified


@pytest.mark.parametrize("end", ["principal", "minor"])
def test_matched_has_an_end_s_directions_and_the_reference_s_values(end):
    _, reference = adapted("middle")
    _, there = adapted(end)
    _, model = adapted(f"matched-{end}")
    for name in ("a", "b"):
        layer, middle, far = (m.get_submodule(name) for m in (model, reference, there))
        unit = torch.nn.functional.normalize
        assert torch.allclose(unit(layer.lora_A0), unit(far.lora_A0), atol=1e-5)
        assert torch.allclose(layer.lora_A0.norm(dim=1), middle.lora_A0.norm(dim=1), rtol=1e-5)


def test_frozen_factors_do_not_train():
    _, model = adapted("frozen-A")
    assert not model.a.lora_A.requires_grad
    assert model.a.lora_B.requires_grad
    _, model = adapted("frozen-B")
    assert model.a.lora_A.requires_grad
    assert not model.a.lora_B.requires_grad
    model(torch.randn(3, 20)).sum().backward()
    assert model.a.lora_B.grad is None


def test_full_trains_the_weights_of_the_layers_and_the_head():
    _, model = adapted("full")
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {"a.weight", "b.weight", "head.weight", "head.bias"}


@pytest.mark.parametrize("method", ["0.25", "middle", "oplora", *baselines.CONTROLS])
def test_what_a_method_decomposes_is_what_it_says(method, tmp_path, monkeypatch):
    base = Plain()
    cache = SpectralCache(tmp_path)
    targets = find_targets(base, SETTINGS)
    expected = {
        (target.name, window.resolve(12).index) for target in targets for window in needed_windows(method, target, 7)
    }
    baselines.apply(base, method, SETTINGS, seed=7, cache=cache)
    assert len(cache.entries()) == len(expected) > 0
    assert {entry.report.window.index for entry in cache.entries()} == {start for _, start in expected}


def test_an_unknown_method_leaves_the_model_alone():
    model = Plain()
    before = snapshot(model)
    with pytest.raises(ValueError, match="unknown method 'PiSSA': use a window such as 'middle'"):
        baselines.apply(model, "PiSSA", SETTINGS)
    assert snapshot(model) == before


@pytest.mark.parametrize("method", ["lora", "oplora"])
def test_plain_lora_is_refused_where_nothing_would_train(method):
    model = Plain()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"'{method}' starts from B = 0, and with train='A' that never trains"):
        baselines.apply(model, method, AdapterSettings(rank=3, train="A"), seed=0)
    assert snapshot(model) == before


def test_a_weight_with_nan_leaves_the_model_alone():
    model = Plain()
    with torch.no_grad():
        model.a.weight[0, 0] = float("nan")
    before = snapshot(model)
    with pytest.raises(ValueError, match="NaN"):
        baselines.apply(model, "haar", SETTINGS)
    assert snapshot(model) == before


def test_kinds_and_positions():
    assert [baselines.kind_of(m) for m in ("0.3", "lora", "full", "auto", "mica", "haar", "energy=0.9")] == [
        *("window", "lora", "full", "auto", "baseline", "control", "window")
    ]
    positions = [baselines.position_of(m) for m in ("principal", "0.25", "minor", "start=3", "erank", "lora")]
    assert positions == [0.0, 0.25, 1.0, None, None, None]
    assert [baselines.check_method(m) for m in ("0.50", "Middle", "principal", "minor", "start=3", "lora")] == [
        *("0.5", "0.5", "0.0", "1.0", "start=3", "lora")
    ]


@pytest.mark.parametrize("kind", ["nf4", "torchao-int8"])
def test_quantized_weights_are_not_trained_whole(kind):
    model = nn.Sequential(quantized_layer(kind, torch.randn(64, 64)))
    with pytest.raises(ValueError, match="0 is quantized and cannot be fully trained; leave the method 'full' out"):
        baselines.apply(model, "full", AdapterSettings(rank=3, form="intact"))


@pytest.mark.parametrize("method", ["lora", "oplora", "lora-null", *baselines.CONTROLS])
def test_the_default_device_does_not_matter(method):
    base, calibration = Plain(), [torch.randn(30, 20)]
    models = [copy.deepcopy(base) for _ in range(2)]
    baselines.apply(models[0], method, SETTINGS, seed=1, calibration=calibration)
    with torch.device("meta"):
        baselines.apply(models[1], method, SETTINGS, seed=1, calibration=calibration)
    states = [model.state_dict() for model in models]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
