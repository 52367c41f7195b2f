"""Heads under a PCConfig: they train whole and are saved, named or not, with and without a task type."""

import copy
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as T
from peft import LoraConfig, PeftModel, get_peft_model

import ipca
from ipca.peft import PCConfig, guards, prepare, summary
from tests.helpers.peft_cases import disturb

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


def encoder(name, **sizes):
    """A model of the class ``name`` with a head of one layer (BERT) or of two in one module (RoBERTa)."""
    torch.manual_seed(0)
    config = getattr(T, name.partition("For")[0] + "Config")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4} | sizes
    return getattr(T, name)(config(vocab_size=97, **sizes)).eval()


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
    disturb(model)
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


@pytest.mark.parametrize("first", ["BertForMaskedLM", "BertForTokenClassification", "RobertaForSequenceClassification"])
def test_a_configuration_that_another_model_has_used_gets_the_head_of_this_one(first, tmp_path):
    config = PCConfig(r=4, target_modules=["query", "value"], progress=False)
    get_peft_model(encoder(first), config)
    base = encoder("BertForSequenceClassification")
    model = get_peft_model(copy.deepcopy(base), config).eval()
    assert [name for name, _ in summary(model).modules_to_save] == ["classifier"]
    disturb(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval()(X).logits, model(X).logits)


HEADS = {
    "BertForSequenceClassification": ("SEQ_CLS", None),
    "BertForTokenClassification": ("TOKEN_CLS", None),
    "RobertaForSequenceClassification": ("SEQ_CLS", None),
}
CASES = [
    f"{name}-{task}-{bias}"
    for name, tasks in HEADS.items()
    for task, bias in itertools.product(tasks, ("none", "all", "lora_only"))
]


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """For each case how far stock PEFT is from the trained model, in one process that cannot import ipca."""
    root, moved = tmp_path_factory.mktemp("stock"), {}
    for case in CASES:
        name, task, bias = case.split("-")
        base = encoder(name)
        config = PCConfig(r=4, target_modules="all-linear", bias=bias, task_type=None if task == "None" else task)
        model = get_peft_model(copy.deepcopy(base), config).eval()
        disturb(model)
        model.save_pretrained(root / case / "adapter")
        y = model(X).logits.detach()
        moved[case] = ((y - base(X).logits).abs().max() / y.abs().max()).item()
        for parameter in base.classifier.parameters():  # as a head that is new in the reader's process
            torch.nn.init.normal_(parameter)
        torch.save({"base": base, "x": X, "y": y, "transformers": False, "auto": False}, root / case / "case.pt")
        resumed = PeftModel.from_pretrained(base, root / case / "adapter", is_trainable=True).eval()
        assert torch.equal(resumed(X).logits, y)
    command = [sys.executable, "-m", "tests.helpers.stock_process", str(root)]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1]), moved


@pytest.mark.parametrize("case", CASES)
def test_a_head_and_biases_load_without_ipca(case, stock):
    found, moved = stock
    assert max(found[case].values()) < 1e-5 < 1e-2 < moved[case]


@pytest.mark.parametrize("adapter", ["default", "mine"])
def test_the_biases_of_a_head_are_written_twice_only(adapter, tmp_path):
    config = PCConfig(r=4, target_modules="all-linear", bias="all")
    model = get_peft_model(encoder("RobertaForSequenceClassification"), config, adapter_name=adapter)
    guards.check_saved(model, adapter)
    model.base_model.model.classifier.modules_to_save.other = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"read another adapter .*classifier\.modules_to_save\.other\.bias would not"):
        guards.check_saved(model, adapter)
