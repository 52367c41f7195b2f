"""One run of each task: what is trained, measured, kept, written, resumed and refused."""

import csv
import json
import shutil
from dataclasses import replace
from math import nan
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.train_runs import save_encoder, save_images, save_language_model, save_vit, tiny

pytest.importorskip("trl")
pytest.importorskip("datasets")

import datasets
import peft
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ResNetConfig,
    ResNetModel,
    RobertaConfig,
    RobertaModel,
    TrainerCallback,
    ViTImageProcessorPil,
    XLNetConfig,
    XLNetModel,
)

import ipca
from ipca._atomic import locked_folder
from ipca.analysis import cross_entropy_rise, kl_to_base
from ipca.cli.main import main
from ipca.train import DataError, OverBudgetError, TrainSettings, fine_tune, run
from ipca.train.checkpoints import last_checkpoint, relocate
from ipca.train.data import Data, Layout, read_data
from ipca.train.examples import split
from ipca.train.keep import KeptTask, build_keep, read_keep
from ipca.train.models import Loaded, adapt, fitting_length, load_model
from ipca.train.run_folder import input_digests
from ipca.train.settings import read_settings
from ipca.train.sources import find_source
from ipca.train.trainers import ImageCollator, micro_batches, repeated_rows


def settings(model, texts, **changes):
    few = {"rank": 4, "steps": 8, "evaluations": 4, "batch": 4, "max_length": 64, "keep_tokens": 640, "lr": 5e-3}
    files = {"model": str(model), "data": str(texts / "new.txt"), "keep": str(texts / "keep.txt")}
    return TrainSettings(**{**files, **few, **changes})


@pytest.fixture(scope="module")
def finished(language_model, texts, tmp_path_factory):
    return fine_tune(settings(language_model, texts), tmp_path_factory.mktemp("runs") / "out", progress=False)


def test_a_run_learns_and_says_what_it_forgets(finished):
    assert [row["step"] for row in finished.rows] == [0, 2, 4, 6, 8]
    assert finished.rows[0]["eval_keep_kl"] == 0
    assert finished.rows[0]["eval_keep_loss_rise"] == 0
    assert finished.kept == 8
    assert finished.best["eval_loss"] < finished.rows[0]["eval_loss"] - 0.05
    assert 0 < finished.rows[1]["eval_keep_kl"] < finished.best["eval_keep_kl"]


def test_the_folder_is_an_adapter_that_stock_peft_loads_and_its_numbers_are_right(finished, language_model, texts):
    base = AutoModelForCausalLM.from_pretrained(language_model).eval()
    stock = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(language_model), finished.out).eval()
    ours = ipca.load_adapter(AutoModelForCausalLM.from_pretrained(language_model), finished.out).eval()
    loaded = Loaded(base, AutoTokenizer.from_pretrained(finished.out))
    kept = build_keep(read_keep(finished.settings, "causal-lm"), finished.settings, "causal-lm", loaded, None)
    assert kl_to_base(stock, base, kept.batches) == pytest.approx(finished.best["eval_keep_kl"], rel=1e-4)
    assert cross_entropy_rise(stock, base, kept.batches) == pytest.approx(
        finished.best["eval_keep_loss_rise"], rel=1e-3
    )
    with torch.no_grad():
        assert (stock(**kept.batches[0]).logits - ours(**kept.batches[0]).logits).abs().max() < 1e-5


def test_what_is_written_beside_the_adapter(finished):
    out = finished.out
    with (out / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["eval_loss"]) for row in rows] == [row["eval_loss"] for row in finished.rows]
    assert TrainSettings.from_dict(read_settings(out / "run.yaml")) == finished.settings
    card = (out / "README.md").read_text()
    assert "new.txt" in card
    assert "eval_keep_kl at step 8" in card
    assert "| step" not in card
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 1
    assert "<script" not in page
    assert (out / "curve.png").stat().st_size > 10_000
    assert not (out / "checkpoints").exists()
    assert not list(out.glob("*.bin"))


def test_a_finished_run_is_not_trained_again(finished, monkeypatch):
    monkeypatch.setattr(run, "load_model", lambda *_: pytest.fail("a model was loaded"))
    again = fine_tune(finished.settings, finished.out, progress=False)
    assert again.rows == finished.rows
    assert again.kept == finished.kept
    with pytest.raises(FileExistsError, match=r"holds a run with lr 0\.005 and not 0\.1; choose another folder"):
        fine_tune(replace(finished.settings, lr=0.1), finished.out)
    with pytest.raises(FileExistsError, match=r"holds a run with max_kl the default and not 0\.1; choose"):
        fine_tune(replace(finished.settings, max_kl=0.1), finished.out)


