"""The hash of a tensor: the same for the same values, another for anything else."""

import hashlib

import pytest
import torch

from ipca._hashing import tensor_sha256


def test_digest_is_that_of_dtype_shape_and_bytes():
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    digest = hashlib.sha256(b"(2, 3)" + tensor.numpy().tobytes()).hexdigest()
    assert tensor_sha256(tensor) == f"float32-{digest}"


def test_a_single_number_has_one_too():
    digest = hashlib.sha256(b"()" + torch.tensor(5).numpy().tobytes()).hexdigest()
    assert tensor_sha256(torch.tensor(5)) == f"int64-{digest}"
    assert tensor_sha256(torch.tensor([5])) != f"int64-{digest}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.bool])
@pytest.mark.parametrize("shape", [(3,), (1, 2), (1024, 3), (1025, 3), (2500, 2), (0, 4), (4, 0), (2, 3, 4)])
def test_memory_layout_does_not_count(shape, dtype):
    tensor = torch.randn(shape).to(dtype)
    digest = tensor_sha256(tensor)
    turned = tensor.movedim(0, -1).contiguous().movedim(-1, 0)
    spread = torch.stack([tensor, tensor], dim=-1)[..., 0]
    assert turned.shape == spread.shape == tensor.shape
    assert tensor_sha256(turned) == tensor_sha256(spread) == tensor_sha256(tensor.clone()) == digest
    assert digest.startswith(str(dtype).removeprefix("torch.") + "-")
    assert len(digest.partition("-")[2]) == 64


def test_gradient_tracking_does_not_count():
    tensor = torch.randn(3, 4)
    assert tensor_sha256(torch.nn.Parameter(tensor)) == tensor_sha256(tensor)
    assert tensor_sha256(tensor.clone().requires_grad_().mul(1)) == tensor_sha256(tensor)


@pytest.mark.parametrize("row", [0, 1023, 1024, 2048])
def test_one_bit_anywhere_counts(row):
    tensor = torch.randn(2049, 3)
    other = tensor.clone()
    other[row, 2] = torch.nextafter(other[row, 2], torch.tensor(9.0))
    assert tensor_sha256(other) != tensor_sha256(tensor)


def test_dtype_shape_and_order_count():
    tensor = torch.zeros(4, 6)
    others = [tensor.half(), tensor.bfloat16(), tensor.reshape(6, 4), tensor.flatten(), -tensor, tensor[:2]]
    digests = {tensor_sha256(t) for t in (tensor, *others)}
    assert len(digests) == 7
    square = torch.randn(5, 5)
    assert tensor_sha256(square) != tensor_sha256(square.mT)


@pytest.mark.parametrize("rows", [1, 1025, 2049])
def test_a_chunk_of_one_value(rows):
    tensor = torch.randn(1, rows).mT
    assert tensor_sha256(tensor) == tensor_sha256(tensor.clone(memory_format=torch.contiguous_format))
    spread = torch.randn(rows, 2)[:, :1]
    assert tensor_sha256(spread) == tensor_sha256(spread + 0)
