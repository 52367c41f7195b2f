"""transformers' Trainer on a model that apply_pc adapted: compiled, checkpointed, resumed, saved."""

import os
from unittest.mock import patch

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import ipca
from tests.model.test_transformers_models import adapted, batch_norm, logits, mixture, multimodal, same_state, vit

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


class Inputs(torch.utils.data.Dataset):
    """Sixteen random rows like the tests' inputs, with labels."""

    def __init__(self, inputs):
        (self.name, self.like), *_ = inputs.items()

    def __len__(self):
        return 16

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        if self.like.is_floating_point():
            return {self.name: torch.randn(self.like.shape[1:], generator=generator), "labels": i % 6}
        row = torch.randint(3, 90, self.like.shape[1:], generator=generator)
        return {self.name: row, "labels": row}


def other_trainer(folder, build, form, **options):
    base, model, inputs = adapted(build, form)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    data = Inputs(inputs)
    return base, inputs, Trainer(model, arguments, train_dataset=data, eval_dataset=data)


@pytest.mark.parametrize("form", ["intact", "residual"])
@pytest.mark.parametrize("build", [vit, mixture, multimodal, batch_norm])
def test_renamed_keys_experts_and_statistics_are_resumed_and_saved(tmp_path, build, form):
    base, inputs, first = other_trainer(tmp_path, build, form)
    first.train()
    _, _, second = other_trainer(tmp_path, build, form)
    second.train(resume_from_checkpoint=True)  # the last one: nothing is left to train
    assert same_state(second.model, first.model)
    _, _, third = other_trainer(tmp_path, build, form)
    third.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same_state(third.model, first.model)
    first.save_model(str(tmp_path / "final"))
    loaded, found = type(base).from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert (logits(loaded, inputs) - logits(first.model, inputs)).abs().max() < 1e-4


@pytest.mark.parametrize("build", [vit, mixture])
def test_the_best_model_is_loaded_at_the_end(tmp_path, build):
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": True}
    _, _, trainer = other_trainer(tmp_path, build, "intact", **options)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")  # the loss falls
    _, _, short = other_trainer(tmp_path / "short", build, "intact")
    short.args.max_steps = 2
    short.train()
    assert same_state(trainer.model, short.model)
