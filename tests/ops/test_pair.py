"""The pair ``D, E`` of a layer's factors, and its copies kept between calls that need no gradient."""

import gc
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ipca.nn import LinearPC
from ipca.ops import backend as backends
from ipca.ops import pair, pc_linear
from tests.ops.test_backends import inputs


def factors(R=5, N=40, K=33, dtype=torch.float32):
    torch.manual_seed(0)
    A, B = nn.Parameter(torch.randn(R, K, dtype=dtype)), nn.Parameter(torch.randn(N, R, dtype=dtype))
    return A, B, torch.randn(R, K, dtype=dtype), torch.randn(N, R, dtype=dtype)


@torch.no_grad()
def change(A, B, A0, B0):
    """``B A − B0 A0`` in float64."""
    A, B, A0, B0 = (factor.double() for factor in (A, B, A0, B0))
    return B @ A - B0 @ A0


@pytest.mark.parametrize("R", [1, 5, 16])
@pytest.mark.parametrize("moved", [0.0, 1e-3])
def test_the_pair_is_the_change_exactly_zero_at_the_start(R, moved):
    A, B, A0, B0 = factors(R)
    with torch.no_grad():
        A.copy_(A0 * (1 + moved))
        B.copy_(B0 * (1 - moved / 2))
    D, E = (factor.detach() for factor in pair.one_pair(A, B, A0, B0))
    assert D.shape == (2 * R, 33)
    assert E.shape == (40, 2 * R)
    if moved == 0:
        assert not (E @ D).any()
    else:
        exact = change(A, B, A0, B0)
        assert (E.double() @ D.double() - exact).abs().max() <= 2e-4 * exact.abs().max()
    assert pair.one_pair(A, B, None, None) == (A, B)


WRITES = {
    "in place": lambda factor: factor.mul_(2),
    "an optimizer's step": lambda factor: torch._foreach_add_([factor], 1.0),
    "an entry": lambda factor: factor[0, 0].add_(1),
    "through data": lambda factor: factor.data.mul_(2),
    "a component through data": lambda factor: component(factor.data, 3).zero_(),
    "other memory": lambda factor: setattr(factor, "data", factor.data * 2),
}


def component(factor: Tensor, i: int) -> Tensor:
    return factor[i] if factor.shape[0] == 5 else factor[:, i]


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("which", [0, 1], ids=["A", "B"])
@torch.no_grad()
def test_a_kept_pair_is_made_anew_when_a_factor_has_changed(write, which):
    given = factors()
    first = pair.kept_pair(*given, torch.float32)
    assert pair.kept_pair(*given, torch.float32) is first
    write(given[which])
    D, E = pair.kept_pair(*given, torch.float32)
    torch.testing.assert_close(E.double() @ D.double(), change(*given), rtol=1e-5, atol=1e-4)
    assert pair.kept_pair(*given, torch.float32)[0] is D


