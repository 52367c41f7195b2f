"""Fields of a PCConfig: what it fills in, and errors that name the field, before the model has changed."""

import copy
from dataclasses import fields

import peft
import pytest
from peft import LoraConfig, get_peft_model, inject_adapter_in_model

from ipca import Window
from ipca.model import AdapterSettings
from ipca.peft import PCConfig
from ipca.peft.config import _REFUSED
from tests.helpers.models import snapshot
from tests.helpers.peft_models import Small

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
