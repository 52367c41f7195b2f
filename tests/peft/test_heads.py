"""Heads under a PCConfig: they train whole and are saved, named or not, with and without a task type."""

import copy

import pytest
import torch
import transformers as T
from peft import LoraConfig, PeftModel, get_peft_model

import ipca
from ipca.peft import PCConfig, prepare, summary

X = torch.cat([torch.arange(24).reshape(2, 12) + 3, torch.full((2, 1), 2)], 1)  # BART wants its <eos>


def distilbert():
    torch.manual_seed(0)
    config = T.DistilBertConfig(vocab_size=97, dim=32, hidden_dim=48, n_layers=1, n_heads=4)
    return T.DistilBertForSequenceClassification(config).eval()


def bart():
    torch.manual_seed(0)
    sizes = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 1, "decoder_layers": 1, "d_model": 32}
    config = T.BartConfig(vocab_size=97, encoder_attention_heads=4, decoder_attention_heads=4, **sizes)
    return T.BartForSequenceClassification(config).eval()


MODELS = {distilbert: ["pre_classifier", "classifier"], bart: ["classification_head"]}


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
@pytest.mark.parametrize("make", MODELS)
def test_the_head_trains_whole_and_loads_everywhere(make, task, prepared, tmp_path):
    base, config = make(), PCConfig(r=4, target_modules="all-linear", task_type=task)
    if prepared:
        prepare(base, config, progress=False)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    assert torch.equal(model(input_ids=X).logits, base(input_ids=X).logits)
    assert [name for name, _ in summary(model).modules_to_save] == MODELS[make]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    right = model(input_ids=X).logits
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for name in MODELS[make]:
            for parameter in base.get_submodule(name).parameters():
                parameter.normal_()
    assert torch.equal(ipca.load_adapter(copy.deepcopy(base), tmp_path).eval()(input_ids=X).logits, right)
    for chosen in (LoraConfig.from_pretrained(tmp_path), PCConfig.from_pretrained(tmp_path)):
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, config=chosen).eval()
        assert torch.allclose(again(input_ids=X).logits, right, atol=1e-6)


def test_a_head_is_adapted_or_left_out_where_that_is_asked_for(tmp_path):
    model = get_peft_model(bart(), PCConfig(r=2, target_modules=["q_proj", "classification_head.dense"]))
    assert [name for name, _ in summary(model).modules_to_save] == ["classification_head.out_proj"]
    config = PCConfig(r=2, target_modules="all-linear", exclude_modules=["pre_classifier", "classifier"])
    model = get_peft_model(distilbert(), config)
    assert config.modules_to_save is None
    model.save_pretrained(tmp_path)  # and it is not added as the file is read
    again = PeftModel.from_pretrained(distilbert(), tmp_path, config=PCConfig.from_pretrained(tmp_path))
    assert summary(again).modules_to_save == ()
