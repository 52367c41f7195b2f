"""Stock PEFT and transformers, in a process where ipca cannot be imported, compute what the adapted model computes."""

import copy
import json
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import ipca
from ipca.io.peft_format import double_factor, from_peft, split_factor, to_peft

# For each case: the plain base, the adapter, an input and the adapted model's output; prints the relative errors.
STOCK = """
import copy, json, pathlib, sys, warnings
sys.modules["ipca"] = None
import torch
torch.set_num_threads(1)
from peft import PeftModel
from safetensors.torch import load_file

def off(model, case):
    with torch.no_grad():
        y = model.eval()(case["x"])
    y = y if isinstance(y, torch.Tensor) else y.logits
    return ((y - case["y"]).norm() / case["y"].norm()).item()

def base_of(case, residual):
    if residual is None:
        return copy.deepcopy(case["base"])
    if hasattr(case["base"], "from_pretrained"):
        return type(case["base"]).from_pretrained(residual)
    case["base"].load_state_dict(load_file(residual / "model.safetensors"))
    return copy.deepcopy(case["base"])

results = {}
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    case = torch.load(folder / "case.pt", weights_only=False)
    residual = folder / "adapter" / "base" if (folder / "adapter" / "base").exists() else None
    adapter = folder / "adapter" / ("adapter" if residual else "")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(base_of(case, residual), adapter)
        lean = PeftModel.from_pretrained(base_of(case, residual), adapter, low_cpu_mem_usage=True)
    found = {"warnings": [str(w.message) for w in caught], "load": off(loaded, case), "low memory": off(lean, case)}
    found["merge"] = off(loaded.merge_and_unload(), case)
    if hasattr(case["base"], "load_adapter"):
        model = base_of(case, residual)
        model.load_adapter(str(adapter))
        found["transformers"] = off(model, case)
    results[folder.name] = found
print(json.dumps(results))
"""

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PATTERNS = {"rank_pattern": {"q_proj": 2, r".*\.1\.mlp\.up_proj": 6}, "alpha_pattern": {"v_proj": 3.5, "k_proj": 8.0}}


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, vocab_size=40, num_labels=5))


def llama(tied: bool = False):
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=40, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


def gpt2():
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 16}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False)
    return transformers.GPT2LMHeadModel(config)


def nested():
    """``dense`` at the root is also the end of two other paths, and ``block`` the beginning of another."""
    block = OrderedDict(dense=nn.Linear(13, 13), act=nn.Tanh())
    blocks = OrderedDict(dense=nn.Linear(13, 13), block=nn.Sequential(block))
    names = OrderedDict(block=nn.Sequential(blocks), block_dense=nn.Linear(13, 13), norm=nn.LayerNorm(13))
    return nn.Sequential(OrderedDict(**names, dense=nn.Linear(13, 13)))


# name: build, how it is written, options
CASES = {
    "bert": (bert, "save", {}),
    "bert with its classifier": (bert, "save", {"form": "intact", "alpha": 9.0, "modules_to_save": ["classifier"]}),
    "llama patterns": (llama, "save", PATTERNS),
    "llama tied": (lambda: llama(True), "peft", {"alpha": 1.5}),
    "llama exported": (lambda: llama(True), "residual", {"form": "intact", **PATTERNS}),
    "gpt2 with its head": (gpt2, "save", {"form": "intact", "targets": ["c_attn", "c_proj", "lm_head"]}),
    "gpt2 exported": (gpt2, "residual", {"alpha": 9.0}),
    "one of three": (nested, "save", {"targets": r"block\.block\.dense"}),
    "root alone": (nested, "save", {"targets": ["dense"], "exclude": ["block"]}),
    "two of three": (nested, "peft", {"targets": ["dense"], "exclude": [r"block\.block"]}),
    "own ranks": (nested, "save", {"rank_pattern": {"block.dense": 2}, "alpha_pattern": {"block.dense": 7.5}}),
    "with the norm": (nested, "save", {"modules_to_save": ["norm"]}),
    "nested exported": (nested, "residual", {"modules_to_save": ["norm"]}),
}
WRITE = {
    "save": ipca.save_adapter,
    "peft": ipca.export,
    "residual": lambda model, folder: ipca.export(model, folder, format="residual"),
}


