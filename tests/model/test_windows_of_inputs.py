"""Windows of the layers' inputs: which directions they take, that the start is exact, and what is refused."""

import copy

import pytest
import torch
import transformers
from torch import nn

import ipca
from ipca.io.adapter_folder import read_record
from ipca.lab.continual import ContinualLearner
from ipca.model import AdapterSettings, calibration
from ipca.model.calibration import directions_of_inputs, input_energy, part_on_directions
from ipca.nn import LinearPC
from tests.helpers.layer_kinds import Table
from tests.helpers.models import Plain, snapshot
from tests.helpers.quantized_layers import quantized_model

RULES = {"principal": 0, "middle": 8, "minor": 16, "0.25": 4, "start=3": 3}
"""The starts of windows of rank 4 of 20 inputs."""


@pytest.fixture
def batches():
    """Inputs with energies over five orders of magnitude."""
    mix = torch.linalg.qr(torch.randn(20, 20))[0] * torch.logspace(0, -2.5, 20)
    return [torch.randn(7, 9, 20) @ mix.mT, torch.randn(2, 9, 20) @ mix.mT]


def moment_of(batches):
    rows = torch.cat([batch.reshape(-1, 20) for batch in batches]).double()
    return rows.mT @ rows / len(rows)


def eigenvectors(moment):
    """Columns, the largest eigenvalue first."""
    return torch.linalg.eigh(moment)[1].flip(1)


def close(A, B):
    torch.testing.assert_close(A, B, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("rule", "start"), RULES.items())
def test_the_band_is_the_part_of_the_weight_that_acts_on_those_directions(rule, start, batches):
    """LoRA-Null's start: B0 A0 = W V Vᵀ, with equal norms of both factors' components."""
    model = Plain()
    weight = model.a.weight.detach().double()
    ipca.apply_pc(model, rank=4, window=f"inputs:{rule}", targets="a", calibration=batches, progress=False)
    V = eigenvectors(moment_of(batches))[:, start : start + 4]
    A0, B0 = model.a.lora_A0.double(), model.a.lora_B0.double()
    close(B0 @ A0, weight @ V @ V.mT)
    close(A0.norm(dim=1), B0.norm(dim=0))
    close(A0.norm(dim=1).square(), torch.linalg.svdvals(weight @ V))
    assert (model.a.window.basis, model.a.window.text) == ("inputs", f"inputs:start={start}")
    assert model.a.svd_report.certified


def test_rules_that_look_at_a_spectrum_look_at_the_inputs(batches):
    energy = torch.linalg.eigvalsh(moment_of(batches)).flip(0)
    start = int((energy.cumsum(0) < 0.9 * energy.sum()).sum()) + 1
    p = energy.sqrt() / energy.sqrt().sum()
    erank = int(torch.exp(-(p * p.log()).sum()))
    for rule, expected in (("energy=0.9", start), ("erank", erank)):
        model = Plain()
        ipca.apply_pc(model, rank=4, window=f"inputs:{rule}", targets="a", calibration=batches, progress=False)
        assert model.a.window.index == expected


def test_a_change_of_the_null_space_leaves_the_outputs_on_such_inputs():
    """Inputs of a subspace: whatever B trains to, the model computes on them what it did."""
    model, basis = nn.Sequential(nn.Linear(20, 12)), torch.randn(6, 20)
    inputs = [torch.randn(64, 6) @ basis]
    before, other = model(inputs[0]), torch.randn(3, 20)
    ipca.apply_pc(model, rank=4, window="inputs:minor", train="B", calibration=inputs, progress=False)
    with torch.no_grad():
        model[0].lora_B.add_(torch.randn_like(model[0].lora_B))
    close(model(inputs[0]), before)
    assert (model(other) - model[0].to_plain(base=True)(other)).abs().max() > 0.1


def test_more_inputs_than_outputs():
    """The null space of 40 inputs, of a weight with 6 singular values."""
    model, inputs = nn.Sequential(nn.Linear(40, 6)), [torch.randn(10, 40)]
    ipca.apply_pc(model, rank=4, window="inputs:minor", calibration=inputs, progress=False)
    assert model[0].window.index == 36
    close(inputs[0] @ model[0].lora_A0.mT, torch.zeros(10, 4))


