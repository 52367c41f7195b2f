"""Which weights are compared, and that looking at a model leaves it as it is."""

import copy

import pytest
import torch
from torch import nn

import ipca
from ipca import analysis
from ipca.analysis.linalg import wide
from ipca.nn import StackPC, dequantize
from ipca.nn.layer_kinds import read_layer
from ipca.nn.registry import get_layer
from tests.helpers.layer_kinds import CASES
from tests.helpers.models import Plain, snapshot
from tests.helpers.quantized_layers import adapt, quantized_model, train


def plain_and_adapted(**options):
    """A plain model, and its copy adapted in ``a`` and ``b`` and changed at random."""
    base = Plain()
    model = ipca.apply_pc(copy.deepcopy(base), rank=3, targets=["a", "b"], progress=False, **options)
    return base, train(model)


@pytest.mark.parametrize("form", ["residual", "intact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapted_layer_is_what_it_computes_beside_what_it_began_with(form, dtype):
    base = Plain().to(dtype)
    model = train(ipca.apply_pc(copy.deepcopy(base), rank=3, form=form, targets=["a", "b"], progress=False))
    pairs = list(analysis.weight_pairs(model))
    assert [(pair.name, tuple(pair.base.shape)) for pair in pairs] == [("a", (12, 20)), ("b", (20, 12))]
    eps = torch.finfo(dtype).eps
    for pair in pairs:
        plain, layer = base.get_submodule(pair.name).weight, model.get_submodule(pair.name)
        assert pair.layer is layer
        assert pair.window == layer.window == ipca.Window(4, 3)
        assert pair.base.dtype == pair.trained.dtype == torch.float64
        assert (pair.base - plain).abs().max() <= (eps * plain.abs().max() if form == "residual" else 0)
        assert (pair.trained - layer.effective_weight()).abs().max() <= eps * layer.effective_weight().abs().max()
        change = layer.scaling * (wide(layer.lora_B) @ wide(layer.lora_A) - wide(layer.lora_B0) @ wide(layer.lora_A0))
        torch.testing.assert_close(pair.change, change, rtol=0, atol=1e-14)


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_layer_is_read_as_matrices_adapted_and_merged(case):
    build, _, targets, options, count = CASES[case]
    base = build()
    model = ipca.apply_pc(
        copy.deepcopy(base), rank=3, targets=targets, form="intact", progress=False, **{**options, "rank_pattern": {}}
    )
    train(model)
    pairs, beside = list(analysis.weight_pairs(model)), list(analysis.weight_pairs(model, base))
    layers = {name: m for name, m in model.named_modules() if isinstance(m, ipca.nn.WindowLayer)}
    assert len(layers) == count
    expected = [
        f"{name}[{i}]" if isinstance(layer, StackPC) else name
        for name, layer in layers.items()
        for i in range(len(layer.lora_A) if isinstance(layer, StackPC) else 1)
    ]
    assert [pair.name for pair in pairs] == [pair.name for pair in beside] == expected
    weights = {name: read_layer(get_layer(base, name))[0] for name in layers}
    merged = list(analysis.weight_pairs(ipca.unload(model), weights))
    for pair, other, whole in zip(pairs, beside, merged, strict=True):
        assert torch.equal(pair.base, other.base)
        assert torch.equal(pair.base, whole.base)
        assert torch.equal(pair.trained, other.trained)
        torch.testing.assert_close(pair.trained, whole.trained, rtol=1e-6, atol=1e-7)
        A, B, A0, B0 = pair.factors
        torch.testing.assert_close(pair.change, pair.layer.scaling * (B @ A - B0 @ A0), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8", "torchao-int4"])
def test_a_quantized_layer_is_compared_dequantized(kind):
    model, plain, _ = quantized_model(kind)
    before = {name: dequantize(model.get_submodule(name)).double() for name in ("a", "b")}
    train(adapt(model))
    for pair in analysis.weight_pairs(model):
        assert torch.equal(pair.base, before[pair.name])
    for pair in analysis.weight_pairs(model, plain):
        assert torch.equal(pair.base, plain.get_submodule(pair.name).weight.double())


def test_quantized_layers_that_are_not_adapted_are_compared_too():
    model, plain, _ = quantized_model("torchao-int8")
    assert [pair.name for pair in analysis.weight_pairs(model, plain)] == ["a", "b", "head"]


def test_plain_models_are_compared_in_the_linear_layers_that_both_have():
    base = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 5), nn.Linear(5, 4))
    model = copy.deepcopy(base)
    model.append(nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight.add_(1)
        model[1].weight.add_(1)
    pairs = {pair.name: pair for pair in analysis.weight_pairs(model, base)}
    assert list(pairs) == ["1", "2"]
    torch.testing.assert_close(pairs["1"].change, torch.ones(5, 6, dtype=torch.float64), rtol=0, atol=1e-6)
    assert not pairs["2"].change.any()
    assert pairs["1"].window is pairs["1"].factors is None


def test_a_mapping_names_the_layers_of_a_plain_model_and_of_every_kind():
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 5), nn.Conv1d(5, 4, 3))
    given = {"0": torch.zeros(6, 9), "2": torch.zeros(4, 15, dtype=torch.bfloat16)}
    pairs = {pair.name: pair for pair in analysis.weight_pairs(model, given)}
    assert list(pairs) == ["0", "2"]
    assert torch.equal(pairs["0"].trained, model[0].weight.double().mT)