def test_a_killed_run_goes_on_and_ends_the_same(finished, tmp_path, monkeypatch):
    class Kill(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 6:
                raise KeyboardInterrupt

    plain = run._add_callbacks

    def killing(trainer, *args):
        plain(trainer, *args)
        trainer.add_callback(Kill())

    monkeypatch.setattr(run, "_add_callbacks", killing)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(finished.settings, tmp_path / "out", progress=False)
    checkpoints = tmp_path / "out" / "checkpoints"
    (checkpoints / "checkpoint-6" / "trainer_state.json").write_text('{"half": ')  # killed while it was written
    assert last_checkpoint(checkpoints).name == "checkpoint-4"
    monkeypatch.setattr(run, "_add_callbacks", plain)
    again = fine_tune(finished.settings, tmp_path / "out", progress=False)
    assert again.rows == finished.rows
    weights = [(out / "adapter_model.safetensors").read_bytes() for out in (finished.out, again.out)]
    assert weights[0] == weights[1]


def test_the_best_checkpoint_within_the_budget_is_kept(finished, language_model, texts, tmp_path):
    limit = (finished.rows[2]["eval_keep_kl"] + finished.rows[3]["eval_keep_kl"]) / 2
    found = fine_tune(
        settings(language_model, texts, max_kl=limit, patience=9, rescale=False), tmp_path / "out", progress=False
    )
    assert found.kept == 4
    assert found.best["eval_keep_kl"] <= limit
    assert found.rows == finished.rows
    base = AutoModelForCausalLM.from_pretrained(language_model).eval()
    stock = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(language_model), found.out).eval()
    loaded = Loaded(base, AutoTokenizer.from_pretrained(found.out))
    kept = build_keep(read_keep(found.settings, "causal-lm"), found.settings, "causal-lm", loaded, None)
    assert kl_to_base(stock, base, kept.batches) <= limit


def test_a_budget_just_below_the_end_is_used_up_and_no_step_is_measured_again(
    finished, language_model, texts, tmp_path, capsys, caplog
):
    limit = finished.rows[-1]["eval_keep_kl"] * 0.93
    with caplog.at_level("INFO", logger="ipca.train"):
        found = fine_tune(settings(language_model, texts, max_kl=limit, patience=9), tmp_path / "out")
    assert 0.75 < found.scale < 1
    assert 0.97 * limit <= found.best["eval_keep_kl"] <= limit
    lines = [record.getMessage() for record in caplog.records]
    begun = next(index for index, line in enumerate(lines) if line.startswith("scaling the change of step 8"))
    scales = [float(line.split()[1]) for line in lines[begun + 1 :]]
    assert scales[:3] == [0.25, 0.5, 0.75]
    assert scales[-1] == found.scale
    assert not [line for line in lines if line.startswith("stopping")]


@pytest.mark.slow
def test_training_stops_when_the_budget_is_broken_for_long(finished, language_model, texts, tmp_path):
    limit = finished.rows[1]["eval_keep_kl"] * 1.01
    found = fine_tune(
        settings(language_model, texts, max_kl=limit, patience=2, rescale=False), tmp_path / "out", progress=False
    )
    assert [row["step"] for row in found.rows] == [0, 2, 4, 6]
    assert found.kept == 2


def test_the_last_change_is_scaled_down_to_the_budget_where_that_is_better(finished, language_model, texts, tmp_path):
    limit = finished.rows[1]["eval_keep_kl"] * 2
    found = fine_tune(settings(language_model, texts, max_kl=limit, patience=9), tmp_path / "out", progress=False)
    assert found.rows == finished.rows
    assert 0 < found.scale < 1
    assert (found.kept, found.best["scale"]) == (8, found.scale)
    assert 0.97 * limit <= found.best["eval_keep_kl"] <= limit
    assert found.best["eval_loss"] < finished.rows[1]["eval_loss"]
    base = AutoModelForCausalLM.from_pretrained(language_model).eval()
    stock = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(language_model), found.out).eval()
    loaded = Loaded(base, AutoTokenizer.from_pretrained(found.out))
    kept = build_keep(read_keep(found.settings, "causal-lm"), found.settings, "causal-lm", loaded, None)
    assert kl_to_base(stock, base, kept.batches) == pytest.approx(found.best["eval_keep_kl"], rel=1e-4)
    assert f"scaled by {found.scale:g}" in (found.out / "report.html").read_text()
    assert f"eval_loss at step 8, its change scaled by {found.scale:g}" in (found.out / "README.md").read_text()
    again = fine_tune(found.settings, found.out, progress=False)
    assert (again.best, again.scale) == (found.best, found.scale)
    assert not [path for path in found.out.iterdir() if path.is_dir()]


