"""States of a layer: merged, disabled, plain again, saved, loaded, copied, cast and moved."""

import copy
import io
import json
import math
import sys
import threading
from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import nn
from transformers.pytorch_utils import Conv1D

import ipca
import ipca.nn.initialization
from ipca import Window
from ipca.nn import LinearPC

FORMS = ("residual", "intact")


def trained(form: str = "residual", kind: str = "linear", **options) -> tuple[nn.Module, LinearPC]:
    plain = Conv1D(37, 23) if kind == "conv1d" else nn.Linear(23, 37, bias=kind == "linear")
    if kind == "conv1d":
        nn.init.normal_(plain.weight, std=0.3)
    layer = LinearPC.from_linear(plain, rank=5, form=form, **options)
    with torch.no_grad():
        layer.lora_A.add_(0.1 * torch.randn_like(layer.lora_A))
        layer.lora_B.add_(0.1 * torch.randn_like(layer.lora_B))
    return plain, layer


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    return ((x.double() - y.double()).norm() / y.double().norm()).item()


def wide_weight(layer: LinearPC) -> torch.Tensor:
    low = layer.lora_B.double() @ layer.lora_A.double()
    if layer.form == "intact":
        low = low - layer.lora_B0.double() @ layer.lora_A0.double()
    return (layer.base_weight.double() + layer.scaling * low).detach()


def bits(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in layer.state_dict().items()}


def same(layer: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = layer.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[key], value) for key, value in before.items())


@pytest.mark.parametrize("form", FORMS)
def test_merge_and_unmerge_are_exact(form):
    _, layer = trained(form)
    layer.eval()
    x = torch.randn(8, 23)
    y, weight, state = layer(x), layer.weight.clone(), copy.deepcopy(layer.state_dict())
    layer.merge()
    layer.merge()
    assert layer.merged
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert relative(layer(x), y) <= 1e-6
    assert layer.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())
    assert "merged" in repr(layer)
    layer.unmerge()
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer(x), y)


def test_merged_layer_cannot_train():
    _, layer = trained()
    layer.merge()
    with pytest.raises(RuntimeError, match=r"merged LinearPC cannot train: call unmerge"):
        layer(torch.randn(2, 23))
    with torch.no_grad():
        layer(torch.randn(2, 23))
    layer.unmerge()
    layer(torch.randn(2, 23)).sum().backward()
    assert layer.lora_A.grad is not None


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("merged", [False, True])
def test_to_linear_gives_the_original_type_back(kind, form, merged):
    layer, adapted = trained(form, kind)
    adapted.eval()
    x = torch.randn(3, 23)
    y = adapted(x)
    if merged:
        adapted.merge()
    back, base = adapted.to_linear(), adapted.to_linear(base=True)
    assert type(back) is type(base) is type(layer)
    assert (back.bias is None) == (layer.bias is None)
    assert relative(back(x), y) <= 1e-6
    assert torch.equal(base.weight, layer.weight) if form == "intact" else relative(base(x), layer(x)) <= 1e-6
    with torch.no_grad():
        for parameter in (*back.parameters(), *base.parameters()):
            parameter.zero_()
    adapted.unmerge()
    assert torch.equal(adapted(x), y)


@pytest.mark.parametrize("first", [0, 1])
def test_blocks_that_overlap_end_in_any_order(first):
    _, layer = trained()
    blocks = [ExitStack(), ExitStack()]
    for block in blocks:
        block.enter_context(layer.disabled())
    blocks[first].close()
    assert layer.is_disabled
    blocks[1 - first].close()
    assert not layer.is_disabled


def test_generators_that_disable_may_be_closed_in_their_order():
    _, layer = trained()

    def outputs():
        with layer.disabled():
            yield 1

    some, others = outputs(), outputs()
    assert next(some) == next(others) == 1
    with pytest.raises(KeyError):
        some.throw(KeyError)
    assert layer.is_disabled
    others.close()
    assert not layer.is_disabled


def test_blocks_of_many_threads_are_all_counted():
    model = nn.Sequential(trained()[1])
    wrong = []

    def run():
        for _ in range(2000):
            with ipca.disabled(model):
                if not model[0].is_disabled:
                    wrong.append(1)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    assert not model[0].is_disabled


