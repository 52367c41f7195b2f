"""Layers whose weight is read instead of called, as their model's source says and as they notice when it runs."""

import functools

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import ipca
from ipca.model.weight_reads import WeightReads, weight_reads


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
        nn.init.orthogonal_(self.a.weight)
        self.compute = F.linear


class Product(Reads):
    def forward(self, x):
        return F.linear(x, self.a.weight)


class Transposed(Reads):
    def forward(self, x):
        return x @ self.a.weight.T + self.a.bias


class InAMethod(Reads):
    def forward(self, x):
        return self.part(x)

    def part(self, x):
        return self.compute(x, self.a.weight)


class Inherited(InAMethod):
    pass


class ByItsParent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Reads()

    def forward(self, x):
        return F.linear(x, self.inner.a.weight, self.inner.a.bias)


class Resizes(Product):
    def resize(self):
        self.a = self.renew(self.a)

    def renew(self, layer):
        return layer


class Called(Reads):
    def forward(self, x):
        return self.a(x)


class OnlyForItsType(Reads):
    def forward(self, x):
        assert isinstance(self.a.weight, torch.Tensor)
        return self.a(x.to(self.a.weight.dtype).to(self.a.weight.device))[: self.a.weight.shape[0]]


class PassedOn(Reads):
    def forward(self, x):
        return self.apply_to(self.a, x) + 0 * self.a.weight.sum()

    def apply_to(self, layer, x):
        return layer(x)


class Either(Reads):
    fast = False

    def forward(self, x):
        return F.linear(x, self.a.weight) if self.fast else self.a(x)


class CalledByItsParent(Product):
    pass


class Parent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = CalledByItsParent()

    def forward(self, x):
        return self.inner.a(x) + self.inner(x)


UNCALLED = [Product, Transposed, InAMethod, Inherited, ByItsParent, Resizes]


@pytest.mark.parametrize("cls", UNCALLED)
def test_read_and_never_called(cls):
    model, x = ipca.apply_pc(nn.Sequential(cls()), rank=2, targets=[r".*\.a"], progress=False), torch.randn(3, 8)
    (name, layer) = next((n, m) for n, m in model.named_modules() if isinstance(m, ipca.nn.LinearPC))
    assert weight_reads(model, [name]) == WeightReads([name], [])
    model(x)
    assert layer.bypassed
    assert weight_reads(model, []) == WeightReads([], [])


@pytest.mark.parametrize("cls", [Called, OnlyForItsType])
def test_called(cls):
    assert weight_reads(nn.Sequential(cls()), ["0.a"]) == WeightReads([], [])


@pytest.mark.parametrize(("cls", "name"), [(PassedOn, "a"), (Either, "a"), (Parent, "inner.a")])
def test_read_and_called(cls, name):
    assert weight_reads(cls(), [name]) == WeightReads([], [name])


def test_methods_that_wrap_what_is_no_function():
    class Wrapping(Product):
        def shown(self):
            pass

    Wrapping.shown.__wrapped__ = functools.partial(print)
    assert weight_reads(Wrapping(), ["a"]) == WeightReads(["a"], [])


def test_code_without_a_source():
    scope = {"nn": nn}
    exec("class Made(nn.Module):\n    def forward(self, x):\n        return x @ self.a.weight", scope)
    model = scope["Made"]()
    model.a = nn.Linear(8, 8)
    assert weight_reads(model, ["a"]) == WeightReads([], [])


def test_models_of_transformers():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, vocab_size=30))
    t5 = transformers.T5Model(transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4))
    for model in (bert, t5):
        names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
        assert weight_reads(model, names) == WeightReads([], [])
    narrow = {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16, "vocab_size": 97}
    mobilebert = transformers.MobileBertForMaskedLM(transformers.MobileBertConfig(**sizes, **narrow))
    names = [name for name, layer in mobilebert.named_modules() if isinstance(layer, nn.Linear)]
    assert weight_reads(mobilebert, names).uncalled == ["cls.predictions.dense", "cls.predictions.decoder"]
    wavlm = transformers.WavLMModel(
        transformers.WavLMConfig(**sizes, conv_dim=(8,), conv_stride=(4,), conv_kernel=(4,), num_feat_extract_layers=1)
    )
    names = [f"encoder.layers.0.attention.{part}_proj" for part in ("k", "v", "q", "out")]
    assert weight_reads(wavlm, names) == WeightReads(names, [])
