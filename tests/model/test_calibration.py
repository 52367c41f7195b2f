"""The second moment of a layer's inputs, energies and sensitivities against their definitions; nothing else changes."""

import copy
import importlib

import pytest
import torch
import transformers
from torch import nn
from transformers import BatchEncoding

import ipca
from ipca.model import LayerSensitivity, sensitivity
from ipca.model.calibration import input_energy
from ipca.nn.layer_kinds import read_layer
from tests.helpers.layer_kinds import Table, mixtral
from tests.helpers.models import Plain, snapshot
from tests.helpers.quantized_layers import quantized_model

TARGETS = ["a", "b"]


def moments(model, layers, batches):
    return dict(input_energy(model, layers, batches, progress=False))


def close(found, expected):
    return torch.allclose(found, expected, rtol=1e-5, atol=1e-7)


def second_moment(x):
    rows = x.detach().double().flatten(0, -2)
    return rows.mT @ rows / len(rows)


@pytest.fixture
def batches():
    return [torch.randn(7, 3, 20), torch.randn(2, 3, 20)]


def test_the_moment_is_the_mean_over_all_positions(batches):
    model = Plain()
    found = moments(model, ["a", "b"], batches)
    x = torch.cat(batches)
    assert close(found["a"], second_moment(x))
    assert close(found["b"], second_moment(model.a(x).relu()))
    assert all(C.dtype == torch.float64 and C.device.type == "cpu" for C in found.values())


@pytest.mark.parametrize(("layer", "shape"), [("a", (12, 20)), ("b", (20, 12))], ids=["wide", "tall"])
def test_energy_is_the_mean_square_along_each_right_singular_vector(batches, layer, shape):
    model = Plain()
    found = sensitivity(model, batches, targets=TARGETS, progress=False)[layer]
    x = torch.cat(batches).flatten(0, -2)
    inputs = (x if layer == "a" else model.a(x).relu()).detach().double()
    _, S, Vh = torch.linalg.svd(model.get_submodule(layer).weight.detach().double(), full_matrices=False)
    assert found.shape == shape
    assert close(found.S, S)
    assert close(found.energy, (inputs @ Vh.mT).square().mean(0))
    assert close(found.sensitivity, S * found.energy)


def test_sensitivity_is_the_mean_square_output_change_of_a_step_in_B(batches):
    model = Plain()
    found = sensitivity(model, batches, targets=TARGETS, progress=False)["a"]
    ipca.apply_pc(model, rank=3, window="start=4", targets="a", progress=False)
    x, step = torch.cat(batches), torch.randn(12)
    before = model.a(x)
    with torch.no_grad():
        model.a.lora_B[:, 1] += step / step.norm()  # component 4 + 1
    change = (model.a(x) - before).square().sum(-1).mean()
    assert change.item() == pytest.approx(found.sensitivity[5].item(), rel=1e-3)


def test_the_forms_of_a_batch_mean_the_same(batches):
    class Named(Plain):
        def forward(self, x, scale=1.0):
            return super().forward(x * scale)

    model = Named()
    expected = moments(model, ["b"], batches)["b"]
    forms = {
        "tuple": [(x, 1.0) for x in batches],
        "list": [[x] for x in batches],
        "dict": [{"x": x, "scale": 1.0} for x in batches],
        "encoding": [BatchEncoding({"x": x}) for x in batches],
        "generator": (x for x in batches),
    }
    for name, form in forms.items():
        assert torch.equal(moments(model, ["b"], form)["b"], expected), name


def bert():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=40)).train()


def test_masked_positions_do_not_count():
    model, ids = bert(), torch.randint(0, 40, (3, 9))
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] * 6 + [0] * 3])
    names = ["encoder.layer.0.attention.self.query", "encoder.layer.1.intermediate.dense", "pooler.dense"]
    padded = moments(model, names, [{"input_ids": ids, "attention_mask": mask}])
    single = moments(model, names, [{"input_ids": row[keep.bool()][None]} for row, keep in zip(ids, mask, strict=True)])
    assert all(close(padded[name], single[name]) for name in names)  # of the pooler one position a row counts in both


