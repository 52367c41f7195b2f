import copy

import peft
import pytest
import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrizations
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding, BartScaledWordEmbedding
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma.modeling_gemma import GemmaTextScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.m2m_100.modeling_m2m_100 import M2M100ScaledWordEmbedding
from transformers.models.xglm.modeling_xglm import XGLMScaledWordEmbedding

import ipca
from ipca.nn.layer_kinds import layer_kind
from ipca.nn.subclasses import computes_as


class Named(nn.Linear):
    """Adds a method and an attribute."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.label = "mine"

    def norm(self):
        return self.weight.norm()


class Table(nn.Embedding):
    pass


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class TwiceInside(Named):
    def forward(self, x):
        return super().forward(x) + 1


class More(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.gain = nn.Parameter(torch.ones(()))


class Stateful(nn.Linear):
    def get_extra_state(self):
        return torch.ones(1)

    def set_extra_state(self, state):
        pass


class ScaledPerRow(BartScaledWordEmbedding):
    def forward(self, input_ids):
        return super().forward(input_ids) * self.embed_scale


LINEAR = {
    "falcon": lambda: FalconLinear(12, 10),
    "no bias": lambda: FalconLinear(12, 10, bias=False),
    "method": lambda: Named(12, 10),
}
EMBEDDINGS = {
    "bart": lambda: BartScaledWordEmbedding(20, 12, 1, embed_scale=3.5),
    "m2m100": lambda: M2M100ScaledWordEmbedding(20, 12, 1, embed_scale=3.5),
    "xglm": lambda: XGLMScaledWordEmbedding(20, 12, 1, embed_scale=3.5),
    "gemma": lambda: GemmaTextScaledWordEmbedding(20, 12, 1, embed_scale=3.5),
    "gemma 3": lambda: Gemma3TextScaledWordEmbedding(20, 12, 1, embed_scale=3.5),
    "bare": lambda: Table(20, 12, 1),
}
KNOWN = LINEAR | EMBEDDINGS
UNKNOWN = {
    "twice": lambda: Twice(12, 10),
    "inherited": lambda: TwiceInside(12, 10),
    "parameter": lambda: More(12, 10),
    "state": lambda: Stateful(12, 10),
    "parametrized": lambda: parametrizations.orthogonal(nn.Linear(12, 10)),
    "attention": lambda: NonDynamicallyQuantizableLinear(12, 10),
    "positions": lambda: BartLearnedPositionalEmbedding(20, 12),
    "two forwards": lambda: ScaledPerRow(20, 12, 1),
    "vector": lambda: BartScaledWordEmbedding(20, 12, 1, embed_scale=torch.ones(12)),
}


@pytest.mark.parametrize("kind", KNOWN)
def test_what_computes_the_same_has_a_kind(kind):
    assert layer_kind(KNOWN[kind]()) == ("linear" if kind in LINEAR else "embedding")


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_may_compute_something_else_has_none(kind):
    module = UNKNOWN[kind]()
    assert not any(computes_as(module, base) for base in (nn.Linear, nn.Embedding))
    model = nn.ModuleDict({"layer": module})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="cannot adapt layer: "):
        ipca.apply_pc(model, rank=2, targets=["layer"], progress=False)
    assert model["layer"] is module
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_router_that_is_an_nn_linear_is_left_out_by_name():
    from transformers import Llama4TextConfig

    model = nn.ModuleDict(
        {"router": Llama4Router(Llama4TextConfig(hidden_size=12, num_local_experts=8)), "up": nn.Linear(9, 9)}
    )
    with pytest.warns(UserWarning, match="leaves out router: a Llama4Router may compute something else"):
        ipca.apply_pc(model, rank=2, progress=False)


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.layer = KNOWN[kind]()

    def forward(self, x):
        return self.layer(x)


def inputs(kind):
    torch.manual_seed(1)
    return torch.randn(4, 3, 12) if kind in LINEAR else torch.arange(20).reshape(4, 5)


def move(model):
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("form", ["intact", "residual"])
@pytest.mark.parametrize("kind", KNOWN)
def test_it_starts_trains_saves_and_comes_back_as_it_was(kind, form, tmp_path):
    base, x = Net(kind), inputs(kind)
    right = base(x).detach()
    model = ipca.apply_pc(Net(kind), rank=3, alpha=5, targets=["layer"], form=form, progress=False)
    assert torch.allclose(model(x), right, rtol=1e-5, atol=1e-5)
    if form == "intact" and kind in EMBEDDINGS:
        assert torch.equal(model(x), right)
    trained = move(model)(x).detach()
    assert not torch.allclose(trained, right, atol=1e-2)
    ipca.save_adapter(model, tmp_path)
    assert torch.equal(ipca.load_adapter(Net(kind), tmp_path).eval()(x), trained)
    stock = peft.PeftModel.from_pretrained(Net(kind), tmp_path).eval()
    assert torch.allclose(stock(x), trained, rtol=1e-4, atol=1e-5)
    again = copy.deepcopy(model)
    assert torch.equal(again(x), trained)
    ipca.merge_adapter(again)
    assert torch.allclose(again(x), trained, rtol=1e-4, atol=1e-5)
    plain = ipca.unload(model).layer
    assert type(plain) is type(base.layer)
    assert plain.state_dict().keys() == base.layer.state_dict().keys()
    assert torch.allclose(plain(x), trained, rtol=1e-4, atol=1e-5)
    for name, value in vars(base.layer).items():
        if name != "training" and not name.startswith("_") and not isinstance(value, torch.Tensor):
            assert getattr(plain, name) == value
    assert layer_kind(plain) == layer_kind(base.layer)  # and it can be adapted again


@pytest.mark.parametrize("kind", ["gemma", "bart"])
def test_the_scale_of_an_embedding_moves_and_is_not_saved(kind):
    model = ipca.apply_pc(Net(kind), rank=3, targets=["layer"], progress=False)
    assert "layer.embed_scale" not in model.state_dict()
    model, base = model.bfloat16(), Net(kind).bfloat16()
    assert torch.equal(model(inputs(kind)), base(inputs(kind)))
