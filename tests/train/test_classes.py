"""The classes of a run: which names they have, in which order, and what programs call them that read its files."""

import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import transformers

pytest.importorskip("trl")
pytest.importorskip("datasets")

import datasets
import peft

import ipca
from ipca.cli.main import main
from ipca.io.adapter_folder import read_labels
from ipca.train import DataError, TrainSettings, fine_tune, run, save_scaled
from ipca.train.classes import base_classes, in_order_of_base
from ipca.train.data import read_data
from ipca.train.evaluation import open_adapter
from ipca.train.sources import find_source
from tests.helpers.train_runs import save_encoder, save_images, save_vit

Image = pytest.importorskip("PIL.Image")
BASE = ("positive", "neutral", "negative")
ORDERS = {
    "the same": (["negative", "neutral", "positive"], BASE, BASE, None),
    "the same in other case": (["NEGATIVE", "Neutral", "positive"], BASE, ("positive", "Neutral", "NEGATIVE"), None),
    "some of them": (["negative", "positive"], BASE, BASE, "no rows of the class neutral, which the base"),
    "some of them in other case": (["Negative", "Positive"], BASE, ("Positive", "neutral", "Negative"), "no rows of"),
    "more": (["mixed", *BASE], BASE, ("mixed", *BASE), "take the place of the base model's, positive, neutral, neg"),
    "others, as many": (["a", "b", "c"], BASE, ("a", "b", "c"), "take the place of"),
    "all places": (["0", "1", "2"], BASE, BASE, "numbers are places .*: 0 positive, 1 neutral, 2 negative"),
    "not all places": (["0", "2"], BASE, ("0", "2"), "take the place of"),
    "from one on": (["1", "2", "3"], BASE, ("1", "2", "3"), "take the place of"),
    "numbers that are names": (["0", "1"], ("1", "0"), ("1", "0"), None),
    "no base": (["b", "a"], (), ("b", "a"), None),
    "a base without names": (["a", "b"], ("LABEL_0", "LABEL_1"), ("a", "b"), None),
    "numbers, and a base without names": (["0", "1"], ("LABEL_0", "LABEL_1"), ("0", "1"), None),
    "names that were made up": (
        ["LABEL_0", "LABEL_1", "LABEL_10", *(f"LABEL_{k}" for k in range(2, 10))],
        [f"LABEL_{k}" for k in range(11)],
        tuple(f"LABEL_{k}" for k in range(11)),
        None,
    ),
    "names that differ in case only": (["A", "a"], ("a", "A"), ("a", "A"), None),
    "more names that differ in case only": (["A", "a", "b"], ("a", "b"), ("A", "a", "b"), "take the place of"),
    "a base that has a name twice": (["a", "b"], ("b", "a", "a"), ("a", "b"), "take the place of"),
}


@pytest.mark.parametrize(("found", "base", "right", "said"), ORDERS.values(), ids=ORDERS)
def test_the_order_is_that_of_a_base_with_the_same_classes(found, base, right, said, caplog):
    caplog.set_level(logging.INFO, "ipca.train")
    assert in_order_of_base(found, base, "a.csv") == right
    assert len(caplog.messages) == (said is not None)
    assert said is None or re.search(f"^a.csv: .*{said}", caplog.messages[0])


def test_the_classes_of_a_base_are_those_of_its_configuration(tmp_path):
    config = tmp_path / "config.json"
    assert base_classes(str(tmp_path)) == ()
    for text, right in (
        ('{"id2label": {"1": "b", "0": "a"}}', ("a", "b")),
        ("{}", ()),
        ('{"id2label": null}', ()),
        ('{"id2label": {"1": "a"}}', ()),
        ('{"id2label": ["a"]}', ()),
        ("[]", ()),
        ("{", ()),
    ):
        config.write_text(text)
        assert base_classes(str(tmp_path)) == right


def texts_of(folder, labels):
    (folder / "a.csv").write_text("text,label\n" + "".join(f"a,{label}\n" for label in labels))
    return folder / "a.csv", lambda row: row["label"]


def rows_of(folder, labels):
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": "a", "label": label}) for label in labels))
    return folder / "a.jsonl", lambda row: row["label"]


def tags_of(folder, labels):
    rows = [{"tokens": ["a"], "tags": [label]} for label in labels]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "a.jsonl", lambda row: row["tags"][0]


def images_of(folder, labels):
    for k, label in enumerate(labels):
        (folder / "train" / label).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (k,) * 3).save(folder / "train" / label / f"{k}.png")
    return folder, lambda row: row["label"]


