import pytest
from peft import LoraConfig, get_peft_model

import ipca
from ipca.peft import PCConfig, summary
from tests.helpers.peft_models import Small


def test_it_says_of_a_window_what_the_native_summary_says():
    options = {"window": "minor", "targets": ["a", "b"]}
    native = ipca.summary(ipca.apply_pc(Small(), rank=3, form="intact", progress=False, **options))
    model = get_peft_model(Small(), PCConfig(r=3, window="minor", target_modules=["a", "b"]))
    found = summary(model)
    assert (found.windows, found.layers, found.trainable) == (native.windows, 2, native.trainable)
    assert found.uncertified == native.uncertified
    assert "2 layers adapted" in str(found)


def test_another_adapter_is_refused_and_the_native_summary_names_this_one():
    model = get_peft_model(Small(), LoraConfig(target_modules=["a"]))
    with pytest.raises(ValueError, match="'default' is no adapter of a PCConfig"):
        summary(model)
    with pytest.raises(ValueError, match=r"say ipca\.peft\.summary"):
        ipca.summary(model)
    with pytest.raises(TypeError, match="expected a PeftModel, got a Small"):
        summary(Small())
    with pytest.raises(ValueError, match="this PeftModel holds PEFT's layers: use its own save_pretrained"):
        ipca.unload(model)