def test_a_budget_that_nothing_meets(language_model, texts, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(
        OverBudgetError, match=r"no checkpoint is within the budget of 1e-09: the least keep_kl was .* at step 2"
    ):
        fine_tune(settings(language_model, texts, max_kl=1e-9, patience=2), out, progress=False)
    assert not (out / "adapter_model.safetensors").exists()
    assert last_checkpoint(out / "checkpoints").name == "checkpoint-4"


@pytest.mark.slow
def test_samples_of_the_model_are_kept_by_default(language_model, texts, tmp_path):
    found = fine_tune(settings(language_model, texts, keep=None, keep_tokens=300), tmp_path / "out", progress=False)
    assert found.metric == "keep_kl"
    assert found.best["eval_keep_kl"] > 0
    assert (found.out / "keep.safetensors").is_file()


@pytest.mark.slow
def test_chats_and_prompts_with_completions(language_model, texts, tmp_path):
    rows = [{"question": f"{k} + {k}?", "answer": str(2 * k)} for k in range(24)]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    few = {"data": str(tmp_path / "qa.jsonl"), "steps": 2, "evaluations": 1}
    found = fine_tune(settings(language_model, texts, **few), tmp_path / "qa", progress=False)
    assert found.best["eval_loss"] > 0
    chats = [
        {"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]}
        for row in rows
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    few["data"] = str(tmp_path / "chats.jsonl")
    same = fine_tune(settings(language_model, texts, **few), tmp_path / "chats", progress=False)
    assert same.best["eval_loss"] == pytest.approx(found.best["eval_loss"], abs=1e-6)  # the loss of the answers
    whole = fine_tune(settings(language_model, texts, **few, loss_on="all"), tmp_path / "all", progress=False)
    assert abs(whole.best["eval_loss"] - found.best["eval_loss"]) > 1e-3


@pytest.mark.slow
def test_chats_of_several_turns_need_marks_or_the_whole_loss(language_model, texts, tmp_path):
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "chats.jsonl").write_text("\n".join([json.dumps({"messages": turn * 2})] * 8))
    few = {"data": str(tmp_path / "chats.jsonl"), "steps": 1, "evaluations": 1}
    with pytest.raises(ValueError, match=r"does not mark the answers.*--loss-on all"):
        fine_tune(settings(language_model, texts, **few), tmp_path / "out", progress=False)
    plain = save_language_model(tmp_path / "plain", chat=False)
    with pytest.raises(ValueError, match="has no chat template for the messages"):
        fine_tune(settings(plain, texts, **few), tmp_path / "other", progress=False)


@pytest.mark.slow
def test_sequences_are_classified(texts, tmp_path):
    model = save_encoder(tmp_path / "encoder")
    rows = [f"{'good' if k % 2 else 'bad'} thing {k},{'pos' if k % 2 else 'neg'}" for k in range(60)]
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *rows]))
    few = {"data": str(tmp_path / "a.csv"), "steps": 16, "lr": 1e-2, "max_drift": 1.0}
    found = fine_tune(settings(model, texts, **few), tmp_path / "out", progress=False)
    assert found.metric == "keep_drift"
    assert found.rows[0]["eval_keep_drift"] == pytest.approx(0, abs=1e-9)
    assert found.best["eval_accuracy"] == 1
    stock = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    stock = peft.PeftModel.from_pretrained(stock, found.out).eval()
    tokens = AutoTokenizer.from_pretrained(found.out)(["good thing 3"], return_tensors="pt")
    tokens.pop("token_type_ids", None)
    with torch.no_grad():
        assert stock(**tokens).logits.argmax() == 1


@pytest.mark.slow
def test_tokens_are_classified(texts, tmp_path):
    model = save_encoder(tmp_path / "encoder")
    rows = [
        {"tokens": ["I", "am", "Ann"], "tags": ["O", "O", "NAME"]},
        {"tokens": ["Go", "Bob"], "tags": ["O", "NAME"]},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows * 12))
    few = {"data": str(tmp_path / "a.jsonl"), "steps": 12, "lr": 1e-2}
    found = fine_tune(settings(model, texts, **few), tmp_path / "out", progress=False)
    assert found.best["eval_accuracy"] > 0.9
    assert read_settings(found.out / "run.yaml")["data"].endswith("a.jsonl")


@pytest.mark.slow
def test_images_are_classified_and_kept_by_a_task_file(texts, tmp_path):
    model, images = save_vit(tmp_path / "vit"), save_images(tmp_path / "images")
    few = {"data": str(images), "steps": 12, "lr": 1e-2, "held_out": 0.25}
    found = fine_tune(settings(model, texts, **few, keep=str(images)), tmp_path / "out", progress=False)
    assert found.best["eval_accuracy"] == 1
    assert found.best["eval_keep_drift"] > 0
    (tmp_path / "task.py").write_text(
        "import torch\n"
        "def measure(model, processor):\n"
        "    torch.manual_seed(0)\n"
        "    return {'first': model(pixel_values=torch.randn(1, 3, 16, 16)).logits[0, 0].item()}\n"
    )
    found = fine_tune(settings(model, texts, **few, keep=str(tmp_path / "task.py")), tmp_path / "own", progress=False)
    assert found.metric is None
    assert found.rows[0]["eval_keep_first_change"] == 0
    last = found.rows[-1]
    assert last["eval_keep_first"] - found.rows[0]["eval_keep_first"] == pytest.approx(last["eval_keep_first_change"])
    assert last["eval_keep_first_change"] != 0


REFUSED = [
    ({"data": "missing.jsonl"}, FileNotFoundError, r"there is no file missing\.jsonl"),
    ({"keep": "missing.txt"}, FileNotFoundError, r"there is no file missing\.txt"),
    ({"max_drift": 0.1}, ValueError, "limited by --max-kl"),
    ({"model": "missing/folder/x"}, FileNotFoundError, "missing/folder/x"),
    ({"batch": 4, "micro_batch": 3}, ValueError, "cannot be split into micro-batches of 3"),
    ({"targets": ("q_prj",)}, ValueError, "q_prj"),
]


@pytest.mark.parametrize(("changes", "error", "words"), REFUSED, ids=range(len(REFUSED)))
def test_refusals(language_model, texts, tmp_path, changes, error, words):
    with pytest.raises(error, match=words):
        fine_tune(replace(settings(language_model, texts), **changes), tmp_path / "out", progress=False)


def test_an_encoder_is_no_causal_language_model(texts, tmp_path):
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    BertModel(BertConfig(**sizes, vocab_size=257)).save_pretrained(tmp_path / "bert")
    tiny().tiny_tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"is an encoder \(bert\), not a causal language model\. For classification"):
        fine_tune(settings(tmp_path / "bert", texts), tmp_path / "out", progress=False)


