"""Words of a list have the tokens that they have in a text, whatever marks a space."""

import json

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

import datasets
import tokenizers
import transformers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from ipca.train import TrainSettings
from ipca.train.data import Data, Layout
from ipca.train.examples import examples
from ipca.train.models import load_model

WORDS = ["the", "cat", "sat", "on", "the", "mat"]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
SETTINGS = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
BYTES = pre_tokenizers.ByteLevel.alphabet()
SPLIT = pre_tokenizers.Split(tokenizers.Regex(" ?[a-z]+"), "isolated")


def byte_level(use_regex=True):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def learned(model, trainer, step, normalizer=None):
    found = tokenizers.Tokenizer(model)
    found.pre_tokenizer = step
    if normalizer:
        found.normalizer = normalizer
    found.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    return found


def pairs(step, normalizer=None):
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=sorted(BYTES), show_progress=False
    )
    return learned(models.BPE(unk_token="<unk>"), trainer, step, normalizer)


def roberta():
    found = json.loads(pairs(byte_level()).to_str())["model"]
    return transformers.RobertaTokenizerFast(vocab=found["vocab"], merges=list(map(tuple, found["merges"])))


def pieces():
    trainer = trainers.UnigramTrainer(vocab_size=40, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    return learned(models.Unigram(), trainer, pre_tokenizers.Metaspace())


def parts():
    trainer = trainers.WordPieceTrainer(vocab_size=60, special_tokens=SPECIAL, show_progress=False)
    return learned(models.WordPiece(unk_token="<unk>"), trainer, pre_tokenizers.BertPreTokenizer())


KEPT = {
    "bytes, of a class": roberta,
    "bytes": lambda: pairs(byte_level()),
    "bytes, after a split": lambda: pairs(pre_tokenizers.Sequence([SPLIT, byte_level(use_regex=False)])),
    "pieces": pieces,
    "parts of words": parts,
}
LOST = {
    "a normalizer's mark": lambda: pairs(pre_tokenizers.Split("_", "merged_with_next"), normalizers.Replace(" ", "_")),
    "a mark that is never put": lambda: pairs(pre_tokenizers.Metaspace(prepend_scheme="never")),
}


def saved(tokenizer, folder):
    if isinstance(tokenizer, tokenizers.Tokenizer):
        names = {"pad_token": "<pad>", "unk_token": "<unk>"}
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    tokenizer.save_pretrained(folder)
    transformers.BertModel(transformers.BertConfig(vocab_size=340, **SETTINGS)).save_pretrained(folder)
    return TrainSettings(str(folder), "a.jsonl")


def made(settings):
    """The tokens of a row of words, and the tokenizer that made them."""
    loaded = load_model(settings, "token-classification", ("O", "X"))
    rows = datasets.Dataset.from_dict({"tokens": [WORDS], "tags": [[0, 1, 0, 0, 0, 1]]})
    data = Data(Layout("token-classification", {"tokens": "tokens", "tags": "tags"}), rows, None, ("O", "X"), False)
    (row,) = examples(rows, data, settings, loaded)
    return row["input_ids"], loaded.processor


@pytest.mark.parametrize("kind", KEPT)
def test_words_have_the_tokens_of_a_text(kind, tmp_path):
    settings = saved(KEPT[kind](), tmp_path)
    ids, tokenizer = made(settings)
    assert ids == tokenizer(" ".join(WORDS))["input_ids"]
    plain = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert plain(" ".join(WORDS))["input_ids"][-3:] == ids[-3:], "as the base was trained, but for the first word"
    tokenizer.save_pretrained(tmp_path / "saved")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again(WORDS, is_split_into_words=True)["input_ids"] == ids


@pytest.mark.parametrize("kind", LOST)
def test_a_tokenizer_that_loses_the_space_before_a_word_is_refused(kind, tmp_path):
    settings = saved(LOST[kind](), tmp_path)
    with pytest.raises(ValueError, match=r"the tokenizer of .* loses the space before a word of a list"):
        made(settings)
