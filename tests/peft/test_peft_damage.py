"""Folders that are no adapter of a PCConfig, or a damaged one, are refused before a model is touched."""

import pytest
from peft import LoraConfig

from ipca.io.adapter_folder import SIDECAR
from ipca.peft import PCConfig
from tests.helpers.peft_cases import saved, wrap
from tests.helpers.peft_models import Small

WEIGHTS = "adapter_model.safetensors"


def truncate(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-64])


def other_weights(folder):
    wrap(Small(), LoraConfig(r=6, target_modules=["a", "b"])).save_pretrained(folder / "other")
    (folder / WEIGHTS).write_bytes((folder / "other" / WEIGHTS).read_bytes())


def odd_rank(folder):
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace('"r": 6', '"r": 5'))


DAMAGE = {
    "truncated weights": (truncate, "is damaged or truncated"),
    "weights of another adapter": (other_weights, f"is not the file that {SIDECAR} was written with"),
    "no sidecar": (lambda folder: (folder / SIDECAR).unlink(), f"has no {SIDECAR}: it is no adapter of a PCConfig"),
    "damaged sidecar": (lambda folder: (folder / SIDECAR).write_text("{"), f"{SIDECAR} is damaged"),
    "sidecar of something else": (lambda folder: (folder / SIDECAR).write_text("[]"), f"{SIDECAR} is damaged"),
    "no configuration": (lambda folder: (folder / "adapter_config.json").unlink(), r"has no adapter_config\.json"),
    "odd rank": (odd_rank, r"a LoRA of even rank; got r=5\."),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_refused(name, tmp_path):
    saved(tmp_path)
    damage, words = DAMAGE[name]
    damage(tmp_path)
    with pytest.raises(ValueError, match=words):
        PCConfig.from_pretrained(tmp_path)


def test_a_file_is_no_folder(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is a file, but an adapter is a folder"):
        PCConfig.from_pretrained(tmp_path / WEIGHTS)