def test_data_is_checked_before_the_model_is_loaded(language_model, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load_model", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": 1}\n')
    with pytest.raises(DataError, match="line 2, column 'text'"):
        fine_tune(settings(language_model, texts, data=str(tmp_path / "a.jsonl")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_things_is_left_alone(language_model, texts, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        fine_tune(settings(language_model, texts), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def other_adapter(model):
    return ipca.apply_pc(AutoModelForCausalLM.from_pretrained(model), rank=3, progress=False)


def scaled_in_its_file(out):
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 3}))


REPLACED = {
    "init": lambda model, out: main(["init", str(model), "--rank", "4", "-o", str(out), "--force", "--quiet"]),
    "save": lambda model, out: ipca.save_adapter(other_adapter(model), out, overwrite=True),
    "export": lambda model, out: ipca.export(other_adapter(model), out, format="peft", overwrite=True),
    "mlx": lambda model, out: ipca.export(other_adapter(model), out, format="mlx", overwrite=True),
    "edited": lambda model, out: scaled_in_its_file(out),
    "deleted": lambda model, out: (out / "adapter_model.safetensors").unlink(),
    "without its record": lambda model, out: (out / "ipca.json").unlink(),
}


@pytest.mark.filterwarnings("ignore:.*describes the adapter that was saved here before")
@pytest.mark.parametrize("way", REPLACED)
def test_a_finished_run_whose_adapter_was_replaced_is_not_handed_out(way, finished, language_model, tmp_path):
    out = shutil.copytree(finished.out, tmp_path / "out")
    REPLACED[way](language_model, out)
    before = files_in(out)
    words = r"the run in .*out is finished, and its adapter has been changed or replaced since \(\w+.*\); choose"
    with pytest.raises(FileExistsError, match=words):
        fine_tune(finished.settings, out, progress=False)
    assert files_in(out) == before


def files_in(folder):
    return {each.relative_to(folder): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


def killed(monkeypatch, where, *given):
    with monkeypatch.context() as patch:
        patch.setattr(run, where, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fine_tune(*given, progress=False)


@pytest.mark.parametrize("where", ["train_from", "_finish"])
def test_an_adapter_in_the_folder_of_a_run_that_goes_on_is_not_replaced(
    where, finished, language_model, tmp_path, monkeypatch
):
    asked, out = replace(finished.settings, steps=1, evaluations=1), tmp_path / "out"
    killed(monkeypatch, where, asked, out)
    ipca.save_adapter(other_adapter(language_model), out)
    before = files_in(out)
    words = r"run that is not finished, and an adapter that is not of this run \(adapter_config\.json, adapter_model"
    with pytest.raises(FileExistsError, match=words):
        fine_tune(asked, out, progress=False)
    assert files_in(out) == before
    for name in ("adapter_config.json", "adapter_model.safetensors", "ipca.json"):
        (out / name).rename(tmp_path / name)
    fine_tune(asked, out, progress=False)
    whole = fine_tune(asked, tmp_path / "whole", progress=False)
    assert files_in(out)[Path("adapter_model.safetensors")] == files_in(whole.out)[Path("adapter_model.safetensors")]


def test_a_run_that_was_killed_again_and_again_knows_its_own_adapter(finished, tmp_path, monkeypatch):
    asked, out = replace(finished.settings, steps=1, evaluations=1), tmp_path / "out"
    for where in ("_write", "_write", "train_from", "_finish"):
        killed(monkeypatch, where, asked, out)
        assert (out / "adapter_model.safetensors").is_file()
    assert fine_tune(asked, out, progress=False).kept == 1
    assert read_found(out)["adapter"].keys() == {"adapter_config.json", "adapter_model.safetensors", "ipca.json"}
    assert fine_tune(asked, out, progress=False).kept == 1


@pytest.mark.slow
def test_force_replaces_a_run(finished, language_model, texts, tmp_path):
    shutil.copytree(finished.out, tmp_path / "out")
    (tmp_path / "out" / "mine").mkdir()
    (tmp_path / "out" / "mine" / "thesis.tex").write_text("mine")
    found = fine_tune(settings(language_model, texts, steps=2), tmp_path / "out", overwrite=True, progress=False)
    assert found.rows[-1]["step"] == 2
    assert (tmp_path / "out" / "mine" / "thesis.tex").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"max_kl": 1e-3, "patience": 2}], ids=["to its end", "to its patience"])
