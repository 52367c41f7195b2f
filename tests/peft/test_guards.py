"""PEFT's functions that go past its layers: refused unless they get all four factors of a window; and warnings."""

import copy
import warnings

import pytest
import torch
import transformers
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn

import ipca
from ipca.peft import PCConfig, prepare, save_gathered
from tests.helpers.models import snapshot
from tests.helpers.peft_cases import off, randomize, train, wrap
from tests.helpers.peft_models import CASES, Small, ids, llama


def test_a_saved_window_is_swapped_into_a_window(tmp_path):
    base, x = Small(), ids()
    model, other = wrap(base), wrap(base, window="minor", lora_alpha=7)
    train(other, x)
    other.save_pretrained(tmp_path)
    train(model, x)
    for _ in range(2):
        hotswap_adapter(model, tmp_path, "default", torch_device="cpu")
        assert off(model(x), other(x)) < 1e-6
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))


def test_saved_windows_are_swapped_in_stock_peft(tmp_path):
    base, x = Small(), ids()
    for window in ("minor", "principal"):
        model = wrap(base, window=window)
        train(model, x)
        model.save_pretrained(tmp_path / window)
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "minor")
    hotswap_adapter(stock, tmp_path / "principal", "default", torch_device="cpu")
    assert off(stock(x), model(x)) < 1e-6


@pytest.mark.parametrize("options", [{"r": 3}, {"r": 2}, {"r": 8, "target_modules": ["a"]}], ids=str)
def test_what_would_leave_a_start_behind_is_not_swapped_in(options, tmp_path):
    base, x = Small(), ids()
    plain = wrap(base, LoraConfig(**{"target_modules": ["a", "b"], **options}))
    randomize(plain)
    plain.save_pretrained(tmp_path)
    model = wrap(base)
    train(model, x)
    y = model(x)
    with pytest.raises(ValueError, match=r"model\.[ab]: the adapter 'default' trains a window of rank 3, into which"):
        hotswap_adapter(model, tmp_path, "default", torch_device="cpu")
    assert torch.equal(model(x), y)


def test_a_window_that_was_swapped_in_is_not_saved_as_the_first_one(tmp_path):
    base, x = Small(), ids()
    model, other = wrap(base, window="principal"), wrap(base, window="minor")
    train(other, x)
    other.save_pretrained(tmp_path / "minor")
    hotswap_adapter(model, tmp_path / "minor", "default", torch_device="cpu")
    with pytest.raises(ValueError, match=r"the factors of a, b were hot-swapped, so that 'default' is no window any"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["llama", "embedding", "experts", "conv2d"])
