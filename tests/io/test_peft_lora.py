"""Stock PEFT folders: fields that make an adapter no plain LoRA, and damaged or hostile files."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ipca
from ipca.io.peft_lora import read_stock
from tests.helpers.models import Net, snapshot

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


@pytest.fixture
def saved(tmp_path):
    """A base and the two files of a stock LoRA for it."""
    base = Net()
    model = ipca.apply_pc(Net(), rank=3, modules_to_save=["norm"], progress=False)
    ipca.export(model, tmp_path / "lora")
    return base, tmp_path / "lora"


def refuses(base, folder: Path, words: str, error: type[Exception] = ValueError) -> None:
    before = snapshot(base)
    with pytest.raises(error, match=words) as found:
        ipca.import_peft(base, folder, progress=False)
    assert "\n" not in str(found.value)
    assert snapshot(base) == before


def change_config(folder: Path, **fields) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


FIELDS = {
    "peft_type": "LOHA",
    "use_dora": True,
    "lora_bias": True,
    "bias": "all",
    "use_qalora": True,
    "layer_replication": [[0, 1]],
    "trainable_token_indices": [1],
    "target_parameters": ["experts.gate_up_proj"],
    "alora_invocation_tokens": [1, 2],
    "a_field_of_the_future": "on",
}


@pytest.mark.parametrize(("name", "value"), FIELDS.items())
def test_a_field_that_makes_it_no_plain_lora(saved, name, value):
    base, folder = saved
    change_config(folder, **{name: value})
    refuses(base, folder, rf"adapter_config\.json: {name} is ")


@pytest.mark.parametrize("start", ["olora", "loftq", "corda", "eva", "pissa_niter_x"])
def test_a_start_that_is_no_window(saved, start):
    base, folder = saved
    change_config(folder, init_lora_weights=start)
    refuses(base, folder, f"init_lora_weights is '{start}', which is no window of singular components")


def test_what_does_not_change_the_function_is_let_through(saved):
    _, folder = saved
    change_config(folder, use_dora=False, lora_bias=False, corda_config=None, loftq_config={}, peft_version="0.21.2")
    lora = read_stock(folder)
    assert lora.layers.keys() == {"a", "b"}
    assert lora.modules_to_save.keys() == {"norm"}
    assert (lora.layers["a"].rank, lora.layers["a"].scaling) == (6, 1.0)


PATTERNS = {
    "none": ({}, (6, 1.5), (6, 1.5)),
    "rslora": ({"use_rslora": True}, (6, 9 / 6**0.5), (6, 9 / 6**0.5)),
    "alpha": ({"alpha_pattern": {"b": 3}}, (6, 1.5), (6, 0.5)),
    "null": ({"alpha_pattern": None, "rank_pattern": None, "modules_to_save": ["norm"]}, (6, 1.5), (6, 1.5)),
}


@pytest.mark.parametrize(("fields", "first", "second"), PATTERNS.values(), ids=PATTERNS)
def test_rank_and_scaling_are_those_that_peft_would_take(saved, fields, first, second):
    _, folder = saved
    change_config(folder, lora_alpha=9, **fields)
    layers = read_stock(folder).layers
    assert [(layers[n].rank, layers[n].scaling) for n in ("a", "b")] == [first, second]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 0}, "is damaged: ValueError: r is 0, not a rank"),
        ({"r": "6"}, "is damaged: ValueError: r is '6', not a rank"),
        ({"rank_pattern": {"a": True}}, "is damaged: ValueError: a is True, not a rank"),
        ({"rank_pattern": 3}, "is damaged: TypeError: "),
        ({"lora_alpha": -1}, "is damaged: ValueError: lora_alpha is -1, not a positive number"),
        ({"alpha_pattern": {"a": None}}, "is damaged: ValueError: a is None, not a positive number"),
        ({"lora_dropout": 1}, "is damaged: ValueError: lora_dropout is 1"),
        ({"r": 4}, r"a: lora_A \(6, 20\) and lora_B \(12, 6\) are no factors of the rank 4"),
        ({"rank_pattern": {"a": 8}}, r"a: lora_A \(6, 20\) .* rank 8"),
        ({"rank_pattern": {"(": 6}}, "is damaged: (error|PatternError): missing \\)"),
        ({"modules_to_save": "norm"}, "is damaged: TypeError: modules_to_save is 'norm', not a list of names"),
        ({"modules_to_save": [""]}, r"is damaged: TypeError: modules_to_save is \[''\], not a list of names"),
        ({"modules_to_save": None}, r"holds base_model\.model\.norm\.\w+, neither a factor of a linear layer"),
    ],
)
def test_numbers_that_are_wrong(saved, fields, words):
    base, folder = saved
    change_config(folder, **fields)
    refuses(base, folder, words)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", b"\xff\xfe{}", "[" * 99999])
def test_a_damaged_configuration(saved, text):
    base, folder = saved
    (folder / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())
    refuses(base, folder, r"adapter_config\.json is damaged: ")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (WEIGHTS, r"has no adapter_model\.safetensors: it is no PEFT adapter"),
        (CONFIG, r"has no adapter_config\.json: it is no PEFT adapter"),
    ],
)
def test_a_missing_file(saved, name, words):
    base, folder = saved
    (folder / name).unlink()
    refuses(base, folder, words, FileNotFoundError)


def test_not_a_folder(saved):
    base, folder = saved
    for path in (folder / "none", folder / WEIGHTS):
        refuses(base, path, "is not a folder; give the folder of a PEFT adapter", FileNotFoundError)


def test_a_pickle_is_refused_by_its_name_and_not_opened(saved):
    base, folder = saved
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    refuses(base, folder, r"holds adapter_model\.bin, a pickle, .* with PEFT as safetensors", FileNotFoundError)


@pytest.mark.parametrize("cut", [0, 7, 8, 9, 200, -4000, -1])
def test_truncated_tensors(saved, cut):
    base, folder = saved
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:cut])
    refuses(base, folder, r"adapter_model\.safetensors is damaged or truncated")


def with_header(whole: bytes, change) -> bytes:
    size = struct.unpack("<Q", whole[:8])[0]
    text = json.dumps(change(json.loads(whole[8 : 8 + size]))).encode()
    return struct.pack("<Q", len(text)) + text + whole[8 + size :]


KEY = PREFIX + "a.lora_A.weight"
LIES = {
    "length": lambda whole: struct.pack("<Q", 1 << 62) + whole[8:],
    "shape": lambda whole: with_header(whole, lambda h: {**h, KEY: {**h[KEY], "shape": [1 << 40, 1 << 40]}}),
    "offsets": lambda whole: with_header(whole, lambda h: {**h, KEY: {**h[KEY], "data_offsets": [0, 1 << 60]}}),
    "dtype": lambda whole: with_header(whole, lambda h: {**h, KEY: {**h[KEY], "dtype": "F4096"}}),
    "type": lambda whole: with_header(whole, lambda h: {**h, KEY: 3}),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies(saved, lie):
    base, folder = saved
    (folder / WEIGHTS).write_bytes(LIES[lie]((folder / WEIGHTS).read_bytes()))
    refuses(base, folder, r"adapter_model\.safetensors is damaged or truncated")


OTHER = PREFIX + "a.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({KEY: t[KEY] * float("nan")}), r"a\.lora_A\.weight holds NaN or Inf; take a checkpoint"),
        (lambda t: t.update({OTHER: t[OTHER] / 0}), r"a\.lora_B\.weight holds NaN or Inf"),
        (lambda t: t.update({PREFIX + "norm.bias": torch.full((20,), torch.inf)}), r"norm\.bias holds NaN or Inf"),
        (lambda t: t.pop(OTHER), r"holds .*a\.lora_A\.weight without .*a\.lora_B\.weight"),
        (lambda t: t.pop(KEY), r"holds .*a\.lora_B\.weight, neither a factor of a linear layer"),
        (lambda t: t.update({KEY: t[KEY].flatten()}), r"a: lora_A \(120,\) .* are no factors of the rank 6"),
        (lambda t: t.update({KEY: t[KEY][:, :-1].clone()}), r"a has shape \(12, 20\), but .* \(12, 19\)"),
        (lambda t: t.update(extra=torch.ones(2)), "holds extra, neither a factor of a linear layer"),
        (lambda t: [t.pop(key) for key in list(t) if "lora" in key], "holds no lora_A.weight: it is no LoRA"),
        (lambda t: t.update({PREFIX + "norm.weight": torch.ones(3)}), r"norm: the adapter holds .*\(3,\)"),
    ],
)
def test_tensors_that_do_not_fit(saved, change, words):
    base, folder = saved
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    refuses(base, folder, words)
