"""A base that PEFT has wrapped already, as in a notebook: an adapter of the same name replaces a window whole."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from ipca.peft import PCConfig, prepare
from tests.helpers.models import snapshot
from tests.helpers.peft_cases import off, output, randomize, train
from tests.helpers.peft_models import CASES, Small, ids

KINDS = ["llama", "gpt2", "embedding", "conv2d"]


def wrapped(name, adapter="default", **options):
    """A plain base, its wrapped twin, the PeftModel around that with a trained window, and an input."""
    case = CASES[name]
    base, x = case.build().eval(), case.x()
    twin = copy.deepcopy(base)
    model = get_peft_model(twin, PCConfig(**{"r": 2, **case.options, **options}), adapter_name=adapter).eval()
    train(model, x)
    return base, twin, model, x


def small(**options):
    base = Small()
    model = get_peft_model(base, PCConfig(**{"r": 2, "target_modules": ["a", "b", "words"], **options}))
    train(model, ids())
    return base, model


def read(base, folder):
    """What stock layers make of a saved adapter on an untouched base."""
    return PeftModel.from_pretrained(copy.deepcopy(base), folder, config=LoraConfig.from_pretrained(folder)).eval()


def trains(model):
    return sorted(name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("adapter", ["default", "mine"])
@pytest.mark.parametrize("name", KINDS)
def test_a_saved_window_is_loaded_onto_the_base_it_was_trained_on(name, adapter, is_trainable, tmp_path):
    base, twin, model, x = wrapped(name, adapter)
    y, trained = output(model, x), trains(model)
    model.save_pretrained(tmp_path)
    folder = tmp_path / ("" if adapter == "default" else adapter)
    again = PeftModel.from_pretrained(twin, folder, adapter_name=adapter, is_trainable=is_trainable).eval()
    assert off(output(again, x), y) < 1e-6
    assert off(output(model, x), y) < 1e-6
    assert trains(again) == (trained if is_trainable else [])
    if is_trainable:
        train(again, x)
        assert off(output(again, x), y) > 1e-4
    for number, saved in enumerate((model, again)):
        place = tmp_path / str(number)
        saved.save_pretrained(place)
        assert off(output(read(base, place / folder.relative_to(tmp_path)), x), output(again, x)) < 1e-6


@pytest.mark.parametrize("name", KINDS)
def test_a_saved_window_is_loaded_beside_the_trained_one(name, tmp_path):
    _, twin, model, x = wrapped(name)
    y = output(model, x)
    model.save_pretrained(tmp_path)
    train(model, x)
    here = output(model, x)
    again = PeftModel.from_pretrained(twin, tmp_path, adapter_name="saved").eval()
    again.set_adapter("saved")
    assert off(output(again, x), y) < 1e-6
    again.set_adapter("default")
    assert torch.equal(output(again, x), here)
    assert off(here, y) > 1e-4


@pytest.mark.parametrize("options", [{}, {"train": "A"}, {"train": "B", "r": 3}], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_a_stock_lora_takes_the_place_of_a_window(name, options, tmp_path):
    base, twin, _, x = wrapped(name, **options)
    model = get_peft_model(twin, LoraConfig(r=3, **CASES[name].options)).eval()
    assert torch.equal(output(model, x), output(base, x))
    assert trains(model) == trains(get_peft_model(copy.deepcopy(base), LoraConfig(r=3, **CASES[name].options)))
    randomize(model)
    train(model, x)
    model.save_pretrained(tmp_path)
    assert off(output(model, x), output(base, x)) > 1e-2
    assert torch.equal(output(read(base, tmp_path), x), output(model, x))
    assert not (tmp_path / "ipca.json").exists()


@pytest.mark.parametrize("name", KINDS)
def test_a_window_takes_the_place_of_a_window(name, tmp_path):
    base, twin, _, x = wrapped(name, train="A")
    model = get_peft_model(twin, PCConfig(r=3, window="minor", **CASES[name].options)).eval()
    assert torch.equal(output(model, x), output(base, x))
    fresh = get_peft_model(copy.deepcopy(base), PCConfig(r=3, window="minor", **CASES[name].options)).eval()
    assert trains(model) == trains(fresh)
    shapes = [{key: tensor.shape for key, tensor in each.state_dict().items()} for each in (model, fresh)]
    assert shapes[0] == shapes[1]
    train(model, x)
    model.save_pretrained(tmp_path)
    assert off(output(read(base, tmp_path), x), output(model, x)) < 1e-6


@pytest.mark.parametrize("name", ["matrix", "experts"])
@pytest.mark.parametrize("config", [PCConfig, LoraConfig])
def test_a_parameter_has_one_adapter_of_a_name(name, config, tmp_path):
    _, twin, model, x = wrapped(name)
    model.save_pretrained(tmp_path)
    before, y = snapshot(twin), output(model, x)
    for attempt in (
        lambda: get_peft_model(twin, config(r=2, **CASES[name].options)),
        lambda: PeftModel.from_pretrained(twin, tmp_path, is_trainable=config is PCConfig),
    ):
        with pytest.raises(ValueError, match=r"the parameter '\w+' has an adapter 'default', and PEFT replaces none"):
            attempt()
    assert snapshot(twin) == before
    other = PeftModel.from_pretrained(twin, tmp_path, adapter_name="other").eval()
    other.set_adapter("other")
    assert off(output(other, x), y) < 1e-6
    plain = PeftModel.from_pretrained(model.unload(), tmp_path).eval()
    assert off(output(plain, x), y) < 1e-6


def broken(base):
    """Let the last layer hold a value of which there is no window."""
    with torch.no_grad():
        base.b.base_layer.weight[0, 0] = torch.nan


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (lambda: PCConfig(r=99, target_modules=["a", "b", "words"]), None),
        (lambda: PCConfig(r=2, target_modules=["a", "nothing"], modules_to_save=["nowhere"]), None),
        (lambda: PCConfig(r=2, target_modules=["a", "b", "words"]), broken),
        (lambda: LoraConfig(r=2, target_modules=["nothing"]), None),
        (lambda: LoraConfig(r=2, target_modules=["a", "b"], init_lora_weights="loftq"), None),
        (lambda: PCConfig(r=2, target_modules=["a"]), None),
        (lambda: LoraConfig(r=2, target_modules=["words", "b"]), None),
    ],
    ids=["rank", "no module", "NaN", "no target", "PEFT's own error", "fewer layers", "fewer layers of stock"],
)
@pytest.mark.parametrize("wrap", [get_peft_model, lambda base, config: inject_adapter_in_model(config, base)])
def test_what_fails_leaves_the_trained_window(wrap, config, change, tmp_path):
    base, model = small()
    plain = copy.deepcopy(model).unload()
    if change is not None:
        change(base)
    config_before, before = model.peft_config["default"], (snapshot(model), model.state_dict())
    with pytest.raises((ValueError, TypeError, AttributeError)):
        wrap(base, config())
    assert model.peft_config == {"default": config_before}
    assert snapshot(model) == before[0]
    after = model.state_dict()
    assert list(after) == list(before[1])
    assert all(torch.equal(after[key].nan_to_num(), tensor.nan_to_num()) for key, tensor in before[1].items())
    if change is None:
        x = ids()
        model.save_pretrained(tmp_path)
        assert off(output(read(plain, tmp_path), x), output(model, x)) < 1e-6


def test_an_adapter_that_would_stay_in_some_layers_is_named():
    base, model = small()
    with pytest.raises(ValueError, match=r"words, b: an earlier adapter 'default' would stay there, which the new con"):
        get_peft_model(base, PCConfig(r=2, target_modules=["a"]))
    plain = Small()
    get_peft_model(plain, LoraConfig(r=2, target_modules=["a", "b"]))
    config = prepare(plain, PCConfig(r=2, target_modules=["a"]), progress=False)
    with pytest.raises(ValueError, match=r"b: an earlier adapter 'default' would stay there"):
        get_peft_model(plain, config)
    model.unload()
    assert isinstance(base.b, nn.Linear)
    get_peft_model(base, PCConfig(r=2, target_modules=["a"]))


def test_a_peft_model_is_no_base(tmp_path):
    _, model = small()
    plain, x = copy.deepcopy(model).unload(), ids()
    model.save_pretrained(tmp_path)
    y, stock = output(model, x), get_peft_model(Small(), LoraConfig(r=2, target_modules=["a"]))
    for name in ("default", "other"):
        for attempt in (
            lambda name=name: get_peft_model(model, PCConfig(r=2, target_modules=["a"]), adapter_name=name),
            lambda name=name: get_peft_model(model, LoraConfig(r=2, target_modules=["a"]), adapter_name=name),
            lambda name=name: get_peft_model(stock, PCConfig(r=2, target_modules=["b"]), adapter_name=name),
            lambda name=name: PeftModel.from_pretrained(model, tmp_path, adapter_name=name),
            lambda name=name: PeftModel.from_pretrained(model, tmp_path, adapter_name=name, is_trainable=True),
        ):
            with pytest.raises(ValueError, match=r"the model is a PeftModel already, .*; call unload\(\) on it first"):
                attempt()
    assert list(model.peft_config) == list(stock.peft_config) == ["default"]
    model.save_pretrained(tmp_path / "again")
    assert off(output(read(plain, tmp_path / "again"), x), y) < 1e-6
    again = get_peft_model(model.unload(), PCConfig(r=2, target_modules=["a"]))
    assert torch.equal(output(again, x), output(plain, x))


def said(call):
    """The value of ``call``, and what it warns of weights that stay trained."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = call()
    return value, [str(each.message) for each in caught if "trained" in str(each.message)]


