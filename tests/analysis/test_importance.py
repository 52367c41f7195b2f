"""The loss without a block of components against a model built without it; the weight's bits come back."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ipca.analysis import component_importance
from ipca.analysis.importance import BlockImportance
from ipca.nn.layer_kinds import read_layer
from ipca.nn.registry import get_layer
from tests.helpers.layer_kinds import CASES, output
from tests.helpers.models import Plain, snapshot
from tests.helpers.quantized_layers import quantized_model


def batches():
    return [(torch.randn(9, 20), torch.randint(0, 5, (9,))) for _ in range(2)]


def loss(model, batch):
    x, labels = batch
    return F.cross_entropy(model(x), labels)


def importance(model, held, of=loss, targets=("a", "b"), **options):
    return component_importance(model, held, of, targets=targets, progress=False, **{"blocks": 4, **options})


def without(weight, start, end):
    U, S, Vh = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    S[..., start:end] = 0
    return ((U * S[..., None, :]) @ Vh).to(weight.dtype)


@torch.no_grad()
def mean_loss(model, held):
    return sum(loss(model, batch).item() for batch in held) / len(held)


def test_each_change_is_that_of_a_model_built_without_the_block():
    model, held = Plain(), batches()
    found = importance(model, iter(held), blocks=5)
    for name in ("a", "b"):
        assert found[name].edges == (0, 2, 4, 7, 9, 12)
        assert found[name].shape == tuple(model.get_submodule(name).weight.shape)
        assert found[name].loss == pytest.approx(mean_loss(model, held), rel=1e-6)
        for b, (start, end) in enumerate(zip(found[name].edges, found[name].edges[1:], strict=False)):
            other = copy.deepcopy(model)
            with torch.no_grad():
                other.get_submodule(name).weight.copy_(without(other.get_submodule(name).weight, start, end))
            expected = mean_loss(other, held) - mean_loss(model, held)
            assert found[name].change[b].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["conv2d", "embedding", "experts", "experts transposed"])
def test_every_kind_of_layer_can_lose_a_block(name):
    case = CASES[name]
    model, x = case.build().eval(), case.x()
    before = snapshot(model)

    def size(model, batch):
        return output(model, batch).square().mean()

    found = importance(model, [x], size, case.targets, blocks=2)
    assert snapshot(model) == before
    path = next(path for path in found if path.endswith(case.targets[0]))
    matrix = read_layer(get_layer(model, path))[0]
    with torch.no_grad():
        plain = size(model, x).item()
        matrix.copy_(without(matrix, found[path].edges[1], found[path].edges[2]))
        assert found[path].change[1].item() == pytest.approx(size(model, x).item() - plain, rel=1e-3, abs=1e-6)


LAYOUTS = {
    "channels_last": (nn.Conv2d, (2, 4, 5, 5), lambda w: w.contiguous(memory_format=torch.channels_last)),
    "channels_last_3d": (nn.Conv3d, (2, 4, 4, 4, 4), lambda w: w.contiguous(memory_format=torch.channels_last_3d)),
    "channels last of one dimension": (nn.Conv1d, (2, 4, 9), lambda w: w.mT.contiguous().mT),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_convolution_loses_a_block_in_any_memory_layout(layout):
    build, shape, arrange = LAYOUTS[layout]
    plain, x = nn.Sequential(build(4, 6, 3)), torch.randn(shape)
    other = copy.deepcopy(plain)
    other[0].weight = nn.Parameter(arrange(other[0].weight.detach()))
    before, strides = snapshot(other), other[0].weight.stride()

    def size(model, batch):
        return model(batch).square().mean()

    expected, found = (importance(model, [x], size, ["0"], blocks=3)["0"].change for model in (plain, other))
    assert (expected != 0).all()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)

    def breaks(model, batch):
        if (model[0].weight != plain[0].weight).any():
            raise KeyboardInterrupt
        return size(model, batch)

    with pytest.raises(KeyboardInterrupt):
        importance(other, [x], breaks, ["0"], blocks=3)
    assert snapshot(other) == before
    assert other[0].weight.stride() == strides


class Noisy(Plain):
    """In training mode but for one layer; draws random numbers in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.b.eval()

    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn_like(x))


def test_modes_weights_and_random_numbers_stay():
    model, held = Noisy(), batches()
    before, state = snapshot(model), torch.get_rng_state()
    importance(model, held)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_every_evaluation_draws_the_same_numbers():
    model = Noisy()
    with torch.no_grad():
        model.a.weight[:] = 0  # has nothing to lose, so that only the noise could change the loss
    found = importance(model, batches(), targets="a")
    assert found["a"].change.tolist() == [0.0] * 4


def test_the_weight_comes_back_where_the_loss_raises():
    model, calls = Plain(), []

    def breaks(model, batch):
        calls.append(model.b.weight.clone())
        if len(calls) == 4:  # the model as it is, two blocks of "a", then in the middle of the third
            raise KeyboardInterrupt
        return loss(model, batch)

    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        importance(model, batches()[:1], breaks)
    assert snapshot(model) == before


def test_the_quietest_window_lies_in_the_block_that_matters_least():
    def found(*change):
        return BlockImportance((40, 50), (0, 10, 20, 30, 40), 1.0, torch.tensor(change, dtype=torch.float64))

    assert found(3.0, 0.5, -0.1, 2.0).quietest(4).index == 23
    assert found(3.0, 0.5, -0.1, 2.0).quietest(24).index == 13  # wider than the block, around its center
    assert found(3.0, 0.5, -8.0, 2.0).quietest(4).index == 13  # better without it is a change too
    assert found(0.0, 1.0, 1.0, 1.0).quietest(16).index == 0
    assert found(1.0, 1.0, 1.0, 0.0).quietest(16).index == 24
    assert found(torch.nan, 2.0, torch.inf, 2.0).quietest(10).index == 10
    with pytest.raises(ValueError, match="needs 41 singular values, but there are only 40"):
        found(1.0, 1.0, 1.0, 1.0).quietest(41)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"blocks": 13}, ValueError, r"^a: its 12 components cannot be divided into 13 blocks"),
        ({"blocks": 0}, ValueError, r"cannot be divided into 0 blocks"),
        ({"of": lambda *_: torch.nan}, ValueError, r"the loss of the unchanged model is nan"),
        ({"of": lambda *_: torch.ones(3)}, TypeError, r"must return one number, it returned a tensor of shape \(3,\)"),
        ({"of": lambda *_: None}, TypeError, r"must return one number, it returned None"),
        ({"held": []}, ValueError, r"there are no batches"),
    ],
)
def test_what_is_refused_leaves_the_model_as_it_was(options, error, words):
    model = Plain()
    before = snapshot(model)
    with pytest.raises(error, match=words):
        importance(model, **{"held": batches(), **options})
    assert snapshot(model) == before


def test_a_quantized_layer_is_named():
    with pytest.raises(ValueError, match=r": components of a quantized weight cannot be removed; exclude it"):
        importance(quantized_model()[0], batches())


def test_the_default_device_does_not_matter():
    model, held = Plain(), batches()
    expected = importance(model, held)
    with torch.device("meta"):
        found = importance(model, held)
    assert all(torch.equal(found[name].change, expected[name].change) for name in expected)