def test_layers_that_pytorch_may_skip_are_called_and_measured():
    """In evaluation mode nn.TransformerEncoderLayer has a path of its own, which reads weights; hooks switch it off."""
    model = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True).eval()
    x = torch.randn(3, 9, 32)
    found = moments(model, ["linear1", "linear2"], [x])
    with torch.no_grad():
        inner = model.norm1(x + model.self_attn(x, x, x)[0])
    assert close(found["linear1"], second_moment(inner))
    assert close(found["linear2"], second_moment(model.linear1(inner).relu()))


def test_a_mask_of_flattened_inputs_counts_too():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(5, 4)

        def forward(self, x, attention_mask):
            return self.a(x.reshape(-1, 5))

    x, mask = torch.randn(3, 7, 5), torch.rand(3, 7) < 0.5
    found = moments(Flat(), ["a"], [{"x": x, "attention_mask": mask}])["a"]
    assert close(found, second_moment(x[mask]))


def test_a_transposed_layer_is_read_as_out_in():
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 40, "n_positions": 16}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    found = sensitivity(model, [torch.randint(0, 40, (3, 9))], progress=False)
    assert found["transformer.h.0.mlp.c_fc"].shape == (128, 32)
    assert found["transformer.h.0.mlp.c_proj"].shape == (32, 128)
    S = torch.linalg.svdvals(model.transformer.h[0].mlp.c_fc.weight.detach().double())
    assert close(found["transformer.h.0.mlp.c_fc"].S, S)


@pytest.mark.parametrize("kind", ["int8", "torchao-int8"])
def test_a_quantized_layer_is_measured_by_its_dequantized_weight(kind, batches):
    model, _, _ = quantized_model(kind)
    found = sensitivity(model, batches, progress=False)
    assert close(found["a"].S, torch.linalg.svdvals(read_layer(model.a)[0].double()))
    inputs = torch.cat(batches).flatten(0, -2).double()
    _, _, Vh = torch.linalg.svd(read_layer(model.a)[0].double(), full_matrices=False)
    assert close(found["a"].energy, (inputs @ Vh.mT).square().mean(0))


def test_layers_narrower_than_any_rank_are_measured(batches):
    found = sensitivity(nn.Sequential(nn.Linear(20, 1)), batches, progress=False)
    assert found["0"].energy.shape == (1,)


def test_layers_beyond_the_budget_take_another_pass(batches, monkeypatch):
    model, calls = Plain(), []
    expected = moments(model, ["a", "b", "head"], batches)
    model.register_forward_hook(lambda *_: calls.append(1))
    module = importlib.import_module("ipca.model.calibration")
    monkeypatch.setattr(module, "_BUDGET", 8 * (20**2 + 12**2))  # "a" and "b", but not "head" too
    again = moments(model, ["a", "b", "head"], iter(batches))
    assert list(again) == list(expected)
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    assert len(calls) == 2 * len(batches)


