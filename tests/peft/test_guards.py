"""PEFT's functions that go past its layers: refused unless they get all four factors of a window; and warnings."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

from ipca.peft import PCConfig
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


def test_a_key_that_matches_a_parameter_gives_no_warning():
    case = CASES["matrix"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        wrap(case.build(), PCConfig(r=2, window_pattern={"inner.weight": "minor", "first": 0.25}, **case.options))
