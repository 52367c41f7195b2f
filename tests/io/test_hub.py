"""Ids of the Hugging Face Hub wherever a folder is, from its local cache."""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from transformers import BertConfig, BertModel

import ipca
from ipca.cli.main import main
from ipca.io.hub import adapter_folder, model_folder
from tests.helpers.models import snapshot


def bert() -> BertModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return BertModel(BertConfig(**sizes, vocab_size=50))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The Hub's local cache, offline, with a model and an adapter."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    bert().save_pretrained(stored(tmp_path, "user/model"))
    bert().save_pretrained(stored(tmp_path, "tiny"))
    (stored(tmp_path, "user/model") / "vocab.txt").write_text("a\n")
    ipca.save_adapter(
        ipca.apply_pc(bert(), rank=4, targets=["query"], progress=False), stored(tmp_path, "user/adapter")
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def stored(top: Path, name: str) -> Path:
    """The folder of the snapshot ``abc`` of a repository in the cache."""
    repository = top / "cache" / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True, exist_ok=True)
    return repository / "snapshots" / "abc"


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "user/model", "--rank", "4"],
        ["inspect", "tiny", "--rank", "4"],
        ["inspect", "user/adapter"],
        ["init", "user/model", "--rank", "4", "-o", "out"],
        ["merge", "user/model", "user/adapter", "-o", "out"],
        ["export", "user/model", "user/adapter", "-o", "out"],
        ["export", "user/model", "user/adapter", "--format", "residual", "-o", "out"],
    ],
)
def test_every_command_takes_ids(words, cache, tmp_path, capsys):
    assert main([*words, "--quiet"]) == 0, capsys.readouterr().err
    config = tmp_path / "out" / "adapter_config.json"
    if config.is_file():
        assert json.loads(config.read_text())["base_model_name_or_path"] == "user/model"
    if words[0] == "merge":
        assert (tmp_path / "out" / "vocab.txt").is_file()


def test_convert_takes_ids(cache, tmp_path, capsys):
    ipca.export(ipca.load_adapter(bert(), "user/adapter"), stored(tmp_path, "user/stock"))
    assert main(["convert", "user/model", "user/stock", "-o", "out", "--quiet"]) == 0, capsys.readouterr().err
    assert ipca.import_peft(bert(), "user/stock", progress=False).encoder.layer[0].attention.self.query.rank == 4


def test_python_takes_ids(cache):
    model = ipca.load_adapter(bert(), "user/adapter")
    assert model.encoder.layer[0].attention.self.query.rank == 4
    assert "encoder.layer.0.attention.self.query" in ipca.load_unquantized_weights("user/model")


def test_a_folder_comes_first(cache, tmp_path):
    shutil.copytree(stored(tmp_path, "user/adapter"), tmp_path / "user" / "adapter")
    assert adapter_folder("user/adapter") == Path("user/adapter")
    assert model_folder(tmp_path) == tmp_path
    assert model_folder("user/model") == stored(tmp_path, "user/model")


@pytest.mark.parametrize("name", ["user/none", "nobody"])
def test_what_is_nowhere_is_said_and_nothing_is_written(name, cache, tmp_path, capsys):
    assert main(["init", name, "-o", "out"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"there is no folder {name}, and the Hugging Face Hub or its local cache has no such repository" in error
    assert "HF_HUB_OFFLINE" in error
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_is_nowhere_changes_nothing(cache):
    model = bert()
    before = snapshot(model)
    with pytest.raises(FileNotFoundError, match="there is no folder user/none"):
        ipca.load_adapter(model, "user/none")
    with pytest.raises(FileNotFoundError, match="none is not a folder; give the folder of an adapter"):
        ipca.load_adapter(model, "none")
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["/no/where", "../user/none", "./user/none", "a/b/c", "~/none"])
def test_paths_are_no_ids(name):
    assert model_folder(name) == Path(name)


def test_the_classes_of_a_base_are_read_from_its_configuration_before_its_weights(cache, tmp_path):
    pytest.importorskip("datasets")
    from ipca.train.classes import base_classes

    path = stored(tmp_path, "user/model") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": {"0": "b", "1": "a"}}))
    for weights in path.parent.glob("*.safetensors"):
        weights.unlink()
    assert base_classes("user/model") == ("b", "a")
    with pytest.raises(FileNotFoundError, match="there is no folder user/other, and the Hugging Face Hub or its local"):
        base_classes("user/other")
