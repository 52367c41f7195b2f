import json
import logging
import re

import pytest
import torch

from ipca.train import sources
from ipca.train.data import find_layout, read_data
from ipca.train.settings import TASKS
from ipca.train.sources import DataError, find_source, load_rows

pytest.importorskip("datasets")


def write(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def row(label):
    return {"text": "a", "label": label}


def lines(*rows):
    return "\n".join(json.dumps(row) for row in rows)


CHAT = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
KINDS = [
    ("a.jsonl", lines({"text": "one"}, {"text": "two"}), "causal-lm", {"text": "text"}),
    ("a.jsonl", lines({"messages": CHAT}), "causal-lm", {"messages": "messages"}),
    (
        "a.jsonl",
        lines({"instruction": "x", "input": "y", "output": "z"}),
        "causal-lm",
        {"prompt": "instruction", "completion": "output"},
    ),
    (
        "a.json",
        json.dumps([{"prompt": "x", "completion": "y"}]),
        "causal-lm",
        {"prompt": "prompt", "completion": "completion"},
    ),
    ("a.csv", "text,label\nfine,1\nbad,0\n", "sequence-classification", {"text": "text", "label": "label"}),
    (
        "a.csv",
        'Sentence;Sentiment\nfine;pos\n"b;d";neg\n',
        "sequence-classification",
        {"text": "Sentence", "label": "Sentiment"},
    ),
    ("a.tsv", "text\tlabel\nfine\tpos\nbad\tneg\n", "sequence-classification", {"text": "text", "label": "label"}),
    (
        "a.jsonl",
        lines({"tokens": ["A", "b"], "ner_tags": ["X", "O"]}),
        "token-classification",
        {"tokens": "tokens", "tags": "ner_tags"},
    ),
    ("a.txt", "Some text.", "causal-lm", {"text": "text"}),
]


@pytest.mark.parametrize(
    ("name", "text", "task", "columns"), KINDS, ids=[f"{k[0]}-{k[2]}-{i}" for i, k in enumerate(KINDS)]
)
def test_task_and_columns_are_found(tmp_path, name, text, task, columns):
    data = read_data(find_source(str(write(tmp_path, name, text))))
    assert data.layout.task == task
    assert data.layout.columns == columns


def test_columns_can_be_named_and_a_task_chosen(tmp_path):
    path = write(tmp_path, "a.csv", "review,stars,text\ngood,5,x\nbad,1,y\n")
    data = read_data(find_source(str(path)), columns={"text": "review", "label": "stars"})
    assert data.layout.task == "sequence-classification"
    assert data.labels == ("1", "5")
    assert data.rows["label"] == [1, 0]
    assert data.rows["text"] == ["good", "bad"]
    assert read_data(find_source(str(path)), "causal-lm").rows["text"] == ["x", "y"]


NAMED = {
    "text and a class beside a question and an answer": (
        ["question", "answer", "rating"],
        None,
        {"text": "answer", "label": "rating"},
        "sequence-classification",
    ),
    "text and a class beside an image": (
        ["image", "review", "stars"],
        None,
        {"text": "review", "label": "stars"},
        "sequence-classification",
    ),
    "text beside an instruction": (["instruction", "output", "formatted"], None, {"text": "formatted"}, "causal-lm"),
    "text of a task": (["messages", "prompt", "completion", "all"], "causal-lm", {"text": "all"}, "causal-lm"),
    "one of two": (["messages", "question", "reply"], "causal-lm", {"completion": "reply"}, "causal-lm"),
    "words beside text": (["text", "label", "split", "ner"], None, {"tokens": "split", "tags": "ner"}, None),
}


@pytest.mark.parametrize(("names", "task", "columns", "right"), NAMED.values(), ids=NAMED)
def test_a_named_column_is_read_whatever_the_others_are_called(names, task, columns, right):
    found = find_layout(names, task, columns, "a.csv")
    assert found.columns.items() >= columns.items()
    assert found.task == (right or "token-classification")


MISFITS = {
    "a role of another task": (
        ["text", "stars"],
        "causal-lm",
        {"label": "stars"},
        "the task causal-lm takes the columns messages or prompt + completion or text, where label of --columns has no "
        "place; leave it out, or choose another --task.",
    ),
    "two of other tasks": (
        ["image", "review", "stars"],
        "image-classification",
        {"text": "review", "tags": "stars", "image": "image"},
        "image + label, where text and tags of --columns have no place; leave one out, or choose",
    ),
    "roles of two layouts": (
        ["text", "question", "answer"],
        None,
        {"text": "text", "prompt": "question"},
        "where text and prompt of --columns have no place; leave one out.",
    ),
    "half of a layout": (
        ["question", "reply", "text", "label"],
        None,
        {"prompt": "question"},
        "a task needs prompt + completion. Name them, such as --columns prompt=question completion=reply.",
    ),
}


@pytest.mark.parametrize(("names", "task", "columns", "said"), MISFITS.values(), ids=MISFITS)
def test_named_columns_that_fit_no_task_are_refused_by_their_roles(names, task, columns, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        find_layout(names, task, columns, "a.csv")


def test_columns_of_what_has_none_are_refused(tmp_path):
    noise(tmp_path / "images" / "a" / "1.png"), noise(tmp_path / "images" / "b" / "1.png")
    sources = {write(tmp_path, "a.txt", "x"): "running text", tmp_path / "images": "a folder of images"}
    for path, words in sources.items():
        with pytest.raises(ValueError, match=f"holds {words}, which has no columns to name; leave --columns out"):
            read_data(find_source(str(path)), columns={"text": "x"})


def test_the_values_arrive_as_they_are(tmp_path):
    rows = [
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"conversations": [{"role": "system", "content": "s"}, *CHAT]},
    ]
    data = read_data(find_source(str(write(tmp_path, "a.jsonl", lines(*rows)))))
    assert data.rows["messages"][0] == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert data.rows["messages"][1][0] == {"role": "system", "content": "s"}
    alpaca = write(tmp_path, "b.jsonl", lines({"instruction": "Add.", "input": "1, 2", "output": "3"}))
    assert read_data(find_source(str(alpaca))).rows["prompt"] == ["Add.\n\n1, 2"]
    empty = [{"instruction": "Add.", "input": value, "output": "3"} for value in (None, "", " \n", "1")]
    rows = read_data(find_source(str(write(tmp_path, "e.jsonl", lines(*empty, {"instruction": "a", "output": "b"})))))
    assert rows.rows["prompt"] == ["Add.", "Add.", "Add.", "Add.\n\n1", "a"]
    quoted = write(tmp_path, "c.csv", 'text,label\n"two\nlines, and ""quotes""",a\nb,b\n')
    assert read_data(find_source(str(quoted))).rows["text"][0] == 'two\nlines, and "quotes"'


def test_the_labels_of_the_training_data_hold_for_other_files(tmp_path):
    first = read_data(find_source(str(write(tmp_path, "a.csv", "text,label\nx,cat\ny,dog\nz,ant\n"))))
    assert first.labels == ("ant", "cat", "dog")
    other = read_data(find_source(str(write(tmp_path, "b.csv", "text,label\nx,dog\n"))), labels=first.labels)
    assert other.rows["label"] == [2]
    with pytest.raises(DataError, match=r"b2\.csv, line 2, column 'label': 'cow' is not one of ant, cat, dog"):
        read_data(find_source(str(write(tmp_path, "b2.csv", "text,label\nx,cow\n"))), labels=first.labels)


def test_parquet_and_folders_of_files(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}).to_parquet(tmp_path / "a.parquet")
    assert read_data(find_source(str(tmp_path / "a.parquet"))).labels == ("0", "1")
    folder = tmp_path / "several"
    folder.mkdir()
    write(folder, "1.jsonl", lines({"text": "a"}))
    write(folder, "2.jsonl", lines({"text": "b"}, {"text": "c"}))
    assert read_data(find_source(str(folder))).rows["text"] == ["a", "b", "c"]


