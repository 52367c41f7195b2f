"""Damaged, missing and mixed files: the error names the fault, and the model is unchanged."""

import copy
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ipca
from ipca.io.adapter_folder import file_sha256, read_labels
from tests.helpers.model_folders import contents
from tests.helpers.models import Net, Plain, adapted, snapshot

WEIGHTS, CONFIG, SIDECAR = "adapter_model.safetensors", "adapter_config.json", "ipca.json"


@pytest.fixture
def saved(tmp_path):
    """A base and the folder of an adapter for it."""
    base = Net()
    ipca.save_adapter(adapted(copy.deepcopy(base)), tmp_path / "adapter")
    return base, tmp_path / "adapter"


def refuses(
    base: nn.Module, folder: Path, words: str, error: type[Exception] = ValueError, *, resumed: bool = True
) -> None:
    """Loading fails with one line on the base, and on that base adapted already; neither changes, nor do the files."""
    files = contents(folder) if folder.is_dir() else {}
    for model in [base, adapted(copy.deepcopy(base))] if resumed else [base]:
        before = snapshot(model)
        with pytest.raises(error, match=words) as found:
            ipca.load_adapter(model, folder)
        assert "\n" not in str(found.value)
        assert snapshot(model) == before
    assert not files or contents(folder) == files


def change_sidecar(folder: Path, change) -> None:
    record = json.loads((folder / SIDECAR).read_text())
    change(record)
    (folder / SIDECAR).write_text(json.dumps(record))


