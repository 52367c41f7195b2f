"""The loss and the gradients of a step are the same however its rows are split into passes and processes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from tests.helpers.train_runs import TEXT, save_base, save_images, save_language_model, tiny

pytest.importorskip("trl")
pytest.importorskip("datasets")

from ipca.train import TrainSettings, fine_tune
from ipca.train.data import read_data
from ipca.train.examples import split
from ipca.train.models import adapt, as_it_was, fitting_length, load_model
from ipca.train.outcome import curve_of, read_curve
from ipca.train.sources import find_source
from ipca.train.trainers import _on_one_device, build_trainer

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 64, "pad_token_id": 256, "initializer_range": 0.2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IMAGES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
MODELS = {
    "bert": (transformers.BertModel, transformers.BertConfig(**SIZES, **NO_DROPOUT)),
    "electra": (transformers.ElectraModel, transformers.ElectraConfig(**SIZES, **NO_DROPOUT, embedding_size=32)),
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES, classifier_dropout=0.0)),
    "vit": (transformers.ViTModel, transformers.ViTConfig(**IMAGES, image_size=16, patch_size=4)),
}


def text(folder, count=24):
    rows = [f"word{k % 7} {'and ' * (k % 5)}{k},{'ab'[k % 2]}\n" for k in range(count)]
    (folder / "a.csv").write_text("text,label\n" + "".join(rows))
    return folder / "a.csv"


def tags(folder, count=24):
    rows = [{"tokens": ["Go", "Bob"] * (1 + k % 4), "tags": ["O", "NAME"] * (1 + k % 4)} for k in range(count)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "a.jsonl"


def images(folder, count=24):
    return save_images(folder / "images", count=count // 2)


def running_text(folder, count=24):
    (folder / "a.txt").write_text(TEXT[: 32 * count])
    return folder / "a.txt"


def answers(folder, count=24):
    rows = [{"prompt": f"{k}?", "completion": "yes " * (1 + k % 4)} for k in range(count)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "a.jsonl"


KINDS = {
    "text, a plain loss": ("bert", text),
    "text, a loss of the step": ("llama", text),
    "tags, a plain loss": ("electra", tags),
    "tags, a loss of the step": ("llama", tags),
    "images": ("vit", images),
    "running text": ("llama", running_text),
    "answers": ("llama", answers),
}


def save(model, folder):
    return save_base(*MODELS[model], folder)


def trained(settings, out):
    """The measurements of a run, the norms of its gradients, and what it trained."""
    data = read_data(find_source(settings.data))
    loaded = load_model(settings, data.layout.task, data.labels)
    model = adapt(loaded, settings, data.layout.task, progress=False)
    settings = fitting_length(settings, loaded)
    trainer = build_trainer(model, split(data, settings, loaded), settings, loaded, data, out)
    trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    weights = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    return curve_of(trainer.state.log_history), norms, weights


@pytest.mark.parametrize(("model", "data"), KINDS.values(), ids=KINDS)
def test_micro_batches_change_no_loss_and_no_gradient(model, data, tmp_path):
    few = {"rank": 4, "steps": 2, "evaluations": 2, "batch": 8, "lr": 1e-2, "max_length": 32, "held_out": 0.4}
    settings = TrainSettings(str(save(model, tmp_path / "model")), str(data(tmp_path)), **few)
    rows, norms, weights = trained(settings, tmp_path / "whole")
    found = trained(replace(settings, micro_batch=2), tmp_path / "micro")
    for row, other in zip(rows, found[0], strict=True):
        names = {*row} - ({"eval_loss"} if data is answers else set())  # a mean over passes
        assert {name: other[name] for name in names} == pytest.approx({name: row[name] for name in names}, rel=1e-4)
    assert found[1] == pytest.approx(norms, rel=1e-3)
    assert all(torch.allclose(found[2][name], value, atol=1e-5) for name, value in weights.items())


LONG = {"prompts": "prompt", "chats": "messages"}


@pytest.mark.parametrize("packing", [False, True], ids=["alone", "packed"])
@pytest.mark.parametrize("role", LONG.values(), ids=LONG)
def test_rows_whose_answers_are_cut_off_are_counted(role, packing, tmp_path, caplog):
    def row(k, long):
        question, answer = f"{k} " * (30 if long else 2), f"{k}"
        if role == "prompt":
            return {"prompt": question, "completion": answer}
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    paths = []
    for name, count in (("a", 12), ("b", 5)):
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("\n".join(json.dumps(row(k, k % 4 == 0)) for k in range(count)))
    save_language_model(tmp_path / "model")
    settings = TrainSettings(str(tmp_path / "model"), str(paths[0]), max_length=64, packing=packing, batch=2, steps=1)
    data, held_out = (read_data(find_source(str(path))) for path in paths)
    loaded = load_model(settings, "causal-lm", ())
    parts = split(data, settings, loaded, held_out)
    build_trainer(loaded.model, parts, settings, loaded, data, tmp_path / "out")
    said = [record.getMessage() for record in caplog.records if record.name == "ipca.train"]
    words = "count nothing: their answers begin after 64 tokens; pass a larger --max-length"
    assert said == [f"3 of 12 rows trained on {words}", f"2 of 5 rows held out {words}"]
    caplog.clear()
    parts = replace(parts, train=parts.held_out)  # as ipca tradeoff, which trains on nothing
    build_trainer(loaded.model, parts, settings, loaded, data, tmp_path / "out")
    assert f"2 of 5 rows held out {words}" in caplog.text
    assert "trained on" not in caplog.text


@pytest.mark.slow
def test_two_processes_train_and_evaluate_a_classifier_as_one(tmp_path):
    (tmp_path / "held_out").mkdir()
    files = [str(save("electra", tmp_path / "model")), str(tags(tmp_path, 32))]
    few = {"held_out": str(tags(tmp_path / "held_out", 21)), "steps": 4, "evaluations": 4, "rank": 4, "batch": 8}
    one = fine_tune(TrainSettings(*files, **few), tmp_path / "one", progress=False)
    options = [word for name, value in few.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "ipca"]
    done = subprocess.run(
        [*command, "train", *files, *options, "-o", str(tmp_path / "two")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for row, other in zip(one.rows, read_curve(tmp_path / "two" / "curve.csv"), strict=True):
        assert other == pytest.approx(row, rel=2e-4)


def test_several_gpus_need_several_processes(caplog):
    arguments = transformers.TrainingArguments("out", use_cpu=True, per_device_train_batch_size=4)
    assert _on_one_device(arguments).n_gpu == arguments.n_gpu <= 1
    assert not caplog.messages
    arguments._n_gpu = 3
    assert _on_one_device(arguments).train_batch_size == 4
    assert caplog.messages == ["one of 3 GPUs is used; torchrun --nproc-per-node 3 -m ipca train … uses all"]


def test_the_tokenizer_of_a_classifier_is_saved_as_the_base_has_it(tmp_path):
    """Fast tokenizers are saved with the length that the last call cut at."""
    save("bert", tmp_path / "model")
    settings = TrainSettings(str(tmp_path / "model"), str(text(tmp_path)), max_length=8, rank=4, steps=1, evaluations=1)
    fine_tune(replace(settings, keep=settings.data), tmp_path / "out", progress=False)
    base, out = (json.loads((tmp_path / name / "tokenizer.json").read_text()) for name in ("model", "out"))
    assert [out[key] for key in ("truncation", "padding")] == [base[key] for key in ("truncation", "padding")]


def test_a_tokenizer_that_cuts_by_itself_does_so_afterward():
    tokenizer = tiny().tiny_tokenizer()
    for given in (None, {"max_length": 7}):
        if given:
            tokenizer.backend_tokenizer.enable_truncation(**given)
            tokenizer.backend_tokenizer.enable_padding(length=9)
        before = tokenizer.backend_tokenizer.to_str()
        with as_it_was(tokenizer):
            tokenizer(["a b c d"], truncation=True, padding=True, max_length=3)
            assert tokenizer.backend_tokenizer.to_str() != before
        assert tokenizer.backend_tokenizer.to_str() == before
