"""PEFT's tests of custom models, as PEFT ships them, with PCConfig in the place of LoraConfig."""

import inspect
import itertools
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from peft import LoraConfig

from ipca.peft import PCConfig
from tests.helpers import peft_suite

if peft_suite.source() is None:
    pytest.skip(peft_suite.MISSING, allow_module_level=True)

_FOLDER = Path(tempfile.mkdtemp(prefix="peft-tests-"))
custom, common, utils = (
    peft_suite.load(name, _FOLDER) for name in ("test_custom_models", "testing_common", "testing_utils")
)
REFUSED = (
    "use_dora",
    "kasa_config",
    "velora_config",
    "lora_bias",
    "monteclora_config",
    "use_bdlora",
    "alora_invocation_tokens",
)
CLASSES = (
    custom.TestPeftCustomModel,
    custom.TestMultipleActiveAdapters,
    custom.TestMixedAdapterBatches,
    custom.TestRequiresGrad,
    custom.TestMultiRankAdapter,
)
ELSEWHERE = {
    "dora": "about a variant that PCConfig refuses",
    "mha": "about nn.MultiheadAttention, which PCConfig refuses",
    "unsupported_layer": "about an unsupported layer",
    "monteclora": "about a variant that PCConfig refuses",
    "add_weighted_adapter": "combines adapters, which PCConfig refuses",
    "lora_opt_timing": "times two runs against each other",
}
COMBINED = "add_weighted_adapter"
OTHER_BASE = "this is not the base weight the adapter was made on"
RAISES = {
    "test_multiple_active_adapters_forward-LoRA Same-lora": COMBINED,
    "test_multiple_active_adapters_forward-LoRA Different-lora": COMBINED,
    "test_loading_model_requires_grad_set_correctly-True": OTHER_BASE,
    "test_loading_model_requires_grad_set_correctly-False": OTHER_BASE,
    "test_loading_model_with_modules_to_save_requires_grad_set_correctly-True": OTHER_BASE,
}
"""What PCConfig refuses in the middle of a test: combining adapters, and resuming on a base of other weights."""


@dataclass
class SmallConfig(PCConfig):
    """A window fits every layer of PEFT's models, the smallest of which has one feature."""

    r: int = 1


def swapped(value):
    """What stands for a parameter of PEFT's test, or None where it is about something PCConfig refuses."""
    if value is LoraConfig:
        return SmallConfig
    if type(value) is LoraConfig:
        plain = LoraConfig()
        given = {f.name: getattr(value, f.name) for f in fields(value)}
        given = {name: known for name, known in given.items() if known != getattr(plain, name)}
        return None if set(given) & set(REFUSED) else SmallConfig(**{**given, "r": 1})
    if isinstance(value, dict) and (set(value) & set(REFUSED) or isinstance(value.get("init_lora_weights"), str)):
        return None
    return value


def about_lora(values):
    return any(value is LoraConfig or type(value) is LoraConfig for value in values)


def combinations(method):
    """Every combination of a test's parameters, by name."""
    marks = [mark.args for mark in getattr(method, "pytestmark", []) if mark.name == "parametrize"]
    for chosen in itertools.product(*(values for _, values in marks)):
        given = {}
        for (names, _), value in zip(marks, chosen, strict=True):
            names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
            given |= dict(zip(names, value if len(names) > 1 else [value], strict=True))
        yield given


def runs():
    """PEFT's tests that are about LoRA itself, on layers that a window fits."""
    for cls in CLASSES:
        for name, method in inspect.getmembers(cls, lambda member: inspect.isfunction(member)):
            if not name.startswith("test_") or any(word in name for word in ELSEWHERE):
                continue
            for given in combinations(method):
                if (given and not about_lora(given.values())) or (not given and "lora" not in name):
                    continue
                values = {key: swapped(value) for key, value in given.items()}
                layers = str(given.get("model_id"))
                if None not in values.values() and "Groups" not in layers and layers != "MHA":
                    label = "-".join(str(value) for value in values.values() if isinstance(value, str | bool))
                    yield pytest.param(cls, name, values, id=f"{name}-{label}")


@pytest.mark.parametrize(("cls", "name", "values"), list(runs()))
def test_of_peft(cls, name, values, request, monkeypatch):
    for module in (custom, common, utils):
        monkeypatch.setattr(module, "LoraConfig", SmallConfig)
    method, given = getattr(cls, name), dict(values)
    for parameter in inspect.signature(method).parameters:
        if parameter != "self" and parameter not in given:
            given[parameter] = request.getfixturevalue(parameter)
    label = request.node.callspec.id
    with pytest.raises(ValueError, match=RAISES[label]) if label in RAISES else nullcontext():
        method(cls(), **given)
