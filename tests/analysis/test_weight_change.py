"""Size, concentration and place of an update, against cases worked out by hand."""

import math

import pytest
import torch
from torch import nn

import ipca
from ipca import analysis
from tests.helpers.models import Plain

MEASURES = {
    "intruder_dimensions": analysis.intruder_dimensions,
    "spectral_imbalance": analysis.spectral_imbalance,
    "overlap": lambda model, base: analysis.overlap(model, base, k=1),
}


def linear(weight, dtype=torch.float32):
    layer = nn.Linear(*reversed(weight.shape), bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def measured(measure, before, after, dtype=torch.float32, **options):
    """What ``measure`` says of a model of one layer; a number for the layer."""
    before, after = (torch.as_tensor(weight, dtype=torch.float32) for weight in (before, after))
    found = measure(nn.Sequential(linear(after, dtype)), {"0": before.to(dtype)}, **options)
    return found["0"] if isinstance(found, dict) else found


def adapted(dtype=torch.float32, **options):
    torch.manual_seed(1)
    return ipca.apply_pc(Plain().to(dtype), rank=3, targets=["a", "b"], progress=False, **options)


def test_update_norm_is_that_of_all_layers_together():
    base = nn.Sequential(linear(torch.tensor([[3.0, 0.0], [0.0, 4.0]])), linear(torch.tensor([[0.0, 12.0]])))
    model = nn.Sequential(linear(torch.tensor([[3.0, 1.0], [2.0, 4.0]])), linear(torch.tensor([[2.0, 12.0]])))
    assert analysis.update_norm(model, base) == pytest.approx(math.sqrt(1 + 4 + 4) / math.sqrt(9 + 16 + 144))


def test_update_norm_of_an_adapted_model_is_that_of_its_factors():
    model = adapted(form="intact")
    assert analysis.update_norm(model) == 0
    with torch.no_grad():
        model.a.lora_B.mul_(2)
    W, low = model.a.base_weight.double(), model.a.lora_B0.double() @ model.a.lora_A0.double()
    expected = low.norm() / math.hypot(W.norm().item(), model.b.base_weight.double().norm().item())
    assert analysis.update_norm(model) == pytest.approx(expected.item(), rel=1e-12)


def test_an_update_below_the_rounding_of_the_weight_counts():
    model = adapted(torch.bfloat16)
    plain = model.a.effective_weight()
    with torch.no_grad():
        model.a.lora_B.mul_(1 + 1e-5)
    assert torch.equal(model.a.effective_weight(), plain)
    low = model.a.lora_B0.double() @ model.a.lora_A0.double()
    total = math.hypot(*(layer.pretrained_weight().double().norm().item() for layer in (model.a, model.b)))
    assert analysis.update_norm(model) == pytest.approx(1e-5 * low.norm().item() / total, rel=1e-2)


def test_update_norm_of_nothing_of_something_from_nothing_and_of_a_diverged_model():
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    assert measured(analysis.update_norm, zero, zero) == 0
    assert measured(analysis.update_norm, zero, one) == math.inf
    assert math.isnan(measured(analysis.update_norm, one, one * math.nan))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_intruders_of_two_by_two(dtype):
    before, after = [[3.0, 0.0], [0.0, 1.0]], [[51.0, 48.0], [48.0, 49.0]]  # 96 along (1, 1) / √2, cosine 0.7 to both
    cosine = torch.linalg.svd(torch.tensor(after)).U.abs().max().item()
    assert cosine == pytest.approx(math.sqrt(0.5), abs=0.02)
    counted = {
        (1, 0.75): 1,
        (2, 0.75): 2,
        (10, 0.75): 2,
        (2, 0.65): 0,
    }
    for (top_k, threshold), count in counted.items():
        options = {"top_k": top_k, "threshold": threshold}
        assert measured(analysis.intruder_dimensions, before, after, dtype, **options) == count


def test_an_intruder_by_default_is_less_than_half_along_any_direction():
    before, mixed = torch.diag(torch.arange(8.0, 0.0, -1)), torch.full((8, 8), 100 / 8)  # 1 / √8 = 0.35 along each
    assert measured(analysis.intruder_dimensions, before, before + mixed) == 1
    assert measured(analysis.intruder_dimensions, before, before @ torch.eye(8).roll(3, 0)) == 0


def test_an_intruder_turns_on_the_output_side_alone():
    before = torch.diag(torch.arange(8.0, 0.0, -1))
    spread = torch.full((8,), 8**-0.5)
    along = torch.outer(torch.eye(8)[0], spread)
    assert measured(analysis.intruder_dimensions, before, before + 100 * along) == 0
    assert measured(analysis.intruder_dimensions, before, before + 100 * along.mT) == 1


def test_a_direction_that_the_weight_does_not_have_is_new_whatever_the_decomposition_calls_it():
    before = torch.diag(torch.tensor([3.0, 2.0, 0.0]))
    after = torch.diag(torch.tensor([3.0, 2.0, 5.0]))
    assert measured(analysis.intruder_dimensions, before, after) == 1
    assert measured(analysis.intruder_dimensions, before, before) == 0
    assert measured(analysis.intruder_dimensions, torch.zeros(3, 3), after) == 3
    assert measured(analysis.intruder_dimensions, after, torch.zeros(3, 3)) == 0


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_a_tall_and_a_wide_weight(shape):
    before = torch.eye(*shape) * torch.arange(9.0, 9 - shape[1], -1)
    new = torch.zeros(shape)
    new[-1, 0] = 50.0
    assert measured(analysis.intruder_dimensions, before, before + new) == (1 if shape[0] > shape[1] else 0)
    assert measured(analysis.overlap, before, before + new, k=5) == pytest.approx(0 if shape[0] > shape[1] else 1)
    assert measured(analysis.spectral_imbalance, before, before + new) == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("change", "share"), [([[2, 0], [0, 1]], 4 / 5), ([[1, 2], [2, 4]], 1), ([[1, 1], [1, -1]], 1 / 2)]
)
def test_spectral_imbalance_by_hand(change, share, dtype):
    change = torch.tensor(change, dtype=torch.float32)
    before = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    assert measured(analysis.spectral_imbalance, before, before + change, dtype) == pytest.approx(share)


