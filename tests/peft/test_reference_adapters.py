"""Adapters of one configuration, as TRL's trainers add ``"ref"`` and copy the trained factors into it by name."""

import copy
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model

import ipca
from ipca.peft import PCConfig, prepare
from tests.helpers.peft_cases import off, output, train, wrap
from tests.helpers.peft_models import CASES, Heavy, Small, ids
from tests.helpers.quantized_layers import quantize

TARGETS = ["words", "a", "b"]


@torch.no_grad()
def add_reference(model):
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name or name.endswith(".default"):
            model.get_parameter(name.replace(".default", ".ref")).data.copy_(parameter.data)
    model.set_adapter("ref")


def plain(tmp_path):
    return wrap(Small(), target_modules=TARGETS), ids()


def unquantized(tmp_path):
    base = Heavy()
    weights = {name: getattr(base, name).weight.detach().clone() for name in "ab"}
    quantized = quantize(base, "nf4").train()
    config = PCConfig(r=3, target_modules=["a", "b"])
    return get_peft_model(quantized, prepare(quantized, config, unquantized_weights=weights)), torch.randn(5, 64)


def of_inputs(tmp_path):
    base, config = Small(), PCConfig(r=3, window="inputs:minor", target_modules=["a", "b"])
    return get_peft_model(base, prepare(base, config, calibration=[ids() for _ in range(4)])), ids()


def two_magnitudes(tmp_path):
    base = Small()
    model = ipca.apply_pc(copy.deepcopy(base), rank=3, targets=["a"], magnitude=1.0, progress=False)
    ipca.save_adapter(ipca.apply_pc(model, rank=3, targets=["b"], progress=False), tmp_path / "saved")
    return PeftModel.from_pretrained(base, tmp_path / "saved", is_trainable=True), ids()


def another_window(tmp_path):
    base = Small()
    state, model = wrap(base, window="minor").state_dict(), wrap(base)
    with pytest.warns(RuntimeWarning, match="starts from another window"):
        model.load_state_dict(state)
    return model, ids()


def low_memory(tmp_path):
    base = Small()
    wrap(base, window="minor").save_pretrained(tmp_path / "saved")
    options = {"config": PCConfig.from_pretrained(tmp_path / "saved"), "is_trainable": True}
    return PeftModel.from_pretrained(base, tmp_path / "saved", low_cpu_mem_usage=True, **options), ids()


ORIGINS = {make.__name__: make for make in (plain, unquantized, of_inputs, two_magnitudes, another_window, low_memory)}


@pytest.mark.parametrize("origin", ORIGINS)
def test_a_reference_computes_what_its_adapter_does(origin, tmp_path, decomposed):
    model, x = ORIGINS[origin](tmp_path)
    model.eval()
    train(model, x)
    y, known = output(model, x), len(decomposed)
    add_reference(model)
    assert torch.equal(output(model, x), y)
    assert len(decomposed) == known
    train(model, x)
    assert not torch.equal(output(model, x), y)
    model.set_adapter("default")
    assert torch.equal(output(model, x), y)


@pytest.mark.parametrize("name", CASES)
def test_a_reference_of_every_kind_of_layer_is_saved_too(name, tmp_path, decomposed):
    case = CASES[name]
    base, x = case.build().eval(), case.x()
    model = wrap(base, PCConfig(r=2, **case.options)).eval()
    train(model, x)
    y, known = output(model, x), len(decomposed)
    add_reference(model)
    assert torch.equal(output(model, x), y)
    assert len(decomposed) == known
    model.save_pretrained(tmp_path)
    folders = [tmp_path, tmp_path / "ref"]
    assert folders[0].joinpath("adapter_model.safetensors").read_bytes() == (
        folders[1].joinpath("adapter_model.safetensors").read_bytes()
    )
    layers = [PCConfig.from_pretrained(folder).records.saved for folder in folders]
    assert layers[0] == layers[1]
    for folder in folders:
        assert off(output(PeftModel.from_pretrained(copy.deepcopy(base), folder).eval(), x), y) < 1e-5


COPIES = {"copy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("twin", COPIES.values(), ids=COPIES)
def test_a_reference_in_a_copy(twin, tmp_path, decomposed):
    model, x = two_magnitudes(tmp_path)
    train(model, x)
    model = twin(model)
    y, known = output(model, x), len(decomposed)
    add_reference(model)
    assert torch.equal(output(model, x), y)
    assert len(decomposed) == known


def test_a_second_adapter_starts_as_the_base_in_16_bits():
    base, x = Small().bfloat16(), ids()
    model = wrap(base, target_modules=TARGETS)
    for module in model.modules():  # as load_state_dict(assign=True) leaves the initial factors of a wider file
        for name, buffer in list(module._buffers.items()):
            if name.startswith("initial_"):
                module.register_buffer(name, buffer.float() * (1 + 2**-12), persistent=False)
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    assert torch.equal(model(x), base(x))


@pytest.mark.parametrize(
    "change", [{"window": "minor"}, {"r": 2}, {"lora_alpha": 12}, {"magnitude": 1.0}, {"tol": "fast"}], ids=str
)
def test_another_request_by_the_same_configuration_is_decomposed(change, decomposed):
    base, x = Small(), ids()
    model = wrap(base)
    config, known = model.peft_config["default"], len(decomposed)
    for name, value in change.items():
        setattr(config, name, value)
    model.add_adapter("second", config)
    assert len(decomposed) == known + 2
    model.set_adapter("second")
    assert torch.equal(model(x), base(x))
    start = wrap(base, PCConfig(**{"r": 3, "lora_alpha": 3, "target_modules": ["a", "b"], **change}))
    layers = [model.base_model.model.a.lora_A["second"], start.base_model.model.a.lora_A["default"]]
    assert torch.equal(layers[0].initial_weight, layers[1].initial_weight)


def test_adapters_of_other_configurations_and_models_are_decomposed(decomposed):
    base, config = Small(), PCConfig(r=3, target_modules=["a", "b"], progress=False)
    model = wrap(base, config)
    model.add_adapter("second", PCConfig(r=3, target_modules=["a", "b"], progress=False))
    wrap(Small(), config)
    assert len(decomposed) == 6


@pytest.mark.parametrize("left", ["deleted", "replaced"])
def test_an_adapter_that_is_gone_lends_nothing(left, decomposed):
    model = Small()
    config = PCConfig(r=3, target_modules=["a", "b"], progress=False)
    adapted = get_peft_model(model, config)
    if left == "deleted":
        adapted.add_adapter("other", PCConfig(r=2, target_modules=["a"], progress=False))
        adapted.delete_adapter("default")
    else:
        inject_adapter_in_model(PCConfig(r=2, target_modules=["a", "b"], progress=False), model, "default")
    known = len(decomposed)
    adapted.add_adapter("second", config)
    assert len(decomposed) == known + 2


def test_the_record_is_that_of_the_models_own_adapter(tmp_path):
    """Where another model of the same configuration has been made since."""
    config = PCConfig(r=3, target_modules=["a", "b"], progress=False)
    bases = [Small(), Small()]
    models = [wrap(base, config) for base in bases]
    train(models[0], ids())
    add_reference(models[0])
    models[0].save_pretrained(tmp_path)
    x = ids()
    again = PeftModel.from_pretrained(bases[0], tmp_path / "ref", is_trainable=True)
    assert torch.equal(again(x), models[0](x))