def test_a_mapping_may_know_more_than_the_adapted_layers():
    base, model = plain_and_adapted()
    given = {name: base.get_submodule(name).weight for name in ("a", "b", "head")}
    assert [pair.name for pair in analysis.weight_pairs(model, given)] == ["a", "b"]


@pytest.mark.parametrize("state", ["merged", "disabled"])
def test_merging_and_disabling_do_not_matter(state):
    _, model = plain_and_adapted()
    before = [pair.trained for pair in analysis.weight_pairs(model)]
    if state == "merged":
        ipca.merge_adapter(model)
        after = [pair.trained for pair in analysis.weight_pairs(model)]
    else:
        with ipca.disabled(model):
            after = [pair.trained for pair in analysis.weight_pairs(model)]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


MEASURES = {
    "weight_pairs": lambda model, base: list(analysis.weight_pairs(model, base)),
    "update_norm": analysis.update_norm,
    "drift": analysis.drift,
    "principal_angles": analysis.principal_angles,
    "intruder_dimensions": analysis.intruder_dimensions,
    "spectral_imbalance": analysis.spectral_imbalance,
    "overlap": lambda model, base: analysis.overlap(model, base, k=4),
    "spectrum": lambda model, base: analysis.spectrum(model, progress=False),
}


@pytest.mark.parametrize("measure", MEASURES)
def test_a_measure_changes_nothing(measure):
    base = Plain().eval()
    model = copy.deepcopy(base).train()
    ipca.apply_pc(model, rank=3, targets=["a", "b"], progress=False)
    train(model)
    before, random = (snapshot(model), snapshot(base)), torch.get_rng_state()
    MEASURES[measure](model, base)
    assert (snapshot(model), snapshot(base)) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("model", "base", "error", "words"),
    [
        (Plain(), 3, TypeError, "base must be a model or a mapping from paths to weights, got int"),
        (Plain(), None, ValueError, "this Plain has no adapted layer that knows its pretrained weight; pass base, the"),
        (Plain(), nn.Linear(3, 4), ValueError, "nothing to compare: this Plain and base have no linear layer of equal"),
        (Plain(), {}, ValueError, "nothing to compare"),
        (
            Plain(),
            {"a": torch.ones(12, 20), "z": torch.ones(2, 2)},
            ValueError,
            "base names 'z', which is not a layer",
        ),
        (
            Plain(),
            {"a": torch.ones(3, 20)},
            ValueError,
            r"a: a weight of shape \(12, 20\) .* \(3, 20\); pass",
        ),
        (Plain(), {"a": torch.ones(12, 20).int()}, TypeError, r"base: a must be a float tensor .* got torch.int32"),
        (Plain(), {"a": 3}, TypeError, r"base: a must be a float tensor \(out, in\), got int"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_what_cannot_be_compared_is_said(model, base, error, words):
    with pytest.raises(error, match=words):
        list(analysis.weight_pairs(model, base))


def test_a_base_that_lacks_an_adapted_layer_is_named():
    _, model = plain_and_adapted()
    with pytest.raises(ValueError, match=r"base has no 'a' \(1 of 2 layers are missing\); pass base, the plain model"):
        analysis.weight_pairs(model, {"b": torch.ones(20, 12)})


def test_an_adapted_base_is_refused():
    _, model = plain_and_adapted()
    with pytest.raises(ValueError, match=r"base: a is a ipca\.nn\.linear\.LinearPC, not a plain layer"):
        list(analysis.weight_pairs(model, copy.deepcopy(model)))


def test_a_model_without_values_is_refused():
    base, model = plain_and_adapted()
    for trained, given in ((copy.deepcopy(model).to("meta"), None), (model, base.to("meta"))):
        with pytest.raises(ValueError, match="a: its weight is on the meta device and holds no values"):
            list(analysis.weight_pairs(trained, given))


def test_an_offloaded_model_is_refused_for_what_it_is():
    accelerate = pytest.importorskip("accelerate")
    _, model = plain_and_adapted()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    for measure in (lambda: list(analysis.weight_pairs(model, None)), lambda: analysis.spectrum(model, progress=False)):
        with pytest.raises(ValueError, match="a: accelerate keeps its weight off the device; measure before"):
            measure()


def test_a_layer_without_a_window_is_refused():
    _, model = plain_and_adapted()
    model.b.window = None
    for measure in (analysis.update_norm, analysis.spectrum):
        with pytest.raises(ValueError, match=r"b: it has no window yet: load a state dict with load_state_dict\(\)"):
            measure(model)
