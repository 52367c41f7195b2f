"""Quantized layers: which they are, their weights as floats and back, and their hash."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ipca.nn.quantization import (
    dequantize,
    quantization_kind,
    quantize_like,
    quantized_sha256,
    unsupported_quantization,
)
from tests.helpers.quantized_layers import KINDS, TORCHAO, quantized_by, quantized_layer

LARGEST_ERROR = {"nf4": 0.16, "fp4": 0.17, "int8": 0.5 / 127, "torchao-int8": 0.5 / 127, "torchao-int4": 0.5 / 7}
"""Half the widest gap between two levels, over the largest weight."""


def layer_and_weight(kind, shape=(33, 65), dtype=torch.float32):
    W, bias = torch.randn(shape, dtype=dtype), torch.randn(shape[0], dtype=dtype)
    return quantized_layer(kind, W, bias), W


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_layer_has_its_kind_and_nothing_against_it(kind):
    layer, _ = layer_and_weight(kind)
    assert quantization_kind(layer) == kind
    assert unsupported_quantization(layer) is None


@pytest.mark.parametrize("module", [nn.Linear(3, 4), nn.Conv1d(3, 4, 1), nn.LayerNorm(3), nn.Identity()])
def test_other_modules_have_none(module):
    assert quantization_kind(module) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_dequantized_weight_is_near_the_original_and_what_the_layer_multiplies_by(kind, dtype):
    layer, W = layer_and_weight(kind, dtype=dtype)
    Q = dequantize(layer)
    assert Q.is_floating_point()
    rounding = 2 * torch.finfo(torch.float16 if kind == "int8" else dtype).eps  # int8 of bitsandbytes goes by float16
    assert (Q.double() - W.double()).abs().max() <= (1.02 * LARGEST_ERROR[kind] + rounding) * W.double().abs().max()
    x = torch.randn(7, 65, dtype=dtype, requires_grad=True)
    want = F.linear(x.double(), Q.double(), layer.bias.double())
    plain = F.linear(x, Q.to(dtype), layer.bias)
    error, yardstick = ((y.double() - want).abs().max() for y in (layer(x), plain))
    assert error <= 2 * yardstick + 8 * torch.finfo(dtype).eps * want.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_the_original_quantized_again_is_the_same_layer_to_the_bit(kind):
    layer, W = layer_and_weight(kind)
    again = quantize_like(layer, W)
    assert type(again) is type(layer)
    assert torch.equal(dequantize(again), dequantize(layer))
    assert quantized_sha256(again) == quantized_sha256(layer)
    x = torch.randn(3, 65, requires_grad=True)
    assert torch.equal(again(x), layer(x))


@pytest.mark.parametrize("kind", KINDS)
def test_another_weight_is_quantized_and_leaves_the_first_layer_alone(kind):
    layer, _ = layer_and_weight(kind)
    x = torch.randn(3, 65, requires_grad=True)
    before, digest = layer(x), quantized_sha256(layer)
    V = torch.randn(33, 65)
    other = quantize_like(layer, V)
    assert (dequantize(other) - V).norm() < 0.3 * V.norm()
    error = (other(x) - F.linear(x, dequantize(other), layer.bias)).abs().max()
    assert error < 1e-4
    assert quantized_sha256(other) != digest
    assert torch.equal(layer(x), before)
    assert quantized_sha256(layer) == digest


@pytest.mark.parametrize(
    "options", [{"blocksize": 128}, {"compress_statistics": False}, {"quant_storage": torch.int16}]
)
def test_settings_of_4_bits_are_kept(options):
    W = torch.randn(48, 64)
    layer = quantized_layer("nf4", W, **options)
    again = quantize_like(layer, W)
    for name, value in options.items():
        assert getattr(again.weight, name) == value
    assert again.weight.quant_state.nested == layer.weight.quant_state.nested
    assert quantized_sha256(again) == quantized_sha256(layer)


def test_settings_of_torchao_are_kept():
    torchao = pytest.importorskip("torchao.quantization")
    W = torch.randn(48, 64, dtype=torch.bfloat16)
    configs = [
        torchao.Int8WeightOnlyConfig(granularity=torchao.PerTensor()),
        torchao.IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=torchao.PerGroup(16)),
        torchao.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=torchao.PerGroup(32), mapping_type=torchao.MappingType.ASYMMETRIC
        ),
    ]
    for config in configs:
        layer = quantized_by(config, W)
        again = quantize_like(layer, W)
        assert torch.equal(dequantize(again), dequantize(layer))
        assert quantized_sha256(again) == quantized_sha256(layer)


def test_the_kind_of_torchao_has_the_number_of_bits():
    torchao = pytest.importorskip("torchao.quantization")
    by_row = torchao.PerAxis(0)
    layer = quantized_by(torchao.IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=by_row), torch.randn(5, 8))
    assert quantization_kind(layer) == "torchao-int3"


@pytest.mark.parametrize("kind", KINDS)
def test_the_hash_stays_through_training_passes_and_copies(kind):
    layer, _ = layer_and_weight(kind)
    digest = quantized_sha256(layer)
    layer(torch.randn(3, 65, requires_grad=True)).sum().backward()
    assert quantized_sha256(layer) == digest == quantized_sha256(copy.deepcopy(layer))
    assert digest.startswith(f"{kind}-")


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
def test_the_hash_tells_scales_apart_that_belong_to_the_same_integers(kind):
    layer, W = layer_and_weight(kind)
    assert quantized_sha256(quantize_like(layer, 2 * W)) != quantized_sha256(layer)


def test_the_hash_does_not_depend_on_how_codes_are_stored():
    W = torch.randn(48, 64)
    digests = {
        quantized_sha256(quantized_layer("nf4", W, quant_storage=t)) for t in (torch.uint8, torch.int16, torch.float32)
    }
    assert len(digests) == 1


def test_a_plain_layer_is_refused():
    with pytest.raises(TypeError, match="expected a layer with a quantized weight, got Linear without one"):
        dequantize(nn.Linear(3, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_of_another_shape_is_refused(kind):
    layer, W = layer_and_weight(kind)
    with pytest.raises(ValueError, match=r"the weight has shape \(65, 33\), the layer takes \(33, 65\)"):
        quantize_like(layer, W.mT)


def test_a_weight_with_nan_is_refused():
    layer, W = layer_and_weight("nf4")
    W[3, 4] = torch.nan
    with pytest.raises(ValueError, match="must hold finite floats to be quantized"):
        quantize_like(layer, W)


def test_4_bits_that_are_not_quantized_yet_are_refused():
    bnb = pytest.importorskip("bitsandbytes")
    with pytest.raises(
        ValueError, match="not quantized yet; bitsandbytes does that when the model moves to its device"
    ):
        dequantize(bnb.nn.Linear4bit(8, 6))


def test_8_bits_that_are_not_quantized_yet_are_refused():
    bnb = pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match="not quantized yet"):
        dequantize(bnb.nn.Linear8bitLt(8, 6, has_fp16_weights=False))


def test_8_bits_that_keep_a_16_bit_weight_are_refused():
    bnb = pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match="load it with has_fp16_weights off"):
        dequantize(bnb.nn.Linear8bitLt(8, 6).to("cpu"))


def test_a_weight_packed_for_a_cpu_is_refused():
    layer, _ = layer_and_weight("nf4")
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="bitsandbytes packed its weight for evaluation on this CPU"):
        dequantize(layer)


def test_a_weight_on_the_meta_device_is_refused():
    bnb = pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match="its quantized weight is on the meta device; load the weights first"):
        dequantize(bnb.nn.Linear4bit(8, 6, device="meta"))


def test_a_weight_quantized_as_its_transpose_is_refused():
    layer, _ = layer_and_weight("nf4")
    layer.out_features, layer.in_features = 65, 33
    with pytest.raises(ValueError, match=r"quantized as \(33, 65\), not as \(out, in\)"):
        dequantize(layer)


def test_quantized_inputs_are_refused():
    torchao = pytest.importorskip("torchao.quantization")
    layer = quantized_by(torchao.Int8DynamicActivationInt8WeightConfig(), torch.randn(48, 64))
    with pytest.raises(ValueError, match="it quantizes its input too; use a weight-only configuration"):
        dequantize(layer)


def test_other_tensors_of_torchao_are_refused_by_name():
    torchao = pytest.importorskip("torchao.quantization")
    layer = quantized_by(torchao.Float8WeightOnlyConfig(), torch.randn(48, 64))
    assert quantization_kind(layer) == "torchao-Float8Tensor"
    with pytest.raises(ValueError, match="torchao's Float8Tensor is not supported; quantize with Int8WeightOnlyConfig"):
        dequantize(layer)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(TORCHAO)))
def test_a_gpu_dequantizes_to_what_it_multiplies_by(kind):
    W = torch.randn(96, 128, dtype=torch.bfloat16)
    layer = quantized_layer(kind, W).cuda()
    Q, x = dequantize(layer), torch.randn(5, 128, dtype=torch.bfloat16, device="cuda")
    assert (Q.cpu().double() - W.double()).norm() < 0.2 * W.double().norm()
    want = x.double() @ Q.double().mT
    assert (layer(x).double() - want).norm() < 0.03 * want.norm()  # int8 rounds its input to 8 bits too
    assert quantized_sha256(quantize_like(layer, Q)).startswith(f"{kind}-")
