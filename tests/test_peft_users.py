"""docs/peft-users.md names every field of LoraConfig and CordaConfig, and tells what PCConfig does with each."""

import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

pytest.importorskip("peft")
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig

from ipca.peft import PCConfig
from tests.helpers.markdown import sections

SECTIONS = sections((Path(__file__).resolve().parents[1] / "docs" / "peft-users.md").read_text(encoding="utf-8"))
ROWS = re.findall(r"^\| (`.+`) \| (same|differs|refused) \|", SECTIONS["Fields of LoraConfig"], flags=re.MULTILINE)
VERDICT = {name: verdict for names, verdict in ROWS for name in re.findall(r"\w+", names)}
STARTS = re.findall(
    r'"(\w+)"', " ".join(re.findall(r"^\| ([^|]*) \|", SECTIONS["Initializations"], flags=re.MULTILINE))
)


def default(config, name):
    (found,) = [field for field in fields(config) if field.name == name]
    return found.default_factory() if found.default is MISSING else found.default


def names(verdict):
    return [name for name, each in VERDICT.items() if each == verdict]


def test_every_field_has_a_row():
    assert {field.name for field in fields(LoraConfig)} - set(VERDICT) == set()
    assert set(VERDICT.values()) == {"same", "differs", "refused"}
    assert set(STARTS) >= {"pissa", "corda", "eva", "olora", "loftq"}


def test_every_field_of_corda_has_a_row():
    rows = re.findall(r"^\| `(\w+)` \|", SECTIONS["Fields of CordaConfig"], flags=re.MULTILINE)
    assert {field.name for field in fields(CordaConfig)} - set(rows) == set()


@pytest.mark.parametrize("name", names("refused"))
def test_a_refused_field_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"PCConfig does not support {name}"):
        PCConfig(**{name: True})


@pytest.mark.parametrize("name", names("same"))
def test_a_field_that_is_the_same_has_the_same_default_and_is_kept(name):
    assert default(PCConfig, name) == default(LoraConfig, name)
    assert getattr(PCConfig(), name) == getattr(LoraConfig(), name)


def test_what_the_page_tells_of_the_fields_that_differ():
    config = PCConfig(rank_pattern={"q_proj": 4})
    assert (config.r, LoraConfig().r) == (16, 8)
    assert (config.lora_alpha, config.alpha_pattern) == (16, {"q_proj": 4})
    assert PCConfig(rank_pattern={"q_proj": 4}, lora_alpha=32).alpha_pattern == {}
    assert PCConfig(use_rslora=True).lora_alpha == 4.0


@pytest.mark.parametrize("text", STARTS)
def test_an_initialization_of_peft_is_refused_with_the_way_out(text):
    with pytest.raises(ValueError, match=r"is not a window; leave it out and pass window=…"):
        PCConfig(init_lora_weights=text)