SPLITS = {
    "files": (["test.jsonl", "train.jsonl", "validation.jsonl"], ["train.jsonl"], ["validation.jsonl"]),
    "no validation": (["test.jsonl", "train.jsonl"], ["train.jsonl"], ["test.jsonl"]),
    "parts": (["Train-0-of-2.jsonl", "Train-1-of-2.jsonl", "val_0.jsonl"], None, ["val_0.jsonl"]),
    "folders": (["test/a.jsonl", "train/a.jsonl", "train/b.jsonl"], ["train/a.jsonl", "train/b.jsonl"], None),
    "another file": (["test.jsonl", "train.jsonl", "more.jsonl"], ["more.jsonl", "test.jsonl", "train.jsonl"], []),
    "no training": (["test.jsonl", "validation.jsonl"], ["test.jsonl", "validation.jsonl"], []),
    "longer names": (["test-set.jsonl", "train.jsonl"], ["test-set.jsonl", "train.jsonl"], []),
}


@pytest.mark.parametrize("ending", ["jsonl", "csv", "txt", "parquet"])
@pytest.mark.parametrize(("names", "train", "held_out"), SPLITS.values(), ids=SPLITS)
def test_files_of_a_split_are_held_out_or_left_out(names, train, held_out, ending, tmp_path, caplog):
    import datasets

    caplog.set_level(logging.INFO, "ipca.train")
    train = names[:2] if train is None else train
    held_out = names[:1] if held_out is None else held_out
    for name in names:
        path = (tmp_path / name).with_suffix(f".{ending}")
        path.parent.mkdir(exist_ok=True)
        text = {"jsonl": lines({"text": name}), "csv": f"text\n{name}\n", "txt": name}.get(ending)
        path.write_text(text) if text else datasets.Dataset.from_dict({"text": [name]}).to_parquet(path)
    data = read_data(find_source(str(tmp_path)))
    assert data.rows["text"] == train
    assert (data.held_out["text"] if data.held_out else []) == held_out
    shown = [f"{name.rpartition('.')[0]}.{ending}" for name in held_out]
    assert ("held out: " + ", ".join(shown) in caplog.text) == bool(held_out)
    assert ("files left out: test." in caplog.text) == (len({*names} - {*train, *held_out}) > 0)


