import math

import pytest
import torch
from torch import nn

pytest.importorskip("trl")
pytest.importorskip("datasets")

import peft
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, Trainer, TrainingArguments

import ipca
from ipca.analysis import forgetting
from ipca.peft import PCConfig
from ipca.train import KeepCallback, token_batches
from tests.helpers.train_runs import KEPT, TEXT


def configs():
    common = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return {"window": PCConfig(r=4, **common), "lora": peft.LoraConfig(r=4, **common)}


def trainer_of(model, folder, **arguments):
    tokens = torch.tensor([list(TEXT.encode()[k : k + 32]) for k in range(0, 640, 32)])
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    few = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    few |= {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "report_to": [], "disable_tqdm": True}
    arguments = TrainingArguments(str(folder), use_cpu=True, **{**few, **arguments})
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4])


@pytest.fixture
def base(language_model):
    return AutoModelForCausalLM.from_pretrained(language_model)


@pytest.fixture
def batches(language_model):
    return token_batches([KEPT], AutoTokenizer.from_pretrained(language_model), max_length=64, tokens=256)


def test_batches_of_texts(batches):
    assert sum(batch["attention_mask"].sum().item() for batch in batches) == 256
    for batch in batches:
        assert ((batch["labels"] == -100) == (batch["attention_mask"] == 0)).all()
    assert bytes(batches[0]["input_ids"][0, :20].tolist()).decode("latin-1")  # bytes of the text


@pytest.mark.parametrize("kind", ["window", "lora", "apply_pc"])
def test_the_numbers_of_any_adapter_join_the_evaluations(base, language_model, batches, tmp_path, kind):
    plain = AutoModelForCausalLM.from_pretrained(language_model)
    model = ipca.apply_pc(base, rank=4) if kind == "apply_pc" else peft.get_peft_model(base, configs()[kind])
    trainer = trainer_of(model, tmp_path, save_strategy="no")
    trainer.add_callback(KeepCallback(trainer, batches))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_keep_kl" in entry]
    assert [entry["step"] for entry in logged] == [1, 2, 3, 4]
    found = forgetting(trainer.model, plain, batches)
    assert logged[-1]["eval_keep_kl"] == pytest.approx(found.kl, rel=1e-4)
    assert logged[-1]["eval_keep_loss_rise"] == pytest.approx(found.loss_rise, rel=1e-4)
    assert found.kl > 1e-4
    assert all(parameter.requires_grad for name, parameter in trainer.model.named_parameters() if "lora_A" in name)


def test_a_budget_chooses_the_checkpoint_that_is_loaded(base, batches, tmp_path):
    model = peft.get_peft_model(base, configs()["lora"])
    trainer = trainer_of(model, tmp_path, load_best_model_at_end=True)
    keep = KeepCallback(trainer, batches, max_kl=math.inf, patience=9)
    trainer.add_callback(keep)
    kls = []
    trainer.callback_handler.callbacks[-1].kept = Recorded(keep.kept, kls)
    keep.budget = 0.0005
    trainer.train()
    within = [step for step, kl in enumerate(kls, start=1) if kl <= keep.budget]
    assert 0 < len(within) < 4
    assert trainer.state.best_global_step in within
    assert keep.kept.measure(trainer.model)["keep_kl"] <= keep.budget


@pytest.mark.parametrize("first", [True, False])
def test_early_stopping_goes_by_the_loss_within_the_budget_in_any_order(base, batches, tmp_path, first):
    trainer = trainer_of(peft.get_peft_model(base, configs()["lora"]), tmp_path, load_best_model_at_end=True)
    stopping = EarlyStoppingCallback(1, early_stopping_threshold=100.0)  # no evaluation is that much better
    if first:
        trainer.add_callback(stopping)
    trainer.add_callback(KeepCallback(trainer, batches, max_kl=100.0))
    if not first:
        trainer.add_callback(stopping)
    trainer.train()
    assert trainer.state.global_step == 2


class Recorded:
    metric, description = "keep_kl", "KL"

    def __init__(self, kept, found):
        self.kept, self.found = kept, found

    def measure(self, model):
        result = self.kept.measure(model)
        self.found.append(result["keep_kl"])
        return result


def test_training_stops_after_patience(base, batches, tmp_path):
    trainer = trainer_of(peft.get_peft_model(base, configs()["lora"]), tmp_path, load_best_model_at_end=True)
    trainer.add_callback(KeepCallback(trainer, batches, max_kl=1e-12, patience=2))
    trainer.train()
    assert trainer.state.global_step < 4
    assert trainer.state.best_model_checkpoint is None or trainer.state.best_metric < math.inf


def test_refusals(base, batches, tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no adapter"):
        KeepCallback(trainer_of(base, tmp_path), batches)
    pissa = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights="pissa")
    trainer = trainer_of(peft.get_peft_model(base, pissa), tmp_path)
    with pytest.raises(ValueError, match=r"init_lora_weights='pissa'.*PCConfig"):
        KeepCallback(trainer, batches)


def test_a_budget_needs_the_best_checkpoint(base, batches, tmp_path):
    trainer = trainer_of(peft.get_peft_model(base, configs()["lora"]), tmp_path)
    with pytest.raises(ValueError, match="load_best_model_at_end=True"):
        KeepCallback(trainer, batches, max_kl=0.1)
    with pytest.raises(TypeError, match="expected an iterable of batches"):
        KeepCallback(trainer, batches[0])