def test_a_head_that_stays_trained_is_named():
    base, x = CASES["vit"].build().eval(), CASES["vit"].x()
    before, config = copy.deepcopy(base.classifier), PCConfig(r=2, target_modules="all-linear")
    model = get_peft_model(base, config)
    assert said(lambda: get_peft_model(base, copy.deepcopy(config)))[1] == []  # nothing has been trained yet
    train(model, x)
    (line,) = said(lambda: get_peft_model(base, PCConfig(r=2, target_modules="all-linear")))[1]
    assert line.startswith("classifier: the weights that an earlier adapter 'default' has trained stay, and the new")
    new, lines = said(lambda: get_peft_model(base, PCConfig(r=2, target_modules="all-linear"), adapter_name="new"))
    assert lines == []
    assert torch.equal(new.base_model.model.classifier.modules_to_save["new"].weight, before.weight)


def test_a_head_without_values_is_wrapped_again():
    with torch.device("meta"):
        base = CASES["vit"].build()
    for _ in range(2):
        model = get_peft_model(base, PCConfig(r=2, target_modules="all-linear"), low_cpu_mem_usage=True)
    assert said(model.unload)[1] == []


def test_what_unloading_leaves_trained_is_named():
    base, x = CASES["vit"].build().eval(), CASES["vit"].x()
    before, model = copy.deepcopy(base.classifier), get_peft_model(base, PCConfig(r=2, target_modules="all-linear"))
    assert said(copy.deepcopy(model).unload)[1] == []
    train(model, x)
    plain, (line,) = said(model.unload)
    assert line.startswith("classifier keep what was trained: PEFT's unload takes out only the factors.")
    assert not torch.equal(plain.classifier.weight, before.weight)
    for config, left in ((PCConfig, ["the biases ('all')"]), (LoraConfig, [])):
        model = get_peft_model(Small(), config(r=2, target_modules=["a", "b"], bias="all"))
        assert [each.split(" keep")[0] for each in said(model.unload)[1]] == left
    _, model = small()
    assert said(copy.deepcopy(model).unload)[1] == said(copy.deepcopy(model).merge_and_unload)[1] == []


@pytest.mark.parametrize("config", [PCConfig, LoraConfig])
def test_a_merged_window_is_not_replaced(config):
    base, model = small()
    model.merge_adapter()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"words: the adapter 'default' is merged into its weight, .*unmerge_adapter"):
        get_peft_model(base, config(r=2, target_modules=["a", "b", "words"]))
    assert snapshot(model) == before


def test_a_window_is_not_saved_as_a_stock_lora(tmp_path):
    _, model = small()
    model.peft_config["default"] = LoraConfig(r=2, target_modules=["a", "b", "words"])
    with pytest.raises(ValueError, match=r"words, a, b: the adapter 'default' is a window there, and its config"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