@pytest.mark.parametrize("form", ["intact", "residual"])
def test_the_function_is_that_of_before(form, batches):
    model = Plain()
    x = batches[0]
    before = model(x)
    ipca.apply_pc(model, rank=4, window="inputs:minor", form=form, calibration=batches, progress=False)
    close(model(x), before)
    assert form == "residual" or torch.equal(model(x), before)


def test_masked_positions_do_not_count():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(20, 12)

        def forward(self, x, attention_mask):
            return self.a(x)

    x, mask = torch.randn(4, 5, 20), torch.ones(4, 5)
    x[:, 3:], mask[:, 3:] = 100.0, 0
    one, two = Masked(), None
    two = copy.deepcopy(one)
    ipca.apply_pc(one, rank=4, window="inputs:principal", calibration=[(x[:, :3], None)], progress=False)
    batch = {"x": x, "attention_mask": mask}
    ipca.apply_pc(two, rank=4, window="inputs:principal", calibration=[batch], progress=False)
    close(one.a.lora_B0 @ one.a.lora_A0, two.a.lora_B0 @ two.a.lora_A0)


def test_a_decoder_has_a_mask_of_its_own():
    """Of the shape of the encoder's, which is that of the keys of cross-attention."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 31}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0)).eval()
    ids = torch.arange(1, 11).view(2, 5)
    mask = torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])
    block = "decoder.block.0.layer"
    own, encoded = f"{block}.0.SelfAttention.q", f"{block}.1.EncDecAttention.k"
    rows, batch = {}, {"input_ids": ids, "decoder_input_ids": ids.flip(1), "attention_mask": mask}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda *a, name=name: rows.update({name: a[1][0]}))
        for name in (own, encoded)
    ]
    for decoder_mask in (mask.flip(0), None):
        masks = {own: torch.ones(2, 5) if decoder_mask is None else decoder_mask, encoded: mask}
        given = {**batch, "decoder_attention_mask": decoder_mask}
        for name, moment in input_energy(model, [own, encoded], [given], progress=False):
            x = rows[name][masks[name].bool()].double()
            close(moment, x.mT @ x / len(x))
    for hook in hooks:
        hook.remove()


def test_a_pattern_mixes_windows_of_weights_and_inputs(batches):
    model = Plain()
    options = {"window": "minor", "window_pattern": {"b": "inputs:principal", "head": "auto"}}
    ipca.apply_pc(model, rank=4, rank_pattern={"head": 2}, calibration=iter(batches), progress=False, **options)
    assert [layer.window.text.partition("start")[0] for layer in (model.a, model.b, model.head)] == ["", "inputs:", ""]
    assert model.a.window.index == 8


def test_the_adapter_is_loaded_and_saved_again_without_batches(batches, tmp_path):
    base = Plain()
    model = copy.deepcopy(base)
    ipca.apply_pc(model, rank=4, window="inputs:minor", calibration=batches, progress=False)
    with torch.no_grad():
        model.a.lora_A.mul_(1.5)
    ipca.save_adapter(model, tmp_path / "one")
    again = ipca.load_adapter(base, tmp_path / "one")
    assert again.a.window == model.a.window
    assert torch.equal(again(batches[0]), model(batches[0]))
    ipca.save_adapter(again, tmp_path / "two")
    assert (tmp_path / "one" / "ipca.json").read_text() == (tmp_path / "two" / "ipca.json").read_text()
    state = model.state_dict()
    again.load_state_dict(state)
    assert again.a.window.text == "inputs:start=16"


def test_a_state_dict_says_of_what_the_window_is(batches, tmp_path):
    """And at which size its components start, whatever the layer that takes it was made for."""
    options = {"rank": 4, "targets": "a", "progress": False}
    inputs = ipca.apply_pc(Plain(), window="inputs:minor", magnitude=1.0, calibration=batches, **options)
    weights = ipca.apply_pc(Plain(), window="minor", **options)
    before = weights.state_dict()
    weights.load_state_dict(inputs.state_dict())
    assert (weights.a.window, weights.a.magnitude) == (inputs.a.window, 1.0)
    ipca.save_adapter(weights, tmp_path)
    assert read_record(tmp_path)[0]["a"].window.text == "inputs:start=16"
    inputs.load_state_dict(before)
    assert (inputs.a.window, inputs.a.magnitude) == (ipca.Window(8, 4), "sigma")


def test_a_window_of_the_inputs_does_not_replace_one_of_the_weight(batches, tmp_path):
    base, options = Plain(), {"rank": 4, "targets": "a", "progress": False}
    model = ipca.apply_pc(copy.deepcopy(base), window="start=8", **options)
    with torch.no_grad():
        model.a.lora_A.mul_(1.5)
    ipca.save_adapter(model, tmp_path)
    other = ipca.apply_pc(base, window="inputs:start=8", calibration=batches, **options)
    with pytest.raises(FileExistsError, match="holds an adapter that is trained"):
        ipca.save_adapter(other, tmp_path)


def test_the_summary_and_the_layer_say_of_what_the_windows_are(batches):
    model = ipca.apply_pc(Plain(), rank=4, window="inputs:minor", calibration=batches, progress=False)
    assert "window [16, 20) of 20 inputs" in str(ipca.summary(model))
    assert "window=[16, 20) of the inputs" in repr(model.a)


def test_a_second_moment_is_decomposed_once(batches, tmp_path):
    cache = ipca.SpectralCache(tmp_path)
    for _ in range(2):
        ipca.apply_pc(
            Plain(), rank=4, window="inputs:minor", targets="a", calibration=batches, cache=cache, progress=False
        )
    assert cache.hits == 1


def test_layers_of_one_input_are_decomposed_once(batches, monkeypatch):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.o = nn.Linear(20, 12), nn.Linear(20, 6), nn.Linear(6, 20)

        def forward(self, x):
            return self.o(self.k(x) * self.q(x).mean())

    made, called = [], calibration.cached_window_svd
    monkeypatch.setattr(calibration, "cached_window_svd", lambda *a, **o: made.append(a) or called(*a, **o))
    model = ipca.apply_pc(Shared(), rank=4, window="inputs:minor", calibration=batches, progress=False)
    assert len(made) == 2
    rows = [torch.linalg.qr(layer.lora_A0.mT)[0] for layer in (model.q, model.k)]
    close(torch.linalg.svdvals(rows[0].mT @ rows[1]), torch.ones(4))


def test_a_quantized_layer(batches):
    model, plain, _ = quantized_model("int8")
    with torch.no_grad():
        (_, moment), *_ = input_energy(model, ["a"], batches, progress=False)
    weights = {name: plain.get_submodule(name).weight.detach() for name in ("a", "b")}
    options = {"targets": ("a", "b"), "calibration": batches, "unquantized_weights": weights, "progress": False}
    ipca.apply_pc(model, rank=4, window="inputs:minor", **options)
    V = eigenvectors(moment)[:, 16:]
    close((model.a.lora_B0 @ model.a.lora_A0).double(), weights["a"].double() @ V @ V.mT)


REFUSED = [
    ({"window": "inputs:minor"}, r"window 'inputs:minor' is found from inputs .* calibration=\[…\], or another window"),
    ({"window_pattern": {"b": "inputs:minor"}}, r"window 'inputs:minor' is found from inputs"),
    ({"window": "inputs:minor", "calibration": [torch.zeros(3, 20)]}, r"^a: its inputs are all 0 in these batches"),
    ({"window": "inputs:minor", "calibration": [torch.full((3, 20), torch.inf)]}, r"^a: its inputs hold NaN or Inf"),
    ({"window": "inputs:start=17", "calibration": [torch.ones(3, 20)]}, r"a, head: .*only 20 inputs; lower its start"),
    ({"window": "inputs:minor", "rank": 13, "calibration": [torch.ones(3, 20)]}, r"rank 13 is above its 12 singular"),
    ({"window": "inputs:auto", "calibration": [torch.ones(3, 20)]}, r"'auto' finds a window of the weight"),
    ({"window": "inputs:9", "calibration": [torch.ones(3, 20)]}, r"window 9 is ambiguous"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_what_is_refused_leaves_the_model_as_it_was(options, words):
    model = Plain()
    before = snapshot(model)
    with pytest.raises(ValueError, match=words):
        ipca.apply_pc(model, progress=False, **{"rank": 4, "exclude": ["b"] * ("b" not in str(options)), **options})
    assert snapshot(model) == before


def test_embeddings_have_no_inputs_to_measure():
    model = Table()
    options = {"targets": ["table", "head"], "calibration": [torch.randint(0, 19, (3, 7))], "progress": False}
    with pytest.raises(ValueError, match=r"^table: only linear layers can be measured"):
        ipca.apply_pc(model, rank=2, window="inputs:minor", **options)


def test_where_there_are_no_inputs_the_message_says_what_to_do():
    words = r"window 'inputs:minor' is found from inputs of the model: call ipca\.apply_pc.*ipca\.peft\.prepare"
    window = ipca.Window("inputs:minor", 3)
    for call in (
        lambda: ipca.window_svd(torch.randn(20, 12), window),
        lambda: LinearPC.from_linear(nn.Linear(20, 12), window),
        lambda: LinearPC(20, 12, 3, "inputs:minor"),
        lambda: window.resolve(12),
        lambda: ContinualLearner(Plain(), "disjoint", AdapterSettings(rank=3, window=window.text), tasks=2),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_a_window_of_a_matrix(batches):
    weight, moment = torch.randn(12, 20), moment_of(batches)
    found = part_on_directions(weight, directions_of_inputs(moment, ipca.Window("inputs:0.5", 4)))
    V = eigenvectors(moment)[:, 8:12]
    close(found.U * found.S @ found.Vh, weight.double() @ V @ V.mT)
    close(found.Vh @ found.Vh.mT, torch.eye(4).double())


@pytest.mark.parametrize("train", ["B", "both"])
def test_directions_that_the_weight_does_not_use_are_trained_all_the_same(train):
    """Inputs that are 0 in the features for which the weight is 0: what is learned there changes nothing for them."""
    model, inputs = nn.Sequential(nn.Linear(20, 12)), torch.randn(200, 20)
    inputs[:, 16:] = 0
    with torch.no_grad():
        model[0].weight[:, 16:] = 0
    before = model(inputs)
    options = {"rank": 4, "window": "inputs:minor", "calibration": [inputs], "train": train, "progress": False}
    with pytest.warns(UserWarning, match="components that are 0 in the window: 4 of 4 of 0.* B = 0, and train"):
        ipca.apply_pc(model, **options)
    A0 = model[0].lora_A0
    assert not A0[:, :16].any()
    close(A0[:, 16:] @ A0[:, 16:].mT, torch.eye(4) / 3)
    with torch.no_grad():
        model[0].lora_B.normal_()
    close(model(inputs), before)
    assert not torch.allclose(model(torch.ones(1, 20)), model[0].base_product(torch.ones(1, 20)))


def test_another_adapter_of_other_inputs_is_not_replaced(batches, tmp_path):
    def adapted(inputs, **options):
        return ipca.apply_pc(
            Plain(), rank=4, window="inputs:minor", targets="a", calibration=inputs, progress=False, **options
        )

    model = adapted(batches)
    with torch.no_grad():
        model.a.lora_B.add_(1.0)
    ipca.save_adapter(model, tmp_path)
    ipca.save_adapter(model, tmp_path)
    with torch.no_grad():
        model.a.lora_B.add_(1.0)
    ipca.save_adapter(model.bfloat16().float(), tmp_path)
    for other in (adapted([batch.flip(-1) for batch in batches]), adapted(batches, train="A")):
        with pytest.raises(FileExistsError, match="holds an adapter that is trained"):
            ipca.save_adapter(other, tmp_path)
