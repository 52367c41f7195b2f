"""EmbeddingPC against a float64 table: forward, gradients, the padding row, settings, errors."""

import pytest
import torch
from torch import nn

from ipca import Window
from ipca.nn.embedding import EmbeddingPC
from tests.helpers.layer_kinds import relative

FORMS = ("residual", "intact")


def trained(form: str, **options) -> tuple[nn.Embedding, EmbeddingPC]:
    table = nn.Embedding(19, 11)
    layer = EmbeddingPC.from_layer(table, Window("middle", 3), form=form, **options)
    with torch.no_grad():
        layer.lora_A.add_(0.1 * torch.randn_like(layer.lora_A))
        layer.lora_B.add_(0.1 * torch.randn_like(layer.lora_B))
    return table, layer


@pytest.mark.parametrize("shape", [(), (5,), (3, 7), (2, 0), (2, 3, 4)])
@pytest.mark.parametrize("form", FORMS)
def test_output_and_gradients_are_those_of_the_effective_table(form, shape):
    _, layer = trained(form, alpha=4.5)
    ids = torch.randint(0, 19, shape)
    y = layer(ids)
    assert y.shape == (*shape, 11)
    dy = torch.randn_like(y)
    y.backward(dy)
    A, B = (t.detach().double().requires_grad_() for t in (layer.lora_A, layer.lora_B))
    low = B @ A - (layer.lora_B0.double() @ layer.lora_A0.double() if form == "intact" else 0.0)
    y64 = (layer.base_weight.double() + layer.scaling * low.mT)[ids]
    y64.backward(dy.double())
    for found, wanted in ((y, y64), (layer.lora_A.grad, A.grad), (layer.lora_B.grad, B.grad)):
        assert (found.double() - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_intact_form_is_exact_before_training_also_under_autocast(dtype):
    table, ids = nn.Embedding(19, 11, dtype=dtype), torch.randint(0, 19, (3, 7))
    layer = EmbeddingPC.from_layer(table, Window("middle", 3), form="intact")
    assert torch.equal(layer(ids), table(ids))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(ids), table(ids))
    assert layer(ids).dtype == dtype


def test_intact_form_shares_the_memory_of_the_table():
    table = nn.Embedding(19, 11)
    layer = EmbeddingPC.from_layer(table, Window("middle", 3), form="intact")
    assert layer.base_weight.data_ptr() == table.weight.data_ptr()
    assert layer.weight.shape == table.weight.shape
    assert (layer.out_features, layer.in_features) == (11, 19)
    assert layer.lora_A.shape == (3, 19)


@pytest.mark.parametrize("form", FORMS)
def test_the_row_of_a_padding_token_stays_zero(form):
    table, ids = nn.Embedding(19, 11, padding_idx=4), torch.arange(19)
    layer = EmbeddingPC.from_layer(table, Window("middle", 3), form=form)
    optimizer = torch.optim.Adam([layer.lora_A, layer.lora_B], lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        (layer(ids) ** 2).sum().backward()
        assert layer.lora_A.grad[:, 4].abs().max() == 0
        optimizer.step()
    assert layer(torch.tensor([4])).abs().max() <= 1e-6
    assert relative(layer(ids), table(ids)) > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_plain_again(form):
    table, layer = trained(form)
    ids = torch.randint(0, 19, (3, 7))
    back = layer.to_plain()
    assert type(back) is nn.Embedding
    assert repr(back) == repr(table)
    assert back.weight.is_contiguous()
    assert relative(back(ids), layer(ids)) <= 1e-6
    assert relative(layer.to_plain(base=True).weight, table.weight) <= (0.0 if form == "intact" else 1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_plain_state_dict_sets_the_window_anew(form):
    _, layer = trained(form)
    other, ids = nn.Embedding(19, 11), torch.randint(0, 19, (3, 7))
    layer.load_state_dict(other.state_dict())
    assert relative(layer(ids), other(ids)) <= 1e-6


@pytest.mark.parametrize(
    ("table", "options", "error", "words"),
    [
        (nn.Linear(4, 4), {}, TypeError, r"expected an nn\.Embedding, got Linear"),
        (nn.EmbeddingBag(4, 4), {}, TypeError, r"expected an nn\.Embedding, got EmbeddingBag"),
        (nn.Embedding(9, 6, max_norm=1.0), {}, ValueError, "cannot adapt this Embedding: its max_norm rewrites rows"),
        (nn.Embedding(9, 6, scale_grad_by_freq=True), {}, ValueError, "its sparse or scale_grad_by_freq"),
        (nn.Embedding(9, 6), {"dropout": 0.1}, ValueError, "dropout can drop nothing; set dropout=0"),
        (nn.Embedding(9, 2), {}, ValueError, r"rank 3 is above the 2 singular values of a \(2, 9\) weight"),
    ],
    ids=str,
)
def test_what_is_refused(table, options, error, words):
    with pytest.raises(error, match=words):
        EmbeddingPC.from_layer(table, Window("middle", 3), **options)