@pytest.mark.parametrize("which", [2, 3], ids=["A0", "B0"])
@torch.no_grad()
def test_a_kept_pair_is_made_anew_when_a_frozen_factor_has_changed(which):
    given = factors()
    pair.kept_pair(*given, torch.float32)
    given[which].add_(1)
    D, E = pair.kept_pair(*given, torch.float32)
    torch.testing.assert_close(E.double() @ D.double(), change(*given), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("N", [1, 4, 5, 6, 40, 64, 97, 4096])
@pytest.mark.parametrize("R", [1, 2, 4, 5, 6, 15, 16, 48])
@torch.no_grad()
def test_every_component_is_looked_at(N, R):
    A, B, *_ = factors(R, N)
    for factor, seen in zip((A, B), pair._of_every_component(A, B), strict=True):
        for i in range(R):
            before = seen.clone()
            (factor[i] if factor is A else factor[:, i]).add_(1)
            assert not torch.equal(seen, before)


@pytest.mark.parametrize("R", [4, 16, 128])
@torch.no_grad()
def test_every_eighth_of_the_inputs_and_outputs_is_looked_at(R):
    A, B, *_ = factors(R, 768, 1024)
    for factor, seen in zip((A.mT, B), pair._of_every_component(A, B), strict=True):
        assert len(seen) <= 4 * max(R, pair.LEAST_SEEN)
        for part in factor.chunk(8):
            before = seen.clone()
            part.add_(1)
            assert not torch.equal(seen, before)


@torch.no_grad()
def test_a_pair_of_another_dtype_is_another_pair():
    given = factors()
    assert pair.kept_pair(*given, torch.bfloat16)[0].dtype == torch.bfloat16
    assert pair.kept_pair(*given, torch.float32)[0].dtype == torch.float32


def test_pairs_go_with_their_factors():
    given = factors()
    with torch.no_grad():
        pair.kept_pair(*given, torch.float32)
    held, key = len(pair._kept), id(given[2])
    assert key in pair._kept
    del given
    gc.collect()
    assert len(pair._kept) < held


@pytest.mark.parametrize("swap", [torch.utils.swap_tensors, "to", "load_state_dict"], ids=["a factor", "to", "load"])
def test_factors_may_be_swapped(swap, monkeypatch):
    """As PEFT's hot-swap and ``set_swap_module_params_on_conversion`` do, which fails where a weak reference is."""
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    layer, x = LinearPC.from_linear(nn.Linear(24, 40), rank=4).eval(), torch.randn(3, 24)
    with torch.no_grad():
        layer(x)
        if swap == "to":
            layer, x = layer.double(), x.double()
        elif swap == "load_state_dict":
            layer.load_state_dict({name: value.clone() for name, value in layer.state_dict().items()})
        else:
            swap(layer.lora_A, nn.Parameter(layer.lora_A * 2))
        torch.testing.assert_close(layer(x), x @ layer.effective_weight().mT + layer.bias, rtol=1e-5, atol=1e-5)


def test_nothing_is_kept_of_fake_tensors():
    layer, x = LinearPC.from_linear(nn.Linear(24, 40), rank=4, dropout=0.5), torch.randn(3, 24)
    for mode in (torch.no_grad, torch.enable_grad):
        for _ in range(2):
            with mode(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
                assert layer(fake.from_tensor(x)).shape == (3, 40)
            with mode():
                assert torch.isfinite(layer(x)).all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_a_model_without_values_gives_shapes(mode):
    layer = LinearPC.from_linear(nn.Linear(24, 40), rank=4, dropout=0.5).to("meta")
    for _ in range(2):
        with mode():
            assert layer(torch.empty(3, 24, device="meta")).shape == (3, 40)


def test_nothing_is_kept_of_factors_made_in_inference_mode():
    with torch.inference_mode():
        given = factors()
        before = len(pair._kept)
        D, E = pair.kept_pair(*given, torch.float32)
        torch.testing.assert_close(E.double() @ D.double(), change(*given), rtol=1e-5, atol=1e-4)
        assert len(pair._kept) == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_layer_follows_its_training(mode):
    """Evaluation between the steps of an optimizer, with an exponential average put in its place and taken out."""
    torch.manual_seed(0)
    layer = LinearPC.from_linear(nn.Linear(24, 40), rank=4)
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=0.1)
    x = torch.randn(3, 24)

    def check():
        with mode():
            y = layer(x)
        torch.testing.assert_close(y, x @ layer.effective_weight().mT + layer.bias, rtol=1e-5, atol=1e-5)

    for _ in range(3):
        check()
        layer(x).square().sum().backward()
        optimizer.step()
        check()
        held = {name: getattr(layer, name).detach().clone() for name in ("lora_A", "lora_B")}
        for name, value in held.items():
            getattr(layer, name).data.copy_(value / 2)
        check()
        for name, value in held.items():
            getattr(layer, name).data.copy_(value)
        check()


FUSED = {
    "AdamW": partial(torch.optim.AdamW, lr=0.1, weight_decay=0),
    "SGD": partial(torch.optim.SGD, lr=1.0),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.1),
}


@pytest.mark.parametrize("train", ["A", "B", "both"])
@pytest.mark.parametrize("make", FUSED.values(), ids=FUSED)
def test_a_fused_step_that_changes_few_entries_is_seen(make, train):
    """It writes past the version of a tensor; an input of one column changes nothing else of ``A``."""
    torch.manual_seed(0)
    layer = LinearPC.from_linear(nn.Linear(2048, 24), rank=4, train=train)
    optimizer = make([p for p in (layer.lora_A, layer.lora_B) if p.requires_grad], fused=True)
    x = F.one_hot(torch.tensor([1234]), 2048).float()
    weight, versions = layer.weight, [layer.lora_A._version, layer.lora_B._version]
    for _ in range(3):
        with torch.no_grad():
            right = x @ layer.effective_weight().mT + layer.bias
            torch.testing.assert_close(layer(x), right, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(F.linear(x, weight, layer.bias), right, rtol=1e-5, atol=1e-5)
        optimizer.zero_grad()
        layer(x).sum().backward()
        optimizer.step()
        with torch.no_grad():
            assert (layer(x) - right).abs().max() > 1e-3
    assert [layer.lora_A._version, layer.lora_B._version] == versions, "else the optimizers tell by themselves"


@pytest.mark.parametrize("M", [24, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["auto", "merged"])
def test_a_layer_starts_with_the_bits_of_the_plain_one(M, dtype, backend, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(backends, "_chosen", backend)
    plain = nn.Linear(33, 40, dtype=dtype).requires_grad_(False)
    layer, x = LinearPC.from_linear(plain, rank=5), torch.randn(2, M // 2, 33, dtype=dtype)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            assert torch.equal(layer(x), plain(x))
    with torch.no_grad():
        assert torch.equal(layer(x.transpose(0, 1)), plain(x.transpose(0, 1)))


def test_without_gradients_there_is_no_graph_and_the_same_output():
    t = inputs(intact=True)
    arguments = {"scaling": 1.5, "A0": t.A0, "B0": t.B0}
    with_grad = pc_linear(t.x, t.weight, t.A, t.B, t.bias, **arguments)
    with torch.no_grad():
        without = pc_linear(t.x, t.weight, t.A, t.B, t.bias, **arguments)
    assert with_grad.grad_fn is not None
    assert without.grad_fn is None
    torch.testing.assert_close(with_grad, without, rtol=1e-5, atol=1e-5)
