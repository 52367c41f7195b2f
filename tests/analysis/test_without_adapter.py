"""The base of a model, which is the model without its adapters: of ipca and of PEFT, wherever they are."""

import copy
import inspect

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

import ipca
from ipca.analysis import accuracy_drop, cross_entropy_rise, embedding_drift, forgetting, kl_to_base, update_norm
from ipca.analysis.without_adapter import check_base, without_adapter
from ipca.nn import LinearPC
from ipca.nn.registry import set_layer
from ipca.peft import PCConfig
from tests.helpers.models import snapshot
from tests.helpers.peft_cases import randomize
from tests.helpers.peft_models import gpt2, llama

IDS = torch.arange(1, 37).view(4, 9) % 31
BATCHES = [{"input_ids": IDS, "labels": IDS}]


class Wrap(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inside = model

    def forward(self, **inputs):
        return self.inside(**inputs)


def moved(model):
    """``model`` with every trained factor changed."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def base():
    return llama().eval()


@pytest.mark.parametrize("kind", [LoraConfig, PCConfig])
def test_a_merged_adapter_is_refused_before_peft_unmerges_it(base, kind):
    model = moved(get_peft_model(base, kind(r=3, target_modules=["q_proj"])))
    model.merge_adapter()
    before = snapshot(model)
    for measure in (lambda: kl_to_base(model, None, BATCHES), lambda: forgetting(model, None, BATCHES)):
        with pytest.raises(ValueError, match=r"q_proj: the adapter 'default' is merged .* unmerge_adapter\(\) first"):
            measure()
    assert snapshot(model) == before
    model.unmerge_adapter()
    assert kl_to_base(model, None, BATCHES) > 0


def windows_beside(model):
    """``model`` of PEFT with windows in other layers by hand: apply_pc refuses it."""
    for name, layer in list(model.named_modules()):
        if name.endswith("q_proj"):
            set_layer(model, name, LinearPC.from_linear(layer, rank=3))
    return model


def adapted(kind, base):
    if kind == "beside ipca's":
        config = LoraConfig(r=3, target_modules=["up_proj"], init_lora_weights=False)
        return windows_beside(get_peft_model(base, config))
    config = LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False)
    if kind == "transformers":
        base.add_adapter(config)
        return base
    if kind == "injected":
        return inject_adapter_in_model(config, base)
    return {"parallel": nn.DataParallel, "wrapped": Wrap}[kind](get_peft_model(base, config))


KINDS = ["beside ipca's", "transformers", "injected", "parallel", "wrapped"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_the_model_without_all_its_adapters(base, kind):
    plain = copy.deepcopy(base)
    model = moved(adapted(kind, base)).eval()
    before = model(input_ids=IDS).logits
    assert kl_to_base(model, None, BATCHES) == pytest.approx(kl_to_base(model, plain, BATCHES), abs=1e-9)
    assert kl_to_base(model, None, BATCHES) > 1e-6
    with without_adapter(model):
        assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    assert torch.equal(model(input_ids=IDS).logits, before)


def test_an_adapter_that_changed_the_base_is_found_in_a_wrapper_and_beside_ipca():
    config = LoraConfig(r=3, target_modules=["up_proj"], init_lora_weights="pissa")
    for wrap in (nn.DataParallel, Wrap, windows_beside):
        model = wrap(get_peft_model(llama(), config))
        with pytest.raises(ValueError, match="init_lora_weights='pissa', which changes the base weights"):
            check_base(model)


def test_stock_adapters_beside_each_other_are_all_off(base):
    plain, model = copy.deepcopy(base), get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    randomize(model)
    with without_adapter(model):
        assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    assert model.active_adapters == ["default"]


def test_gpt2_is_measured_the_same_in_pairs_and_in_mappings():
    model = moved(ipca.apply_pc(gpt2(), rank=3, progress=False))
    mappings = forgetting(model, None, BATCHES)
    assert mappings.tokens == 32
    mask = torch.ones_like(IDS)
    for inputs in (IDS, {"input_ids": IDS}, {"input_ids": IDS, "attention_mask": mask}):
        assert forgetting(model, None, [(inputs, IDS)]) == mappings
    wrapped = moved(get_peft_model(gpt2(), LoraConfig(r=3, target_modules=["c_attn"], init_lora_weights=False)))
    assert "input_ids" not in inspect.signature(wrapped.forward).parameters
    assert forgetting(wrapped, None, [(IDS, IDS)]) == forgetting(wrapped, None, BATCHES)
    with pytest.raises(ValueError, match="labels must be class indices"):
        forgetting(model, None, [(IDS, IDS + 1000)])


@pytest.mark.parametrize("measure", [kl_to_base, forgetting, cross_entropy_rise, accuracy_drop, embedding_drift])
@pytest.mark.parametrize("kind", ["ipca", "wrapped", "parallel", "transformers", "injected"])
def test_a_base_that_was_adapted_in_place_is_refused(base, kind, measure):
    model = moved(Wrap(ipca.apply_pc(base, rank=3, progress=False)) if kind == "ipca" else adapted(kind, base))
    before = snapshot(model)
    for given in (base, model, Wrap(base)):
        with pytest.raises(ValueError, match=r"q_proj is an adapted layer of the model itself.* Pass the plain model"):
            measure(model, given, BATCHES)
    assert snapshot(model) == before


@pytest.mark.parametrize("kind", ["ipca", "wrapped"])
def test_weights_are_not_compared_with_those_of_the_model_itself(base, kind):
    model = ipca.apply_pc(base, rank=3, progress=False) if kind == "ipca" else adapted(kind, base)
    with pytest.raises(ValueError, match="is an adapted layer of the model itself"):
        update_norm(model, base)


def test_a_base_may_share_plain_layers_and_be_adapted_otherwise(base):
    plain = copy.deepcopy(base)
    model = moved(ipca.apply_pc(base, rank=3, targets=["q_proj"], progress=False))
    apart = kl_to_base(model, plain, BATCHES)
    plain.model.embed_tokens = model.model.embed_tokens
    assert kl_to_base(model, plain, BATCHES) == apart > 0
    again = moved(ipca.apply_pc(plain, rank=3, targets=["q_proj"], progress=False))
    assert kl_to_base(model, again, BATCHES) > 0
