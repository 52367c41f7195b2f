"""Damaged folders on the command line: status 1, one line, nothing written or changed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import ipca
from ipca.cli.main import main
from tests.helpers.model_folders import contents

WEIGHTS, SIDECAR = "adapter_model.safetensors", "ipca.json"


@pytest.fixture
def adapter(llama, tmp_path):
    model = ipca.apply_pc(LlamaForCausalLM.from_pretrained(llama), rank=3, targets="q_proj", progress=False)
    ipca.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def fails(root, capfd, words: str, *command: str) -> None:
    before = contents(root)
    capfd.readouterr()
    assert main([*command, "-o", str(root / "out"), "--json"]) == 1
    found = capfd.readouterr()
    (line,) = [line for line in found.err.splitlines() if line.startswith("ipca: error: ")]
    assert words in line
    assert "Traceback" not in found.err
    assert found.out == ""
    assert contents(root) == before
    assert not (root / "out").exists()


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def spoil(folder, value: float) -> None:
    tensors = load_file(folder / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = value
    save_file(tensors, folder / WEIGHTS)


DAMAGE = {
    "cut": (lambda folder: cut(folder / WEIGHTS), f"{WEIGHTS} is damaged or truncated"),
    "sidecar": (lambda folder: (folder / SIDECAR).write_text("{"), f"{SIDECAR} is damaged"),
    "exchanged": (lambda folder: spoil(folder, 2.0), f"is not the file that {SIDECAR} was written with"),
    "gone": (lambda folder: (folder / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
    "file": (lambda folder: (shutil.rmtree(folder), folder.write_text("")), "is not a folder"),
}


@pytest.mark.parametrize("command", ["merge", "export"])
@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_adapter(llama, adapter, tmp_path, capfd, damage, words, command):
    damage(adapter)
    fails(tmp_path, capfd, words, command, str(llama), str(adapter))


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "holds NaN or Inf"), (5.0, "window's rank for this base")])
def test_convert_of_a_stock_lora_with_other_values(llama, adapter, tmp_path, capfd, value, words):
    (adapter / SIDECAR).unlink()
    tensors = load_file(adapter / WEIGHTS)
    next(value for key, value in tensors.items() if "lora_A" in key)[3:] = value  # A0
    save_file(tensors, adapter / WEIGHTS)
    fails(tmp_path, capfd, words, "convert", str(llama), str(adapter))


def test_a_pickled_adapter(llama, adapter, tmp_path, capfd):
    tensors = load_file(adapter / WEIGHTS)
    (adapter / WEIGHTS).unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    fails(tmp_path, capfd, "holds adapter_model.bin, a pickle", "convert", str(llama), str(adapter))


@pytest.mark.parametrize("command", ["merge", "export"])
def test_an_adapter_of_another_base(gpt2, llama, adapter, tmp_path, capfd, command):
    fails(tmp_path, capfd, "which this GPT2LMHeadModel does not have", command, str(gpt2), str(adapter))
    other = LlamaForCausalLM.from_pretrained(llama)
    torch.nn.init.normal_(other.model.layers[1].self_attn.q_proj.weight)
    other.save_pretrained(tmp_path / "other")
    fails(
        tmp_path,
        capfd,
        "is not the base weight the adapter was made on",
        command,
        str(tmp_path / "other"),
        str(adapter),
    )


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "none"}', '{"model_type": 3}'])
@pytest.mark.parametrize("command", ["inspect", "init"])
def test_a_damaged_configuration_of_the_model(llama, tmp_path, capfd, text, command):
    (llama / "config.json").write_text(text)
    if command == "init":
        fails(tmp_path, capfd, str(llama), "init", str(llama), "--rank", "3")
    else:
        assert main(["inspect", str(llama)]) == 1
        assert "ipca: error: transformers cannot load" in capfd.readouterr().err


@pytest.mark.parametrize("size", [0, 700])
def test_a_full_disk_leaves_no_trace(llama, adapter, tmp_path, capsys, size):
    resource = pytest.importorskip("resource", reason="needs POSIX, whose limits stand in for a full disk")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    files = contents(tmp_path)
    capsys.readouterr()
    codes = []
    try:
        for command in (["merge", str(llama), str(adapter)], ["export", str(llama), str(adapter)]):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
            codes.append(main([*command, "-o", str(tmp_path / "out")]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert codes == [1, 1]
    assert capsys.readouterr().err.count(f"ipca: error: cannot write {tmp_path / 'out'}: ") == 2
    assert contents(tmp_path) == files
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["inspect", "init"])
def test_code_of_a_model_is_not_run(llama, tmp_path, capfd, command):
    config = json.loads((llama / "config.json").read_text()) | {"model_type": "own", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    (llama / "config.json").write_text(json.dumps(config))
    (llama / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    words = "code of its own, which is not run here; load it in Python"
    if command == "init":
        fails(tmp_path, capfd, words, "init", str(llama))
    else:
        assert main(["inspect", str(llama)]) == 1
        assert words in capfd.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_an_adapter_behind_a_link_is_not_overwritten(llama, adapter, tmp_path, capsys):
    (tmp_path / "link").symlink_to(adapter)
    before = contents(adapter)
    words = ["export", str(llama), str(adapter), "--format", "truncated", "--rank", "2", "-o", str(tmp_path / "link")]
    assert main(words) == 1
    assert "link is the adapter itself; choose another folder" in capsys.readouterr().err
    assert contents(adapter) == before
