"""Measures of models in PEFT: what is compared, and what PEFT's own count of intruders compares instead."""

import copy

import peft
import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension
from torch import nn

import ipca
from ipca import analysis
from ipca.analysis.peft_layers import _ADDITIVE
from ipca.nn import dequantize
from ipca.nn.layer_kinds import read_layer
from ipca.nn.registry import get_layer
from ipca.peft import PCConfig
from tests.helpers.models import Plain, snapshot
from tests.helpers.peft_cases import randomize, train, wrap
from tests.helpers.peft_models import CASES, Small, ids

KINDS = [name for name in CASES if name != "matrix"]


def stock(base, config_class=LoraConfig, **options):
    """``base`` in stock PEFT, its adapter changed at random."""
    model = get_peft_model(copy.deepcopy(base), config_class(**{"r": 3, "target_modules": ["a", "b"], **options}))
    randomize(model)
    return model


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("case", KINDS)
def test_every_kind_is_what_merging_makes_of_it(case, ours):
    build, x, options = CASES[case]
    base = build()
    config = (PCConfig if ours else LoraConfig)(r=2, **options)
    model = wrap(base, config)
    train(model, x())
    pairs = list(analysis.weight_pairs(model, base))
    merged = copy.deepcopy(model).merge_and_unload()
    assert pairs
    for pair in pairs:
        name, _, index = pair.name.partition("[")
        before, after = (read_layer(get_layer(plain, name))[0].double() for plain in (base, merged))
        if index:
            before, after = before[int(index[:-1])], after[int(index[:-1])]
        assert torch.equal(pair.base, before)
        torch.testing.assert_close(pair.trained, after, rtol=1e-5, atol=1e-6)
        assert pair.change.norm() > 1e-4
        if ours:
            assert pair.window.rank == 2
            A, B, A0, B0 = pair.factors
            torch.testing.assert_close(pair.change, B @ A - B0 @ A0, rtol=1e-5, atol=1e-6)
        else:
            assert pair.window is pair.factors is None


def test_measures_of_a_window_in_peft_are_those_of_the_native_one():
    base = Small()
    native = ipca.apply_pc(copy.deepcopy(base), rank=3, form="intact", targets=["a", "b"], progress=False)
    model = wrap(base)
    layers = {name: model.get_base_model().get_submodule(name) for name in ("a", "b")}
    assert analysis.update_norm(model, base) == 0
    with torch.no_grad():
        for name, layer in layers.items():
            for factor in ("lora_A", "lora_B"):
                change = 0.1 * torch.randn_like(getattr(native.get_submodule(name), factor))
                getattr(native.get_submodule(name), factor).add_(change)
                getattr(layer, factor)["default"].weight.add_(change)
    assert analysis.update_norm(model, base) == pytest.approx(analysis.update_norm(native), rel=1e-6)
    here, there = analysis.principal_angles(model, base), analysis.principal_angles(native)
    drifted, native_drift = analysis.drift(model, base), analysis.drift(native)
    for name in ("a", "b"):
        torch.testing.assert_close(here[name].output, there[name].output, rtol=1e-6, atol=0)
        torch.testing.assert_close(here[name].input, there[name].input, rtol=1e-6, atol=0)
        assert drifted[name].window == native_drift[name].window == ipca.Window(4, 3)
        assert drifted[name].shares == pytest.approx(native_drift[name].shares, rel=1e-4)
    for measure in (analysis.spectral_imbalance, analysis.intruder_dimensions):
        assert measure(model, base) == pytest.approx(measure(native), rel=1e-5)
    assert analysis.overlap(model, base, k=4) == pytest.approx(analysis.overlap(native, k=4), rel=1e-4)


def test_an_untrained_pissa_has_no_intruders_while_its_residual_shows_some():
    base = nn.Sequential(nn.Linear(48, 160), nn.Linear(160, 48))
    config = LoraConfig(r=32, lora_alpha=32, init_lora_weights="pissa", target_modules=["0", "1"])
    model = get_peft_model(copy.deepcopy(base), config)
    assert analysis.update_norm(model, base) < 1e-6
    assert analysis.intruder_dimensions(model, base) == {"0": 0, "1": 0}

    kept = {name: model.get_base_model().get_submodule(name).get_base_layer().weight for name in ("0", "1")}
    residual = {name: weight.detach().clone() for name, weight in kept.items()}
    assert min(analysis.intruder_dimensions(model, residual).values()) > 0
    lines: list[str] = []
    config.init_lora_weights = True  # else the adapter that it adds takes a second window out of the base
    reduce_intruder_dimension(model, logging_sink=lines.append)
    assert all(torch.equal(weight, residual[name]) for name, weight in kept.items())
    counts = [int(line.rpartition("Intruders: ")[2]) for line in lines if "Intruders: " in line]
    assert len(counts) == 2
    assert min(counts) > 0


