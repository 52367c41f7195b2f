"""Checkpoints read tensor by tensor, and as weights by layer."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import ipca
from ipca.io.checkpoint import DTYPES, INDEX, WHOLE, Checkpoint, write_in_place

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensors():
    made = {f"layer.{dtype}": torch.randn(5, 7).to(dtype) for dtype in FLOATS}
    return {**made, "scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "ids": torch.arange(6), "é": torch.ones(3)}


@pytest.fixture
def sharded(tmp_path):
    """Two shards and their index, and what they hold."""
    held = tensors()
    names = list(held)
    places = {name: SHARDS[i % 2] for i, name in enumerate(names)}
    for shard in SHARDS:
        save_file({name: held[name] for name in names if places[name] == shard}, tmp_path / shard)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return tmp_path, held


def test_every_tensor_is_read_as_the_library_reads_it(sharded):
    folder, held = sharded
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.files == tuple(folder / name for name in SHARDS)
    assert checkpoint.index == folder / INDEX
    assert checkpoint.tensors.keys() == held.keys()
    for name, value in held.items():
        found = checkpoint.read(name)
        assert found.dtype == value.dtype == checkpoint.tensors[name].torch_dtype
        assert torch.equal(found, value)
    found.fill_(0)  # memory of its own


def test_a_single_file_comes_before_an_index(sharded):
    folder, _ = sharded
    save_file({"alone": torch.ones(2)}, folder / WHOLE)
    checkpoint = Checkpoint.open(folder)
    assert (checkpoint.files, checkpoint.index) == ((folder / WHOLE,), None)
    assert list(checkpoint.tensors) == ["alone"]


def test_a_folder_without_safetensors_is_no_checkpoint(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert Checkpoint.open(tmp_path) is None


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_truncated_shard_is_refused_when_it_is_opened(sharded, keep):
    folder, _ = sharded
    path = folder / SHARDS[1]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"{SHARDS[1]} is damaged or truncated"):
        Checkpoint.open(folder)


def test_a_shard_that_shrinks_afterwards_is_noticed(sharded):
    folder, held = sharded
    checkpoint = Checkpoint.open(folder)
    name = max(held, key=lambda name: checkpoint.tensors[name].start)
    file = checkpoint.tensors[name].file
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match=f"ends within the tensor {name}; download it again"):
        checkpoint.read(name)


def test_a_missing_shard_and_a_missing_tensor_are_named(sharded):
    folder, held = sharded
    save_file({name: value for name, value in held.items() if name == "ids"}, folder / SHARDS[0])
    with pytest.raises(ValueError, match=rf"{SHARDS[0]} lacks the tensor layer\.torch\.float16 that"):
        Checkpoint.open(folder)
    (folder / SHARDS[0]).unlink()
    with pytest.raises(FileNotFoundError, match=f"names {SHARDS[0]}, which is not there; download it again"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../model.safetensors"}}'],
)
def test_a_broken_index_is_refused(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=r"index\.json is damaged: "):
        Checkpoint.open(tmp_path)


def test_an_unknown_dtype_is_read_by_nobody(tmp_path, monkeypatch):
    save_file({"a": torch.ones(2)}, tmp_path / WHOLE)
    monkeypatch.delitem(DTYPES, "F32")
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(ValueError, match="a has the dtype F32, which cannot be read"):
        checkpoint.read("a")


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_tensor_is_replaced_in_place_and_no_other_byte(sharded, dtype):
    folder, held = sharded
    name = f"layer.{dtype}"
    stored = Checkpoint.open(folder).tensors[name]
    copy = folder / "copy.safetensors"
    shutil.copyfile(stored.file, copy)
    new = torch.randn(7, 5).to(dtype).mT
    write_in_place(copy, stored, new)
    found, before = load_file(copy), load_file(stored.file)
    assert torch.equal(found.pop(name), new)
    assert torch.equal(before.pop(name), held[name])
    assert all(torch.equal(found[key], value) for key, value in before.items())
    assert copy.stat().st_size == stored.file.stat().st_size


def test_a_folder_without_a_checkpoint_is_no_source(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors nor .* the original model"):
        ipca.load_unquantized_weights(tmp_path)


def test_a_checkpoint_is_a_mapping_by_layer(tmp_path):
    save_file({"m.a.weight": torch.ones(2), "n.a.weight": torch.ones(2), "b.weight": torch.ones(3)}, tmp_path / WHOLE)
    weights = ipca.load_unquantized_weights(tmp_path)
    assert "b" in weights
    assert "x.b" in weights  # the checkpoint of an inner model
    assert "a" not in weights  # which of two?
    assert "c" not in weights
    assert set(weights) == {"m.a", "n.a", "b"}
    assert len(weights) == 3
    assert torch.equal(weights["b"], torch.ones(3))
    with pytest.raises(KeyError, match=r"no tensor, or more than one, for a\.weight"):
        weights["a"]


def test_tensors_are_read_into_memory_whatever_the_default_device_is(sharded):
    folder, held = sharded
    with torch.device("meta"):
        read = {name: Checkpoint.open(folder).read(name) for name in held}
    assert all(torch.equal(read[name], value) for name, value in held.items())