class Moody(Plain):
    """Draws random numbers in evaluation mode too, counts its calls in training, and has a module in another mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.a.eval()

    def forward(self, x):
        if self.training:
            self.calls += 1
        return super().forward(x + 0.1 * torch.randn_like(x))


def hooks(model):
    return [len(module._forward_hooks) for module in model.modules()]


def test_modes_weights_buffers_hooks_and_random_numbers_stay():
    model = Moody()
    before, state, hooked = snapshot(model), torch.get_rng_state(), hooks(model)
    sensitivity(model, [torch.randn(7, 20, generator=torch.Generator())], targets=TARGETS, progress=False)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert hooks(model) == hooked


def test_all_stays_where_the_model_raises():
    model = Moody()
    before, state, hooked = snapshot(model), torch.get_rng_state(), hooks(model)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        sensitivity(model, [torch.ones(7, 20), torch.ones(7, 21)], targets=TARGETS, progress=False)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert hooks(model) == hooked


def test_the_quietest_window_has_the_smallest_sum():
    S, energy = torch.tensor([9.0, 4, 2, 1, 1, 1, 0.5]).double(), torch.tensor([1.0, 1, 1, 1, 3, 9, 40]).double()
    layer = LayerSensitivity((7, 9), S, energy)  # 9 4 2 1 3 9 20
    assert [layer.quietest(rank).index for rank in (1, 2, 3, 7)] == [3, 2, 2, 0]


def test_of_equal_windows_the_first_is_the_quietest():
    layer = LayerSensitivity((5, 5), torch.ones(5).double(), torch.ones(5).double())
    assert layer.quietest(2).index == 0
    with pytest.raises(ValueError, match="needs 6 singular values, but there are only 5"):
        layer.quietest(6)


@pytest.mark.parametrize(
    ("batches", "error", "words"),
    [
        (torch.ones(3, 20), TypeError, "expected an iterable of batches, got a Tensor; put one batch into a list"),
        ({"x": torch.ones(3, 20)}, TypeError, "got a dict; put one batch into a list"),
        (
            lambda: [torch.ones(3, 20)],
            TypeError,
            "got a function; put one batch into a list, call a function that makes them",
        ),
        ([], ValueError, "there are no batches"),
        ([3.0], TypeError, "a batch must be a tensor, a tuple .* or a mapping .*, got a float"),
    ],
)
def test_bad_batches_are_named(batches, error, words):
    with pytest.raises(error, match=words):
        sensitivity(Plain(), batches, targets=TARGETS, progress=False)


def test_a_layer_that_is_not_linear_is_named():
    with pytest.raises(ValueError, match=r"table: only linear layers .* kind 'embedding'; exclude it, or name"):
        sensitivity(Table(), [torch.ones(3, 7).long()], targets=["table", "head"], progress=False)
    with pytest.raises(ValueError, match=r"experts\.down_proj: .* kind 'experts'"):
        sensitivity(mixtral(), [torch.ones(3, 7).long()], targets="down_proj", progress=False)


def test_a_layer_that_no_input_reaches_is_named(batches):
    class Spare(Plain):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(20, 20)

    with pytest.raises(ValueError, match="spare: no input reached it in these batches; exclude it"):
        sensitivity(Spare(), batches, progress=False)


def test_inputs_that_are_not_finite_are_named(batches):
    batches[1][0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"^a: its inputs hold NaN or Inf"):
        sensitivity(Plain(), batches, targets=TARGETS, progress=False)


def test_a_mask_counts_by_position_as_by_name():
    config = transformers.BertConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20
    )
    model, ids, mask = transformers.BertModel(config).eval(), torch.arange(24).view(3, 8) % 31, torch.ones(3, 8)
    mask[0, 5:] = 0
    layers = ["encoder.layer.0.attention.self.query"]
    named = moments(model, layers, [{"input_ids": ids, "attention_mask": mask}])
    for batch in ((ids, mask), [ids, mask]):
        assert torch.equal(moments(model, layers, [batch])[layers[0]], named[layers[0]])
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["value"]))
    inside = f"base_model.model.{layers[0]}"
    assert torch.equal(moments(wrapped, [inside], [(ids, mask)])[inside], named[layers[0]])
    without = moments(model, layers, [(ids,)])
    assert not close(without[layers[0]], named[layers[0]])


@pytest.mark.parametrize("window", ["auto", "inputs:minor"])
def test_the_default_device_does_not_matter(window, batches):
    plain, model = Plain(), Plain()
    model.load_state_dict(plain.state_dict())
    expected = sensitivity(plain, batches, progress=False)
    ipca.apply_pc(plain, rank=3, window=window, calibration=batches, progress=False)
    with torch.device("meta"):
        found = sensitivity(model, batches, progress=False)
        ipca.apply_pc(model, rank=3, window=window, calibration=batches, progress=False)
    assert all(torch.equal(found[name].energy, expected[name].energy) for name in expected)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