def declared_by(folder, labels):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=sorted({*labels}))}
    )
    rows = {"text": ["a"] * len(labels), "label": list(labels)}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "a.parquet")
    return folder / "a.parquet", lambda row: row["label"]


@pytest.mark.parametrize("way", [texts_of, rows_of, tags_of, images_of, declared_by])
@pytest.mark.parametrize("labels", [["negative", "neutral", "positive"], ["negative", "negative", "positive"]])
def test_rows_have_the_places_of_the_base(way, labels, tmp_path):
    path, label_of = way(tmp_path, labels)
    found = read_data(find_source(str(path)), base=BASE)
    assert found.labels == BASE
    assert sorted(map(label_of, found.rows)) == sorted(BASE.index(label) for label in labels)
    alone = read_data(find_source(str(path)))
    assert alone.labels == tuple(sorted({*labels}))
    assert sorted(map(label_of, alone.rows)) == sorted(alone.labels.index(label) for label in labels)


@pytest.mark.parametrize(
    ("way", "numbers"), [(texts_of, "102"), (rows_of, "102"), (rows_of, (1, 0, 2)), (tags_of, (1, 0, 2))]
)
def test_numbers_are_the_places_of_the_base_in_each_file(way, numbers, tmp_path):
    path, label_of = way(tmp_path, numbers)
    found = read_data(find_source(str(path)), base=BASE)
    assert (found.labels, list(map(label_of, found.rows))) == (BASE, [1, 0, 2])
    path, _ = way(tmp_path, numbers[2:])
    held_out = read_data(find_source(str(path)), found.layout.task, labels=found.labels)
    assert list(map(label_of, held_out.rows)) == [2]
    path, _ = way(tmp_path, "3" if isinstance(numbers, str) else (3,))
    with pytest.raises(DataError, match=r"'?3'? is not one of positive, neutral, negative"):
        read_data(find_source(str(path)), found.layout.task, labels=found.labels)


@pytest.mark.parametrize("label", [1, "1", "x"])
def test_a_class_that_only_the_held_out_split_has_is_an_error(label, monkeypatch):
    values = [0, 2] if isinstance(label, int) else ["0", "2"]
    train = datasets.Dataset.from_dict({"text": ["a"] * 2, "label": values})
    test = datasets.Dataset.from_dict({"text": ["a"], "label": [label]})
    splits = datasets.DatasetDict({"train": train, "test": test})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: splits)
    with pytest.raises(DataError, match=r"user/set, row 1 of held_out, column 'label': '?\w'? is not one of 0, 2"):
        read_data(find_source("user/set"))


class Kind(NamedTuple):
    """A task: the class of its models, how a base without a head and rows are made, and an input of each class."""

    auto: str
    save: Callable
    data: Callable
    inputs: Callable


def write_texts(folder, names):
    rows = [f"{'good' if k % 2 else 'bad'} thing {k},{names[k % 2]}" for k in range(60)]
    (folder / "a.csv").write_text("\n".join(["text,label", *rows]))
    return folder / "a.csv"


def write_tokens(folder, names):
    rows = [{"tokens": ["Go", "Bob"] * 3, "tags": list(names) * 3}] * 40
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "a.jsonl"


def write_images(folder, names):
    return save_images(folder / "images", classes=names, count=20)


def read_texts(folder):
    texts = ["bad thing 4", "good thing 5"]
    return transformers.AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt"), [0, 1]