WRONG = [
    ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: expected one JSON object, got \{\"text\":"),
    ("a.jsonl", '{"text": "a"}\n\n[1, 2]\n', r"a\.jsonl, line 3: expected an object with named columns, got \[1, 2\]"),
    ("a.jsonl", '{"text": "a"}\n{"text": null}\n', r"a\.jsonl, line 2, column 'text': expected text, got nothing"),
    ("a.jsonl", '{"text": "a"}\n{"text": 3}\n', r"a\.jsonl, line 2, column 'text': expected text, got 3"),
    (
        "a.jsonl",
        lines({"messages": CHAT}, {"messages": [{"role": "robot", "content": "x"}]}),
        r"line 2, column 'messages', message 1: expected role",
    ),
    ("a.jsonl", lines({"messages": CHAT[:1]}), r"line 1, column 'messages': expected a message of the assistant"),
    ("a.jsonl", lines({"prompt": "a", "completion": ""}), r"line 1, column 'completion': expected text"),
    (
        "a.jsonl",
        lines({"tokens": ["a", "b"], "tags": [1]}),
        r"line 1: expected a tag for each token, got 2 tokens in 'tokens' and 1 tags",
    ),
    *(
        (
            "a.jsonl",
            lines({"tokens": ["a", "b"], "tags": [got, "X"]}),
            r"line 1, column 'tags': expected a list of names",
        )
        for got in ("", " ", None, 0.5)
    ),
    (
        "a.jsonl",
        lines({"tokens": "a b", "tags": [1, 0]}),
        r"line 1, column 'tokens': expected a list of words, got a b",
    ),
    *(
        (
            "a.jsonl",
            lines({"instruction": "a", "input": "b", "output": "c"}, {"instruction": "a", "input": got, "output": "c"}),
            rf"a\.jsonl, line 2, column 'input': expected text or nothing, got {re.escape(json.dumps(got))}\.",
        )
        for got in ([2, 3], 4, 0, 0.5, True, {"x": 1}, [])
    ),
    *(
        ("a.jsonl", lines({"messages": [CHAT[0], got]}), rf"line 1, column 'messages', message 2: expected {words}")
        for got, words in (
            ({"role": ["assistant"], "content": "a"}, "role"),
            ({"role": "assistant", "content": ["a"]}, "role"),
            ({"role": "assistant", "content": None}, "role"),
            ({"role": "assistant", "content": " \n"}, "the text of an answer, got none"),
            ({**CHAT[1], "weight": 0}, "an answer that is trained on as its text, got weight 0; leave"),
            ({**CHAT[1], "tool_calls": [{"id": "1"}]}, "an answer .* got tool_calls .*; leave"),
            ({**CHAT[1], "function_call": {"name": "f"}}, "an answer .* got function_call .*; leave"),
        )
    ),
    ("a.csv", "text,label\na,b\nc,d,e\n", r"a\.csv, line 3: expected 2 values \(text, label\), got 3"),
    ("a.csv", 'text,label\n"two\nlines",b\nc\n', r"a\.csv, line 4: expected 2 values"),
    ("a.csv", "text,label\na,\nb,c\n", r"a\.csv, line 2, column 'label': expected the name or the number of a class"),
    ("a.csv", "text,label\na,x\nb,x\n", r"column 'label': expected at least two classes, got only 'x'"),
    ("a.csv", "one,two\na,x\n", r"a\.csv has the columns one, two; a task needs .*--columns"),
    ("a.csv", "text,label,text\na,x,b\n", r"a\.csv, line 1: expected columns of different names, got \["),
    ("a.jsonl", '{"text": "a"}\n{"text": "b \\ud800"}\n', r"a\.jsonl, line 2: expected text in Unicode, got half"),
    ("a.jsonl", "\n", r"a\.jsonl holds no rows"),
    ("a.txt", "  \n", r"a\.txt holds no text"),
    ("a.xml", "<x/>", r"a\.xml has an unknown format"),
]


