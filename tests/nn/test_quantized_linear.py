"""QuantizedLinearPC: a window beside a quantized linear layer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ipca
from ipca.nn import QuantizedLinearPC
from ipca.nn.quantization import dequantize, quantized_sha256
from tests.helpers.quantized_layers import KINDS, quantized_layer

OUT, IN, RANK = 33, 65, 5


def made(kind, *, dtype=torch.float32, trained=False, bias=True, unquantized=False, **options):
    W = torch.randn(OUT, IN, dtype=dtype)
    base = quantized_layer(kind, W, torch.randn(OUT, dtype=dtype) if bias else None)
    layer = QuantizedLinearPC.from_linear(base, rank=RANK, unquantized=W if unquantized else None, **options)
    if trained:
        with torch.no_grad():
            layer.lora_A.add_(0.1 * torch.randn_like(layer.lora_A))
            layer.lora_B.add_(0.1 * torch.randn_like(layer.lora_B))
    return layer, W


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_before_training_the_output_is_the_bases_to_the_bit(kind, dtype):
    layer, _ = made(kind, dtype=dtype, dropout=0.3)
    for shape in ((7, IN), (2, 3, IN), (IN,), (0, IN)):
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        y = layer(x)
        assert torch.equal(y, layer.base(x))
        assert y.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_in_evaluation_too_and_with_strided_input(kind):
    layer, _ = made(kind)
    layer.eval()
    x = torch.randn(IN, 7).mT
    assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("unquantized", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_window_is_that_of_the_original_or_of_the_dequantized_weight(kind, unquantized):
    layer, W = made(kind, unquantized=unquantized)
    source = W if unquantized else dequantize(layer.base)
    found = ipca.window_svd(source, layer.window, dtype=torch.float64)
    want = (found.U * found.S) @ found.Vh
    got = layer.lora_B0.double() @ layer.lora_A0.double()
    assert (got - want).abs().max() < 1e-5
    assert layer.svd_report.source == ("unquantized" if unquantized else "dequantized")
    assert layer.base_sha256 == quantized_sha256(layer.base)


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_of_the_trained_layer(kind):
    layer, _ = made(kind, trained=True, alpha=2 * RANK)
    x, dy = torch.randn(2, 7, IN, requires_grad=True), torch.randn(2, 7, OUT)
    layer(x).backward(dy)
    assert all(p.grad is None for p in layer.base.parameters())
    z, A, B = (t.detach().double().requires_grad_() for t in (x, layer.lora_A, layer.lora_B))
    change = 2 * (B @ A - layer.lora_B0.double() @ layer.lora_A0.double())
    y = F.linear(z, dequantize(layer.base).double() + change, layer.base.bias.double())
    y.backward(dy.double())
    for got, want in ((layer(x), y), (x.grad, z.grad), (layer.lora_A.grad, A.grad), (layer.lora_B.grad, B.grad)):
        assert (got.double() - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_merged_disabled_and_plain(kind):
    layer, _ = made(kind, trained=True)
    layer.eval()
    x = torch.randn(7, IN)
    trained, untouched = layer(x), layer.base(x)
    with layer.disabled():
        assert torch.equal(layer(x), untouched)
        assert torch.equal(layer.weight, dequantize(layer.base))
    layer.merge()
    merged = layer(x)
    plain = layer.to_plain()
    layer.unmerge()
    assert torch.equal(layer(x), trained)
    assert type(plain) is nn.Linear
    assert torch.equal(plain(x), merged)
    rounding = 0.01 if kind == "int8" else 1e-5  # LLM.int8() rounds the input of its product to 8 bits too
    for y in (merged, F.linear(x, layer.weight, layer.base.bias)):
        assert (y - trained).norm() < rounding * trained.norm()
    assert layer.to_plain(base=True) is layer.base
    assert (trained - untouched).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_the_output_before_training_is_the_bases(kind):
    layer, _ = made(kind)
    x = torch.randn(7, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert torch.equal(y, layer.base(x))
    y.float().sum().backward()
    assert layer.lora_A.grad.any()


def test_cast_with_its_model_it_still_computes_what_its_base_does():
    layer, _ = made("nf4")
    layer.to(torch.bfloat16)
    x = torch.randn(7, IN, dtype=torch.bfloat16, requires_grad=True)
    assert layer.lora_A.dtype == torch.bfloat16
    assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("kind", ["nf4", "torchao-int8"])
def test_torch_compile_computes_the_same(kind):
    layer, _ = made(kind, trained=True)
    x = torch.randn(7, IN, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager")
    assert (compiled(x) - layer(x)).abs().max() < 1e-4


def test_dropout_acts_on_the_low_rank_part_alone():
    layer, _ = made("nf4", trained=True, dropout=0.5)
    x = torch.randn(400, IN, requires_grad=True)
    low = (layer(x) - layer.base(x)).detach()
    layer.eval()
    assert (low - (layer(x) - layer.base(x))).abs().max() > 0.1
    layer.train()
    with layer.disabled():
        assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_computes_the_same_and_stands_alone(kind):
    layer, _ = made(kind, trained=True)
    x = torch.randn(7, IN, requires_grad=True)
    before = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        twin.lora_A.zero_()
    assert torch.equal(layer(x), before)


def test_the_factors_keep_their_own_dtype():
    layer, _ = made("nf4", dtype=torch.bfloat16)
    assert layer.lora_A.dtype == layer.lora_B0.dtype == torch.float32
    layer, _ = made("nf4", adapter_dtype=torch.float64)
    assert layer.lora_A.dtype == torch.float64


def test_a_packing_cpu_does_not_pack_in_evaluation():
    """Where bitsandbytes would, in place and for good: then nothing could train any more."""
    base = quantized_layer("nf4", torch.randn(32, 64))
    base.support_avx512bf16_for_cpu = True
    layer = QuantizedLinearPC.from_linear(base, rank=RANK)
    digest = quantized_sha256(base)
    layer.eval()(torch.randn(3, 64))
    assert not getattr(base.weight.quant_state, "packing_format_for_cpu", False)
    assert quantized_sha256(base) == digest
    assert layer.to_plain(base=True).support_avx512bf16_for_cpu


def test_the_repr_says_what_it_is():
    layer, _ = made("nf4")
    text = repr(layer)
    assert text.startswith("QuantizedLinearPC(\n  nf4, in_features=65, out_features=33, bias=True, window=[14, 19)")
    assert "(base): Linear4bit" in text
    layer, _ = made("int8", bias=False)
    assert "bias=False" in repr(layer)


def test_its_state_restores_the_factors():
    layer, _ = made("torchao-int8", trained=True)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.lora_A.zero_()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, IN, requires_grad=True)
    assert torch.equal(other(x), layer(x))
    assert other.window == layer.window


def test_a_plain_weight_cannot_be_loaded():
    layer, W = made("nf4")
    with pytest.raises(RuntimeError, match="a plain weight cannot be loaded beside a quantized one"):
        layer.load_state_dict({"weight": W})


def test_a_plain_layer_is_refused():
    with pytest.raises(TypeError, match="expected a layer with a quantized weight, got Linear; use LinearPC"):
        QuantizedLinearPC.from_linear(nn.Linear(IN, OUT), rank=RANK)


def test_the_residual_form_is_refused():
    with pytest.raises(ValueError, match=r"quantize W_res anew, which changes .*; use the intact form"):
        made("nf4", form="residual")


def test_a_layer_that_cannot_be_worked_with_is_refused():
    bnb = pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match="cannot adapt a Linear4bit: its weight is not quantized yet"):
        QuantizedLinearPC.from_linear(bnb.nn.Linear4bit(IN, OUT), rank=RANK)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda W: W.mT, ValueError, r"shape \(65, 33\), the layer \(33, 65\)"),
        (lambda W: W.to(torch.int8), TypeError, r"must hold floats, got torch.int8"),
        (lambda W: W.flip(0), ValueError, r"no nearer to the quantized one than 0 is \(‖W − Q‖ / ‖W‖ = 1\.\d\d\)"),
        (lambda W: W * torch.nan, ValueError, r"no nearer to the quantized one"),
    ],
)
def test_what_cannot_be_the_original_is_refused(change, error, words):
    W = torch.randn(OUT, IN)
    base = quantized_layer("nf4", W)
    with pytest.raises(error, match=words):
        QuantizedLinearPC.from_linear(base, rank=RANK, unquantized=change(W))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_on_a_gpu_the_output_before_training_is_the_bases(kind):
    W = torch.randn(96, 128, dtype=torch.bfloat16)
    layer = QuantizedLinearPC.from_linear(quantized_layer(kind, W).cuda(), rank=RANK, unquantized=W)
    x = torch.randn(7, 128, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    y = layer(x)
    assert torch.equal(y, layer.base(x))
    y.sum().backward()
    assert layer.lora_A.grad.isfinite().all()
    assert layer.lora_B.grad.any()


def test_a_plain_layer_has_one_dtype_though_bitsandbytes_casts_the_bias():
    W = torch.randn(OUT, IN, dtype=torch.bfloat16)
    base = quantized_layer("nf4", W, torch.randn(OUT), compute_dtype=torch.float32)
    plain = QuantizedLinearPC.from_linear(base, rank=RANK).to_plain()
    assert (plain.weight.dtype, plain.bias.dtype) == (torch.bfloat16, torch.bfloat16)
    assert base.bias.dtype == torch.float32