@pytest.mark.parametrize("form", FORMS)
def test_blocks_compile_within_and_around_a_model(form):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    _, layer = trained(form)
    x, counter = torch.randn(3, 23), CompileCounter()

    def change(x):
        with layer.disabled():
            base = layer(x)
        return layer(x) - base

    expected = change(x)
    assert torch.equal(torch.compile(change, backend="eager", fullgraph=True)(x), expected)
    assert not layer.is_disabled
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    y = compiled(x)
    with layer.disabled():
        base = compiled(x)
        with layer.disabled():
            assert torch.equal(compiled(x), base)
    assert torch.equal(y - base, expected)
    assert counter.frame_count == 2  # however deep the blocks are nested


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("merged", [False, True])
def test_disabled_gives_the_base_function(form, merged):
    linear, layer = trained(form)
    layer.eval()
    if merged:
        layer.merge()
    x = torch.randn(8, 23)
    y = layer(x)
    assert relative(y, linear(x)) > 1e-2
    with layer.disabled():
        with layer.disabled():
            pass
        assert relative(layer(x), linear(x)) <= (0.0 if form == "intact" else 1e-5)
    assert torch.equal(layer(x), y)
    with pytest.raises((ValueError, RuntimeError)), layer.disabled():
        layer(x.mT)
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize(("device", "assign"), [("cpu", False), ("cpu", True), ("meta", True)])
@pytest.mark.parametrize("form", FORMS)
def test_plain_state_dict_loads_and_sets_the_window(form, device, assign):
    plain = nn.Sequential(nn.Linear(23, 37), nn.ReLU(), nn.Sequential(nn.Linear(37, 11, bias=False)))
    model = nn.Sequential(
        LinearPC(23, 37, 5, "principal", form=form, alpha=8, device=device),
        nn.ReLU(),
        nn.Sequential(LinearPC(37, 11, 3, bias=False, form=form, device=device)),
    )
    model.load_state_dict(plain.state_dict(), strict=True, assign=assign)
    assert (model[0].window, model[2][0].window) == (Window(0, 5), Window(4, 3))
    assert model[0].certificate.holds
    assert model[0].svd_report.certified
    x = torch.randn(6, 23)
    assert relative(model(x), plain(x)) <= (0.0 if form == "intact" else 1e-5)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        f"{layer}.lora_{factor}" for layer in ("0", "2.0") for factor in "AB"
    ]
    model(x).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_plain_state_dict_of_another_dtype_is_cast_first(dtype):
    plain, layer = nn.Linear(23, 37, dtype=dtype), LinearPC(23, 37, 5)
    layer.load_state_dict(plain.state_dict())
    assert layer.weight.dtype == layer.lora_A.dtype == torch.float32
    assert relative(layer.effective_weight(), plain.weight.float()) <= 1e-6
    taken = LinearPC(23, 37, 5)
    taken.load_state_dict(plain.state_dict(), assign=True)
    assert taken.weight.dtype == dtype
    assert relative(taken.effective_weight(), plain.weight) <= torch.finfo(dtype).eps


def test_plain_state_dict_loads_into_a_merged_layer():
    plain, layer = nn.Linear(23, 37), LinearPC(23, 37, 5)
    layer.merge()
    layer.load_state_dict(plain.state_dict())
    assert not layer.merged
    assert relative(layer.effective_weight(), plain.weight) <= 1e-6