def test_the_state_of_another_window_is_not_saved_as_this_one(name, tmp_path):
    case = CASES[name]
    base = case.build()
    first, other, same = (
        get_peft_model(copy.deepcopy(base), PCConfig(r=2, window=window, **case.options))
        for window in ("principal", "minor", "principal")
    )
    state = get_peft_model_state_dict(first)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        set_peft_model_state_dict(same, state)
    other.save_pretrained(tmp_path)
    assert (tmp_path / "ipca.json").exists()
    with pytest.warns(RuntimeWarning, match=r"starts from another window, or from that of another base, than the PCCo"):
        set_peft_model_state_dict(other, state)
    x = case.x()
    with torch.no_grad():
        assert all(map(torch.equal, tensors(other(x)), tensors(same(x))))
    with pytest.warns(RuntimeWarning, match=r"saved as a stock LoRA, without ipca\.json.*; ipca\.import_peft finds"):
        other.save_pretrained(tmp_path)
    assert not (tmp_path / "ipca.json").exists()
    assert ipca.peft.summary(other).layers == 0
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    with torch.no_grad():
        assert all(off(one, two) < 1e-5 for one, two in zip(tensors(stock(x)), tensors(same(x)), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        set_peft_model_state_dict(other, get_peft_model_state_dict(same))  # which it starts from now
    with pytest.warns(RuntimeWarning, match=r"saved as a stock LoRA, without ipca\.json"):
        other.save_pretrained(tmp_path)


def tensors(output):
    return [output] if isinstance(output, torch.Tensor) else [output.logits]


def test_a_pickle_of_weights_is_resumed_on_its_base_only(tmp_path):
    base, x = Small(), ids()
    model = wrap(base)
    train(model, x)
    model.save_pretrained(tmp_path, safe_serialization=False)
    resumed = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert off(resumed(x), model(x)) < 1e-6
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.a.weight.add_(0.1)
    with pytest.raises(ValueError, match=r"a: this is not the base weight the adapter was made on"):
        PeftModel.from_pretrained(other, tmp_path, is_trainable=True)


def test_a_pickle_of_weights_is_not_written_beside_what_is_loaded_instead(tmp_path):
    model = wrap(Small())
    train(model, ids())
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        ValueError, match=r"holds adapter_model\.safetensors, which PEFT would load in place of the file"
    ):
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_factors_without_their_start_are_not_computed_with():
    model = wrap(Small())
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    with pytest.raises(RuntimeError, match=r"^a: the adapter 'default' cannot be computed: its factors were replaced"):
        model(ids())


@pytest.mark.parametrize(
    "options", [{"hotswap": True, "adapter_name": "default"}, {"peft_config": PCConfig(r=3, target_modules=["q_proj"])}]
)
def test_transformers_loader_does_not_leave_a_start_behind(options, tmp_path):
    base, x = llama().eval(), ids()
    plain = wrap(base, LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    plain.save_pretrained(tmp_path)
    if "hotswap" in options:
        base.add_adapter(PCConfig(r=3, target_modules=["q_proj"]))
    base.load_adapter(str(tmp_path), **options)
    with pytest.raises(
        RuntimeError, match=r"q_proj: the adapter 'default' cannot be computed: transformers' load_adapter"
    ):
        base(x)


def test_transformers_loads_a_second_adapter_beside_a_window(tmp_path):
    base, x = llama().eval(), ids()
    plain = wrap(base, LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False)).eval()
    plain.save_pretrained(tmp_path)
    base.add_adapter(PCConfig(r=3, target_modules=["q_proj"]))
    train(base, x)
    y = base(x).logits
    base.load_adapter(str(tmp_path), "plain")
    base.set_adapter("plain")
    assert off(base(x).logits, plain(x).logits) < 1e-6
    base.set_adapter("default")
    assert torch.equal(base(x).logits, y)


@pytest.mark.parametrize("name", ["embedding", "experts", "llama"])
def test_empty_factors_are_not_computed_with(name):
    case = CASES[name]
    model = get_peft_model(case.build(), PCConfig(r=2, **case.options), low_cpu_mem_usage=True)
    with pytest.raises(
        RuntimeError, match="'default' cannot be computed: it was made with low_cpu_mem_usage; load its file"
    ):
        model(case.x())


@pytest.mark.parametrize("order", [["default", "plain"], ["plain", "default"]])
def test_a_window_is_not_combined_with_others(order):
    model = wrap(Small())
    model.add_adapter("plain", LoraConfig(r=3, target_modules=["a", "b"]))
    with pytest.raises(
        ValueError, match="'default' trains a window, and add_weighted_adapter would combine the trained"
    ):
        model.add_weighted_adapter(order, [1.0, 1.0], "both", combination_type="cat")
    assert set(model.peft_config) == {"default", "plain"}


def test_plain_adapters_beside_a_window_combine_as_ever():
    base, x = Small(), ids()
    model = wrap(base)
    for name in ("one", "two"):
        model.add_adapter(name, LoraConfig(r=3, target_modules=["a", "b"]))
    randomize(model)
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "both", combination_type="cat")
    model.set_adapter("both")
    y = model(x)
    model.base_model.set_adapter(["one", "two"])
    assert off(y, model(x)) < 1e-5


def test_add_weighted_adapter():
    model = wrap(Small())
    model.add_adapter("minor", PCConfig(r=3, window="minor", target_modules=["a", "b"]))
    train(model, ids())
    with pytest.raises(ValueError, match="'default' trains a window, and add_weighted_adapter would combine"):
        model.add_weighted_adapter(["default", "minor"], [1.0, 1.0], "both")
    assert set(model.peft_config) == {"default", "minor"}


def test_a_key_of_window_pattern_that_matches_nothing_gives_a_warning():
    windows = {"q_prj": "minor", "v_proj": 0.25, r"layers\.0\.self_attn\.v_proj": "minor"}
    with pytest.warns(RuntimeWarning, match=r"window_pattern keys did not match .* were ignored: \['q_prj'\]\.$"):
        wrap(llama(), target_modules=["q_proj", "v_proj"], window_pattern=windows)


def test_names_that_are_near_are_said():
    with pytest.warns(RuntimeWarning, match=r"window_pattern keys .* \(Did you mean 'q_proj'.*\?\) and were ignored"):
        wrap(llama(), target_modules=["q_proj", "v_proj"], window_pattern={"q_prj": "minor"})
    with pytest.warns(RuntimeWarning, match=r"target_modules .* \(Did you mean 'v_proj'.*\?\) .*: \['v_prj'\]"):
        wrap(llama(), target_modules=["q_proj", "v_prj"])
    for targets in (["q_prj"], "q_prj", r".*\.q_prj"):
        model = llama()
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"Did you mean '(self_attn\.)?q_proj'"):
            wrap(model, target_modules=targets)
        assert snapshot(model) == before
    with pytest.raises(ValueError, match="give 'q_proj' and 'v_proj' as separate ones"):
        wrap(llama(), target_modules="q_proj,v_proj")
    with pytest.raises(ValueError, match=r"Did you mean 'q_proj'"):
        prepare(llama(), PCConfig(r=2, target_modules=["q_prj"]), progress=False)


