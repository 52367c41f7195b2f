"""prepare: the decompositions of a whole model before PEFT changes it, from a cache, beside other adapters."""

import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import ipca
from ipca.model import AdapterSettings
from ipca.peft import PCConfig, prepare
from ipca.peft.records import LayerRecords
from tests.helpers.layer_kinds import mixtral
from tests.helpers.models import snapshot
from tests.helpers.peft_cases import off, output, train, wrap
from tests.helpers.peft_models import CASES, Heavy, Small, ids, llama
from tests.helpers.quantized_layers import KINDS, quantize


@pytest.fixture
def never_again(monkeypatch):
    """Called, it makes every further decomposition fail."""

    def stop():
        monkeypatch.setattr(ipca.nn.initialization, "window_svd", lambda *_, **__: pytest.fail("decomposed by a layer"))
        monkeypatch.setattr(ipca.svd.cache, "window_svd", lambda *_, **__: pytest.fail("decomposed by prepare"))

    return stop


@pytest.mark.parametrize("name", sorted(set(CASES) - {"matrix"}))  # which PEFT decomposes in its turn
def test_peft_finds_the_starts_ready(name, never_again):
    case = CASES[name]
    base, x = case.build().eval(), case.x()
    config, before = PCConfig(r=2, **case.options), snapshot(base)
    assert prepare(base, config, progress=False) is config
    assert snapshot(base) == before
    alone = wrap(base, PCConfig(r=2, **case.options))
    never_again()
    model = get_peft_model(copy.deepcopy(base), config)
    assert config.records.initial == {}
    assert torch.equal(output(model, x), output(base, x))
    for (name, one), (other, two) in zip(model.state_dict().items(), alone.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(one, two)


def test_a_cache_saves_the_second_run(tmp_path, never_again):
    base = Small()
    config = prepare(base, PCConfig(r=3, target_modules=["a", "b"]), cache=tmp_path, progress=False)
    never_again()
    again = prepare(base, PCConfig(r=3, target_modules=["a", "b"]), cache=tmp_path, progress=False)
    known = again.records.initial
    assert all(torch.equal(known[path].A0, initial.A0) for path, initial in config.records.initial.items())


def test_a_second_adapter(never_again):
    base, x = Small(), ids()
    model = wrap(base)
    train(model, x)
    y, before = model(x), snapshot(model)
    config = prepare(model, PCConfig(r=2, window="minor", target_modules=["words", "b"]), progress=False)
    assert snapshot(model) == before
    assert list(config.records.initial) == ["words", "b"]
    never_again()
    model.add_adapter("minor", config)
    assert torch.equal(model(x), y)
    model.set_adapter("minor")
    assert torch.equal(model(x), base(x))


def test_a_window_after_plain_lora(tmp_path):
    base, x = Small(), ids()
    model = wrap(base, LoraConfig(r=2, target_modules=["words", "a", "b"], init_lora_weights=False))
    y, config = model(x), PCConfig(r=3, target_modules=["a", "words"])
    with pytest.raises(ValueError, match=r"variant combination: \('window',\)"):
        copy.deepcopy(model).add_adapter("window", PCConfig(r=3, target_modules=["a", "words"]))
    model.add_adapter("window", prepare(model, config, progress=False))
    assert torch.equal(model(x), y)
    model.set_adapter("window")
    assert torch.equal(model(x), base(x))
    train(model, x)
    model.save_pretrained(tmp_path)
    assert off(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "window")(x), model(x)) < 1e-6
    model.set_adapter("default")
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_base(kind, never_again):
    base, x = quantize(Heavy(), kind).train(), torch.randn(5, 64)
    config = prepare(base, PCConfig(r=3, target_modules=["a", "b"]), progress=False)
    never_again()
    model = get_peft_model(base, config)
    with model.disable_adapter():
        y = model(x)
    assert torch.equal(model(x), y)


def test_the_unquantized_weights_of_a_quantized_base():
    plain = Heavy()
    base, x = quantize(copy.deepcopy(plain), "nf4").train(), torch.randn(5, 64)
    unquantized_weights = {f"{name}.weight": getattr(plain, name).weight.detach() for name in "ab"}
    asked = []

    def find(name):
        asked.append(name)
        return unquantized_weights[name if name.endswith("weight") else f"{name}.weight"]

    config = prepare(base, PCConfig(r=3, target_modules=["a", "b"]), unquantized_weights=find, progress=False)
    assert {name.removesuffix(".weight") for name in asked} == {"a", "b"}
    exact = ipca.window_svd(plain.a.weight.detach(), ipca.Window.middle(3))
    start = config.records.initial["a"]
    assert off(start.B0 @ start.A0, (exact.U * exact.S) @ exact.Vh) < 1e-4
    model = get_peft_model(base, config)
    with model.disable_adapter():
        y = model(x)
    assert torch.equal(model(x), y)