def test_an_adapter_that_is_merged_counts_once():
    base = Small()
    model = stock(base)
    before = analysis.update_norm(model, base)
    model.merge_adapter()
    assert analysis.update_norm(model, base) == pytest.approx(before, rel=1e-5)


def test_only_active_adapters_count():
    base = Small()
    model = stock(base)
    before = analysis.update_norm(model, base)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["a"], init_lora_weights=False))
    assert analysis.update_norm(model, base) == pytest.approx(before, rel=1e-12)
    model.base_model.set_adapter(["default", "second"])
    assert analysis.update_norm(model, base) > 1.01 * before
    (pair, _) = analysis.weight_pairs(model, base)
    expected = sum(pair.layer.get_delta_weight(name).double() for name in ("default", "second"))
    torch.testing.assert_close(pair.change, expected, rtol=1e-6, atol=1e-9)


def test_other_methods_of_peft_are_compared_by_their_change():
    base = Small()
    model = stock(base, LoHaConfig)
    train(model, ids())
    merged = copy.deepcopy(model).merge_and_unload()
    assert analysis.update_norm(model, base) == pytest.approx(
        analysis.update_norm(merged, {name: base.get_submodule(name).weight for name in ("a", "b")}), rel=1e-5
    )


TUNERS = {
    "lora": ("LoraConfig", {"r": 4}),
    "adalora": ("AdaLoraConfig", {"total_step": 10}),
    "c3a": ("C3AConfig", {"block_size": 4}),
    "deft": ("DeftConfig", {"r": 4}),
    "delora": ("DeloraConfig", {"r": 4}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 20}),
    "frod": ("FrodConfig", {}),
    "gralora": ("GraloraConfig", {"r": 4}),
    "loha": ("LoHaConfig", {"r": 4}),
    "lokr": ("LoKrConfig", {"r": 4}),
    "osf": ("OSFConfig", {}),
    "peanut": ("PeanutConfig", {"r": 4}),
    "psoft": ("PsoftConfig", {"r": 4}),
    "pvera": ("PveraConfig", {"r": 4}),
    "randlora": ("RandLoraConfig", {"r": 4}),
    "shira": ("ShiraConfig", {"r": 4}),
    "supertuning": ("SupertuningConfig", {}),
    "unilora": ("UniLoraConfig", {"r": 4}),
    "vblora": ("VBLoRAConfig", {"r": 4, "num_vectors": 8, "vector_length": 4}),
    "vera": ("VeraConfig", {"r": 4}),
    "waveft": ("WaveFTConfig", {"n_frequency": 20}),
}


def in_tuner(base, name, options):
    """``base`` with a layer ``a`` in a method of PEFT, its parameters changed at random."""
    model = get_peft_model(copy.deepcopy(base), getattr(peft, name)(target_modules=["a"], **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("tuner", _ADDITIVE)
def test_methods_that_add_to_the_weight_are_read_as_what_they_compute(tuner):
    base = nn.ModuleDict({"a": nn.Linear(24, 24)})
    model = in_tuner(base, *TUNERS[tuner])
    with torch.no_grad():
        computed = (model.get_base_model()["a"](torch.eye(24)) - base["a"].bias).mT.double()
    random = torch.get_rng_state()
    (pair,) = analysis.weight_pairs(model.train(), base)
    assert torch.equal(torch.get_rng_state(), random)
    assert pair.change.norm() > 1e-4
    assert (pair.trained - computed).abs().max() <= 1e-6 * computed.abs().max()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("OFTConfig", {"oft_block_size": 4}),
        *((name, {"r": 4}) for name in ("HRAConfig", "HiraConfig", "MissConfig")),
        ("LoraConfig", {"r": 4, "use_dora": True}),
        ("LoraConfig", {"r": 4, "init_lora_weights": "mica"}),
        ("LoraConfig", {"r": 4, "kasa_config": peft.KasaConfig()}),
    ],
)
def test_methods_that_do_more_than_add_are_read_as_what_they_compute(name, options):
    base = nn.ModuleDict({"a": nn.Linear(24, 24)})
    model = in_tuner(base, name, options)
    before, random = snapshot(model), torch.get_rng_state()
    (pair,) = analysis.weight_pairs(model, base)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    with torch.no_grad():
        computed = (model.double().get_base_model()["a"](torch.eye(24).double()) - base["a"].bias).mT
    assert pair.change.norm() > 1e-4
    assert (pair.trained - computed).abs().max() <= 1e-12


