"""Fields of a PCConfig: what it fills in, and errors that name the field, before the model has changed."""

import copy
import json
from dataclasses import fields

import peft
import pytest
from peft import LoraConfig, get_peft_model, inject_adapter_in_model

from ipca import Window
from ipca.model import AdapterSettings
from ipca.peft import PCConfig
from ipca.peft.config import _REFUSED
from tests.helpers.models import snapshot
from tests.helpers.peft_cases import off, randomize
from tests.helpers.peft_models import Small, ids

GIVEN = {
    "velora_config": peft.tuners.lora.config.VeloraConfig,
    "monteclora_config": peft.tuners.lora.config.MontecloraConfig,
    "arrow_config": lambda: peft.tuners.lora.config.ArrowConfig(),
    "kasa_config": peft.tuners.lora.config.KasaConfig,
    "layer_replication": lambda: [(0, 2)],
    "alora_invocation_tokens": lambda: [1, 2],
    "megatron_config": lambda: {"x": 1},
    "loftq_config": lambda: {"loftq_bits": 4},
}


@pytest.mark.parametrize("name", _REFUSED)
def test_variants_of_lora(name):
    value = GIVEN.get(name, lambda: True)()
    with pytest.raises(ValueError, match=rf"PCConfig does not support {name}; leave it out, or use peft\.LoraConfig\."):
        PCConfig(**{name: value})


def test_every_variant_of_pefts_is_refused_or_ours():
    variants = {f.name for f in fields(LoraConfig) if f.metadata.get("is_lora_variant")}
    assert variants <= set(_REFUSED)


@pytest.mark.parametrize("value", ["pissa", "gaussian", "olora", "pissa_niter_4", "eva", "mica", "orthogonal"])
def test_other_initializations(value):
    with pytest.raises(ValueError, match=rf"init_lora_weights='{value}' is not a window; leave it out and pass"):
        PCConfig(init_lora_weights=value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": "center"}, "Unknown window 'center'"),
        ({"window": 1.5}, r"must lie in \[0, 1\]"),
        ({"window": Window(3, 4), "r": 5}, "has rank 4, but r=5 was given too"),
        (
            {"window_pattern": {"a": Window(5, 8)}},
            r"^window_pattern\['a'\] is .*=8\), .* rank_pattern\['a'\] or r, ",
        ),
        ({"window_pattern": {"a": "center"}}, r"^window_pattern\['a'\]: Unknown window 'center'"),
        ({"r": 0}, "^r must be at least 1, got 0"),
        ({"rank_pattern": {"a": 0}}, r"^rank_pattern\['a'\] must be at least 1, got 0"),
        ({"lora_alpha": -1}, "^lora_alpha must be positive, got -1"),
        ({"alpha_pattern": {"a": 0}}, r"^alpha_pattern\['a'\] must be positive, got 0"),
        ({"lora_dropout": 1.0}, r"^lora_dropout must lie in \[0, 1\), got 1\.0"),
        ({"tol": "fastest"}, "tol"),
    ],
    ids=str,
)
def test_values_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        PCConfig(**options)


@pytest.mark.parametrize("options", [{"r": 2.0}, {"rank_pattern": {"a": "2"}}, {"lora_alpha": "8"}], ids=str)
def test_values_of_a_wrong_type(options):
    (name,) = options
    with pytest.raises(TypeError, match=rf"^{name}.* must be (an int|a number), got"):
        PCConfig(**options)


def test_a_window_brings_its_rank():
    config = PCConfig(window=Window(3, 4))
    assert (config.r, config.window, config.lora_alpha) == (4, "start=3", 4)
    assert PCConfig(r=9, use_rslora=True).lora_alpha == 3


def test_a_refusal_names_the_config_alone():
    base = Small()
    before = snapshot(base)
    with pytest.raises(ValueError, match="init_lora_weights"):
        get_peft_model(base, PCConfig(r=3, init_lora_weights="pissa", target_modules=["a"]))
    assert snapshot(base) == before
    assert copy.deepcopy(PCConfig(r=3)).r == 3


@pytest.mark.parametrize("way", [get_peft_model, lambda model, config: inject_adapter_in_model(config, model)])
def test_settings_of_apply_pc_are_no_configuration_of_peft(way):
    with pytest.raises(AttributeError, match=r"; for PEFT use an ipca\.peft\.PCConfig\.$"):
        way(Small(), AdapterSettings(targets=["a"]))
    with pytest.raises(AttributeError, match=r"AdapterSettings has no attribute 'rnk'\.$"):
        AdapterSettings().rnk  # noqa: B018


@pytest.mark.parametrize("options", [{}, {"rank_pattern": {"b": 5}, "use_rslora": True}, {"lora_alpha": 7}], ids=str)
def test_a_lora_config_takes_the_dictionary_and_computes_the_same(options):
    base, x = Small(), ids()
    model = get_peft_model(copy.deepcopy(base), PCConfig(r=3, target_modules=["a", "b"], **options))
    randomize(model)
    config = LoraConfig(**model.peft_config["default"].to_dict())
    assert config.r == 6
    other = get_peft_model(base, config)
    peft.set_peft_model_state_dict(other, peft.get_peft_model_state_dict(model))
    assert off(other(x), model(x)) < 1e-5


def test_files_hold_no_default_of_a_field_that_old_versions_of_peft_refuse(tmp_path):
    old = {
        "peft_type",
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "bias",
    }
    old |= {"target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora", "modules_to_save", "bias"}
    old |= {"init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"}
    plain, more = {"target_modules": ["a"]}, {"target_modules": ["a", "b"], "exclude_modules": ["b"]}
    for options, beyond in ((plain, set()), (more, {"exclude_modules"})):
        get_peft_model(Small(), PCConfig(r=3, **options)).save_pretrained(tmp_path)
        written = json.loads((tmp_path / "adapter_config.json").read_text())
        assert set(written) - old == beyond
        assert LoraConfig.from_pretrained(tmp_path).r == 6