@pytest.mark.parametrize(("k", "share"), [(1, 1 / 6), (2, 2 / 6), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overlap_by_hand(k, share, dtype):
    before = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    change = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
    assert measured(analysis.overlap, before, before + change, dtype, k=k) == pytest.approx(share)


def test_what_a_window_trains_lies_there():
    for window, share in (("principal", 1.0), ("minor", 0.0)):
        model = adapted(window=window)
        with torch.no_grad():
            for layer in (model.a, model.b):
                layer.lora_B.copy_(layer.lora_B0 @ torch.randn(3, 3))
        assert analysis.overlap(model, k=3) == {name: pytest.approx(share, abs=1e-9) for name in ("a", "b")}


@pytest.mark.parametrize("measure", MEASURES)
def test_without_a_change_it_is_zero(measure):
    model = adapted()
    assert MEASURES[measure](model, None) == {"a": 0, "b": 0}
    assert MEASURES[measure](nn.Sequential(linear(torch.zeros(3, 2))), {"0": torch.zeros(3, 2)}) == {"0": 0}


@pytest.mark.parametrize("measure", [*MEASURES, "drift", "principal_angles"])
def test_a_diverged_layer_is_named(measure):
    model = adapted()
    with torch.no_grad():
        model.b.lora_A[0, 0] = math.inf
    with pytest.raises(ValueError, match="b: it holds NaN or Inf, and so has no spectrum; training may have diverged"):
        (MEASURES.get(measure) or getattr(analysis, measure))(model, None)


def test_options_out_of_range_are_refused():
    model = adapted()
    for options in ({"top_k": 0}, {"threshold": 0.0}, {"threshold": 1.5}):
        with pytest.raises(ValueError, match=r"top_k must be at least 1 and threshold lie in \(0, 1\]; got"):
            analysis.intruder_dimensions(model, **options)
    with pytest.raises(ValueError, match="k must be a whole number of at least 1, got 0"):
        analysis.overlap(model, k=0)
    with pytest.raises(ValueError, match=r"k must be a whole number of at least 1, got 2\.5"):
        analysis.overlap(model, k=2.5)
    with pytest.raises(ValueError, match="a: k=13, but its weight has only 12 singular values; lower k"):
        analysis.overlap(model, k=13)