def read_tokens(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = tokenizer([["Go", "Bob"]], is_split_into_words=True, return_tensors="pt")
    return found, [found.word_ids(0).index(word) for word in (0, 1)]


def read_images(folder):
    images = [Image.new("RGB", (16, 16), (gray,) * 3) for gray in (45, 195)]
    return transformers.AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt"), [0, 1]


KINDS = {
    "sequence": Kind("AutoModelForSequenceClassification", save_encoder, write_texts, read_texts),
    "tokens": Kind("AutoModelForTokenClassification", save_encoder, write_tokens, read_tokens),
    "images": Kind("AutoModelForImageClassification", save_vit, write_images, read_images),
}


def with_head(kind, folder, names):
    """A base of this kind; with the classes ``names``, or without a head."""
    kind.save(folder)
    auto = getattr(transformers, kind.auto)
    if names:
        torch.manual_seed(1)
        named = {"id2label": dict(enumerate(names)), "label2id": {name: k for k, name in enumerate(names)}}
        auto.from_pretrained(folder, **named).save_pretrained(folder)
    return folder


def names_of(kind, model, out):
    """What ``model`` calls the two inputs, as the tokenizer or image processor of the run in ``out`` reads them."""
    inputs, places = kind.inputs(out)
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        found = model.eval()(**inputs).logits.argmax(-1).flatten()
    return [model.config.id2label[int(found[place])] for place in places]


def check_names(kind, base, out, names, tmp_path, **options):
    auto = getattr(transformers, kind.auto)
    stock = peft.PeftModel.from_pretrained(auto.from_pretrained(base, **options), out)
    assert names_of(kind, stock, out) == names
    assert main(["merge", str(base), str(out), "-o", str(tmp_path / "merged"), "--quiet"]) == 0
    assert names_of(kind, auto.from_pretrained(tmp_path / "merged"), out) == names
    native = ipca.load_adapter(auto.from_pretrained(base, **options), out)
    assert names_of(kind, native, out) == names


def few_steps(base, data):
    return TrainSettings(str(base), str(data), rank=4, steps=24, lr=1e-2, evaluations=1, batch=8, held_out=0.2)


@pytest.mark.parametrize("kind", ["sequence", *(pytest.param(k, marks=pytest.mark.slow) for k in ("tokens", "images"))])
def test_the_names_of_a_base_with_a_head_stay_right(kind, tmp_path):
    kind, names = KINDS[kind], ["bad", "other"]
    base = with_head(kind, tmp_path / "base", ["other", "bad"])
    fine_tune(few_steps(base, kind.data(tmp_path, names)), tmp_path / "out", progress=False)
    assert read_labels(tmp_path / "out") == ("other", "bad")
    check_names(kind, base, tmp_path / "out", names, tmp_path)


HEADS = {
    "none": (["z", "a"], (), ("a", "z"), ["z", "a"]),
    "of more classes": (["z", "a"], ("z", "m", "a"), ("z", "m", "a"), ["z", "a"]),
    "of fewer classes": (["z", "a"], ("z",), ("a", "z"), ["z", "a"]),
    "of other classes": (["z", "a"], ("b", "a"), ("a", "z"), ["z", "a"]),
    "without names": (["z", "a"], ("LABEL_0", "LABEL_1"), ("a", "z"), ["z", "a"]),
    "of classes by number": (["1", "0"], ("b", "a"), ("b", "a"), ["a", "b"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("given", "head", "labels", "names"), HEADS.values(), ids=HEADS)
def test_names_are_right_whatever_head_the_base_has(given, head, labels, names, kind, tmp_path):
    kind = KINDS[kind]
    base = with_head(kind, tmp_path / "base", head)
    settings = few_steps(base, kind.data(tmp_path, given))
    fine_tune(settings, tmp_path / "out", progress=False)
    assert read_labels(tmp_path / "out") == labels
    named = {"id2label": dict(enumerate(labels)), "ignore_mismatched_sizes": True}  # as its README.md shows
    check_names(kind, base, tmp_path / "out", names, tmp_path, **({} if labels == head else named))
    half = save_scaled(tmp_path / "out", tmp_path / "half", 0.5)
    with open_adapter(settings, half) as (trainer, _):
        assert trainer.evaluate()["eval_accuracy"] == 1


def test_a_run_that_goes_on_has_the_classes_it_was_begun_with(tmp_path, monkeypatch):
    kind = KINDS["sequence"]
    base = with_head(kind, tmp_path / "base", ())
    asked = replace(few_steps(base, kind.data(tmp_path, ["z", "a"])), steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(run, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fine_tune(asked, tmp_path / "out", progress=False)
    with monkeypatch.context() as patch:  # as where the base is on the Hub, and another one by now
        patch.setattr(run, "base_classes", lambda model: ("z", "a"))
        with pytest.raises(FileExistsError, match="begun with the classes a, z, in this order, and not with z, a; ch"):
            fine_tune(asked, tmp_path / "out", progress=False)
    fine_tune(asked, tmp_path / "out", progress=False)
    assert read_labels(tmp_path / "out") == ("a", "z")


def test_a_language_model_has_no_classes_whatever_its_adapter_was_saved_with(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a"}))
    found = read_data(find_source(str(tmp_path / "a.jsonl")), labels=("a", "b"), base=BASE)
    assert (found.labels, found.layout.task) == ((), "causal-lm")