@pytest.mark.parametrize("through", ["memory", "torch.save", "safetensors"])
@pytest.mark.parametrize("form", FORMS)
def test_own_state_dict_restores_without_svd(form, through, monkeypatch):
    _, layer = trained(form, alpha=8.0)
    state = nn.Sequential(layer).state_dict()
    if through == "torch.save":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    elif through == "safetensors":
        state = load(save({key: value.contiguous() for key, value in state.items()}))
    other = nn.Sequential(LinearPC(23, 37, 5, "principal", alpha=8.0, form=form))
    waiting = nn.Sequential(LinearPC(23, 37, 5, alpha=8.0, form=form, device="meta"))
    monkeypatch.setattr(ipca.nn.initialization, "window_svd", lambda *a, **k: pytest.fail("an SVD ran"))
    other.load_state_dict(state)
    waiting.load_state_dict(state, assign=True)
    x = torch.randn(6, 23)
    for model in (other, waiting):
        assert same(model, nn.Sequential(layer).state_dict())
        assert model[0].window == layer.window == Window(9, 5)
        assert model[0].base_sha256 == layer.base_sha256
        assert model[0].svd_report is model[0].certificate is None
        assert torch.equal(model(x), layer(x))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"alpha": 9.0}, r"0: the state dict was saved with alpha=9\.0, this layer has 5\.0"),
        ({"form": "intact"}, "0: the state dict was saved with form='intact', this layer has 'residual'"),
        ({"train": "A"}, "0: the state dict was saved with train='A', this layer has 'both'"),
        ({"rank": 4, "alpha": 5.0}, "0: the state dict was saved with rank=4, this layer has 5"),
    ],
    ids=["alpha", "form", "train", "rank"],
)
def test_state_dict_of_other_settings_is_reported(change, words):
    source = nn.Sequential(LinearPC.from_linear(nn.Linear(23, 37), **{"rank": 5, "form": "residual", **change}))
    model = nn.Sequential(LinearPC(23, 37, 5, form="residual"))
    before = bits(model)
    with pytest.raises(RuntimeError, match=words):
        model.load_state_dict(source.state_dict())
    assert same(model, before)


def test_bad_plain_weights_are_reported_and_nothing_changes():
    model = nn.Sequential(LinearPC(23, 37, 5), LinearPC(37, 37, 5))
    model[1].merge()
    state = nn.Sequential(nn.Linear(23, 37), nn.Linear(37, 36)).state_dict()
    state["0.weight"][3, 4] = math.nan
    before, merged = bits(model), model[1].weight.clone()
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(state)
    assert "0: the tensor holds NaN or Inf" in str(caught.value)
    assert "1: the weight has shape (36, 37), this layer (37, 37)" in str(caught.value)
    assert same(model, before)
    assert torch.equal(model[1].weight, merged)


def test_missing_and_unexpected_keys_are_reported_as_by_nn_linear():
    with pytest.raises(RuntimeError, match=r'Missing key.*"bias"'):
        LinearPC(8, 8, 2).load_state_dict({"weight": torch.randn(8, 8)})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"scale"'):
        LinearPC(8, 8, 2).load_state_dict({**nn.Linear(8, 8).state_dict(), "scale": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r'Missing key.*"base_weight"'):
        LinearPC(8, 8, 2).load_state_dict({"bias": torch.randn(8)})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keys", [("lora_",), ("lora_", "base_weight", "bias"), ("lora_B",)], ids=str)
def test_factors_of_another_window_without_their_record_are_refused(keys, form):
    linear = nn.Linear(23, 17)
    layer, other = (LinearPC.from_linear(linear, window, rank=5, form=form) for window in ("minor", "principal"))
    state = {key: value for key, value in other.state_dict().items() if key.startswith(keys)}
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match="the frozen factors of another window and no _extra_state"):
        layer.load_state_dict(state, strict=False)
    assert same(layer, before)
    assert layer.window.index == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_factors_of_the_same_window_load_without_their_record(form, dtype):
    linear = nn.Linear(23, 17)
    layer, other = (LinearPC.from_linear(linear, "principal", rank=5, form=form) for _ in range(2))
    with torch.no_grad():
        other.lora_B.mul_(2)
    state = {key: value.to(dtype) for key, value in other.state_dict().items() if key.startswith("lora_")}
    layer.load_state_dict(state, strict=False)
    assert relative(layer.weight, other.weight) <= 4 * torch.finfo(dtype).eps


