"""transformers' Trainer on a model that apply_pc adapted: compiled, checkpointed, resumed, saved."""

import os
from unittest.mock import patch

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import ipca

CONFIG = LlamaConfig(
    hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, vocab_size=50, use_cache=False
)


def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG)


def trainer(folder, form, **options):
    model = ipca.apply_pc(base(), rank=3, form=form, progress=False)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 50, (24, 11), generator=generator)
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        weight_decay=0.0,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    return Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])


def losses(trained):
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def same_weights(one, other):
    pairs = zip(ipca.adapter_parameters(one), ipca.adapter_parameters(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("form", ["intact", "residual"])
def test_a_run_resumed_from_its_checkpoint_ends_with_the_same_bits(tmp_path, form):
    first, second = trainer(tmp_path, form), trainer(tmp_path, form)
    first.train()
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(losses(first)) == 4
    assert losses(second) == losses(first)
    assert same_weights(first.model, second.model)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["intact", "residual"])
def test_a_compiled_trainer_trains_the_same(tmp_path, form):
    plain = trainer(tmp_path / "plain", form)
    plain.train()
    torch._dynamo.reset()
    counters.clear()
    with patch.dict(os.environ):  # torch_compile is left in the environment, for every Trainer after it
        compiled = trainer(tmp_path / "compiled", form, torch_compile=True, torch_compile_backend="aot_eager")
        compiled.train()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    ipca.save_adapter(compiled.model, tmp_path / "adapter")
    assert same_weights(ipca.load_adapter(base(), tmp_path / "adapter"), compiled.model)
