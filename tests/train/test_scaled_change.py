import json
import math
import shutil

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")

import peft
from transformers import AutoModelForCausalLM, AutoTokenizer

import ipca
from ipca.peft import PCConfig
from ipca.train import KeepCallback, Tradeoff, save_scaled, token_batches, tradeoff
from ipca.train.scaled_change import Point, _next_scale, scaled
from tests.helpers.train_runs import KEPT
from tests.train.test_callback import trainer_of


@pytest.fixture
def batches(language_model):
    return token_batches([KEPT], AutoTokenizer.from_pretrained(language_model), max_length=64, tokens=256)


def trained(language_model, folder, config):
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(language_model), config)
    trainer = trainer_of(model, folder, save_strategy="no")
    trainer.train()
    return trainer


CONFIGS = {
    "window": lambda: PCConfig(r=4, target_modules="all-linear"),
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    "patterns": lambda: PCConfig(
        r=4, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 2}, use_rslora=True
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_0_is_the_base_and_1_the_adapter_to_the_bit_and_files_are_scaled_as_they_say(
    language_model, batches, tmp_path, kind
):
    trainer = trained(language_model, tmp_path / "run", CONFIGS[kind]())
    base = AutoModelForCausalLM.from_pretrained(language_model).eval()
    model = trainer.model.eval()
    with torch.no_grad():
        at_one, plain = model(**batches[0]).logits, base(**batches[0]).logits
        with scaled(model, 0.0):
            assert torch.equal(model(**batches[0]).logits, plain)
        with scaled(model, 1.0):
            assert torch.equal(model(**batches[0]).logits, at_one)
        with scaled(model, 0.6):
            wanted = model(**batches[0]).logits
        assert torch.equal(model(**batches[0]).logits, at_one)
    model.save_pretrained(tmp_path / "adapter")
    save_scaled(tmp_path / "adapter", tmp_path / "scaled", 0.6)
    with torch.no_grad():
        stock = peft.PeftModel.from_pretrained(base, tmp_path / "scaled").eval()
        assert (stock(**batches[0]).logits - wanted).abs().max() < 1e-5
        if kind != "lora":
            ours = ipca.load_adapter(AutoModelForCausalLM.from_pretrained(language_model), tmp_path / "scaled").eval()
            assert (ours(**batches[0]).logits - wanted).abs().max() < 1e-5
            config = PCConfig.from_pretrained(tmp_path / "scaled")
            again = AutoModelForCausalLM.from_pretrained(language_model)
            again = peft.PeftModel.from_pretrained(again, tmp_path / "scaled", config=config, is_trainable=True)
            assert (again.eval()(**batches[0]).logits - wanted).abs().max() < 1e-5
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("adapter", "scaled")]
    assert weights[0] == weights[1]


def test_the_curve_and_the_scale_of_a_budget(language_model, batches, tmp_path):
    trainer = trained(language_model, tmp_path / "run", CONFIGS["window"]())
    keep = KeepCallback(trainer, batches).kept
    whole = keep.measure(trainer.model)["keep_kl"]
    found = tradeoff(trainer, batches, max_forgotten=whole / 3, progress=False)
    points = {point.scale: point for point in found.points}
    assert points[0.0].forgotten == 0
    assert points[1.0].forgotten == whole
    assert points[1.0].loss == trainer.evaluate()["eval_loss"]
    assert sorted(found.points, key=lambda point: point.forgotten) == list(found.points)
    assert 0.97 * whole / 3 <= found.best.forgotten <= whole / 3
    with scaled(trainer.model, found.best.scale):
        assert keep.measure(trainer.model)["keep_kl"] == found.best.forgotten
    assert "<- best within the budget" in str(found)
    assert found.rows()[0] == {"scale": 0.0, "loss": points[0.0].loss, "forgotten": 0.0}


def test_a_string_is_one_text(language_model, batches):
    found = token_batches(KEPT, AutoTokenizer.from_pretrained(language_model), max_length=64, tokens=256)
    assert all(torch.equal(one["input_ids"], two["input_ids"]) for one, two in zip(found, batches, strict=True))