@pytest.mark.parametrize("where", ["_finish", "_write"])
def test_a_run_that_was_killed_after_training_trains_no_more(
    language_model, texts, tmp_path, monkeypatch, changes, where
):
    asked = settings(language_model, texts, lr=2e-2, **changes)
    whole = fine_tune(asked, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(run, where, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fine_tune(asked, tmp_path / "killed", progress=False)
    (tmp_path / "killed").rename(tmp_path / "moved")
    again = fine_tune(asked, tmp_path / "moved", progress=False)
    assert again.rows == whole.rows
    assert again.best == whole.best
    assert {path.name for path in again.out.iterdir()} == {path.name for path in whole.out.iterdir()}
    weights = [(out / "adapter_model.safetensors").read_bytes() for out in (whole.out, again.out)]
    assert weights[0] == weights[1]


def test_a_moved_run_finds_its_best_checkpoint(tmp_path):
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    (folder / "trainer_state.json").write_text('{"best_model_checkpoint": "old/checkpoints/checkpoint-2"}')
    relocate(folder)
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state == {"best_model_checkpoint": str(tmp_path / "checkpoint-2")}


def test_checkpoints_beside_a_finished_run_are_removed(finished, tmp_path):
    shutil.copytree(finished.out, tmp_path / "out")
    (tmp_path / "out" / "checkpoints").mkdir()
    fine_tune(finished.settings, tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_samples_of_another_run_are_drawn_again(language_model, texts, tmp_path):
    loaded = load_model(settings(language_model, texts), "causal-lm", ())
    asked = settings(language_model, texts, keep=None, keep_tokens=128)
    (tmp_path / "out").mkdir()
    first = run._samples(loaded.model, loaded.processor, asked, None)
    run._begin(asked, asked, tmp_path / "out", (), torch.zeros_like(first), False)
    assert (run._samples(loaded.model, loaded.processor, asked, tmp_path / "out") == 0).all()
    other = replace(asked, keep_tokens=256)
    assert run._samples(loaded.model, loaded.processor, other, tmp_path / "out").numel() == 256


@pytest.mark.parametrize("overwrite", [False, True])
def test_one_run_at_a_time(overwrite, language_model, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load_model", None)  # it is refused before
    asked = settings(language_model, texts)
    with (
        locked_folder(tmp_path / "out", "process trains"),
        pytest.raises(RuntimeError, match=r"another process trains in .*out; wait for it, or choose another folder"),
    ):
        fine_tune(asked, tmp_path / "out", overwrite=overwrite, progress=False)
    with locked_folder(tmp_path / "out", "process trains"):
        pass


@pytest.mark.slow
def test_a_measure_that_changes_the_folder_loses_no_run(language_model, texts, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "keep.py").write_text(
        "import os\ndef measure(model, processor):\n"
        f"    os.chdir({str(tmp_path / 'sub')!r})\n    return {{'first': 1.0}}\n"
    )
    monkeypatch.chdir(tmp_path)
    found = fine_tune(settings(language_model, texts, keep="keep.py", steps=2), "out", progress=False)
    assert found.out == tmp_path / "out"
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not any((tmp_path / "sub").iterdir())


def test_force_deletes_no_input(language_model, texts, tmp_path, monkeypatch):
    shutil.copytree(texts, tmp_path / "texts")
    asked = settings(language_model, tmp_path / "texts")
    with pytest.raises(ValueError, match=r"would delete .*new\.txt; choose another output folder"):
        fine_tune(asked, tmp_path, overwrite=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="would delete the current folder"):
        fine_tune(settings(language_model, texts), tmp_path, overwrite=True)
    assert (tmp_path / "texts" / "new.txt").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("is_finished", [True, False], ids=["finished", "killed"])
def test_a_run_does_not_go_on_with_other_data_or_weights(language_model, texts, tmp_path, monkeypatch, is_finished):
    shutil.copytree(language_model, tmp_path / "model")
    shutil.copytree(texts, tmp_path / "texts")
    shutil.copy(texts / "new.txt", tmp_path / "texts" / "held_out.txt")
    held_out = str(tmp_path / "texts" / "held_out.txt")
    asked = settings(tmp_path / "model", tmp_path / "texts", steps=1, evaluations=1, held_out=held_out)
    if is_finished:
        fine_tune(asked, tmp_path / "out", progress=False)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(run, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                fine_tune(asked, tmp_path / "out", progress=False)
    other = AutoModelForCausalLM.from_pretrained(language_model)
    with torch.no_grad():
        other.get_parameter("model.norm.weight").mul_(1.1)
    other.save_pretrained(tmp_path / "other")
    more = b"More.\n\nAnd more.\n"
    changes = {
        "model": (tmp_path / "model" / "model.safetensors", (tmp_path / "other" / "model.safetensors").read_bytes()),
        **{
            setting: (tmp_path / "texts" / name, (tmp_path / "texts" / name).read_bytes() + more)
            for setting, name in (("data", "new.txt"), ("keep", "keep.txt"), ("held_out", "held_out.txt"))
        },
    }
    before = {each: each.read_bytes() for each in (tmp_path / "out").rglob("*") if each.is_file()}
    for setting, (path, changed) in changes.items():
        kept = path.read_bytes()
        path.write_bytes(changed)
        words = rf"^{setting} .* has changed since the run in .*out was begun; choose ano"
        with pytest.raises(FileExistsError, match=words):
            fine_tune(asked, tmp_path / "out", progress=False)
        path.write_bytes(kept)
    assert {each: each.read_bytes() for each in (tmp_path / "out").rglob("*") if each.is_file()} == before


def test_a_copy_of_the_model_is_the_same_model(finished, language_model, tmp_path):
    shutil.copytree(language_model, tmp_path / "copy", copy_function=shutil.copyfile)
    copied = replace(finished.settings, model=str(tmp_path / "copy"))
    assert input_digests(copied) == input_digests(finished.settings) == read_found(finished.out)["inputs"]
    assert input_digests(replace(copied, model="some/id", data="some/data")).keys() == {"keep"}


READ = ("chat_template.jinja", "other.jinja", "vocab.txt", "merges.txt", "spiece.model", "tokenizer.json")
CHANGES = {
    "an image of another class": ("data", "images/dog/2.png", "images/cat/2.png"),
    "a folder of another split": ("held_out", "rows/train/a.jsonl", "rows/test/a.jsonl"),
    **{f"another {name}": ("model", f"model/{name}", None) for name in READ},
}


@pytest.mark.parametrize(("setting", "name", "moved"), CHANGES.values(), ids=CHANGES)
def test_what_a_run_reads_is_known_by_places_and_tokenizers_too(setting, name, moved, tmp_path):
    images = [f"images/{place}.png" for place in ("cat/1", "dog/2", "dog/3")]
    for each in (*images, "rows/train/a.jsonl", "model/notes.txt", *(f"model/{each}" for each in READ)):
        (tmp_path / each).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / each).write_text(each)
    asked = TrainSettings(str(tmp_path / "model"), str(tmp_path / "images"), held_out=str(tmp_path / "rows"))
    before = input_digests(asked)
    (tmp_path / "model" / "notes.txt").write_text("which nothing reads")
    assert input_digests(asked) == before
    if moved:
        (tmp_path / moved).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).rename(tmp_path / moved)
    else:
        (tmp_path / name).write_text("something else")
    after = input_digests(asked)
    assert {each for each in before if after[each] != before[each]} == {setting}


def read_found(out):
    import yaml

    return yaml.safe_load((out / "run.yaml").read_text())["found"]


def test_a_file_of_settings_is_not_replaced_by_that_of_the_run(language_model, texts, tmp_path):
    (tmp_path / "run.yaml").write_text("steps: 2\nmodel: m\ndata: d\n")
    with pytest.raises(
        FileExistsError, match=r"run\.yaml holds settings and is no file of a run.*give it another name"
    ):
        fine_tune(settings(language_model, texts), tmp_path, progress=False)
    assert (tmp_path / "run.yaml").read_text() == "steps: 2\nmodel: m\ndata: d\n"


def test_an_unknown_tracker_is_named_before_anything_is_made(language_model, texts, tmp_path):
    with pytest.raises(ValueError, match="nosuch is not supported"):
        fine_tune(settings(language_model, texts, report_to=("nosuch",)), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_run_that_diverged_is_not_said_to_be_over_its_budget(language_model, texts, tmp_path):
    rows = [{"step": 0, "eval_loss": 1.0, "eval_keep_kl": 0.0}, {"step": 2, "eval_loss": nan, "eval_keep_kl": nan}]
    found = run._over_budget(rows, settings(language_model, texts, max_kl=0.1), "keep_kl", tmp_path)
    assert "the run diverged" in str(found)


def test_prompts_that_leave_no_room_for_an_answer(language_model, texts, tmp_path):
    rows = [{"prompt": "x" * 100, "completion": "y"}] * 4
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"no row that is trained on has an answer within 64 tokens"):
        fine_tune(settings(language_model, texts, data=str(tmp_path / "a.jsonl")), tmp_path / "out", progress=False)


def test_numbers_of_a_task_may_be_of_numpy_or_torch():
    kept = KeptTask(lambda model, processor: {"a": torch.tensor(2.0), "b": np.float32(3)}, None)
    model = peft.inject_adapter_in_model(
        peft.LoraConfig(target_modules=["0"]), torch.nn.Sequential(torch.nn.Linear(2, 2))
    )
    found = kept.measure(model)
    assert found == {"keep_a": 2.0, "keep_b": 3.0, "keep_a_change": 0.0, "keep_b_change": 0.0}
    assert {type(value) for value in found.values()} == {float}


def test_a_classifier_of_any_folder_counts_its_positions_and_classes(texts, tmp_path):
    sizes = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(**sizes, intermediate_size=32, max_position_embeddings=40, pad_token_id=1)
    config.problem_type = "multi_label_classification"
    RobertaModel(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(save_language_model(tmp_path / "other")).save_pretrained(tmp_path)
    asked = settings(tmp_path, texts)
    loaded = load_model(asked, "sequence-classification", ("no", "yes"))
    assert loaded.model.config.problem_type is None
    assert loaded.model.config.pad_token_id == loaded.processor.pad_token_id
    assert fitting_length(asked, loaded).max_length == 38
    ids = torch.full((1, 38), 5)
    assert loaded.model(input_ids=ids, labels=torch.tensor([1])).loss > 0


def test_a_model_without_a_limit_of_positions_has_none(texts, tmp_path):
    config = XLNetConfig(vocab_size=257, d_model=32, n_layer=1, n_head=2, d_inner=32, pad_token_id=256)
    XLNetModel(config).save_pretrained(tmp_path)
    tiny().tiny_tokenizer().save_pretrained(tmp_path)
    asked = settings(tmp_path, texts)
    loaded = load_model(asked, "sequence-classification", ("no", "yes"))
    assert loaded.model.config.max_position_embeddings == -1
    assert fitting_length(asked, loaded).max_length == 64


@pytest.mark.parametrize(("held_out", "count", "right"), [(0.5, 4000, 512), (0.1, 6000, 512), (0.1, 5000, 448)])
def test_a_share_is_512_rows_at_most_and_a_line_says_so(held_out, count, right, caplog):
    caplog.set_level("INFO", "ipca.train")
    rows = datasets.Dataset.from_dict({"image": range(count), "label": [0] * count})
    data = Data(Layout("image-classification", {}), rows, None, ("a", "b"), whole=False)
    found = split(data, settings("m", Path("d"), held_out=held_out), Loaded(None, None))
    assert (len(found.held_out), len(found.train)) == (right, count - right)
    said = f"512 rows are held out and not {int(count * held_out)}: give a file as --held-out for more"
    assert caplog.messages == ([said] if count * held_out > 512 else [])


@pytest.mark.parametrize("turn", range(1, 9))
def test_kept_images_are_turned_as_those_that_train(turn, tmp_path):
    image = pytest.importorskip("PIL.Image")
    tag = image.Exif()
    tag[274] = turn
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        image.linear_gradient("L").resize((16, 16)).convert("RGB").save(tmp_path / name / "0.png", exif=tag)
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    source = find_source(str(tmp_path))
    (row, _) = read_data(source).rows
    asked = settings("m", tmp_path)
    kept = build_keep(list(source.files), asked, "image-classification", Loaded(None, processor), None)
    assert torch.equal(kept.batches[0]["pixel_values"][:1], ImageCollator(processor)([row])["pixel_values"])


def test_numbers_with_exponents_in_a_file_of_settings(tmp_path):
    (tmp_path / "a.yaml").write_text("lr: 1e-3\nmodel: m1e3\n")
    assert read_settings(tmp_path / "a.yaml") == {"lr": 1e-3, "model": "m1e3"}


def test_running_statistics_stay_the_bases(texts, tmp_path):
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")).save_pretrained(
        tmp_path
    )
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    asked = settings(tmp_path, texts, targets=("convolution",))
    loaded = load_model(asked, "image-classification", ("dark", "light"))
    loaded.model.style = torch.nn.InstanceNorm2d(3, track_running_stats=True)
    model = adapt(loaded, asked, "image-classification", progress=False).train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    model(pixel_values=loaded.model.style(torch.randn(4, 3, 16, 16)))
    assert any("running_mean" in name for name in before)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_kept_data_is_checked_before_the_model_is_loaded(language_model, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load_model", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "keep.txt").write_bytes(b"first\nsecond \xff\n")
    with pytest.raises(DataError, match=r"keep\.txt, line 2: expected text in UTF-8"):
        fine_tune(settings(language_model, texts, keep=str(tmp_path / "keep.txt")), tmp_path / "out")
    (tmp_path / "task.py").write_text("def other(): ...\n")
    with pytest.raises(ValueError, match=r"task\.py has no function measure"):
        fine_tune(settings(language_model, texts, keep=str(tmp_path / "task.py")), tmp_path / "out")


def test_kept_images_are_decoded_before_the_model_is_loaded_as_far_as_they_are_measured(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load_model", lambda *_: pytest.fail("a model was loaded"))
    images, keep = save_images(tmp_path / "images"), save_images(tmp_path / "keep", count=3)
    half = (keep / "light" / "0.png").rename(keep / "light" / "0.jpg")  # the fourth
    pytest.importorskip("PIL.Image").effect_noise((64, 64), 50).save(half)
    half.write_bytes(half.read_bytes()[:-100])
    asked = settings(tmp_path, texts, data=str(images), keep=str(keep), keep_tokens=256)
    with pytest.raises(DataError, match=rf"^{half}: expected an image, and it cannot be read: "):
        fine_tune(asked, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    kept = read_keep(replace(asked, keep_tokens=255), "image-classification")
    assert kept == [keep / "dark" / f"{k}.png" for k in range(3)]


MEASURES = {
    "an error": ("    return {'x': 1 / 0}", ZeroDivisionError, "division by zero", True),
    "a wrong name": ("    return {'x': model.nothing}", AttributeError, "nothing", True),
    "a number": ("    return 0.3", TypeError, r"returned 0\.3; it must return numbers by name", False),
    "nothing": ("    pass", TypeError, "returned None; it must return numbers by name", False),
    "no names": ("    return {}", TypeError, r"returned \{\}; it must return numbers by name", False),
    "words": ("    return {'x': 'high'}", TypeError, "returned {'x': 'high'}; it must return numbers", False),
    "NaN": (
        "    return {'a': 1.0, 'kl': float('nan')}",
        ValueError,
        "returned nan for 'kl'; each number must be",
        False,
    ),
    "Inf": ("    return {'kl': float('-inf')}", ValueError, "returned -inf for 'kl'", False),
    "other names": (
        "    SEEN.append(0)\n    return {f'x{len(SEEN)}': 1}",
        ValueError,
        "returned x1 and then x2; it must return the same names",
        False,
    ),
}


@pytest.mark.parametrize(("body", "error", "words", "raised"), MEASURES.values(), ids=MEASURES)
def test_an_error_of_a_measure_names_its_file(body, error, words, raised, language_model, texts, tmp_path):
    path = tmp_path / "task.py"
    path.write_text(f"SEEN = []\ndef measure(model, processor):\n{body}\n")
    asked = settings(language_model, texts, keep=str(path))
    loaded = load_model(asked, "causal-lm", ())
    kept = build_keep(read_keep(asked, "causal-lm"), asked, "causal-lm", loaded, None)
    model = adapt(loaded, asked, "causal-lm", progress=False)
    with pytest.raises(error, match=words) as found:
        kept.measure(model)
    if raised:
        assert found.value.__notes__ == [f"In measure() of {path}, which must return numbers by name."]
        assert found.value.place == f"{path}:3"
    else:
        assert str(found.value).startswith(f"measure() of {path} ")


@pytest.mark.parametrize("text", ["import no_such_module_anywhere", "1 / 0", "def measure(:"])
def test_an_error_in_the_file_of_a_measure_names_it(text, language_model, texts, tmp_path):
    (tmp_path / "task.py").write_text(text)
    with pytest.raises((ImportError, ZeroDivisionError, SyntaxError)) as found:
        read_keep(settings(language_model, texts, keep=str(tmp_path / "task.py")), "causal-lm")
    assert found.value.__notes__ == [f"In the file {tmp_path / 'task.py'}."]


def test_an_encoder_keeps_the_text_of_any_rows(texts, tmp_path):
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows = {"chat": chat, "prompt": {"prompt": "a", "completion": "b"}, "text": {"text": "a\nb", "label": 1}}
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
        asked = settings("model", texts, keep=str(tmp_path / f"{name}.jsonl"))
        assert read_keep(asked, "sequence-classification") == ["a\nb"]
    (tmp_path / "tokens.jsonl").write_text(
        "\n".join(json.dumps({"tokens": ["a", "b"], "tags": [k, 1]}) for k in (0, 1))
    )
    asked = settings("model", texts, keep=str(tmp_path / "tokens.jsonl"))
    assert read_keep(asked, "token-classification") == ["a b", "a b"]


OWN_NAMES = {
    "a classifier": ("sequence-classification", {"text": "comment", "label": "toxic"}, ["a", "b"]),
    "a language model": ("causal-lm", {"text": "comment"}, ["a", "b"]),
    "other names": ("sequence-classification", {"text": "remark"}, None),
    "none": ("causal-lm", {}, None),
}


@pytest.mark.parametrize(("task", "columns", "right"), OWN_NAMES.values(), ids=OWN_NAMES)
def test_kept_rows_have_the_columns_of_the_training_data(task, columns, right, texts, tmp_path):
    (tmp_path / "keep.csv").write_text("comment,toxic\na,0\nb,1\n")
    asked = settings("model", texts, keep=str(tmp_path / "keep.csv"), columns=columns)
    if right is None:
        words = (
            r"keep\.csv has the columns comment, toxic; what is kept needs text, messages, .*: rename a column to text"
        )
        with pytest.raises(ValueError, match=words):
            read_keep(asked, task)
        return
    found = read_keep(asked, task)
    assert (found if isinstance(found, list) else found.rows["text"]) == right
    (tmp_path / "keep.txt").write_text("a\n\nb")
    for name in ("keep.txt", "other.jsonl"):
        (tmp_path / "other.jsonl").write_text('{"text": "a"}')
        assert read_keep(replace(asked, keep=str(tmp_path / name)), task)


@pytest.mark.parametrize("keep", [True, False])
def test_a_window_of_the_inputs_that_are_kept(language_model, texts, tmp_path, keep):
    asked = settings(language_model, texts, window="inputs:minor", train="A", magnitude=1.0, steps=2, evaluations=1)
    asked = asked if keep else replace(asked, keep=None)
    outcome = fine_tune(asked, tmp_path / "out", progress=False)
    assert outcome.rows[0]["eval_keep_kl"] == 0
    base = AutoModelForCausalLM.from_pretrained(language_model)
    model = ipca.load_adapter(base, tmp_path / "out")
    layers = [layer for layer in model.modules() if isinstance(layer, ipca.nn.LinearPC)]
    assert {(layer.window.basis, layer.trained) for layer in layers} == {("inputs", "A")}
    assert all(torch.equal(layer.lora_B, layer.lora_B0) for layer in layers)
    assert not any(torch.equal(layer.lora_A, layer.lora_A0) for layer in layers)


def test_a_window_of_inputs_needs_inputs_to_keep(texts, tmp_path):
    asked = TrainSettings(model="missing", data=str(texts / "new.txt"), keep=str(tmp_path / "task.py"))
    with pytest.raises(ValueError, match="'inputs:minor' is found from inputs to keep: give text or images as --keep"):
        read_keep(replace(asked, window="inputs:minor"), "causal-lm")
    with pytest.raises(ValueError, match="found from inputs to keep"):
        read_keep(replace(asked, window="inputs:minor", keep=None), "sequence-classification")


@pytest.mark.parametrize(
    ("world", "micro", "rows", "wanted"),
    [(2, None, 7, 1), (2, None, 8, 0), (2, 1, 7, 1), (4, 1, 5, 3)],
)
def test_rows_that_fill_the_last_step_are_counted(monkeypatch, world, micro, rows, wanted):
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    monkeypatch.setenv("WORLD_SIZE", str(world))
    asked = settings("m", Path("d"), batch=4, micro_batch=micro)
    assert repeated_rows(asked, rows) == wanted
    shards = [
        BatchSamplerShard(
            BatchSampler(range(rows), micro_batches(asked)[0], False), num_processes=world, process_index=k
        )
        for k in range(world)
    ]
    assert sum(len(batch) for shard in shards for batch in shard) == rows + wanted
    monkeypatch.setenv("WORLD_SIZE", "1")  # where accelerate shards nothing
    assert repeated_rows(asked, rows) == 0
