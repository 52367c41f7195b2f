"""Layers that "all-linear" leaves out under a PCConfig, and models that are as they were where PEFT raises."""

import copy

import pytest
import torch
import transformers as T
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import ipca
from ipca.peft import PCConfig, prepare, summary
from tests.helpers.layer_kinds import mixtral
from tests.helpers.models import snapshot


class Net(nn.Module):
    """Linear layers, some of which no window of rank 4 fits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.narrow, self.tied, self.twice = (
            nn.Linear(8, 8),
            nn.Linear(8, 2),
            *(nn.Linear(8, 8, False),) * 2,
        )
        self.other = nn.Linear(8, 8, False)
        self.again = nn.Linear(8, 8, False)
        self.again.weight = self.other.weight
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.again(self.other(self.tied(self.wide(x))))
        return self.narrow(self.attention(x, x, x)[0])


X = torch.randn(2, 3, 8)
LEFT = (
    r"'all-linear' leaves out narrow: rank 4 is above the 2 singular values.*; tied: the same module stands in several "
    r"places of the model; other, again: its weight is tied.*; attention\.out_proj: nn.MultiheadAttention reads"
)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("excluded", [None, ["unused"], "unus.d"], ids=str)
def test_all_linear_leaves_out_what_no_window_fits(prepared, excluded, tmp_path):
    base, config = Net(), PCConfig(r=4, target_modules="all-linear", exclude_modules=excluded)
    with pytest.warns(UserWarning, match=LEFT) as said:
        model = get_peft_model(copy.deepcopy(base), prepare(base, config, progress=False) if prepared else config)
    assert sum("leaves out" in str(each.message) for each in said) == 1
    assert summary(model).layers == 1
    assert torch.equal(model(X), base.requires_grad_(False)(X))  # torch's attention rounds otherwise while it trains
    with torch.no_grad():
        model.base_model.model.wide.lora_B["default"].weight.add_(0.1)
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(Net(), tmp_path, config=LoraConfig.from_pretrained(tmp_path))
    assert torch.allclose(stock(X), model(X), atol=1e-6)
    assert torch.allclose(ipca.load_adapter(Net(), tmp_path)(X), model(X), atol=1e-6)


@pytest.mark.parametrize("prepared", [False, True])
def test_a_rank_above_all_layers_is_an_error_that_says_so(prepared):
    model = Net()
    config = PCConfig(r=9, target_modules="all-linear")
    with pytest.raises(ValueError, match=r"can have a window: .*rank 9 is above the 8 singular"):
        prepare(model, config, progress=False) if prepared else get_peft_model(model, config)
    assert config.exclude_modules is None


def test_the_router_of_a_mixture_is_left_out_or_has_a_rank_of_its_own():
    model = mixtral()
    experts = len(model.model.layers[0].mlp.experts.down_proj)
    config = PCConfig(r=experts + 1, target_modules="all-linear")
    with pytest.warns(UserWarning, match=r"leaves out .*mlp\.gate\.weight"):
        get_peft_model(model, config)
    assert "gate.weight" not in config.target_parameters
    config = PCConfig(r=experts + 1, target_modules="all-linear", rank_pattern={"gate.weight": 2})
    with pytest.warns(RuntimeWarning, match="did not match any targeted module"):  # PEFT says so, and uses it
        get_peft_model(mixtral(), config)
    assert "gate.weight" in config.target_parameters


class Shared(nn.Module):
    """Two places for one module, and one for another layer."""

    def __init__(self, module):
        super().__init__()
        self.first = self.second = module
        self.other = nn.Linear(8, 8)

    def forward(self, x):
        return self.other(self.second(self.first(x)))


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return x @ self.weight.T


SHARED = {
    "linear": (lambda: nn.Linear(8, 8), {"target_modules": ["first", "other"]}),
    "both places": (lambda: nn.Linear(8, 8), {"target_modules": ["first", "second", "other"]}),
    "pattern": (lambda: nn.Linear(8, 8), {"target_modules": ".*(first|second)"}),
    "convolution": (lambda: nn.Conv2d(8, 8, 1), {"target_modules": ["first", "other"]}),
    "embedding": (lambda: nn.Embedding(9, 8), {"target_modules": ["first", "other"]}),
    "block": (lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh()), {"target_modules": ["0", "other"]}),
    "parameter": (Own, {"target_modules": ["other"], "target_parameters": ["first.weight"]}),
}


@pytest.mark.parametrize("way", [get_peft_model, prepare, "second"], ids=["get_peft_model", "prepare", "second"])
@pytest.mark.parametrize("name", SHARED)
def test_a_module_in_two_places_is_refused(name, way, decomposed):
    make, options = SHARED[name]
    model = Shared(make())
    if way == "second":
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["other"]))
        model, way = adapted, lambda model, config: model.add_adapter("second", prepare(model, config))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"first(\.weight|\.0)?: the same module stands in several places"):
        way(model, PCConfig(r=4, **options))
    assert snapshot(model) == before
    assert not decomposed


def broken():
    model = Net()
    with torch.no_grad():
        model.other.weight[0, 0] = torch.nan
    return model


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (Net, {"target_modules": ["wide", "narrow"]}, "narrow: r=4 needs 4 singular values, but there are only 2"),
        (Net, {"target_modules": ["wide", "out_proj"]}, r"attention\.out_proj: nn.MultiheadAttention reads"),
        (broken, {"target_modules": ["wide", "other"]}, "other: the tensor holds NaN or Inf"),
        (Net, {"target_modules": ["wide"], "window": "start=6"}, "wide: window 'start=6' of rank 4 ends at 10"),
    ],
    ids=["narrow", "attention", "NaN", "window"],
)
def test_a_model_is_as_it_was_where_a_layer_is_refused(make, options, message):
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, PCConfig(r=4, **options))
    assert snapshot(model) == before
    adapted = get_peft_model(model, PCConfig(r=2, target_modules=["wide"]))
    before = snapshot(adapted)
    with pytest.raises(ValueError, match=message):
        adapted.add_adapter("second", PCConfig(r=4, **options))
    assert snapshot(adapted) == before
    assert list(adapted.peft_config) == ["default"]


def test_a_head_whose_name_ends_in_another_is_refused_as_a_whole():
    config = T.DistilBertConfig(vocab_size=97, dim=32, hidden_dim=48, n_layers=1, n_heads=4)
    model = T.DistilBertForSequenceClassification(config)
    before = snapshot(model)
    with pytest.raises(TypeError, match="modules_to_save cannot be applied"):
        get_peft_model(model, PCConfig(r=2, target_modules=["q_lin", "pre_classifier"]))
    assert snapshot(model) == before
