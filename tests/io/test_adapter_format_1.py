"""Adapters of format 1, written before the first release: they load, save and train on as they were.

``tests/data/adapter_format_1`` holds a base and one adapter for each of ``residual``, ``intact`` and PEFT's PCConfig:
rank 3, the window "0.5", alpha 6, three steps of SGD from the start.
"""

import copy
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ipca
from ipca.model.apply import adapted_layers
from ipca.peft import PCConfig

DATA = Path(__file__).parents[1] / "data" / "adapter_format_1"
WEIGHTS, PREFIX, RANK = "adapter_model.safetensors", "base_model.model.", 3
NAMES = ("residual", "intact", "peft")
KEYS = {
    "embed": "embed.lora_embedding_{}",
    "conv": "conv.lora_{}.weight",
    "linear": "linear.lora_{}.weight",
    "experts.down_proj": "experts.lora_{}.weight",
}


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.down_proj = nn.Parameter(torch.empty(2, 8, 12))

    def forward(self, x):
        return sum(x @ w.mT for w in self.down_proj)


class Model(nn.Module):
    """One layer of each kind that an adapter can hold, and a head that is fully trained."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 10)
        self.conv = nn.Conv1d(10, 12, 3, padding=1)
        self.linear = nn.Linear(12, 12)
        self.experts = Experts()
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        x = self.conv(self.embed(ids).mT).mT
        return self.head(self.experts(self.linear(x.relu())))


def base() -> Model:
    model = Model()
    model.load_state_dict(load_file(DATA / "base.safetensors"))
    return model


def train(model: nn.Module, steps: int = 2, seed: int = 2) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        ids = torch.randint(0, 20, (4, 6), generator=generator)
        optimizer.zero_grad()
        model(ids).square().mean().backward()
        optimizer.step()
    return model


def with_peft(folder: Path) -> nn.Module:
    config = PCConfig.from_pretrained(str(folder))
    return peft.PeftModel.from_pretrained(base(), folder, config=config, is_trainable=True)


def halves(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``A, A0, B, B0`` of a layer as matrices or stacks, cut out of the file's tensors by their definition."""
    A, B = (tensors[PREFIX + KEYS[name].format(part)].flatten(1) for part in "AB")
    if name == "experts.down_proj":  # lora_A holds one expert after the other; in lora_B the expert is the last index
        A, B = A.view(2, 2 * RANK, -1), B.view(-1, 2 * RANK, 2).permute(2, 0, 1)
    return {"lora_A": A[..., :RANK, :], "lora_A0": A[..., RANK:, :], "lora_B": B[..., :RANK], "lora_B0": -B[..., RANK:]}


@pytest.mark.parametrize("name", NAMES)
def test_every_factor_is_the_files_to_the_bit(name):
    model, tensors = ipca.load_adapter(base(), DATA / name), load_file(DATA / name / WEIGHTS)
    layers = adapted_layers(model)
    assert list(layers) == list(KEYS)
    assert {layer.form for layer in layers.values()} == {"intact" if name == "peft" else name}
    for path, layer in layers.items():
        assert (layer.rank, layer.alpha) == (RANK, 6.0)
        for factor, wanted in halves(path, tensors).items():
            assert torch.equal(getattr(layer, factor), wanted), (path, factor)
    for key in ("weight", "bias"):
        assert torch.equal(getattr(model.head, key), tensors[f"{PREFIX}head.{key}"])


@pytest.mark.parametrize("name", NAMES)
def test_saved_again_it_has_the_same_bytes(name, tmp_path):
    ipca.save_adapter(ipca.load_adapter(base(), DATA / name), tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == (DATA / name / WEIGHTS).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_as_if_it_had_not_been_saved(name, tmp_path):
    model = ipca.load_adapter(base(), DATA / name)
    kept = copy.deepcopy(model)
    ipca.save_adapter(model, tmp_path)
    resumed = ipca.load_adapter(base(), tmp_path)
    wanted = train(kept).state_dict()
    for found in (train(model), train(resumed)):
        state = found.state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(value, wanted[key]) for key, value in state.items())
    assert not torch.equal(resumed.linear.lora_A, halves("linear", load_file(DATA / name / WEIGHTS))["lora_A"])


def test_peft_loads_its_own_to_the_bit_and_saves_the_same_bytes(tmp_path):
    model = with_peft(DATA / "peft")
    native = ipca.load_adapter(base(), DATA / "peft")
    ids = torch.arange(20).view(4, 5)
    torch.testing.assert_close(model(ids), native(ids))
    model.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == (DATA / "peft" / WEIGHTS).read_bytes()


def test_peft_trains_its_own_on_as_if_it_had_not_been_saved(tmp_path):
    model = with_peft(DATA / "peft")
    model.save_pretrained(tmp_path / "again")
    for number, found in enumerate((train(model), train(with_peft(tmp_path / "again")))):
        found.save_pretrained(tmp_path / str(number))
    first, second = (load_file(tmp_path / number / WEIGHTS) for number in "01")
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    before = load_file(DATA / "peft" / WEIGHTS)
    assert any(not torch.equal(value, before[key]) for key, value in first.items())