def test_record_in_the_state_dict_is_json():
    _, layer = trained(alpha=8.0)
    record = json.loads(bytes(layer.state_dict()["_extra_state"].tolist()))
    assert record == {"rank": 5, "alpha": 8.0, "form": "residual", "start": 9, "base_sha256": layer.base_sha256}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_copy_is_independent_and_complete(form, merged):
    _, layer = trained(form)
    layer.eval()
    if merged:
        layer.merge()
    twin, x = copy.deepcopy(layer), torch.randn(4, 23)
    y = layer(x)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert torch.equal(twin(x), y)
    twin.unmerge()
    assert relative(twin(x), y) <= 1e-6


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_cast_keeps_the_effective_weight(form, dtype, merged):
    _, layer = trained(form, alpha=8.0)
    weight = wide_weight(layer)
    if merged:
        layer.merge()
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    for step in (dtype, torch.float32):
        layer.to(step)
        assert layer.merged == merged
        if merged:
            assert relative(layer.weight, weight) <= 2 * eps
        layer.unmerge()
        assert {t.dtype for t in (*layer.parameters(), *layer.buffers())} == {step}
        assert relative(wide_weight(layer), weight) <= 2 * eps
        if merged:
            layer.merge()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast_of_the_residual_form_rounds_the_sum_once(dtype):
    linear = nn.Linear(64, 48, bias=False)
    U, _, Vh = torch.linalg.svd(torch.randn(48, 64), full_matrices=False)
    linear.weight = nn.Parameter(U @ torch.diag(0.5 ** torch.arange(48.0)) @ Vh)
    layer = LinearPC.from_linear(linear, "principal", rank=8, alpha=5, form="residual")
    parts = [t.detach().to(dtype).double() for t in (layer.base_weight, layer.lora_B0, layer.lora_A0)]
    each_part_rounded = relative(parts[0] + layer.scaling * parts[1] @ parts[2], linear.weight)
    off = relative(wide_weight(layer.to(dtype)), linear.weight)
    eps = torch.finfo(dtype).eps
    assert off <= eps / 20
    assert each_part_rounded >= eps / 5


def test_move_to_meta_and_back_keeps_the_description():
    _, layer = trained()
    state = copy.deepcopy(layer.state_dict())
    layer.to("meta").to_empty(device="cpu").load_state_dict(state)
    assert same(layer, state)
    assert layer.window == Window(9, 5)


def test_a_plain_load_of_an_adapted_state_dict_misses_the_weight():
    plain = nn.Sequential(nn.Linear(8, 8))
    adapted = ipca.apply_pc(copy.deepcopy(plain), rank=2, progress=False)
    assert "0.weight" in plain.load_state_dict(adapted.state_dict(), strict=False).missing_keys


def test_a_base_weight_without_its_factors_is_refused():
    _, layer = trained("residual")
    before = copy.deepcopy(layer.state_dict())
    partial = {key: value for key, value in before.items() if "lora" not in key}
    with pytest.raises(
        RuntimeError, match=r"base_weight, which means nothing without lora_A, lora_B, lora_A0, lora_B0"
    ):
        layer.load_state_dict(partial, strict=False)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_a_plain_conv1d_state_dict_sets_the_window_of_its_transpose():
    first, second = Conv1D(16, 16), Conv1D(16, 16)
    nn.init.normal_(second.weight)
    layer = LinearPC.from_linear(first, rank=4)
    layer.load_state_dict(second.state_dict())
    x = torch.randn(5, 16)
    torch.testing.assert_close(layer(x), second(x), atol=1e-5, rtol=1e-5)


def test_factors_that_overflow_their_dtype_are_refused():
    linear = nn.Linear(8, 8)
    with torch.no_grad():
        linear.weight.mul_(1e12)
    with pytest.raises(RuntimeError, match="factors overflow"):
        LinearPC.from_linear(linear, rank=2, form="intact", adapter_dtype=torch.float16)


def test_conv1d_with_one_input():
    LinearPC.from_linear(Conv1D(1025, 1), rank=1)


@pytest.mark.parametrize("shape", [(8, 8), (8, 12)])
def test_plain_conv1d_state_dict_loads_into_its_layer(shape):
    conv = Conv1D(*shape)
    layer = LinearPC.from_linear(conv, rank=2)
    layer.load_state_dict(conv.state_dict())
    x = torch.randn(3, shape[1])
    assert torch.allclose(layer(x), conv(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("alpha", "words"), [(1e-12, "factors overflow"), (1e20, "factors are all 0")])
def test_factors_that_leave_the_range_of_float16(form, alpha, words):
    with pytest.raises((ValueError, RuntimeError), match=words):
        LinearPC.from_linear(nn.Linear(20, 20).half(), rank=4, alpha=alpha, form=form)
