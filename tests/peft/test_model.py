"""Functions of a whole PeftModel with windows: its summary, and its adapter gathered into a folder."""

import json

import pytest
from peft import LoraConfig, get_peft_model

import ipca
from ipca.io.adapter_folder import SIDECAR
from ipca.peft import PCConfig, save_gathered, summary
from tests.helpers.peft_cases import saved, train, wrap
from tests.helpers.peft_models import Small, llama

WEIGHTS = "adapter_model.safetensors"


def test_it_says_of_a_window_what_the_native_summary_says():
    options = {"window": "minor", "targets": ["a", "b"]}
    native = ipca.summary(ipca.apply_pc(Small(), rank=3, form="intact", progress=False, **options))
    model = get_peft_model(Small(), PCConfig(r=3, window="minor", target_modules=["a", "b"]))
    found = summary(model)
    assert (found.windows, found.layers, found.trainable) == (native.windows, 2, native.trainable)
    assert found.uncertified == native.uncertified
    assert "2 layers adapted" in str(found)


def test_a_summary_reads_no_weight_that_saving_would_warn_of(tmp_path, recwarn):
    model = get_peft_model(Small(), PCConfig(r=3, target_modules=["a", "b"]))
    summary(model)
    model.save_pretrained(tmp_path)
    assert [str(w.message) for w in recwarn if "reads the weight" in str(w.message)] == []


def test_another_adapter_is_refused_and_the_native_summary_names_this_one():
    model = get_peft_model(Small(), LoraConfig(target_modules=["a"]))
    with pytest.raises(ValueError, match="'default' is no adapter of a PCConfig"):
        summary(model)
    with pytest.raises(ValueError, match=r"call ipca\.peft\.summary"):
        ipca.summary(model)
    with pytest.raises(TypeError, match="expected a PeftModel, got a Small"):
        summary(Small())
    with pytest.raises(ValueError, match="this PeftModel holds PEFT's layers: use its own save_pretrained"):
        ipca.unload(model)


def test_gathered_files_are_those_of_save_pretrained(tmp_path):
    _, model, _ = saved(tmp_path / "saved", llama(), target_modules=["q_proj", "down_proj"])
    save_gathered(model, tmp_path / "gathered")
    names = sorted(path.name for path in (tmp_path / "gathered").iterdir())
    assert names == ["adapter_config.json", WEIGHTS, SIDECAR]
    for name in names:
        assert (tmp_path / "gathered" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()
    assert model.peft_config["default"].inference_mode is False


def test_a_save_that_fails_leaves_the_old_files(tmp_path, monkeypatch):
    _, model, x = saved(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    train(model, x)
    monkeypatch.setattr(json, "dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_gathered(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_adapter_is_not_saved(tmp_path):
    model = wrap(Small())
    with pytest.raises(ValueError, match=r"'other' is no adapter of a PCConfig; those are default\."):
        save_gathered(model, tmp_path, "other")
    with pytest.raises(TypeError, match="expected a PeftModel, got a Small; pass the model inside"):
        save_gathered(Small(), tmp_path)