def test_a_key_that_matches_a_parameter_gives_no_warning():
    case = CASES["matrix"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        wrap(case.build(), PCConfig(r=2, window_pattern={"inner.weight": "minor", "first": 0.25}, **case.options))


def tree(model):
    return [(name, type(module)) for name, module in model.named_modules()]


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.ModuleDict({"attn": nn.Linear(20, 20), "mlp": nn.Linear(20, 20)})

    def forward(self, x):
        return self.block["mlp"](torch.tanh(self.block["attn"](x)))


@pytest.mark.parametrize("name", ["mlp", "block", "model", "weight"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
def test_an_adapter_named_like_a_part_of_the_model_is_refused(name, first):
    names = [name, "other"] if first else ["other", name]
    model = get_peft_model(Named(), PCConfig(r=4, target_modules=["attn", "mlp"]), adapter_name=names[0])
    before, state = tree(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"the adapter '{name}' has the name of a part of the model.*another name"):
        model.add_adapter(names[1], PCConfig(r=4, window="minor", target_modules=["attn"]))
    assert tree(model) == before
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert list(model.peft_config) == names[:1]


def test_adapters_of_other_names_are_all_saved(tmp_path):
    model = get_peft_model(Named(), PCConfig(r=4, target_modules=["attn", "mlp"]), adapter_name="ml")
    model.add_adapter("att", PCConfig(r=4, window="minor", target_modules=["attn"]))
    randomize(model)
    for name in ("ml", "att"):
        model.save_pretrained(tmp_path, selected_adapters=[name])
        assert len(PCConfig.from_pretrained(tmp_path / name).records.initial) == (2 if name == "ml" else 1)


@pytest.mark.parametrize("merged", [["first"], ["second"]], ids=str)
def test_merging_some_of_the_active_adapters_is_refused(merged):
    model = get_peft_model(Named(), PCConfig(r=4, target_modules=["attn"]), adapter_name="first")
    model.add_adapter("second", PCConfig(r=4, window="minor", target_modules=["attn"]))
    model.base_model.set_adapter(["first", "second"])
    randomize(model)
    x = torch.randn(3, 20)
    right, state = model(x), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"attn: '(first|second)' is active too, .* merge all of \['first'"):
        model.merge_adapter(adapter_names=merged)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    model.merge_adapter(adapter_names=["first", "second"])
    assert off(model(x), right) < 1e-5
    model.unmerge_adapter()
    model.base_model.set_adapter(merged)
    right = model(x)
    model.merge_adapter(adapter_names=merged)
    assert off(model(x), right) < 1e-5


def trains(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}], ids=["plain", "low_cpu_mem_usage"])
def test_a_trainable_window_trains_on_as_one(options, tmp_path):
    base, x = Small(), ids()
    model = wrap(base, lora_alpha=5)
    train(model, x)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path), is_trainable=True, **options)
    assert torch.equal(again(x), model(x))
    assert trains(again) == trains(model)
    assert isinstance(again.peft_config["default"], PCConfig)
    plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)  # for inference it is a stock LoRA
    assert type(plain.peft_config["default"]) is LoraConfig


