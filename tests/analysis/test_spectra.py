"""The spectra of plain and adapted models, their table and their records."""

import copy

import pytest
import torch

import ipca
from ipca import analysis
from ipca.nn import dequantize
from tests.helpers.models import Plain
from tests.helpers.quantized_layers import adapt, quantized_model, train


def test_a_plain_model_shows_what_apply_pc_would_choose():
    model = Plain().to(torch.bfloat16)
    found = analysis.spectrum(model, rank=3, window="0.25", targets=("a", "b"), progress=False)
    assert [(layer.name, layer.shape, layer.dtype) for layer in found] == [
        ("a", (12, 20), "bfloat16"),
        ("b", (20, 12), "bfloat16"),
    ]
    for layer in found:
        S = torch.linalg.svdvals(model.get_submodule(layer.name).weight.double())
        torch.testing.assert_close(layer.spectrum, S, rtol=1e-12, atol=0)
        assert layer.window == ipca.Window(2, 3)
        assert layer.trainable == 3 * 32
        record = layer.record()
        assert record["window"] == [2, 5]
        assert record["window_sigma"] == pytest.approx([S[2].item(), S[4].item()], rel=1e-12)
        assert record["window_energy"] == pytest.approx((S[2:5].square().sum() / S.square().sum()).item())
        assert record["energy_before"] == pytest.approx((S[:2].square().sum() / S.square().sum()).item())
        p = S / S.sum()
        assert record["effective_rank"] == layer.effective_rank == int(torch.exp(-(p * p.log()).sum()))
        assert layer.energy.sum().item() == pytest.approx(1)


def test_the_defaults_are_those_of_apply_pc():
    model = torch.nn.Sequential(torch.nn.Linear(40, 50), torch.nn.Linear(50, 60))
    found = analysis.spectrum(model, progress=False)
    ipca.apply_pc(copy.deepcopy(model), progress=False)
    assert [(layer.name, layer.window) for layer in found] == [("0", ipca.Window(12, 16)), ("1", ipca.Window(17, 16))]


@pytest.mark.parametrize("form", ["residual", "intact"])
def test_an_adapted_model_shows_its_own_windows_and_the_pretrained_spectra(form):
    base = Plain()
    plain = analysis.spectrum(base, rank=3, targets=("a", "b"), progress=False)
    model = ipca.apply_pc(copy.deepcopy(base), rank=3, form=form, targets=["a", "b"], progress=False)
    found = analysis.spectrum(train(model), progress=False)
    for layer, other in zip(found, plain, strict=True):
        assert (layer.name, layer.window, layer.form) == (other.name, other.window, form)
        torch.testing.assert_close(layer.spectrum, other.spectrum, rtol=1e-6, atol=0)
    assert found.parameters == plain.parameters
    assert found.totals() == plain.totals()


def test_experts_are_shown_one_by_one():
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Parameter(torch.randn(3, 6, 8))

        def forward(self, x):
            return x @ self.up.mT

    model = torch.nn.Sequential(Experts())
    options = {"rank": 2, "targets": "0.up", "progress": False}
    plain = analysis.spectrum(model, **options)
    found = analysis.spectrum(ipca.apply_pc(model, **options), progress=False)
    assert [layer.name for layer in plain] == ["0.up[0]", "0.up[1]", "0.up[2]"]
    assert found.records() == plain.records()
    assert found.totals()["trainable"] == 3 * 2 * (6 + 8)


def test_a_quantized_model_shows_the_dequantized_weights():
    model, _, _ = quantized_model("torchao-int8")
    S = torch.linalg.svdvals(dequantize(model.a).double())
    (layer, _) = analysis.spectrum(adapt(model), progress=False)
    torch.testing.assert_close(layer.spectrum, S, rtol=1e-12, atol=0)


def test_the_totals_are_those_of_the_adapter():
    model = Plain()
    found = analysis.spectrum(model, rank=2, targets=("a", "head"), progress=False)
    assert len(found) == 2
    trainable = 2 * (12 + 20) + 2 * (5 + 20)
    assert found.totals() == {
        "layers": 2,
        "trainable": trainable,
        "share": trainable / (20 * 12 + 12 + 12 * 20 + 20 + 20 * 5 + 5),
        "file_bytes": 8 * trainable,
        "memory_bytes": 8 * trainable,
        "adamw_bytes": 12 * trainable,
    }


def test_the_table_has_a_line_for_each_layer():
    lines = str(analysis.spectrum(Plain(), rank=3, targets=("a", "b"), progress=False)).splitlines()
    assert lines[0].split() == [
        "layer",
        "shape",
        "σ",
        "max",
        "σ",
        "min",
        "erank",
        "window",
        "its",
        "σ",
        "its",
        "energy",
    ]
    assert [line.split()[:4] for line in lines[1:]] == [["a", "12", "×", "20"], ["b", "20", "×", "12"]]
    assert all("[4, 7)" in line for line in lines[1:])
    assert len({len(line) for line in lines}) == 1


def test_a_zero_weight_has_no_energy():
    model = torch.nn.Sequential(torch.nn.Linear(5, 4))
    torch.nn.init.zeros_(model[0].weight)
    (layer,) = analysis.spectrum(model, rank=2, targets="0", progress=False)
    assert layer.record()["window_energy"] == 0
    assert layer.effective_rank == 0


def test_a_choice_beside_an_adapted_model_is_refused():
    model = ipca.apply_pc(Plain(), rank=3, targets=["a"], progress=False)
    with pytest.raises(ValueError, match="this Plain is adapted, its windows are chosen; leave out rank"):
        analysis.spectrum(model, rank=2)


def test_the_progress_bar_can_be_left_out(capsys):
    analysis.spectrum(Plain(), rank=2, targets="a", progress=False)
    assert capsys.readouterr().err == ""
    analysis.spectrum(Plain(), rank=2, targets="a")
    assert "Spectra" in capsys.readouterr().err