@pytest.mark.parametrize(("name", "text", "words"), WRONG, ids=range(len(WRONG)))
def test_an_error_names_file_line_column_and_what_was_expected(tmp_path, name, text, words):
    path = write(tmp_path, name, text)
    with pytest.raises(ValueError, match=words):
        read_data(find_source(str(path)))


def test_a_wrong_byte_has_its_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"first\nsecond \xff\n")
    with pytest.raises(DataError, match=r"a\.txt, line 2: expected text in UTF-8, got the byte 0xff"):
        read_data(find_source(str(tmp_path / "a.txt")))


class Searched(str):
    """A text that counts how often it is searched."""

    times = 0

    def __contains__(self, part):
        Searched.times += 1
        return super().__contains__(part)


@pytest.mark.parametrize(
    "rows", [lines(*[{"text": "a"}] * 50), json.dumps([{"text": "é"}] * 50)], ids=["lines", "array"]
)
def test_a_file_is_searched_once_and_not_for_each_row(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "read_text", lambda path: Searched(path.read_text()))
    monkeypatch.setattr(Searched, "times", 0)
    assert len(load_rows(find_source(str(write(tmp_path, "a.json", rows))))["train"]) == 50
    assert Searched.times <= 1


def test_what_is_not_there_or_mixed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*missing\.jsonl"):
        find_source(str(tmp_path / "missing.jsonl"))
    write(tmp_path, "a.csv", "x")
    write(tmp_path, "b.jsonl", "{}")
    with pytest.raises(ValueError, match="holds csv and json files; give one kind"):
        find_source(str(tmp_path))
    with pytest.raises(ValueError, match="has no column 'nothing'; it has text, label"):
        read_data(find_source(str(write(tmp_path, "c.csv", "text,label\na,b\n"))), columns={"text": "nothing"})
    with pytest.raises(ValueError, match="no role 'wort'"):
        read_data(find_source(str(tmp_path / "c.csv")), columns={"wort": "text"})


def test_images_by_folder(tmp_path):
    pytest.importorskip("PIL")
    from tests.helpers.train_runs import save_images

    folder = save_images(tmp_path / "images", count=3)
    data = read_data(find_source(str(folder)))
    assert (data.layout.task, data.labels, len(data.rows), data.held_out) == (
        "image-classification",
        ("dark", "light"),
        6,
        None,
    )
    assert data.rows[5]["image"].size == (16, 16)
    split = tmp_path / "split"
    save_images(split / "train", count=2)
    save_images(split / "test", count=1)
    data = read_data(find_source(str(split)))
    assert (len(data.rows), len(data.held_out), data.labels) == (4, 2, ("dark", "light"))
    (folder / "dark" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"dark/1\.png: expected an image"):
        read_data(find_source(str(folder)))
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "x.png").write_bytes((folder / "dark" / "0.png").read_bytes())
    with pytest.raises(DataError, match="expected an image in a folder named by its class"):
        read_data(find_source(str(tmp_path / "flat")))