def test_the_next_scale_is_that_of_the_curve():
    square = [Point(x, 1 - x, x * x) for x in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert _next_scale(square, 0.4) == pytest.approx(math.sqrt(0.4), abs=0.01)
    assert _next_scale(square, 2.0) is None
    assert _next_scale([*square, Point(0.63, 0.4, 0.396)], 0.4) is None  # near enough
    dip = [Point(0.0, 3.0, 0.0), Point(0.5, 1.0, 0.1), Point(1.0, 2.0, 0.2)]
    assert Tradeoff(tuple(dip), "KL", 0.3).best.scale == 0.5
    assert Tradeoff(tuple(dip), "KL", 0.05).best.scale == 0.0


def test_refusals(language_model, batches, tmp_path):
    trainer = trained(language_model, tmp_path / "run", peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match="use_dora: its change is not linear"):
        tradeoff(trainer, batches, progress=False)
    for budget in (-1.0, math.nan):
        with pytest.raises(ValueError, match="a budget must be at least 0"):
            tradeoff(trainer, batches, max_forgotten=budget, progress=False)
    held_out, trainer.eval_dataset = trainer.eval_dataset, dict.fromkeys("ab", trainer.eval_dataset)
    with pytest.raises(ValueError, match=r"one held-out loss, and the trainer has the evaluation sets a, b; set"):
        tradeoff(trainer, batches, progress=False)
    trainer.eval_dataset = held_out
    with pytest.raises(TypeError, match=r"the tensors input_ids and labels; ipca\.train\.token_batches"):
        tradeoff(trainer, [{"text": KEPT}], progress=False)
    trainer.model.save_pretrained(tmp_path / "dora")
    with pytest.raises(ValueError, match="use_dora"):
        save_scaled(tmp_path / "dora", tmp_path / "out", 0.5)
    for scale in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="scale must be above 0"):
            save_scaled(tmp_path / "dora", tmp_path / "out", scale)
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
        save_scaled(language_model, tmp_path / "out", 0.5)
    shutil.copytree(tmp_path / "dora", tmp_path / "other")
    config = tmp_path / "other" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": "OFT"}))
    with pytest.raises(TypeError, match="holds a OFT; only a LoRA"):
        save_scaled(tmp_path / "other", tmp_path / "out", 0.5)
    base = AutoModelForCausalLM.from_pretrained(language_model)
    pissa = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    peft.get_peft_model(base, pissa).save_pretrained(tmp_path / "pissa")
    with pytest.raises(ValueError, match="init_lora_weights='pissa', which changes the base weights"):
        save_scaled(tmp_path / "pissa", tmp_path / "out", 0.5)
    assert not (tmp_path / "out").exists()


def test_a_merged_adapter_is_refused(language_model, batches, tmp_path):
    trainer = trained(language_model, tmp_path / "run", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    trainer.model.merge_adapter()
    with pytest.raises(ValueError, match=r"is merged into its weight.*unmerge_adapter\(\)"):
        tradeoff(trainer, batches, progress=False)
    assert trainer.model.get_model_status().merged_adapters == ["default"]


def test_what_trains_whole_is_measured_at_scale_0_too(language_model, batches, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    trainer = trained(language_model, tmp_path / "run", config)
    kept = KeepCallback(trainer, batches).kept
    with scaled(trainer.model, 0.0):
        left = kept.measure(trainer.model)["keep_kl"]
    assert left > 0
    history = list(trainer.state.log_history)
    assert tradeoff(trainer, batches, scales=[1.0], progress=False).points[0].forgotten == left
    assert trainer.state.log_history == history
    with pytest.raises(
        ValueError, match=r"at scale 0 the model has forgotten .* modules that train whole are not scaled"
    ):
        tradeoff(trainer, batches, scales=[1.0], max_forgotten=left / 2, progress=False)
