"""The loss without a block of components against a model built without it; the weight's bits come back; pictures."""

import copy

import pytest
import torch
import torch.nn.functional as F

from ipca import analysis
from ipca.analysis import BlockImportance, LayerSensitivity, component_importance
from ipca.model import AdapterSettings
from ipca.nn.layer_kinds import read_layer
from ipca.nn.registry import get_layer
from tests.helpers.layer_kinds import CASES, output
from tests.helpers.models import Plain, snapshot
from tests.helpers.quantized_layers import quantized_model

CONFIG = AdapterSettings(rank=3, targets=("a", "b"))


def batches():
    return [(torch.randn(9, 20), torch.randint(0, 5, (9,))) for _ in range(2)]


def loss(model, batch):
    x, labels = batch
    return F.cross_entropy(model(x), labels)


def importance(model, held, of=loss, config=CONFIG, **options):
    return component_importance(model, held, of, config=config, progress=False, **{"blocks": 4, **options})


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

    found = importance(model, [x], size, AdapterSettings(rank=2, targets=tuple(case.targets)), blocks=2)
    assert snapshot(model) == before
    path = next(path for path in found if path.endswith(case.targets[0]))
    matrix = read_layer(get_layer(model, path))[0]
    with torch.no_grad():
        plain = size(model, x).item()
        matrix.copy_(without(matrix, found[path].edges[1], found[path].edges[2]))
        assert found[path].change[1].item() == pytest.approx(size(model, x).item() - plain, rel=1e-3, abs=1e-6)


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
    found = importance(model, batches(), config=AdapterSettings(rank=3, targets="a"))
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
        ({"blocks": 13}, ValueError, r"^a: its 12 components cannot be cut into 13 blocks"),
        ({"blocks": 0}, ValueError, r"cannot be cut into 0 blocks"),
        ({"of": lambda *_: torch.nan}, ValueError, r"the loss of the model as it is is nan"),
        ({"of": lambda *_: torch.ones(3)}, TypeError, r"must give one number, it gave a tensor of shape \(3,\)"),
        ({"of": lambda *_: None}, TypeError, r"must give one number, it gave None"),
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
    with pytest.raises(ValueError, match=r": components of a quantized weight cannot be taken out; exclude it"):
        importance(quantized_model()[0], batches())


pytest.importorskip("matplotlib")


def test_sensitivities_are_drawn_with_both_windows_shaded(tmp_path, drawn):
    found = analysis.sensitivity(Plain(), [torch.randn(40, 20)], CONFIG, progress=False)
    analysis.draw_sensitivity(found, tmp_path / "sensitivity.png", rank=3)
    assert (tmp_path / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    assert [axis.get_title() for axis in drawn[0].axes] == ["a  12 × 20  (1)", "b  20 × 12  (1)"]
    for axis, layer in zip(drawn[0].axes, found.values(), strict=True):
        assert axis.get_yscale() == "log"
        assert [patch.get_x() + 0.5 for patch in axis.patches] == [layer.quietest(3).index, 4]
        relative = layer.sensitivity / layer.sensitivity.mean()
        assert axis.lines[0].get_ydata().tolist() == pytest.approx(relative.tolist())


def test_a_window_that_does_not_fit_is_refused_before_a_file_is_written(tmp_path):
    found = {"a": LayerSensitivity((5, 7), torch.ones(5), torch.ones(5))}
    with pytest.raises(ValueError, match="needs 16 singular values, but there are only 5"):
        analysis.draw_sensitivity(found, tmp_path / "picture.png")
    assert not any(tmp_path.iterdir())


def test_importance_is_drawn_as_layers_by_blocks(tmp_path, drawn):
    edges, nan = (0, 2, 4, 6), torch.nan
    changes = {"first": [3.0, 0.5, nan], "second": [-1.0, torch.inf, 0.0]}
    found = {k: BlockImportance((6, 8), edges, 1.0, torch.tensor(v).double()) for k, v in changes.items()}
    analysis.draw_importance(found, tmp_path / "importance.svg")
    axis = drawn[0].axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["first", "second"]
    shown = axis.images[0].get_array()
    assert shown.filled(-9).tolist() == [[3.0, 0.5, -9], [-1.0, -9, 0.0]]


def test_nothing_to_draw_is_refused(tmp_path):
    for draw in (analysis.draw_importance, analysis.draw_sensitivity):
        with pytest.raises(ValueError, match="there is nothing to draw"):
            draw({}, tmp_path / "picture.png")