def change_tensors(folder: Path, change) -> None:
    """Rewrite the tensors and make the sidecar agree with the new file."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    change_sidecar(folder, lambda record: record.update(adapter_sha256=file_sha256(folder / WEIGHTS)))


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 200, -4000, -100, -1])
def test_truncated_tensors(saved, cut):
    base, folder = saved
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:cut])
    refuses(base, folder, r"adapter_model\.safetensors is damaged or truncated")


@pytest.mark.parametrize("where", [0, 7, 8, 12])
def test_corrupted_header(saved, where):
    base, folder = saved
    damaged = bytearray((folder / WEIGHTS).read_bytes())
    damaged[where] ^= 0xFF
    (folder / WEIGHTS).write_bytes(damaged)
    refuses(base, folder, r"adapter_model\.safetensors is damaged or truncated")


KEY = "base_model.model.b.lora_A.weight"


def with_header(whole: bytes, **entry) -> bytes:
    """The file with something else said of the tensor ``KEY``."""
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    header[KEY] |= entry
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + whole[8 + size :]


LIES = {
    "length": lambda whole: struct.pack("<Q", 1 << 62) + whole[8:],
    "shape": lambda whole: with_header(whole, shape=[1 << 40, 1 << 40]),
    "negative": lambda whole: with_header(whole, shape=[-6, -12]),
    "offsets": lambda whole: with_header(whole, data_offsets=[0, 1 << 60]),
    "dtype": lambda whole: with_header(whole, dtype="F4096"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_claims_what_is_not_there(saved, lie):
    base, folder = saved
    (folder / WEIGHTS).write_bytes(LIES[lie]((folder / WEIGHTS).read_bytes()))
    refuses(base, folder, r"adapter_model\.safetensors is damaged or truncated")


def test_one_flipped_bit_among_the_values(saved):
    base, folder = saved
    damaged = bytearray((folder / WEIGHTS).read_bytes())
    damaged[-1] ^= 1
    (folder / WEIGHTS).write_bytes(damaged)
    refuses(base, folder, r"adapter_model\.safetensors is not the file that ipca\.json was written with; save .* again")


def test_tensors_of_another_save(saved, tmp_path):
    base, folder = saved
    ipca.save_adapter(adapted(copy.deepcopy(base)), tmp_path / "other")
    os.replace(tmp_path / "other" / WEIGHTS, folder / WEIGHTS)
    refuses(base, folder, "is not the file that ipca.json was written with")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (WEIGHTS, r"has no adapter_model\.safetensors: it is no adapter folder"),
        (SIDECAR, r"has no ipca\.json: it was not written by ipca\.save_adapter"),
    ],
)
def test_missing_file(saved, name, words):
    base, folder = saved
    (folder / name).unlink()
    refuses(base, folder, words, FileNotFoundError)
    (folder / name).mkdir()
    refuses(base, folder, words, FileNotFoundError)


def test_not_a_folder(saved):
    base, folder = saved
    for path in (folder / "none", folder / WEIGHTS):
        refuses(base, path, "is not a folder; give the folder of an adapter", FileNotFoundError)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        '"x"',
        "{}",
        '{"format": 1}',
        '{"format": 1, "layers": []}',
        b"\xff\xfe{}",
        "[" * 99999,
    ],
)
def test_damaged_sidecar(saved, text):
    base, folder = saved
    (folder / SIDECAR).write_bytes(text if isinstance(text, bytes) else text.encode())
    refuses(base, folder, r"ipca\.json is damaged: ")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda r: r.update(format=2),
            r"ipca\.json is damaged: ValueError: format 2 is that of a newer ipca; upgrade it",
        ),
        (lambda r: r.update(layers={}), r"ipca\.json is damaged: ValueError: it names no layer"),
        (lambda r: r.pop("layers"), r"ipca\.json is damaged: KeyError: 'layers'"),
        (lambda r: r["layers"]["b"].update(note=1), r"ipca\.json is damaged: TypeError: .*note"),
        (lambda r: r["layers"]["b"].pop("alpha"), r"ipca\.json is damaged: TypeError: .*alpha"),
        (
            lambda r: r["layers"]["b"].update(form="both"),
            r"ipca\.json is damaged: ValueError: form must be one of intact, residual; got 'both'",
        ),
        (lambda r: r["layers"]["b"].update(rank="3"), r"ipca\.json is damaged: TypeError: rank must be an int"),
        (lambda r: r["layers"]["b"]["svd"].pop("path"), r"ipca\.json is damaged: TypeError: .*path"),
        (
            lambda r: r["layers"]["b"].update(rank=2),
            r"b\.lora_A\.weight has shape \(6, 12\), but ipca\.json says \(4, 12",
        ),
        (lambda r: r["layers"].update(c=r["layers"]["b"]), r"has no tensor base_model\.model\.c\.lora_A\.weight"),
        (lambda r: r["layers"].pop("b"), r"holds base_model\.model\.b\.lora_A\.weight, which belongs to no layer"),
        (lambda r: r["modules_to_save"].clear(), r"holds base_model\.model\.norm\.\w+, which belongs to no layer"),
        (lambda r: r["modules_to_save"].append("head"), "the module 'head', which this model does not have"),
    ],
    ids=["format", "none", "key", "more", "less", "form", "type", "svd", "rank", "c", "b", "norm", "head"],
)
def test_sidecar_that_does_not_fit(saved, change, words):
    base, folder = saved
    change_sidecar(folder, change)
    refuses(base, folder, words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({KEY: t[KEY] * float("nan")}), r"b\.lora_A\.weight holds NaN or Inf; take a checkpoint"),
        (lambda t: t.update({KEY: t[KEY] / 0}), r"b\.lora_A\.weight holds NaN or Inf"),
        (
            lambda t: t.update({KEY: t[KEY][:-1].clone()}),
            r"b\.lora_A\.weight has shape \(5, 12\), but .* says \(6, 12\)",
        ),
        (lambda t: t.update({KEY: t[KEY].flatten()}), r"b\.lora_A\.weight has shape \(72,\)"),
        (lambda t: t.pop(KEY), r"adapter_model\.safetensors has no tensor .*b\.lora_A\.weight"),
        (lambda t: t.update(extra=torch.ones(2)), "holds extra, which belongs to no layer of the adapter"),
        (lambda t: t.update({"base_model.model.norm.weight": torch.ones(3)}), r"norm: the adapter holds .*\(3,\)"),
        (lambda t: t.pop("base_model.model.norm.bias"), "norm: the adapter holds .*, this model has .*bias"),
    ],
    ids=["nan", "inf", "short", "flat", "missing", "extra", "norm shape", "norm bias"],
)
def test_tensors_that_do_not_fit(saved, change, words):
    base, folder = saved
    change_tensors(folder, change)
    refuses(base, folder, words)


def test_another_model(saved):
    base, folder = saved
    refuses(
        Net(), folder, r"a: this is not the base weight the adapter was made on \(its values differ\)", resumed=False
    )
    refuses(nn.Sequential(nn.Linear(20, 12)), folder, "norm', which this model does not have", resumed=False)
    without = copy.deepcopy(base)
    without.b = nn.Identity()
    refuses(without, folder, "b: it is a Identity, not an nn.Linear", resumed=False)
    wider = copy.deepcopy(base)
    wider.b = nn.Linear(13, 20)
    refuses(wider, folder, r"b has shape \(20, 13\), but the adapter was made for \(20, 12\)", resumed=False)


def test_adapter_config_is_for_peft_alone(saved):
    base, folder = saved
    (folder / CONFIG).unlink()
    ipca.load_adapter(base, folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dropout", 7),
        ("dropout", None),
        ("alpha", -1),
        ("alpha", "x"),
        ("alpha", None),
        ("rank", 0),
        ("start", -1),
        ("start", 1.5),
        ("shape", [3]),
    ],
)
@pytest.mark.parametrize("form", ["residual", "intact"])
def test_sidecar_with_values_out_of_range(tmp_path, field, value, form):
    base = Plain()
    ipca.save_adapter(ipca.apply_pc(copy.deepcopy(base), rank=2, form=form, progress=False), tmp_path)
    record = json.loads((tmp_path / "ipca.json").read_text())
    record["layers"]["b"][field] = value
    (tmp_path / "ipca.json").write_text(json.dumps(record))
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"ipca\.json"):
        ipca.load_adapter(base, tmp_path)
    assert snapshot(base) == before


@pytest.mark.parametrize("value", [None, 3, "norm"])
def test_sidecar_with_a_wrong_list(tmp_path, value):
    base = Plain()
    ipca.save_adapter(ipca.apply_pc(copy.deepcopy(base), rank=2, progress=False), tmp_path)
    record = json.loads((tmp_path / "ipca.json").read_text())
    record["modules_to_save"] = value
    (tmp_path / "ipca.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"ipca\.json is damaged"):
        ipca.load_adapter(base, tmp_path)


@pytest.mark.parametrize("labels", ["ab", {"0": "a"}, [1, 2], None, 3])
def test_names_of_classes_that_are_none(saved, labels):
    base, folder = saved
    change_sidecar(folder, lambda record: record.update(labels=labels))
    refuses(base, folder, r"ipca\.json is damaged: TypeError: labels is .*, not a list of names")
    with pytest.raises(ValueError, match="is damaged"):
        read_labels(folder)
