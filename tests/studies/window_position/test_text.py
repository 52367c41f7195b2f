"""The study's language model, its text, and the runs on a GPU as far as a CPU can tell."""

import copy
import pickle
import sys
from functools import partial

import pytest
import torch

import ipca
from ipca._hashing import tensor_sha256
from ipca.lab import baselines
from ipca.model.targets import find_targets
from studies import corpus
from studies.window_position import digits, pretraining, run, vit
from studies.window_position import language_model as text

QUICK = text.Size(32, 72, 1, 2, 24, 21, 30, pretraining.Pretraining(steps=40, batch=8, rate=5e-3, warm_up=5))


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """Where models and text are kept; the tiny size is tinier still."""
    path = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPCA_STUDY_CACHE", str(path))
        patch.setitem(text.SIZES, "tiny", QUICK)
        yield path
    text.texts.cache_clear()
    text.before.cache_clear()


@pytest.fixture(scope="module")
def base(folder):
    return text.task().build()


@pytest.fixture
def adapted(base):
    return baselines.apply(copy.deepcopy(base), "middle", text.task().settings)


def trained(task, model, seed, lr=5e-3):
    task.train(model, ipca.param_groups(model, lr), seed)
    return {name: tensor_sha256(p) for name, p in model.named_parameters()}


def test_the_model_predicts_prose_better_than_chance_and_headers_worse(base):
    found = text.task().evaluate(base)
    assert found["retained"] > -5.5  # a byte by chance has log 1 / 256 = −5.55
    assert found["target"] < found["retained"]
    assert found["kl"] == pytest.approx(0, abs=1e-6)


def test_metrics_are_those_of_counting_byte_by_byte(base, adapted):
    trained(text.task(steps=3), adapted, 0)
    data = text.texts("tiny")
    found = text.task().evaluate(adapted)
    with torch.no_grad():
        after, before = (m(input_ids=data.prose_test).logits[:, :-1].double().softmax(-1) for m in (adapted, base))
        target = -text.cross_entropy(adapted, data.headers_test).item()
    chosen = after.gather(-1, data.prose_test[:, 1:, None])
    assert found["target"] == pytest.approx(target, rel=1e-5)
    assert found["retained"] == pytest.approx(chosen.log().mean().item(), rel=1e-5)
    assert found["kl"] == pytest.approx((before * (before / after).log()).sum(-1).mean().item(), rel=1e-4)


def test_training_learns_headers_and_leaves_the_prose_behind(base, adapted):
    task = text.task(steps=200)
    before = task.evaluate(adapted)
    trained(task, adapted, seed=0)
    after = task.evaluate(adapted)
    assert after["target"] > before["target"] + 0.1
    assert after["kl"] > 1e-4 > before["kl"]


def test_a_seed_decides_every_bit_of_a_run(adapted):
    task = text.task(steps=2)
    first, second, other = (trained(task, copy.deepcopy(adapted), seed) for seed in (3, 3, 4))
    assert first == second
    assert first != other


def test_every_linear_layer_of_the_blocks_is_adapted_and_no_other(base):
    names = [target.name for target in find_targets(base, text.task().settings)]
    assert len(names) == 7
    assert all(".layers.0." in name for name in names)


def test_the_pretrained_model_is_made_once_and_then_read(base, folder, monkeypatch):
    assert len(list(folder.glob("text-llama-*.safetensors"))) == 1
    monkeypatch.setattr(text, "pretrain", lambda *size: pytest.fail("pretrained again"))
    again = text.task().build()
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), again.parameters(), strict=True))


def test_calibration_is_training_text_that_the_model_takes(base):
    batches = text.task().calibration()
    assert [batch["input_ids"].shape for batch in batches] == [(16, 24)] * 4
    assert torch.equal(batches[1]["input_ids"], text.texts("tiny").headers_train[16:32])
    assert base(**batches[0]).logits.shape == (16, 24, 256)


@pytest.mark.parametrize("make", [text.task, partial(text.task, "base", "cuda", 320), partial(digits.task, "base")])
def test_a_task_travels_to_another_process(make):
    task = make()
    assert pickle.loads(pickle.dumps(task)).labels == task.labels


def test_the_larger_models_have_the_size_that_their_pages_say():
    with torch.device("meta"):
        assert 24e6 < sum(p.numel() for p in text.llama("base").parameters()) < 27e6
        assert 84e6 < sum(p.numel() for p in vit.ViT("base").parameters()) < 87e6


@pytest.mark.parametrize("module", [text, digits])
def test_unknown_sizes_are_refused(module):
    with pytest.raises(ValueError, match=r"size must be one of \w+, base; got 'huge'"):
        module.task("huge")


def test_a_larger_vit_cuts_enlarged_images_into_squares(monkeypatch):
    monkeypatch.setitem(vit.SHAPES, "base", vit.Shape(24, 40, 1, 2, side=64, patch=16))
    model, image = vit.ViT("base"), torch.rand(3, 8, 8)
    large = model.enlarged(image)
    assert large.shape == (3, 64, 64)
    assert torch.equal(large[:, 0, 0], image[:, 0, 0])
    squares = model.cut(large)
    assert squares.shape == (3, 16, 256)
    assert torch.equal(squares[1, 6], large[1, 16:32, 32:48].flatten())
    assert model.features(image).shape == (3, 24)


