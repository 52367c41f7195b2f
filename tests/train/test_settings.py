"""Settings have the right types before anything runs."""

import pytest

from ipca.train import TrainSettings
from ipca.train.settings import read_settings

WHOLE = ("batch", "evaluations", "keep_tokens", "max_length", "micro_batch", "patience", "rank", "seed", "steps")


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_number_may_be_written_as_a_float_and_nothing_else(name):
    value = getattr(TrainSettings("m", "d", **{name: 4.0}), name)
    assert (value, type(value)) == (4, int)
    for wrong in (2.5, "4", True, float("nan"), [4]):
        with pytest.raises(TypeError, match=f"{name} must be a whole number, got"):
            TrainSettings("m", "d", **{name: wrong})


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [("steps: 1e1", "steps", 10), ("keep_tokens: 256.0", "keep_tokens", 256), ("seed: 1.5e1", "seed", 15)],
)
def test_whole_numbers_in_a_file(line, name, value, tmp_path):
    (tmp_path / "a.yaml").write_text(f"model: m\ndata: d\n{line}\n")
    found = getattr(TrainSettings.from_dict(read_settings(tmp_path / "a.yaml")), name)
    assert (found, type(found)) == (value, int)


@pytest.mark.parametrize("name", ["rescale", "packing", "gradient_checkpointing"])
@pytest.mark.parametrize("wrong", ["false", "no", 0, 1.0])
def test_a_switch_is_true_or_false(name, wrong):
    with pytest.raises(TypeError, match=f"{name} must be true or false, got {wrong!r}"):
        TrainSettings("m", "d", **{name: wrong})


@pytest.mark.parametrize("wrong", [-0.1, 1, 1.0, 1.5, float("inf")])
def test_the_warmup_is_a_share_below_1(wrong):
    assert TrainSettings("m", "d", warmup=0).warmup == 0
    with pytest.raises(ValueError, match="warmup must be at least 0 and below 1"):
        TrainSettings("m", "d", warmup=wrong)


@pytest.mark.parametrize("name", ["batch", "seed", "rescale", "schedule", "columns", "held_out", "model"])
def test_what_has_a_default_is_not_empty(name):
    with pytest.raises(TypeError, match=f"{name} is empty; give a value"):
        TrainSettings(**{"model": "m", "data": "d", name: None})


@pytest.mark.parametrize("wrong", [0, 1, True, ["a.jsonl"]])
def test_what_is_held_out_is_a_share_or_a_file(wrong):
    with pytest.raises(ValueError, match="held_out must be a share between 0 and 1, or a file"):
        TrainSettings("m", "d", held_out=wrong)


@pytest.mark.parametrize("name", ["model", "data", "keep", "held_out"])
def test_a_path_is_not_empty(name):
    with pytest.raises(ValueError, match=f"{name} is empty; give a path or an id"):
        TrainSettings(**{"model": "m", "data": "d", name: ""})
