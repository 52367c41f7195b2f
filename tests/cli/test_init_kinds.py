"""``ipca init`` on embeddings, convolutions and experts: the same adapter as from the model in memory."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import ViTConfig, ViTModel

import ipca
from ipca.cli.main import main
from ipca.io.model_folder import load_model
from ipca.model.apply import adapted_layers
from tests.helpers.layer_kinds import STACKS, gpt_oss, mixtral, relative
from tests.helpers.model_folders import contents


def vit() -> ViTModel:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8))


MODELS = {
    "embedding": (mixtral, ["embed_tokens"], True),
    "conv": (vit, ["projection"], True),
    "experts transposed": (gpt_oss, STACKS, True),
    "experts": (mixtral, STACKS, False),  # each expert's matrices are tensors of their own in the checkpoint
}


def init(model: Path, out: Path, targets: list[str], *options: str) -> int:
    return main(["init", str(model), "--rank", "3", "-o", str(out), "--targets", *targets, *options])


@pytest.mark.parametrize("kind", MODELS)
def test_the_adapter_is_the_one_of_the_whole_model(kind, tmp_path, capsys):
    build, targets, streamed = MODELS[kind]
    build().save_pretrained(tmp_path / "model")
    assert init(tmp_path / "model", tmp_path / "out", targets) == 0
    assert ("the whole model was loaded" not in capsys.readouterr().out) == streamed
    model = load_model(tmp_path / "model")
    ipca.apply_pc(model, rank=3, form="intact", targets=targets, progress=False)
    ipca.save_adapter(model, tmp_path / "whole", base_model=str(tmp_path / "model"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("kind", MODELS)
def test_the_residual_base_holds_the_residual_weights(kind, tmp_path):
    build, targets, _ = MODELS[kind]
    build().save_pretrained(tmp_path / "model")
    assert init(tmp_path / "model", tmp_path / "out", targets, "--form", "residual") == 0
    base, residual = load_model(tmp_path / "model"), load_model(tmp_path / "out" / "base")
    ipca.apply_pc(base, rank=3, form="residual", targets=targets, progress=False)
    layers, left = adapted_layers(base), residual.state_dict()
    for name, layer in layers.items():
        stored = left[name if name in left else f"{name}.weight"]
        assert relative(stored, layer.base_weight) <= 1e-6
    factors = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert len(factors) == 2 * len(layers)
    assert all(torch.isfinite(factor).all() for factor in factors.values())