def write_case(folder: Path, build, form: str, options) -> None:
    folder.mkdir()
    base = build().eval()
    x = torch.randn(3, 13) if isinstance(base, nn.Sequential) else torch.randint(0, 40, (3, 7))
    model = ipca.apply_pc(copy.deepcopy(base), progress=False, **{"rank": 4, **options})
    with torch.no_grad():
        for parameter in ipca.adapter_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
        plain, y = base(x), model(x)
    plain, y = (plain, y) if isinstance(y, torch.Tensor) else (plain.logits, y.logits)
    assert (y - plain).norm() > 1e-2 * y.norm(), "the adapter must matter"
    WRITE[form](model, folder / "adapter")
    torch.save({"base": base, "x": x, "y": y}, folder / "case.pt")


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """What the stock libraries make of every case: errors and warnings by case."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("stock")
    for name, case in CASES.items():
        write_case(root / name, *case)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STOCK, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_stock_libraries_compute_the_same(stock, name):
    found = dict(stock[name])
    complaints = [words for words in found.pop("warnings") if "key" in words or "match" in words]
    assert complaints == []
    assert {"load", "low memory", "merge"} <= set(found)
    assert ("transformers" in found) == ("nested" not in CASES[name][0].__name__)
    assert max(found.values()) <= 1e-5, found


def written_config(model: nn.Module, folder: Path, **options) -> dict:
    ipca.save_adapter(ipca.apply_pc(model, progress=False, **{"rank": 3, **options}), folder)
    return json.loads((folder / "adapter_config.json").read_text())


def test_config_is_that_of_a_lora_of_twice_the_rank(tmp_path):
    config = written_config(nested(), tmp_path, alpha=4.5, rank_pattern={"block_dense": 2}, modules_to_save=["norm"])
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 6, 9)
    assert config["rank_pattern"] == {"block_dense": 4}
    assert config["alpha_pattern"] == {}
    assert config["modules_to_save"] == ["norm"]
    assert (config["use_rslora"], config["init_lora_weights"], config["bias"]) == (False, True, "none")


def test_config_says_which_weights_are_stored_transposed(tmp_path):
    assert written_config(gpt2(), tmp_path)["fan_in_fan_out"] is True
    assert written_config(bert(), tmp_path)["fan_in_fan_out"] is False


def test_config_names_the_base_model(tmp_path):
    model = bert()
    model.name_or_path = "some/base"
    assert written_config(copy.deepcopy(model), tmp_path)["base_model_name_or_path"] == "some/base"
    model = ipca.apply_pc(model, rank=2, progress=False)
    ipca.save_adapter(model, tmp_path, base_model="other/base", overwrite=True)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "other/base"


@pytest.mark.parametrize("shape", [(7, 5, 1), (5, 7, 3), (4, 4, 4)])
def test_doubled_factors_are_the_change_of_the_weight_and_split_to_the_bit(shape):
    out, inner, rank = shape
    A, B, A0, B0 = (torch.randn(s) for s in ((rank, inner), (out, rank), (rank, inner), (out, rank)))
    lora_A, lora_B = double_factor("A", A, A0), double_factor("B", B, B0)
    change = B.double() @ A.double() - B0.double() @ A0.double()
    assert (lora_B.double() @ lora_A.double() - change).abs().max() <= 1e-14 * change.abs().max()
    split = (*split_factor("A", lora_A), *split_factor("B", lora_B))
    for found, wanted in zip(split, (A, A0, B, B0), strict=True):
        assert torch.equal(found, wanted)
        assert found.is_contiguous()
        assert found.untyped_storage().nbytes() == found.nbytes


@pytest.mark.parametrize("shape", [(1, 5, 7, 3), (4, 6, 5, 2), (3, 4, 4, 1)])
def test_experts_are_doubled_one_by_one(shape):
    experts, out, inner, rank = shape
    A, A0 = torch.randn(2, experts, rank, inner)
    B, B0 = torch.randn(2, experts, out, rank)
    stack = torch.cat([A, A0], dim=-2), torch.cat([B, -B0], dim=-1)
    (pA, pB), (pA0, pB0) = to_peft("experts", A, B), to_peft("experts", A0, B0)
    doubled = double_factor("A", pA, pA0, experts), double_factor("B", pB, pB0, experts)
    for found, wanted in zip(doubled, to_peft("experts", *stack), strict=True):
        assert torch.equal(found, wanted)
    for found, wanted in zip(from_peft("experts", (experts, out, inner), *doubled), stack, strict=True):
        assert torch.equal(found, wanted)
    split = (*split_factor("A", doubled[0], experts), *split_factor("B", doubled[1], experts))
    for found, wanted in zip(split, (pA, pA0, pB, pB0), strict=True):
        assert torch.equal(found, wanted)
        assert found.is_contiguous()
