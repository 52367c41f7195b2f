"""The weights of a checkpoint by layer."""

import pytest
import torch
from safetensors.torch import save_file

import ipca

FILE = "model.safetensors"


def test_a_folder_without_a_checkpoint_is_no_source(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors nor .* the original model"):
        ipca.load_unquantized_weights(tmp_path)


def test_a_checkpoint_is_a_mapping_by_layer(tmp_path):
    save_file({"m.a.weight": torch.ones(2), "n.a.weight": torch.ones(2), "b.weight": torch.ones(3)}, tmp_path / FILE)
    weights = ipca.load_unquantized_weights(tmp_path)
    assert "b" in weights
    assert "x.b" in weights  # the checkpoint of an inner model
    assert "a" not in weights  # which of two?
    assert "c" not in weights
    assert set(weights) == {"m.a", "n.a", "b"}
    assert len(weights) == 3
    assert torch.equal(weights["b"], torch.ones(3))
    with pytest.raises(KeyError, match=r"no tensor that is a\.weight alone"):
        weights["a"]