def noise(path):
    """An image of which no part is enough."""
    image = pytest.importorskip("PIL.Image")
    torch.manual_seed(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"quality": 95, "progressive": True} if path.suffix == ".jpeg" else {}
    image.fromarray(torch.randint(256, (32, 32, 3), dtype=torch.uint8).numpy()).save(path, **options)
    return path


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 9 // 10])
    return path


def by_folder(path):
    return path.parent.parent


def by_path_in_rows(path):
    rows = [{"image": str(each), "label": each.parent.name} for each in sorted(path.parent.parent.rglob("*.*"))]
    return write(path.parent.parent, "rows.jsonl", lines(*rows))


def by_bytes_in_parquet(path, declared=False):
    import datasets

    every = sorted(path.parent.parent.rglob("*.*"))
    images = [{"path": None, "bytes": each.read_bytes()} for each in every]
    rows = datasets.Dataset.from_dict({"image": images, "label": [each.parent.name for each in every]})
    rows = rows.cast_column("image", datasets.Image()) if declared else rows
    rows.to_parquet(path.parent.parent / "rows.parquet")
    return path.parent.parent / "rows.parquet"


def by_declared_bytes_in_parquet(path):
    return by_bytes_in_parquet(path, declared=True)


WAYS = {
    by_folder: "{path}",
    by_path_in_rows: "{source}, line 2, column 'image', {path}",
    by_bytes_in_parquet: "{source}, row 2, column 'image'",
    by_declared_bytes_in_parquet: "{source}, row 2, column 'image'",
}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("ending", ["bmp", "gif", "jpeg", "jpg", "png", "tif", "tiff", "webp"])
def test_a_truncated_image_is_refused_with_its_place(ending, way, tmp_path):
    for name in ("a/1", "b/1"):
        noise(tmp_path / "data" / f"{name}.png")
    path = noise(tmp_path / "data" / "a" / f"2.{ending}")
    data = read_data(find_source(str(way(path))))
    assert (len(data.rows), data.labels, data.layout.task) == (3, ("a", "b"), "image-classification")
    whole = pytest.importorskip("PIL.Image").open(path).convert("RGB")
    assert data.rows[1]["image"].convert("RGB").tobytes() == whole.tobytes()
    truncated(path)
    source = way(path)
    place = WAYS[way].format(source=source, path=path)
    with pytest.raises(DataError, match=f"^{re.escape(place)}: expected an image, and it cannot be read: "):
        read_data(find_source(str(source)))


@pytest.mark.parametrize("got", [None, 3, "", [1], {"path": None, "bytes": None}, {}])
def test_what_is_no_image_is_refused_with_its_place(got, tmp_path):
    path = write(tmp_path, "a.jsonl", lines({"image": got, "label": 1}))
    with pytest.raises(DataError, match=r"a\.jsonl, line 1, column 'image': expected an image, got "):
        read_data(find_source(str(path)))