def test_the_larger_vit_trains_and_is_judged(monkeypatch):
    monkeypatch.setitem(vit.SHAPES, "base", vit.Shape(24, 40, 1, 2, side=64, patch=16))
    task = digits.task("base", steps=2, pretraining=pretraining.Pretraining(steps=2, batch=8))
    model = baselines.apply(task.build(), "1.0", task.settings)
    trained(task, model, 0)
    assert set(task.evaluate(model)) == set(task.labels)


def test_pieces_of_text_are_on_one_side_alone_and_in_an_order_of_their_own():
    pieces = [bytes([65 + i]) * (7 + i) for i in range(20)]
    train, test = corpus.sequences(pieces, length=5, held_out=4, kind="made-up letters")
    assert test.shape == (4, 5)
    letters = [set(part.flatten().tolist()) - {10} for part in (train, test)]
    assert letters[0].isdisjoint(letters[1])
    again = corpus.sequences(reversed(pieces * 2), length=5, held_out=4, kind="made-up letters")
    assert torch.equal(again[0], train)
    assert torch.equal(again[1], test)
    assert train.numel() + test.numel() > 0.8 * sum(map(len, pieces))


def test_no_more_is_taken_than_the_limit(monkeypatch):
    monkeypatch.setattr(corpus, "LIMIT", 23)
    train, _ = corpus.sequences([bytes([i]) * 40 for i in range(9)], length=5, held_out=4, kind="made-up bytes")
    assert train.shape == (4, 5)


@pytest.mark.parametrize("pieces", [[], [b"abc"], [b"abc" * 10]])
def test_too_little_text_is_said_to_be(pieces):
    says = f"4 test sequences of 5 bytes, .* looked for in this list, where there are {sum(map(len, pieces))} bytes"
    with pytest.raises(ValueError, match=says):
        corpus.sequences(pieces, length=5, held_out=4, kind="this list")


def test_prose_is_mostly_words_and_headers_are_not():
    words = [sum(c.isalpha() or c == " " for c in piece.decode()) / len(piece) for piece in corpus.prose(20)]
    assert min(words) > 0.7  # without its indentation
    assert any(b"#pragma once" in piece for piece in corpus.headers(5))


def test_the_same_files_are_read_wherever_torch_is_installed(monkeypatch, tmp_path):
    def read(torch):
        for k in range(20):
            (torch / "include/c10/a").mkdir(parents=True, exist_ok=True)
            (torch / f"include/c10/a/{k}.h").write_text(str(k))
        monkeypatch.setattr(corpus, "TORCH", torch)
        return list(corpus.headers(5))

    assert read(tmp_path / "here") == read(tmp_path / "somewhere" / "else")


def test_strings_of_a_file_for_another_python_are_left_out():
    assert list(corpus._strings(b"'one'\nx = f('two', 3, b'four')")) == ["one", "two"]
    assert list(corpus._strings(b"print 'one'")) == []
    assert list(corpus._strings(rb"'\d'")) == [r"\d"]


def gpu_experiments(devices, seeds):
    """What would take hours, small."""
    grid = {"windows": (0.0, 0.5), "methods": ("lora", "auto"), "lrs": (5e-3,), "seeds": seeds, "devices": devices}
    task = partial(text.task, "tiny", devices[0], 12)
    return (run.Experiment("G2", "text-base", task, grid | {"comparisons": run._EVERY}),)


def test_runs_on_a_device_go_where_they_are_told_and_say_how_far_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "gpu_experiments", gpu_experiments)
    where = ["--gpu", "--devices", "cpu", "--seeds", "1", "--workers", "1", "--out", str(tmp_path / "out")]
    where += ["--results", str(tmp_path / "results")]
    run.main([*where, "--status"])
    assert capsys.readouterr().out.startswith("G2: 0 of at most 10 runs; stopped: call again with the same folder")
    assert list((tmp_path / "results").iterdir()) == []
    run.main(where)
    assert capsys.readouterr().out.endswith("complete: G2\n")
    run.main([*where, "--status"])
    assert capsys.readouterr().out.startswith("G2: 10 of at most 10 runs")
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"G2.csv", "G2.json"}
    assert len((tmp_path / "results" / "G2.csv").read_text().splitlines()) == 1 + 1 + 10


def test_runs_on_a_gpu_are_large_and_not_among_the_others(capsys):
    first, second = run.gpu_experiments(("cuda:0", "cuda:1"))
    assert [first.name, second.name] == ["G1", "G2"]
    assert run.progress([first], run.Path("nowhere")) == "G1: 0 of at most 1,900 runs"
    assert not {"G1", "G2"} & {experiment.name for experiment in run.EXPERIMENTS}
    assert first.grid["devices"] == ("cuda:0", "cuda:1")
    with pytest.raises(SystemExit):
        run.main(["G3"])
    assert "no experiment G3; there are V1" in capsys.readouterr().err


def test_without_scikit_learn_the_digits_say_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(
        ImportError, match="digits are scikit-learn's; run: pip install scikit-learn, or leave V1 and G1"
    ):
        digits.images(torch.device("meta"))