def test_peft_layers_in_a_model_of_ones_own(batches):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    x = torch.randn(3, 8)
    with torch.no_grad():
        before = model(x)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), model)
    with torch.no_grad():
        assert (model(x) - before).abs().max() > 1e-3
        with ipca.analysis.without_adapter(model):
            assert torch.equal(model(x), before)
        assert (model(x) - before).abs().max() > 1e-3


def test_the_patience_of_a_resumed_run_goes_on(base, language_model, batches, tmp_path):
    whole = {"load_best_model_at_end": True, "max_steps": 4}
    trainer = trainer_of(peft.get_peft_model(base, configs()["lora"]), tmp_path, **whole)
    trainer.add_callback(KeepCallback(trainer, batches, max_kl=1e-12, patience=3))  # above it from step 2 on
    trainer.train()
    stopped = trainer.state.global_step
    again = AutoModelForCausalLM.from_pretrained(language_model)
    trainer = trainer_of(peft.get_peft_model(again, configs()["lora"]), tmp_path, **whole, eval_on_start=True)
    trainer.add_callback(KeepCallback(trainer, batches, max_kl=1e-12, patience=3))
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stopped - 1}"))
    assert trainer.state.global_step == stopped < 4


def test_arguments_are_left_to_other_trainers(base, batches, tmp_path):
    trainer = trainer_of(peft.get_peft_model(base, configs()["lora"]), tmp_path, load_best_model_at_end=True)
    arguments = trainer.args
    KeepCallback(trainer, batches, max_kl=0.1)
    assert trainer.args.metric_for_best_model == "eval_loss_within_budget"
    assert arguments.metric_for_best_model == "loss"


def test_biases_that_train_are_refused(base, batches, tmp_path):
    biases = peft.LoraConfig(r=4, target_modules="all-linear", bias="all")
    trainer = trainer_of(peft.get_peft_model(base, biases), tmp_path)
    with pytest.raises(ValueError, match=r"bias='all', which trains biases of the base"):
        KeepCallback(trainer, batches)


def test_a_budget_that_nothing_met_is_said_at_the_end(base, batches, tmp_path, caplog):
    trainer = trainer_of(
        peft.get_peft_model(base, configs()["lora"]), tmp_path, load_best_model_at_end=True, max_steps=2
    )
    trainer.add_callback(KeepCallback(trainer, batches, max_kl=1e-12))
    trainer.train()
    assert trainer.state.best_model_checkpoint is None
    assert "no evaluation was within the budget of 1e-12: the model is that of the last step" in caplog.text


def test_one_of_several_evaluation_sets_decides(base, batches, tmp_path, caplog):
    trainer = trainer_of(
        peft.get_peft_model(base, configs()["lora"]),
        tmp_path,
        load_best_model_at_end=True,
        metric_for_best_model="eval_b_loss",
    )
    trainer.eval_dataset = dict.fromkeys("ab", trainer.eval_dataset)
    trainer.add_callback(KeepCallback(trainer, batches, max_kl=100.0))
    trainer.train()
    losses = {e["step"]: e["eval_b_loss"] for e in trainer.state.log_history if "eval_b_loss" in e}
    assert losses[trainer.state.best_global_step] == min(losses.values())
    assert sum("eval_keep_kl" in entry for entry in trainer.state.log_history) == 4
    assert "no evaluation was within" not in caplog.text


class Counted:
    """What ``kept`` measures, counted."""

    def __init__(self, kept):
        self._kept, self.metric, self.description, self.times = kept, kept.metric, kept.description, 0

    def measure(self, model):
        self.times += 1
        return self._kept.measure(model)


def test_several_evaluation_sets_are_measured_once_a_step(base, batches, tmp_path):
    trainer = trainer_of(ipca.apply_pc(base, rank=4), tmp_path, save_strategy="no", eval_steps=2)
    trainer.eval_dataset = dict.fromkeys("ab", trainer.eval_dataset)
    keep = KeepCallback(trainer, batches)
    keep.kept = counted = Counted(keep.kept)
    trainer.add_callback(keep)
    for again in (1, 2):
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "eval_keep_kl" in entry]
        assert [entry["step"] for entry in logged] == [2, 4]
        assert counted.times == 2 * again, "also of a second training, whose steps have the same numbers"
    before = trainer.evaluate()
    with torch.no_grad():
        for parameter in ipca.adapter_parameters(trainer.model):
            parameter.mul_(1.5)
    assert trainer.evaluate()["eval_keep_kl"] > before["eval_keep_kl"] > 0, "measured anew outside training"


def refused_in_training(trainer, words):
    """At the first evaluation, when the model has moved: so that no model is a variable here, and compared."""
    with pytest.raises(ValueError, match=words):
        trainer.train()


def test_a_metric_that_no_evaluation_gives_is_named(base, batches, tmp_path):
    model = peft.get_peft_model(base, configs()["lora"])
    options = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
    trainer = trainer_of(model, tmp_path, **options)
    trainer.add_callback(KeepCallback(trainer, batches, max_kl=1.0))
    refused_in_training(trainer, r"by 'eval_accuracy', and the evaluation gives eval_loss.*set metric_for_best_model")


def test_a_budget_by_the_metric_of_no_evaluation_set_is_refused_before_training(base, batches, tmp_path):
    model = peft.get_peft_model(base, configs()["window"])
    trainer = trainer_of(model, tmp_path, load_best_model_at_end=True)
    trainer.eval_dataset = dict.fromkeys("ab", trainer.eval_dataset)
    trainer.add_callback(KeepCallback(trainer, batches, max_kl=1.0))
    refused_in_training(trainer, r"by 'eval_loss', and the evaluation sets are a, b; .* as eval_a_loss")