def test_an_adapter_that_peft_cannot_merge_is_refused():
    base = nn.ModuleDict({"a": nn.Linear(24, 24)})
    model = in_tuner(base, "LoraConfig", {"r": 4, "alora_invocation_tokens": [1]})
    with pytest.raises(ValueError, match=r"a: PEFT cannot merge this adapter, so its weight is unknown: .*aLoRA"):
        analysis.update_norm(model, base)


def test_a_method_without_a_change_of_the_weight_is_no_unchanged_model():
    base = nn.ModuleDict({"a": nn.Linear(24, 24), "b": nn.Linear(24, 24)})
    model = in_tuner(base, "IA3Config", {"feedforward_modules": []})
    with pytest.raises(ValueError, match="holds a Linear of PEFT, which adds nothing to a weight; merge_and_unload"):
        analysis.update_norm(model, base)


def test_beside_a_merged_adapter_the_others_do_not_count_as_in_peft():
    base = Small()
    model = stock(base)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["a"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    model.merge_adapter(["default"])
    (pair, _) = analysis.weight_pairs(model, base)
    assert torch.equal(pair.trained, pair.layer.get_base_layer().weight.double())


def test_a_half_precision_weight_is_not_rounded():
    base = Plain().to(torch.bfloat16)
    model = stock(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1e-6)
    for pair in analysis.weight_pairs(model, base):
        change = pair.layer.get_delta_weight("default").double()
        torch.testing.assert_close(pair.change, change, rtol=1e-6, atol=1e-15)
        assert pair.change.norm() > 0


def test_a_quantized_base_is_dequantized():
    pytest.importorskip("bitsandbytes")
    from tests.helpers.quantized_layers import quantized_model

    model, plain, _ = quantized_model("nf4")
    held = dequantize(model.a).double()
    model = get_peft_model(model, LoraConfig(r=3, target_modules=["a"]))
    (pair,) = analysis.weight_pairs(model, plain)
    assert torch.equal(pair.trained, held)
    assert torch.equal(pair.base, plain.a.weight.double())


def test_a_transformers_model_with_an_adapter_inside_is_read_as_well():
    base = CASES["llama"].build()
    model = copy.deepcopy(base)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    names = [pair.name for pair in analysis.weight_pairs(model, base)]
    assert names == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]


@pytest.mark.parametrize("measure", ["drift", "intruder_dimensions", "spectral_imbalance", "update_norm"])
def test_a_measure_changes_nothing(measure):
    base = Small()
    model = stock(base)
    before, random = (snapshot(model), snapshot(base)), torch.get_rng_state()
    getattr(analysis, measure)(model, base)
    assert (snapshot(model), snapshot(base)) == before
    assert torch.equal(torch.get_rng_state(), random)


def test_what_cannot_be_measured_is_said():
    base = Small()
    for config in (LoraConfig(target_modules=["a"]), PCConfig(r=3, target_modules=["a"])):
        with pytest.raises(ValueError, match=r"these are PEFT's layers, .* the residual W − B A\); pass base"):
            analysis.update_norm(wrap(base, config))
    with pytest.raises(ValueError, match=r"a: a Linear does not keep its initial factors"):
        analysis.principal_angles(wrap(base, LoraConfig(target_modules=["a"])), base)
    with pytest.raises(ValueError, match=r"base: a is a peft\.tuners\.lora\.layer\.Linear, not a plain layer"):
        analysis.update_norm(wrap(base, LoraConfig(target_modules=["a"])), stock(base).get_base_model())
    matrix = CASES["matrix"].build()
    model = wrap(matrix, LoraConfig(r=2, **CASES["matrix"].options))
    given = {"first": matrix.first.weight, "inner.weight": matrix.inner.weight, "inner.other": matrix.inner.other}
    with pytest.raises(ValueError, match=r"inner\.other: .* base, a bare parameter 'other', cannot be read"):
        analysis.update_norm(model, given)