@pytest.mark.parametrize("first", [PCConfig, LoraConfig], ids=["window", "stock"])
def test_a_trainable_window_is_loaded_beside_another_adapter(first, tmp_path):
    base, x = Small(), ids()
    model = wrap(base)
    train(model, x)
    model.save_pretrained(tmp_path)
    config = first(r=2, target_modules=["a", "b"])
    again = get_peft_model(copy.deepcopy(base), config, adapter_name="first")
    again.load_adapter(tmp_path, "again", is_trainable=True)
    again.set_adapter("again")
    assert torch.equal(again(x), model(x))
    sizes = [p.numel() for p in again.parameters() if p.requires_grad]
    assert sorted(sizes) == sorted(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_native_adapter_trains_on_in_peft(tmp_path):
    base, x = Small(), ids()
    native = ipca.apply_pc(copy.deepcopy(base), rank=3, progress=False)
    ipca.save_adapter(native, tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    assert isinstance(again.peft_config["default"], PCConfig)
    assert off(again(x), native(x)) < 1e-6


def test_a_stock_adapter_trains_on_as_a_stock_one(tmp_path):
    base = Small()
    wrap(base, LoraConfig(r=2, target_modules=["a"])).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert type(again.peft_config["default"]) is LoraConfig


def mobilebert():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    narrow = {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16}
    torch.manual_seed(0)
    return transformers.MobileBertForMaskedLM(transformers.MobileBertConfig(vocab_size=97, **sizes, **narrow)).eval()


BYPASSED = r"cls\.predictions\.dense: the model reads the weight and does not call the layer"


def test_a_layer_that_the_model_does_not_call_is_named_at_once_and_when_it_is_saved(tmp_path):
    with pytest.warns(RuntimeWarning, match=BYPASSED) as said:
        model = get_peft_model(mobilebert(), PCConfig(r=2, target_modules=["predictions.dense", "query"]))
    assert [each.category for each in said].count(RuntimeWarning) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model.save_pretrained(tmp_path / "before")  # the model has not run
    model(input_ids=ids())
    with pytest.warns(RuntimeWarning, match=BYPASSED + ".* merging adds it; exclude it in exclude_modules"):
        model.save_pretrained(tmp_path)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.warns(RuntimeWarning, match=BYPASSED):
            merge()


def test_the_second_model_of_a_configuration_is_warned_of_as_the_first_one():
    config = PCConfig(r=2, target_modules=["predictions.dense", "query"], progress=False)
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match=BYPASSED):
            get_peft_model(mobilebert(), config)
    config, base = PCConfig(r=2, target_modules=["a", "b"], progress=False), Small()
    wrap(base, config)
    nn.init.zeros_(base.b.weight)
    with pytest.warns(UserWarning, match="components that are 0 in the window: 2 of 2 of b"):
        wrap(base, config)


def test_a_layer_that_the_model_does_not_call_is_named_when_it_is_loaded(tmp_path):
    native = ipca.apply_pc(mobilebert(), rank=2, targets=["predictions.dense"], progress=False)
    with torch.no_grad():
        for parameter in ipca.adapter_parameters(native):
            parameter.add_(0.1 * torch.randn_like(parameter))
    native(input_ids=ids())
    with pytest.warns(RuntimeWarning, match=BYPASSED):
        ipca.save_adapter(native, tmp_path)
    with pytest.warns(RuntimeWarning, match=BYPASSED):
        PCConfig.from_pretrained(tmp_path)


def test_layers_whose_weight_is_read_for_its_dtype_are_not_named(tmp_path):
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 4, "num_layers": 1, "vocab_size": 37}
    base = transformers.T5Model(transformers.T5Config(**sizes, decoder_start_token_id=0))
    model = get_peft_model(base, PCConfig(r=2, target_modules=["wo", "q"]))
    model(input_ids=ids(), decoder_input_ids=ids())
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model.save_pretrained(tmp_path)


def test_transformers_load_adapter_does_not_train_a_windows_initial_factors(tmp_path):
    base, x = llama(), ids()
    model = wrap(base, PCConfig(r=3, target_modules=["q_proj"]))
    randomize(model)
    model.save_pretrained(tmp_path)
    before = tree(base)
    with pytest.raises(ValueError, match=r"holds a window, .* train on with peft.PeftModel.from_pretrained"):
        base.load_adapter(str(tmp_path), is_trainable=True)
    assert tree(base) == before
    base.load_adapter(str(tmp_path))
    assert off(base(x).logits, model(x).logits) < 1e-5


def test_transformers_that_misreads_experts_does_not_load_them(tmp_path, monkeypatch):
    case = CASES["experts"]
    base = case.build()
    wrap(base, PCConfig(r=2, **case.options)).save_pretrained(tmp_path)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "5.6.1")
    before = tree(base)
    with pytest.raises(ValueError, match=r"experts, which load_adapter of transformers 5\.6\.1 misreads"):
        base.load_adapter(str(tmp_path))
    assert tree(base) == before
    native = ipca.apply_pc(base, rank=2, targets=["experts.down_proj"], progress=False)
    with pytest.warns(RuntimeWarning, match=r"transformers 5\.6\.1 misreads stacks of experts in model.load_adapter"):
        ipca.save_adapter(native, tmp_path / "native")


def test_what_stock_peft_would_read_otherwise_is_refused_before_it_is_written(tmp_path):
    model = wrap(Small(), PCConfig(r=3, target_modules=["a", "b"]))
    model.peft_config["default"].target_modules = {"a"}  # as a program might that shares configurations
    for save in (PeftModel.save_pretrained, save_gathered):
        with pytest.raises(ValueError, match=r"would read another adapter than 'default' .*model\.b\.lora_A"):
            save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