def test_a_bar_is_shown_where_reading_takes_long(tmp_path, monkeypatch):
    tqdm = pytest.importorskip("tqdm")
    seen = []

    class Bar(tqdm.tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            seen.append((options["unit"], options["delay"], options["disable"], self.total))

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    noise(tmp_path / "a" / "1.png"), noise(tmp_path / "b" / "1.png")
    read_data(find_source(str(tmp_path)), progress=True)
    read_data(find_source(str(write(tmp_path, "a.jsonl", lines(row(0), row(1))))), progress=False)
    assert seen == [("image", 5, None, 2), ("row", 5, True, 2)]


def test_a_task_needs_its_columns(tmp_path):
    path = write(tmp_path, "a.jsonl", lines({"text": "a"}))
    for task in TASKS[1:]:
        with pytest.raises(ValueError, match=f"the task {task} needs"):
            read_data(find_source(str(path)), task)
    with pytest.raises(ValueError, match="running text, which is for the task causal-lm"):
        read_data(find_source(str(write(tmp_path, "a.txt", "x"))), "sequence-classification")


@pytest.mark.parametrize(
    ("names", "task", "said"),
    [
        (["input", "reply"], None, "--columns prompt=input completion=reply."),
        (["x"], None, "--columns text=x."),
        (["x", "y"], "sequence-classification", "--columns text=x label=y."),
    ],
)
def test_the_error_of_unknown_columns_shows_how_to_name_them(names, task, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        find_layout(names, task, {}, "data.csv")


def test_a_number_is_the_place_of_a_class_only_where_no_class_is_named_by_one(tmp_path):
    train = read_data(find_source(str(write(tmp_path, "a.jsonl", lines(row(3), row("5"), row("3"))))))
    assert train.labels == ("3", "5")
    other = find_source(str(write(tmp_path, "b.jsonl", lines(row(5), row(1)))))
    with pytest.raises(DataError, match=r"line 2, column 'label': 1 is not one of 3, 5"):
        read_data(other, labels=train.labels)
    assert read_data(other, labels=("no", "yes", *"abcd")).rows["label"] == [5, 1]


def test_numbers_of_a_held_out_file_are_said_to_be_places(tmp_path, caplog):
    caplog.set_level(logging.INFO, "ipca.train")
    path = write(tmp_path, "b.csv", "text,label\na,1\nb,0\nc,sports\n")
    assert read_data(find_source(str(path)), labels=("news", "sports")).rows["label"] == [1, 0, 1]
    assert f"{path}: numbers are places among the classes: 0 news, 1 sports" in caplog.messages
    caplog.clear()
    read_data(find_source(str(write(tmp_path, "c.csv", "text,label\na,1\nb,0\n"))), labels=("0", "1"))
    assert "places" not in caplog.text


def test_a_data_set_that_names_its_classes_has_their_places(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["1", "2", "3"])}
    )
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features).to_parquet(
        tmp_path / "a.parquet"
    )
    found = read_data(find_source(str(tmp_path / "a.parquet")))
    assert found.labels == ("1", "2", "3")
    assert found.rows["label"] == [0, 1]


def test_the_separator_is_that_of_the_first_line_with_words(tmp_path):
    path = write(tmp_path, "a.csv", "\ufeff\n\ntext;label\na, b;x\n\nc;y\n")
    assert read_data(find_source(str(path))).rows["text"] == ["a, b", "c"]


USES = {
    "a context": (
        "a.jsonl",
        lines({"context": "c", "question": "q", "answer": "a"}),
        "task causal-lm; prompt from column 'question', completion from column 'answer'; columns left out: 'context'",
    ),
    "a system prompt": (
        "a.jsonl",
        lines({"system": "s", "instruction": "i", "input": "n", "output": "o", "id": 1}),
        "prompt from column 'instruction', completion from column 'output', input from column 'input'; "
        "columns left out: 'system', 'id'",
    ),
    "fields of messages": (
        "a.jsonl",
        lines({"messages": [{**CHAT[0], "name": "Ann", "weight": 0}, {**CHAT[1], "weight": 1, "tool_calls": []}]}),
        "messages from column 'messages'; fields of messages left out: 'name', 'weight'",
    ),
    "two columns of text": (
        "a.csv",
        "text,body\na,b\n",
        "task causal-lm; text from column 'text'; columns left out: 'body'",
    ),
    "few classes": ("a.csv", "text,label\na,x\nb,y\n", "label from column 'label'; 2 classes (x, y)"),
    "many classes": (
        "a.csv",
        "text,label\n" + "".join(f"a,{k}\n" for k in range(9)),
        "label from column 'label'; 9 classes",
    ),
    "a file of text": ("a.txt", "a", "task causal-lm"),
}


@pytest.mark.parametrize(("name", "text", "said"), USES.values(), ids=USES)
def test_the_log_says_what_is_used_and_what_is_left_out(name, text, said, tmp_path, caplog):
    caplog.set_level(logging.INFO, "ipca.train")
    path = write(tmp_path, name, text)
    read_data(find_source(str(path)))
    (message,) = caplog.messages
    assert message.startswith(f"{path}: ")
    assert message.endswith(said)


def test_hidden_files_and_a_readme_beside_data_are_left_out(tmp_path, caplog):
    caplog.set_level(logging.INFO, "ipca.train")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for name in ("b.txt", "README.md", "LICENSE", ".ipynb_checkpoints/b.txt", ".a.txt"):
        write(tmp_path, name, name)
    assert read_data(find_source(str(tmp_path))).rows["text"] == ["b.txt"]
    assert caplog.messages == [
        f"{tmp_path}: task causal-lm; files left out: LICENSE, README.md, .a.txt, .ipynb_checkpoints/b.txt"
    ]
    (tmp_path / "b.txt").unlink()
    assert read_data(find_source(str(tmp_path))).rows["text"] == ["README.md"]  # which is all that there is
    write(tmp_path, "b.jsonl", lines({"text": "b"}))
    assert read_data(find_source(str(tmp_path))).rows["text"] == ["b"]