def test_another_weight_than_the_prepared_one_is_refused():
    config = prepare(Small(), PCConfig(r=3, target_modules=["a", "b"]), progress=False)
    with pytest.raises(ValueError, match=r"^a: this is not the base weight the adapter was made on"):
        wrap(Small(), config)


WRONG = {
    "window": ({"r": 13}, ValueError, "^a: .*needs 13 singular values, but there are only 12"),
    "layer": ({"target_modules": ["a", "norm"]}, ValueError, "^norm: a LayerNorm has no weight matrix"),
    "name": ({"target_modules": ["c"]}, ValueError, "Target modules {'c'} not found in the base model"),
    "value": ({"target_modules": ["a", "infinite"]}, ValueError, "^infinite: .*Inf"),
}


class Wrong(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.infinite = nn.Linear(20, 12), nn.LayerNorm(12), nn.Linear(12, 9)
        with torch.no_grad():
            self.infinite.weight[0, 0] = torch.inf


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_error_changes_nothing(name, wrapped):
    options, error, words = WRONG[name]
    model = Wrong()
    model.a.bias.requires_grad_(False)
    if wrapped:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["a"]))
    config = PCConfig(**{"r": 3, "target_modules": ["a"], **options})
    before = snapshot(model), [type(module) for module in model.modules()], vars(config).copy()
    with pytest.raises(error, match=words):
        prepare(model, config, progress=False)
    assert (snapshot(model), [type(module) for module in model.modules()], vars(config)) == before


def test_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        prepare(Small(), PCConfig(r=3, target_modules=["a"]))


def test_a_copy_by_replace_has_no_starts_of_its_own():
    config = prepare(Small(), PCConfig(r=3, target_modules=["a"]), progress=False)
    copied = replace(config, r=2, lora_alpha=None)
    assert config.records.initial
    assert (copied.records, copied.r, copied.lora_alpha) == (LayerRecords(), 2, 2)


def test_a_router_too_small_for_its_rank_is_refused_before_anything_is_wrapped():
    model = mixtral()
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"mlp\.gate\.weight: r=16 needs 16 singular values, but .* only 4; lower r, give"
    ):
        prepare(model, PCConfig(target_modules="all-linear", rank_pattern={"gate.weight": 16}), progress=False)
    assert snapshot(model) == before


def test_a_tied_head_is_refused_by_name():
    model = llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(ValueError, match="lm_head: its weight is tied to another module's"):
        prepare(model, PCConfig(r=3, target_modules=["lm_head"]), progress=False)


@pytest.mark.parametrize("config", [LoraConfig(target_modules=["a"]), AdapterSettings(targets=["a"])], ids=type)
def test_another_configuration_is_refused(config):
    with pytest.raises(TypeError, match=rf"config must be an ipca\.peft\.PCConfig, got {type(config).__name__}\."):
        prepare(Small(), config)


@pytest.mark.parametrize("kind", [PCConfig, LoraConfig])
def test_a_merged_adapter_is_refused_and_nothing_moves(kind):
    model, x = get_peft_model(Small(), kind(r=3, target_modules=["a"])), ids()
    train(model, x)
    model.merge_adapter()
    before, y = snapshot(model), output(model, x)
    with pytest.raises(ValueError, match=r"^a: the adapter 'default' is merged .* call unmerge_adapter\(\) first"):
        prepare(model, PCConfig(r=2, target_modules=["a"]), progress=False)
    assert snapshot(model) == before
    assert torch.equal(output(model, x), y)
    model.unmerge_adapter()
    prepare(model, PCConfig(r=2, target_modules=["a"]), progress=False)


def test_inputs_are_measured_on_an_offloaded_base():
    accelerate = pytest.importorskip("accelerate")
    base, x = Small(), ids()
    options = {"r": 2, "window": "inputs:principal", "target_modules": ["a"], "progress": False}
    want = prepare(copy.deepcopy(base), PCConfig(**options), calibration=[x])
    accelerate.cpu_offload(base, execution_device=torch.device("cpu"))
    found = prepare(base, PCConfig(**options), calibration=[x])
    assert torch.equal(found.records.initial["a"].A0, want.records.initial["a"].A0)
