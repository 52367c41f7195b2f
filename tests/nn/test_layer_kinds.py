"""Which weights have a kind, and every kind's weight as a matrix and back."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ipca.nn import LinearPC
from ipca.nn.conv import ConvPC
from ipca.nn.embedding import EmbeddingPC
from ipca.nn.experts import StackPC
from ipca.nn.layer_kinds import ExpertStack, from_matrix, layer_kind, read_layer, stack_names, to_matrix
from ipca.nn.registry import layer_class


def stack(transposed: bool) -> ExpertStack:
    return ExpertStack(nn.Parameter(torch.randn(2, 5, 7)), transposed)


KINDS = {
    "linear": (lambda: nn.Linear(5, 7), (7, 5), LinearPC),
    "conv1d": (lambda: Conv1D(7, 5), (7, 5), LinearPC),
    "embedding": (lambda: nn.Embedding(5, 7), (7, 5), EmbeddingPC),
    "conv": (lambda: nn.Conv2d(5, 7, (3, 2)), (7, 30), ConvPC),
    "experts": (lambda: stack(False), (2, 5, 7), StackPC),
    "experts transposed": (lambda: stack(True), (2, 7, 5), StackPC),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_as_a_matrix_and_back(kind):
    build, shape, adapts = KINDS[kind]
    layer = build()
    assert layer_kind(layer) == kind
    assert layer_class(kind) is adapts
    matrix, bias = read_layer(layer)
    assert matrix.shape == shape
    assert not matrix.requires_grad
    assert matrix.data_ptr() == layer.weight.data_ptr()
    assert (bias is None) == (kind in ("embedding", "experts", "experts transposed"))
    assert torch.equal(matrix, to_matrix(kind, layer.weight))
    assert torch.equal(from_matrix(kind, matrix, layer.weight.shape), layer.weight)


class Subclass(nn.Embedding):
    def forward(self, ids):
        return 2 * super().forward(ids)


@pytest.mark.parametrize(
    "module",
    [Subclass(4, 4), nn.ConvTranspose2d(2, 2, 2), nn.LayerNorm(4), nn.EmbeddingBag(4, 4)],
)
def test_other_modules_have_no_kind(module):
    assert layer_kind(module) is None


def test_stacks_are_three_dimensional_parameters_of_two_weights_or_more():
    module = nn.Module()
    for name, shape in (("one", (1, 4, 4)), ("two", (2, 4, 4)), ("matrix", (4, 4)), ("four", (2, 2, 2, 2))):
        module.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    assert stack_names(module) == ["two"]
    assert stack_names(nn.Conv1d(4, 4, 3)) == []
    assert stack_names(nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3)).parametrizations.weight) == []
