"""LinearPC as a layer: what it computes before, during and after training, against float64 and the plain layer."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

import ipca
from ipca import Window
from ipca.nn import LinearPC
from ipca.ops.dropout import apply_dropout, new_seed

FORMS = ("residual", "intact")
EPS = torch.finfo(torch.float32).eps


def plain(kind: str, in_features: int = 23, out_features: int = 37) -> nn.Module:
    if kind == "conv1d":
        layer = Conv1D(out_features, in_features)
        nn.init.normal_(layer.weight, std=0.3)
        nn.init.normal_(layer.bias)
        return layer
    return nn.Linear(in_features, out_features, bias=kind != "no bias")


def jitter(layer: LinearPC, size: float = 0.1) -> LinearPC:
    with torch.no_grad():
        for factor in (layer.lora_A, layer.lora_B):
            factor.add_(size * torch.randn_like(factor))
    return layer


def trained(form: str = "residual", **options) -> tuple[nn.Linear, LinearPC]:
    linear = nn.Linear(23, 37)
    return linear, jitter(LinearPC.from_linear(linear, rank=5, form=form, **options))


def reference_weight(layer: LinearPC) -> torch.Tensor:
    low = layer.lora_B.double() @ layer.lora_A.double()
    if layer.form == "intact":
        low = low - layer.lora_B0.double() @ layer.lora_A0.double()
    return layer.base_weight.double() + layer.alpha / layer.rank * low


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    return ((x.double() - y.double()).norm() / y.double().norm()).item()


@pytest.mark.parametrize("form", FORMS)
def test_fresh_layer_is_drawn_as_nn_linear_and_takes_its_window(form):
    layer = LinearPC(65, 48, rank=7, form=form)
    assert layer.window == Window(20, 7)
    weight = layer.effective_weight()
    limit = 1 / math.sqrt(65)
    assert weight.abs().max() <= limit * (1 + 1e-5)
    assert layer.bias.abs().max() <= limit
    assert weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.05)
    S = torch.linalg.svdvals(weight.double())
    found = torch.linalg.svdvals(layer.lora_B.double() @ layer.lora_A.double())[:7]
    assert (found - S[20:27]).abs().max() <= 65 * EPS * S[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_fresh_layer_trains_its_factors_alone(form, bias):
    layer = LinearPC(19, 13, rank=4, bias=bias, form=form, alpha=6.0)
    frozen = {k: v.clone() for k, v in layer.state_dict().items() if k not in ("lora_A", "lora_B")}
    x, target = torch.randn(64, 19), torch.randn(64, 13)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(15):
        loss = F.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}
    assert all(torch.equal(value, layer.state_dict()[key]) for key, value in frozen.items())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("alpha", [None, 3.0, 40.0])
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("form", FORMS)
def test_from_linear_computes_what_the_layer_computed(form, kind, alpha, dropout):
    layer = plain(kind)
    before = copy.deepcopy(layer.state_dict())
    adapted = LinearPC.from_linear(layer, rank=5, alpha=alpha, form=form, dropout=dropout)
    x = torch.randn(4, 11, 23)
    if form == "intact":
        assert torch.equal(adapted(x), layer(x))
    assert relative(adapted.eval()(x), layer(x)) <= (0.0 if form == "intact" else 1e-5)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert adapted.scaling == (1.0 if alpha is None else alpha / 5)


@pytest.mark.parametrize("window", ["principal", "minor", 0.33, "energy=0.5", "erank", "start=0"])
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (5, 5), (64, 9), (9, 64)])
@pytest.mark.parametrize("form", FORMS)
def test_every_window_of_every_shape_keeps_the_function(form, shape, window):
    linear = nn.Linear(*shape)
    adapted = LinearPC.from_linear(linear, window, rank=min(5, *shape), form=form)
    x = torch.randn(6, shape[0])
    assert relative(adapted(x), linear(x)) <= 1e-5


@pytest.mark.parametrize("weight", [torch.zeros(9, 6), torch.eye(9, 6), torch.ones(9, 6)], ids=["0", "tie", "rank 1"])
@pytest.mark.parametrize("form", FORMS)
def test_degenerate_weights_keep_the_function(weight, form):
    linear = nn.Linear(6, 9)
    linear.weight = nn.Parameter(weight)
    x = torch.randn(4, 6)
    assert torch.allclose(LinearPC.from_linear(linear, rank=2, form=form)(x), linear(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", ["principal", "middle", "minor"])
def test_sixteen_bit_start_stays_within_one_rounding_and_is_certified(dtype, window):
    linear = nn.Linear(65, 48, dtype=dtype)
    layer = LinearPC.from_linear(linear, window, rank=8, alpha=12, form="residual")
    off = relative(reference_weight(layer), linear.weight)
    assert 0 < off <= torch.finfo(dtype).eps
    assert layer.certificate.relative == pytest.approx(off, rel=1e-9)
    assert layer.certificate.dtype == str(dtype).removeprefix("torch.")
    assert layer.certificate.holds
    assert layer.lora_A.dtype == layer.lora_B0.dtype == torch.float32
    intact = LinearPC.from_linear(linear, window, rank=8, alpha=12, form="intact")
    x = torch.randn(5, 65, dtype=dtype)
    assert torch.equal(intact(x), linear(x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(23,), (0, 23), (3, 1, 23), (2, 3, 4, 23)])
def test_trained_layer_against_float64(form, shape):
    _, layer = trained(form, alpha=8.0)
    x = torch.randn(shape)
    wanted = F.linear(x.double(), reference_weight(layer), layer.bias.double())
    y = layer(x)
    assert y.shape == (*shape[:-1], 37)
    assert (y - wanted).norm() <= 50 * EPS * wanted.norm()
    assert relative(layer.effective_weight(), reference_weight(layer)) <= EPS


def test_input_in_another_memory_layout():
    _, layer = trained("intact")
    x = torch.randn(23, 9).mT
    assert torch.allclose(layer(x), layer(x.contiguous()), rtol=1e-5, atol=1e-6)


def nested_sum(y):
    return (y.values() if y.layout is torch.jagged else y.to_padded_tensor(0.0)).sum()


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_input_is_each_of_its_rows(form, layout):
    _, layer = trained(form, alpha=8.0)
    rows = [torch.randn(3, 23), torch.randn(5, 23)]
    y = layer(torch.nested.nested_tensor(rows, layout=layout))
    for found, x in zip(y.unbind(), rows, strict=True):
        torch.testing.assert_close(found, layer(x), rtol=1e-5, atol=1e-5)
    (found,) = torch.autograd.grad(nested_sum(y), layer.lora_A)
    (wanted,) = torch.autograd.grad(layer(torch.cat(rows)).sum(), layer.lora_A)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_forms_agree_after_the_same_training():
    linear = nn.Linear(23, 37)
    residual, intact = (LinearPC.from_linear(linear, rank=5, form=form) for form in FORMS)
    jitter(residual)
    intact.load_state_dict({k: v for k, v in residual.state_dict().items() if k in ("lora_A", "lora_B")}, strict=False)
    assert relative(intact.effective_weight(), residual.effective_weight()) <= 1e-6


def test_dropout_falls_on_the_low_rank_branch_alone():
    _, layer = trained(dropout=0.4)
    x = torch.randn(8, 23)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    z = apply_dropout(x, new_seed(x.device), 0.4)
    wanted = F.linear(x, layer.base_weight, layer.bias) + F.linear(F.linear(z, layer.lora_A), layer.lora_B)
    assert torch.allclose(y, wanted, rtol=1e-5, atol=1e-6)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_intact_form_shares_the_weight_and_residual_does_not():
    linear = nn.Linear(23, 37)
    residual, intact = (LinearPC.from_linear(linear, rank=5, form=form) for form in FORMS)
    assert intact.base_weight.data_ptr() == linear.weight.data_ptr() != residual.base_weight.data_ptr()
    assert intact.bias.data_ptr() == residual.bias.data_ptr() == linear.bias.data_ptr()
    assert [name for name, p in intact.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    assert linear.weight.requires_grad


def test_extra_repr_names_what_matters():
    layer = LinearPC.from_linear(nn.Linear(23, 37, bias=False), rank=5, alpha=2.5, form="intact", dropout=0.1)
    assert repr(layer) == (
        "LinearPC(in_features=23, out_features=37, bias=False, window=[9, 14), rank=5, alpha=2.5, "
        "form=intact, dropout=0.1)"
    )
    assert "window='energy=0.9'" in repr(LinearPC(23, 37, 5, "energy=0.9", device="meta"))


@pytest.mark.parametrize("form", FORMS)
def test_compiles_as_one_graph(form):
    _, layer = trained(form, alpha=8.0)
    x = torch.randn(6, 23, requires_grad=True)
    eager = layer(x)
    wanted = torch.autograd.grad(eager.square().sum(), [x, layer.lora_A, layer.lora_B])
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    found = torch.autograd.grad(y.square().sum(), [x, layer.lora_A, layer.lora_B])
    assert torch.allclose(y, eager, rtol=1e-5, atol=1e-6)
    assert all(relative(g, w) <= 1e-5 for g, w in zip(found, wanted, strict=True))


BUILDERS = {
    "LinearPC": lambda **options: LinearPC(23, 37, **options),
    "from_linear": lambda **options: LinearPC.from_linear(nn.Linear(23, 37), **options),
}


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_the_names_of_peft_mean_the_same(build):
    ours = {"rank": 3, "alpha": 6.0, "dropout": 0.25}
    theirs = {"r": 3, "lora_alpha": 6.0, "lora_dropout": 0.25}
    for options in (ours, theirs, ours | theirs):
        layer = build(**options)
        assert (layer.rank, layer.alpha, layer.dropout) == (3, 6.0, 0.25)
    for name, (alias, value) in zip(ours, theirs.items(), strict=True):
        with pytest.raises(TypeError, match=rf"{name}=.* and {alias}=.* are two names of one argument; pass one"):
            build(**{**ours, alias: value + 0.5})
    with pytest.raises(ValueError, match=r"rank 4, but rank=5 was given too"):
        build(window=Window(3, 4), r=5)


class Subclass(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"rank": 24}, ValueError, r"rank 24 is above the 23 singular values of a \(37, 23\) weight; lower `rank`"),
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"window": Window(20, 4)}, ValueError, "ends at 24, but there are only 23 singular values"),
        ({"window": Window(3, 4), "rank": 5}, ValueError, "rank 4, but rank=5 was given too"),
        ({"window": "center"}, ValueError, "Unknown window 'center'"),
        ({"alpha": 0.0}, ValueError, r"alpha must be positive, got 0\.0"),
        ({"alpha": math.nan}, ValueError, "alpha must be positive, got nan"),
        ({"form": "whole"}, ValueError, "form must be one of intact, residual; got 'whole'"),
        ({"dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\), got 1\.0"),
        ({"tol": "best"}, ValueError, "tol must be a number or one of fast, default, exact; got 'best'"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(options, error, words):
    linear = nn.Linear(23, 37)
    before = linear.weight.clone()
    options = {"rank": None if "window" in options else 4, **options}
    with pytest.raises(error, match=words):
        LinearPC.from_linear(linear, **options)
    with pytest.raises(error, match=words):
        LinearPC(23, 37, **options)
    assert torch.equal(linear.weight, before)


@pytest.mark.parametrize(
    ("layer", "error", "words"),
    [
        (Subclass(8, 8), TypeError, "expected an nn.Linear or a transformers Conv1D, got Subclass"),
        (nn.Conv1d(8, 8, 1), TypeError, "got Conv1d"),
        (nn.Linear(8, 8, device="meta"), ValueError, "meta device and holds no values; load the weights first"),
        (nn.Linear(8, 8, dtype=torch.complex64), TypeError, "cannot decompose a torch.complex64 tensor"),
    ],
    ids=["subclass", "Conv1d", "meta", "complex"],
)
def test_other_layers_are_refused(layer, error, words):
    with pytest.raises(error, match=words):
        LinearPC.from_linear(layer, rank=2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_refused(value):
    linear = nn.Linear(23, 37)
    with torch.no_grad():
        linear.weight[36, 22] = value
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        LinearPC.from_linear(linear, rank=4)


def test_layer_on_meta_waits_for_its_weights():
    layer = LinearPC(8, 8, rank=2, device="meta")
    with pytest.raises(RuntimeError, match=r"no window yet: load a state dict with load_state_dict"):
        layer(torch.empty(1, 8, device="meta"))
    layer.to_empty(device="cpu").reset_parameters()
    assert layer.window == Window(3, 2)
    assert layer(torch.randn(4, 8)).isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_model_compiles_whole_and_once_for_any_number_of_tokens(form, dropout):
    """Through inductor: no graph break, no recompilation, the losses and gradients of eager mode."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24))
    ipca.apply_pc(model, rank=4, form=form, dropout=dropout, progress=False)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for tokens in (5, 64, 300):
        x = torch.randn(tokens, 24)
        gradients = []
        for run in (compiled, model):
            model.zero_grad()
            y = run(x)
            y.square().mean().backward()
            gradients.append([y.detach(), *(p.grad for p in ipca.adapter_parameters(model))])
        frames.append(counter.frame_count)
        assert all(value.isfinite().all() for value in gradients[0])
        if not dropout:
            for got, want in zip(*gradients, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert len(set(frames)) == 1
