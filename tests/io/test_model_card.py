"""The model card: its contents come from the adapter's files, and a card written by hand is kept."""

import json
import warnings

import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

import ipca
from tests.helpers.models import Net, adapted


@pytest.fixture
def folder(tmp_path):
    ipca.save_adapter(adapted(Net()), tmp_path, base_model="someone/base-1b")
    return tmp_path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_front_matter_is_what_the_hub_reads(folder):
    card = ModelCard.load(ipca.write_model_card(folder))
    assert card.data.base_model == "someone/base-1b"
    assert card.data.library_name == "peft"
    assert card.data.tags == ["ipca", "lora", "peft", "base_model:adapter:someone/base-1b"]


def test_a_base_that_is_no_name_on_the_hub_stays_out_of_the_front_matter(tmp_path):
    ipca.save_adapter(adapted(Net()), tmp_path, base_model='/models/of mine: "base"')
    card = ModelCard.load(ipca.write_model_card(tmp_path))
    assert card.data.base_model is None
    assert '# Adapter of /models/of mine: "base"' in card.text


def test_it_states_windows_exactness_and_versions(folder):
    text = ipca.write_model_card(folder).read_text()
    record = json.loads((folder / "ipca.json").read_text())
    worst = max(layer["svd"]["residual"] for layer in record["layers"].values())
    assert "| 1 | linear | 12 × 20 | [4, 7) of 12 | 3 | intact |" in text
    assert "| 1 | linear | 20 × 12 | [4, 7) of 12 | 3 | intact |" in text
    assert "192 parameters in 2 layers, and fully trained modules beside them" in text
    assert f"residual {worst:.1e}; the indices of 2 of 2 windows are proven" in text
    assert f"| torch | {record['versions']['torch']} |" in text
    assert "PeftModel.from_pretrained" in text
    assert "With ipca, to continue training:\n\n```python\nmodel = ipca.load_adapter(" in text


def test_it_states_what_the_windows_are_of_and_what_trains(tmp_path):
    model = nn.Sequential(nn.Linear(20, 12))
    options = {"calibration": [torch.randn(9, 20)], "train": "A", "progress": False}
    ipca.save_adapter(ipca.apply_pc(model, rank=3, window="inputs:minor", **options), tmp_path)
    text = ipca.write_model_card(tmp_path).read_text()
    assert "A window of the directions of each adapted layer's inputs was trained" in text
    assert "60 parameters in 1 layers" in text
    assert "| 1 | linear | 12 × 20 | [17, 20) of 20 inputs | 3 | intact | A |" in text


def test_data_and_metrics_are_given_by_the_caller(folder):
    text = ipca.write_model_card(folder, data="Film reviews.\n", metrics={"F1 | dev": 0.765432, "seeds": 3}).read_text()
    assert "## Data\n\nFilm reviews.\n\n" in text
    assert "| F1 \\| dev | 0.7654 |\n| seeds | 3 |" in text


def test_its_own_card_is_replaced_and_another_kept(folder):
    ipca.write_model_card(folder, data="first")
    text = ipca.write_model_card(folder).read_text()
    assert "first" not in text
    (folder / "README.md").write_text("by hand")
    before = contents(folder)
    with pytest.raises(FileExistsError, match=r"README\.md was not written by this function; pass overwrite=True"):
        ipca.write_model_card(folder)
    assert contents(folder) == before
    assert ipca.write_model_card(folder, overwrite=True).read_text() == text


def test_a_folder_that_is_no_adapter(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model\.safetensors: it is no adapter folder"):
        ipca.write_model_card(tmp_path)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(("text", "words"), [("{", "Expecting property name"), ("[]", "it holds list, not an object")])
def test_a_damaged_configuration(folder, text, words):
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"adapter_config\.json is damaged: {words}"):
        ipca.write_model_card(folder)
    assert not (folder / "README.md").exists()


def test_an_adapter_without_its_configuration(folder):
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
        ipca.write_model_card(folder)


def test_an_adapter_without_a_base_or_reports(tmp_path):
    model = ipca.apply_pc(nn.Sequential(nn.Linear(9, 8)), rank=2, progress=False)
    model.load_state_dict(model.state_dict())  # a layer forgets its report when it is restored
    ipca.save_adapter(model, tmp_path)
    text = ipca.write_model_card(tmp_path).read_text()
    assert "# Adapter of an unnamed base model" in text
    assert "does not say how the windows were found" in text


def test_a_card_that_an_adapter_has_outlived_is_named(folder):
    model = ipca.apply_pc(torch.nn.Sequential(torch.nn.Linear(20, 12)), rank=3, progress=False)
    ipca.write_model_card(folder)
    with pytest.warns(RuntimeWarning, match=r"README\.md describes the adapter that was saved here before"):
        ipca.save_adapter(model, folder, overwrite=True)
    (folder / "README.md").write_text("by hand")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ipca.save_adapter(model, folder)


def test_it_names_the_classes_and_how_to_load_the_base_with_them(tmp_path):
    config = BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    config.id2label = {0: "z | `q`", 1: "a\nb"}
    model = ipca.apply_pc(BertForSequenceClassification(config), rank=3, progress=False)
    ipca.save_adapter(model, tmp_path)
    text = ipca.write_model_card(tmp_path).read_text()
    assert "## Classes\n\nIn this order: `z \\| 'q'`, `a b`. The base with them:\n" in text
    BertModel(config).save_pretrained(tmp_path / "base")
    code = text.partition("The base with them:\n\n```python\n")[2].partition("```")[0]
    assert "transformers.BertForSequenceClassification.from_pretrained" in code
    code = code.replace("path/to/this/folder", str(tmp_path)).replace("path/to/base", str(tmp_path / "base"))
    found = {}
    exec(code, found)
    assert found["model"].config.id2label == config.id2label
