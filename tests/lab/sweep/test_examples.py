"""The examples of tasks run as they are printed, on tiny random models."""

import csv
import math
import re

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import logging

from ipca.cli.main import main
from ipca.lab.names import TASK_EXAMPLES

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
FEW = (
    "--windows",
    "0.5",
    "--lrs",
    "1e-3",
    "--seeds",
    "1",
    "--early",
    "2",
    "--methods",
    "lora",
    "--comparisons",
    "same",
)


@pytest.fixture(autouse=True)
def _restored():
    """The examples silence transformers, other tests listen to it."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


def save(name, folder):
    """A tiny pretrained model for the example ``name``, with a tokenizer of bytes."""
    torch.manual_seed(0)
    if name == "lm":
        LlamaForCausalLM(LlamaConfig(vocab_size=257, **SIZES)).save_pretrained(folder)
    elif name == "classification":
        config = DistilBertConfig(vocab_size=257, dim=32, hidden_dim=48, n_layers=1, n_heads=2)
        DistilBertForSequenceClassification(config).save_pretrained(folder)
    else:
        ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=7, **SIZES)).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>").save_pretrained(folder)


@pytest.mark.parametrize("name", TASK_EXAMPLES)
def test_an_example_runs_as_it_is_printed(name, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["sweep", "--example", name])
    text = capsys.readouterr().out
    save(name, tmp_path / "model")
    text, models_named = re.subn(r'(?m)^MODEL = ".*?"', f"MODEL = {str(tmp_path / 'model')!r}", text)
    text, sizes_named = re.subn(r"(?m)^(STEPS, BATCH(, LENGTH)?) = .*", r"*_, STEPS, BATCH, LENGTH = 3, 4, 16", text)
    assert (models_named, sizes_named) == (1, 1)
    (tmp_path / "task.py").write_text(text)
    assert main(["sweep", str(tmp_path / "task.py"), "-o", str(tmp_path / "out"), *FEW, "--quiet"]) == 0
    with (tmp_path / "out" / "rows.csv").open(newline="") as file:
        base, window, lora = csv.DictReader(file)
    assert [row["method"] for row in (base, window, lora)] == ["base", "0.5", "lora"]
    assert {row["status"] for row in (base, window, lora)} == {"ok"}
    assert float(base["retained"]) == pytest.approx(1.0 if name != "lm" else 0.0, abs=1e-6)
    assert all(math.isfinite(float(row["target"])) for row in (base, window, lora))
    assert all(float(row["retained"]) < float(base["retained"]) - 1e-6 for row in (window, lora))
    assert (tmp_path / "out" / "report.html").exists()
