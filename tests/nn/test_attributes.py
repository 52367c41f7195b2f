"""What a layer has beside its weight and bias: tensors are refused, attributes go with it and come back."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune, spectral_norm, weight_norm

import ipca
from tests.helpers.models import snapshot


def gained(layer):
    layer.gain = nn.Parameter(torch.ones(8))


def masked(layer):
    layer.register_buffer("mask", torch.ones(8))


def nested(layer):
    layer.act = nn.ReLU()


def pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.3)


HOLDERS = {"gain": gained, "mask": masked, "act": nested, "weight_orig": pruned}
HOLDERS |= {"weight_g": weight_norm, "weight_orig, weight_u": spectral_norm}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("build", [lambda: nn.Linear(8, 8), lambda: nn.Conv1d(8, 8, 1)], ids=["linear", "conv"])
@pytest.mark.parametrize(("names", "change"), HOLDERS.items(), ids=HOLDERS)
def test_a_layer_that_holds_more_is_left_out_and_refused_by_name(names, change, build):
    model = nn.Sequential(build(), nn.Linear(8, 8))
    change(model[0])
    before = snapshot(model)
    words = rf"0: it holds {names}.* beside its weight and bias, which would be lost; remove what added it"
    with pytest.raises(ValueError, match=words):
        ipca.apply_pc(model, rank=2, targets=["0"], progress=False)
    assert snapshot(model) == before
    if type(model[0]) is nn.Linear:
        with pytest.warns(UserWarning, match=f"leaves out {words}"):
            ipca.apply_pc(model, rank=2, progress=False)
        assert type(model[0]) is nn.Linear


def test_a_pruned_layer_is_adapted_where_the_pruning_is_permanent():
    model = nn.Sequential(nn.Linear(8, 8))
    pruned(model[0])
    prune.remove(model[0], "weight")
    x = torch.randn(3, 8)
    y = model(x)
    assert torch.equal(ipca.apply_pc(model, rank=2, progress=False)(x), y)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_experts = 4
        self.w = nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x, i):
        return x @ self.w[i].T


class Reader(nn.Module):
    """Reads attributes of its layers in its forward."""

    def __init__(self):
        super().__init__()
        self.experts, self.table = Experts(), nn.Embedding(16, 8)
        self.fc, self.conv = nn.Linear(8, 8), nn.Conv1d(8, 8, 1)
        self.fc.heads, self.conv.axis, self.table.scale = 2, (1, 2), 3.0

    def forward(self, ids):
        t = self.table
        x = F.embedding(ids, t.weight, t.padding_idx, t.max_norm, t.norm_type, t.scale_grad_by_freq, t.sparse)
        x = self.fc(x * t.scale).unflatten(-1, (self.fc.heads, -1)).flatten(-2)
        x = self.conv(x.transpose(*self.conv.axis)).transpose(*self.conv.axis)
        return sum(self.experts(x, i) for i in range(self.experts.num_experts))


@pytest.mark.parametrize("form", ["intact", "residual"])
def test_attributes_of_a_plain_layer_are_those_of_the_adapted_one_and_come_back(form):
    base, ids = Reader(), torch.randint(16, (2, 5))
    model = copy.deepcopy(base)
    ipca.apply_pc(model, rank=2, targets=["experts.w", "table", "fc", "conv"], form=form, progress=False)
    tight = {"rtol": 1e-4, "atol": 1e-3}
    torch.testing.assert_close(model(ids), base(ids), **tight)
    model.fc.heads = 4  # where the user sets it now
    plain = ipca.unload(copy.deepcopy(model))
    assert (plain.fc.heads, plain.conv.axis, plain.table.scale) == (4, (1, 2), 3.0)
    torch.testing.assert_close(plain(ids), base(ids), **tight)
    assert {name: type(module) for name, module in plain.named_modules()} == {
        name: type(module) for name, module in base.named_modules()
    }


def test_attributes_never_hide_those_of_the_adapted_layer():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].rank, model[0].window, model[0].note = 7, "mine", "kept"
    ipca.apply_pc(model, rank=2, progress=False)
    assert (model[0].rank, model[0].window.rank, model[0].note) == (2, 2, "kept")
    ipca.unload(model)
    assert model[0].note == "kept"
    assert not hasattr(model[0], "form")


def test_a_weight_that_is_pruned_while_adapted_is_named(tmp_path):
    model = ipca.apply_pc(nn.Sequential(nn.Linear(8, 8)), rank=2, progress=False)
    prune.random_unstructured(model[0], "base_weight", 0.3)
    with pytest.raises(ValueError, match="0: its base_weight is computed from other parameters, as by"):
        ipca.save_adapter(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