def test_a_readme_and_hidden_copies_beside_images_are_left_out(tmp_path, caplog):
    pytest.importorskip("PIL")
    from tests.helpers.train_runs import save_images

    caplog.set_level(logging.INFO, "ipca.train")
    for name in ("train", "val", "test", "train/.copy"):
        save_images(tmp_path / name, count=2)
    write(tmp_path, "README.md", "x")
    data = read_data(find_source(str(tmp_path)))
    assert (len(data.rows), len(data.held_out)) == (4, 4)
    assert "2 classes (dark, light); files left out: test/, README.md, train/.copy/dark/0.png" in caplog.text


@pytest.mark.parametrize(
    ("folder", "got"),
    [
        ("train", "no such folder"),
        ("test", "no such folder"),
        ("Validation", "no such folder"),
        ("dark/siamese", "the nested folders dark/siamese"),
        ("train/dark/siamese", "the nested folders dark/siamese"),
        ("archive/train/dark", "the nested folders archive/train/dark"),
    ],
)
def test_images_that_lie_elsewhere_than_in_folders_of_classes_are_refused(folder, got, tmp_path):
    image = pytest.importorskip("PIL.Image")
    from tests.helpers.train_runs import save_images

    save_images(tmp_path, count=1)
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    image.new("RGB", (16, 16)).save(tmp_path / folder / "x.png")
    with pytest.raises(DataError, match=f"{re.escape(str(tmp_path / folder))}/x.png: expected an image .* got {got}"):
        read_data(find_source(str(tmp_path)))


def test_space_around_labels_makes_no_class(tmp_path):
    spaced = write(tmp_path, "a.csv", "text, label\na,pos\nb,pos \nc, neg\n")
    assert read_data(find_source(str(spaced))).labels == ("neg", "pos")
    tags = write(tmp_path, "a.jsonl", lines({"tokens": ["a", "b", "c"], "tags": ["X", "X ", "O"]}))
    assert read_data(find_source(str(tags))).labels == ("O", "X")


NO_CLASSES = {
    "floats": ([k * 0.37 for k in range(12)], "12 rows of 12 with a class of their own"),
    "few floats": ([0.5, 1, 2, 0.5], r"numbers with fractions, such as 0\.5"),
    "whole numbers": (range(100, 112), "12 rows of 12 with"),
    "names": ([f"id{k}" for k in range(7)] + ["x"] * 5, "7 rows of 12 with"),
}


@pytest.mark.parametrize(("labels", "words"), NO_CLASSES.values(), ids=NO_CLASSES)
def test_a_column_without_classes_is_refused(labels, words, tmp_path):
    path = write(tmp_path, "a.csv", "text,stars\n" + "".join(f"a,{label}\n" for label in labels))
    with pytest.raises(DataError, match=f"column 'stars': expected classes that rows have in common, got {words}"):
        read_data(find_source(str(path)), columns={"label": "stars"})


@pytest.mark.parametrize(
    "labels", [["a", "b", "c"], ["0.0", "1.0"] * 6, ["1.5", "x"], [f"c{k // 2}" for k in range(12)]]
)
def test_classes_of_few_rows_and_whole_numbers_are_classes(labels, tmp_path):
    path = write(tmp_path, "a.csv", "text,label\n" + "".join(f"a,{label}\n" for label in labels))
    assert set(read_data(find_source(str(path))).labels) == set(labels)


def test_splits_that_are_not_read_are_named(tmp_path, monkeypatch, caplog):
    import datasets

    caplog.set_level(logging.INFO, "ipca.train")
    part = datasets.Dataset.from_dict({"text": ["a"]})
    splits = datasets.DatasetDict(dict.fromkeys(("train", "test", "validation", "unsupervised"), part))
    monkeypatch.setattr(datasets, "load_dataset", lambda name: splits)
    assert read_data(find_source("user/set")).held_out is not None
    assert "user/set: not read: the splits test, unsupervised" in caplog.messages
