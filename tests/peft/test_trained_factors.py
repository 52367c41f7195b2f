"""A PCConfig with one factor frozen, a magnitude, and windows that are found from inputs."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import ipca
import ipca.peft
from ipca.io.adapter_folder import read_record
from ipca.peft import PCConfig, prepare
from tests.helpers.layer_kinds import mixtral
from tests.helpers.models import snapshot
from tests.helpers.peft_models import llama

TARGETS = ["q_proj", "down_proj"]
IDS = torch.arange(36).view(4, 9) % 31


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return llama().eval()


@pytest.fixture
def batches():
    return [{"input_ids": IDS}, {"input_ids": IDS.flip(1)}]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def trained(model):
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return {part for name in names for part in name.split(".") if part.startswith("lora")}


def fit(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize(("train", "names"), [("A", {"lora_A"}), ("B", {"lora_B"})])
def test_one_factor_trains_whatever_peft_switches_on(base, train, names, tmp_path):
    config = PCConfig(r=3, window="minor", train=train, magnitude=1.0, target_modules=TARGETS, progress=False)
    model = get_peft_model(copy.deepcopy(base), config)
    assert torch.equal(logits(model), logits(base))
    assert trained(fit(model)) == names
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS))
    model.set_adapter("other")
    assert trained(model) == {"lora_A", "lora_B"}
    model.set_adapter("default")
    with model.disable_adapter():
        pass
    model.set_requires_grad("default")
    assert trained(model) == names
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(logits(stock), logits(model))
    resumed = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert trained(resumed) == names
    assert resumed.peft_config["default"].magnitude == 1.0
    assert torch.equal(logits(resumed), logits(model))
    native = ipca.load_adapter(copy.deepcopy(base), tmp_path)
    assert trained(native) == names
    torch.testing.assert_close(logits(native), logits(model))


def test_an_adapter_of_apply_pc_keeps_its_options(base, tmp_path):
    options = {"rank": 3, "train": "B", "magnitude": 1.0, "progress": False}
    ipca.save_adapter(ipca.apply_pc(copy.deepcopy(base), targets=TARGETS, **options), tmp_path / "one")
    resumed = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "one", is_trainable=True)
    resumed.save_pretrained(tmp_path / "two")
    for layer in read_record(tmp_path / "two")[0].values():
        assert (layer.train, layer.magnitude) == ("B", 1.0)


def test_layers_of_several_options_give_a_warning(base, tmp_path):
    model = ipca.apply_pc(copy.deepcopy(base), rank=3, targets="q_proj", train="A", progress=False)
    ipca.save_adapter(ipca.apply_pc(model, rank=3, targets="down_proj", progress=False), tmp_path)
    with pytest.warns(RuntimeWarning, match="layers have train 'A', 'both', and a PCConfig has one for all"):
        config = PCConfig.from_pretrained(tmp_path)
    assert (config.train, config.magnitude) == ("both", "sigma")


@pytest.mark.parametrize("window", ["inputs:minor", "inputs:0.3", "auto"])
def test_prepare_finds_windows_from_inputs_as_apply_pc_does(base, window, batches, tmp_path):
    before = snapshot(base)
    config = PCConfig(r=3, window=window, target_modules=TARGETS, progress=False)
    prepare(base, config, calibration=iter(batches))
    assert snapshot(base) == before
    model = get_peft_model(copy.deepcopy(base), config)
    native = ipca.apply_pc(
        copy.deepcopy(base), rank=3, window=window, targets=TARGETS, calibration=batches, progress=False
    )
    assert ipca.peft.summary(model).windows == ipca.summary(native).windows
    for name, layer in ipca.model.apply.adapted_layers(native).items():
        ours = model.get_submodule(f"base_model.model.{name}")
        torch.testing.assert_close(ours.lora_A["default"].weight, layer.lora_A, rtol=1e-4, atol=1e-6)
    fit(model).save_pretrained(tmp_path)
    resumed = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert torch.equal(logits(resumed), logits(model))
    assert ipca.peft.summary(resumed).windows == ipca.summary(native).windows


def test_adapters_that_are_there_are_off_while_inputs_are_measured(base, batches):
    found = []
    for adapted in (False, True):
        model = copy.deepcopy(base)
        if adapted:
            model = get_peft_model(model, LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
        config = PCConfig(r=3, window="inputs:principal", target_modules=["down_proj"], progress=False)
        found.append(prepare(model, config, calibration=batches).records.initial)
    for path, initial in found[0].items():
        torch.testing.assert_close(found[1][path].A0, initial.A0)


def test_a_bare_parameter_has_no_inputs(batches):
    model, parameter = mixtral(), "model.layers.0.mlp.gate.weight"
    before = snapshot(model)
    options = {"r": 2, "target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"], "progress": False}
    with pytest.raises(ValueError, match=f"^{parameter}: window 'inputs:minor' .* bare parameter; name another window"):
        prepare(model, PCConfig(window="inputs:minor", **options), calibration=batches)
    assert snapshot(model) == before
    config = PCConfig(window="inputs:minor", window_pattern={"gate.weight": "middle"}, **options)
    model = get_peft_model(model, prepare(model, config, calibration=batches))
    assert config.records.saved[parameter].basis == "weight"


def test_without_inputs_the_message_says_what_to_do(base, batches):
    model, config = copy.deepcopy(base), PCConfig(r=3, window="inputs:minor", target_modules=TARGETS, progress=False)
    before = snapshot(model)
    words = r"q_proj: window 'inputs:minor' is found from inputs .*to ipca\.peft\.prepare, calibration="
    with pytest.raises(ValueError, match=words):
        get_peft_model(model, config)
    with pytest.raises(ValueError, match=words):
        prepare(model, config)
    with pytest.raises(ValueError, match="calibration is for windows that are found from inputs"):
        prepare(model, PCConfig(r=3, target_modules=TARGETS), calibration=batches)
    assert snapshot(model) == before


def test_each_layer_keeps_the_magnitude_it_started_with(base, tmp_path):
    model = ipca.apply_pc(copy.deepcopy(base), rank=3, targets="q_proj", magnitude=1.0, progress=False)
    ipca.save_adapter(ipca.apply_pc(model, rank=3, targets="down_proj", progress=False), tmp_path / "one")
    PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "one", is_trainable=True).save_pretrained(
        tmp_path / "two"
    )
    one, two = ({n: layer.magnitude for n, layer in read_record(tmp_path / name)[0].items()} for name in ("one", "two"))
    assert one == two
    assert set(one.values()) == {1.0, "sigma"}


def test_a_config_that_is_prepared_again_counts_again(base):
    config = PCConfig(r=3, target_modules=TARGETS, magnitude=1.0, progress=False)
    get_peft_model(copy.deepcopy(base), prepare(base, config))
    config.magnitude = 2.0
    get_peft_model(copy.deepcopy(base), prepare(base, config))
    assert {layer.magnitude for layer in config.records.saved.values()} == {2.0}
