"""What stock PEFT reads is what was written: names that PEFT or transformers rewrite, and the check before writing."""

import copy
import json
import re
import time
import warnings

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn

import ipca
from ipca.io import peft_format
from ipca.io.peft_format import LayerFormat, readable_config, shortest_ends
from ipca.io.peft_reader import Reading, plain_copy, read_with_peft
from ipca.peft import PCConfig, prepare

SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
MIXTURE = {**SMALL, "num_attention_heads": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
GROUPS = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
MIXTURES = {
    "DeepseekV3": {**MIXTURE, **MLA, **GROUPS, "num_key_value_heads": 4},
    "Dots1": {**MIXTURE, **GROUPS, "num_key_value_heads": 2, "head_dim": 8},
    "Glm4Moe": {**MIXTURE, **GROUPS, "num_key_value_heads": 2, "head_dim": 8},
    "Qwen2Moe": {**MIXTURE, "num_key_value_heads": 2, "num_experts": 4, "shared_expert_intermediate_size": 24},
    "Qwen3Moe": {**MIXTURE, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "mlp_only_layers": [0]},
}
IDS = torch.arange(24).reshape(2, 12) + 3


def mixture(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MIXTURES[name])
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


@torch.no_grad()
def trained(model, **options):
    torch.manual_seed(1)
    ipca.apply_pc(model, **{"rank": 4, "progress": False, **options})
    for parameter in ipca.adapter_parameters(model):
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def off(model, right):
    return float((logits(model) - right).abs().max())


def state(model):
    return [(name, type(module)) for name, module in model.named_modules()], copy.deepcopy(model.state_dict())


def assert_unchanged(model, before):
    modules, tensors = state(model)
    assert modules == before[0]
    assert tensors.keys() == before[1].keys()
    assert all(torch.equal(tensors[key], before[1][key]) for key in tensors)


# -- mixtures of experts with dense layers


@pytest.mark.parametrize("ends", [("gate_proj", "up_proj", "down_proj"), ("q_proj", "q_a_proj", "gate_proj")])
@pytest.mark.parametrize("name", MIXTURES)
def test_dense_layers_of_a_mixture_load_as_trained(name, ends, tmp_path):
    base = mixture(name)
    chosen = [path for path, module in base.named_modules() if type(module) is nn.Linear and path.endswith(ends)]
    model = trained(copy.deepcopy(base), targets=chosen, rank_pattern={chosen[-1]: 2}, alpha_pattern={chosen[-1]: 3.0})
    right = logits(model)
    assert (right - logits(base)).abs().max() > 1e-2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ipca.save_adapter(model, tmp_path)
        assert off(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path), right) < 1e-5
        pc = PCConfig.from_pretrained(tmp_path)
        assert pc.records.initial.keys() == set(chosen)
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, config=pc, is_trainable=True)
    assert pc.records.initial == {}  # every layer took its own, so that none was decomposed again
    assert off(again, right) < 1e-5
    again.save_pretrained(tmp_path / "again")
    assert off(ipca.load_adapter(copy.deepcopy(base), tmp_path / "again"), right) == 0
    assert off(ipca.load_adapter(copy.deepcopy(base), tmp_path), right) == 0


def test_transformers_loads_dense_layers_of_a_mixture(tmp_path):
    base = mixture("Qwen3Moe")
    model = trained(copy.deepcopy(base), targets=[r".*_proj"])
    ipca.save_adapter(model, tmp_path)
    base.load_adapter(str(tmp_path))
    assert off(base, logits(model)) < 1e-5


def test_both_parts_of_a_residual_mixture_give_the_trained_function(tmp_path):
    model = trained(mixture("Dots1"), targets=[r".*\.mlp(\.shared_experts)?\.(gate|up|down)_proj"], form="residual")
    ipca.export(model, tmp_path, format="residual")
    base = transformers.Dots1ForCausalLM.from_pretrained(tmp_path / "base")
    assert off(PeftModel.from_pretrained(base, tmp_path / "adapter"), logits(model)) < 1e-5


def test_dense_layers_are_prepared_as_linear_layers(tmp_path):
    base = mixture("Qwen3Moe")
    options = {"target_modules": ["q_proj"], "target_parameters": ["model.layers.0.mlp.up_proj.weight"]}
    config = prepare(base, PCConfig(r=4, **options), progress=False)
    assert "model.layers.0.mlp.up_proj" in config.records.initial
    model = get_peft_model(base, config)
    assert config.records.saved["model.layers.0.mlp.up_proj"].kind == "linear"
    model.save_pretrained(tmp_path)
    assert set(json.loads((tmp_path / "ipca.json").read_text())["layers"]) >= {"model.layers.0.mlp.up_proj"}


def test_an_exported_mixture_is_imported_again(tmp_path):
    base, name = mixture("Qwen3Moe"), "model.layers.0.mlp.up_proj"
    model = trained(copy.deepcopy(base), targets=[name, "q_proj"], rank_pattern={name: 2}, alpha_pattern={name: 3.0})
    ipca.export(model, tmp_path)
    again = ipca.import_peft(base, tmp_path, progress=False)
    assert (again.get_submodule(name).rank, again.get_submodule(name).alpha) == (2, 3.0)
    assert off(again, logits(model)) < 1e-5


# -- names


def test_ends_are_the_shortest_that_pick_no_other_module():
    names = ["m.0.q", "m.1.q", "m.1.k", "v.1.k", "q"]
    assert shortest_ends(["m.0.q"], names) == {"m.0.q": "0.q"}
    assert shortest_ends(["m.0.q", "m.1.q", "q"], names) == {"m.0.q": "q", "m.1.q": "q", "q": "q"}
    assert shortest_ends(["m.1.k"], names) == {"m.1.k": "m.1.k"}
    assert shortest_ends(["q"], names) == {"q": None}


def llava():
    torch.manual_seed(0)
    text = transformers.LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8
    )
    config = transformers.LlavaConfig(image_token_id=96, vision_config=vision, text_config=text)
    return transformers.LlavaForConditionalGeneration(config).eval()


def before_the_move(text):
    """A path as transformers 4.51 had it."""
    return text.replace("model.language_model.", "language_model.model.")


@pytest.mark.parametrize("targets", ["up_proj", "o_proj"])
def test_a_folder_from_before_modules_were_moved_loads(targets, tmp_path):
    from safetensors.torch import load_file, save_file

    model = trained(llava(), targets=[targets], rank_pattern={f"0.mlp.{targets}": 2} if targets == "up_proj" else {})
    right = logits(model)
    ipca.save_adapter(model, tmp_path)
    tensors, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_file({before_the_move(key): value for key, value in load_file(tensors).items()}, tensors)
    config.write_text(before_the_move(config.read_text()))
    assert off(PeftModel.from_pretrained(llava(), tmp_path), right) < 1e-5


def test_fields_and_patterns_are_those_that_old_versions_of_peft_know(tmp_path):
    torch.manual_seed(0)
    blocks = {"first": nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), "x": nn.Linear(32, 32)}
    model = nn.ModuleDict({"block": nn.ModuleDict(blocks), "head": nn.Linear(32, 32)})
    ipca.apply_pc(model, rank=4, rank_pattern={"0": 8, "head": 2}, alpha_pattern={"first.1": 6.0}, progress=False)
    ipca.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not {"target_parameters", "exclude_modules", "trainable_token_indices", "lora_bias"} & set(config)
    assert config["rank_pattern"] == {"0": 16, "head": 4}
    assert (config["lora_alpha"], config["alpha_pattern"]) == (16, {"1": 12, "x": 8, "head": 4})
    paths = [f"base_model.model.{path}" for path in ("block.first.0", "block.first.1", "block.x", "head")]
    for key in (*config["rank_pattern"], *config["alpha_pattern"]):  # PEFT 0.13 and older match in this way
        assert any(re.match(rf".*\.{key}$", path) for path in paths)


# -- the check


def test_a_copy_for_the_check_is_plain_and_shares_no_tensor():
    base = mixture("Qwen3Moe")
    model = trained(copy.deepcopy(base), targets=[r".*_proj"])
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    before = state(model)
    copied = plain_copy(model)
    assert {n: (type(m), m.training) for n, m in copied.named_modules()} == {
        n: (type(m), m.training) for n, m in base.named_modules()
    }
    assert {n: p.shape for n, p in copied.named_parameters()} == {n: p.shape for n, p in base.named_parameters()}
    assert all(p.is_meta for p in copied.parameters())
    assert not any(m._forward_hooks for m in copied.modules())
    assert_unchanged(model, before)


def test_a_copy_of_a_peft_model_is_that_of_its_base():
    base = mixture("Qwen3Moe")
    options = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj", "experts.gate_up_proj"]}
    model = get_peft_model(copy.deepcopy(base), PCConfig(r=2, modules_to_save=["lm_head"], **options))
    copied = plain_copy(model.get_base_model())
    assert not hasattr(copied, "peft_config")
    names = [(name, type(module)) for name, module in copied.named_modules()]
    assert names == [(name, type(module)) for name, module in base.named_modules()]


def test_the_check_sees_what_peft_ignores_lacks_scales_and_refuses():
    def read(shapes=None, **config):
        base = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
        keys = {f"base_model.model.a.lora_{side}.weight": shape for side, shape in (("A", (4, 8)), ("B", (8, 4)))}
        whole = {"r": 4, "lora_alpha": 4, "target_modules": ["a"], "peft_type": "LORA"} | config
        return read_with_peft(plain_copy(base), whole, shapes or keys, {"base_model.model.a.lora_A.weight": 1.0})

    assert not read()
    assert read(target_modules=["b"]).ignored == tuple(f"base_model.model.a.lora_{side}.weight" for side in "AB")
    assert read(target_modules=["a", "b"]).missing == tuple(f"base_model.model.b.lora_{side}.weight" for side in "AB")
    assert read(lora_alpha=8).scaled == ("base_model.model.a.lora_A.weight",)
    assert "size mismatch" in read(r=2).refusal
    assert "not found in the base model" in read(target_modules=["c"]).refusal


def test_a_model_with_gradient_checkpointing_is_checked(tmp_path, recwarn):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_attention_heads=4))
    model.gradient_checkpointing_enable()  # for which PEFT registers a hook on the copy
    get_peft_model(model, PCConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert [str(w.message) for w in recwarn if "not checked" in str(w.message)] == []


def test_what_peft_would_read_otherwise_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    lost = tuple(f"base_model.model.model.layers.{i}.self_attn.v_proj.lora_A.weight" for i in (0, 1))
    monkeypatch.setattr(peft_format, "read_with_peft", lambda *_: Reading(ignored=lost))
    model = trained(llama(), targets=["q_proj", "v_proj"])
    before = state(model)
    for write in (ipca.save_adapter, ipca.export):
        with pytest.raises(ValueError, match=r"PEFT would read another adapter .* leave out .*v_proj.*exclude them"):
            write(model, tmp_path / "new")
    assert_unchanged(model, before)
    assert not (tmp_path / "new").exists()


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_attention_heads=4)).eval()


def test_a_module_that_the_names_would_match_too_is_excluded(monkeypatch, tmp_path):
    monkeypatch.setattr(peft_format, "_target_modules", lambda names, all_names: ["q_proj"])
    model = trained(llama(), targets=["0.self_attn.q_proj"])
    ipca.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["exclude_modules"] == [
        "model.layers.1.self_attn.q_proj"
    ]
    assert off(PeftModel.from_pretrained(llama(), tmp_path), logits(model)) < 1e-5


def mamba():
    torch.manual_seed(0)
    config = {"vocab_size": 97, "hidden_size": 32, "state_size": 4, "time_step_rank": 4, "num_hidden_layers": 2}
    return transformers.MambaForCausalLM(transformers.MambaConfig(**config, pad_token_id=0)).eval()


def test_a_layer_that_peft_refuses_is_told_and_no_other(tmp_path):
    model = trained(mamba(), rank=2)
    with pytest.warns(
        UserWarning, match=r"PEFT cannot load backbone\.layers\.0\.mixer\.out_proj, .*\.1\.mixer\.out_proj"
    ):
        ipca.save_adapter(model, tmp_path / "saved")
    assert off(ipca.load_adapter(mamba(), tmp_path / "saved"), logits(model)) == 0
    model = trained(mamba(), rank=2, exclude=["dt_proj"])
    before = state(model)
    with pytest.raises(ValueError, match=r"out_proj .*; exclude them, or call ipca\.unload\(model\) and save"):
        ipca.export(model, tmp_path / "exported")
    assert_unchanged(model, before)
    assert not (tmp_path / "exported").exists()


def test_without_peft_nothing_is_checked_which_is_said_for_models_of_transformers(monkeypatch, tmp_path):
    monkeypatch.setattr(peft_format, "has_peft", lambda: False)
    layers = {"a": LayerFormat("linear", (8, 8), 2, 2.0)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert readable_config(nn.ModuleDict({"a": nn.Linear(8, 8)}), layers, {})["target_modules"] == ["a"]
    with pytest.warns(UserWarning, match="PEFT is not installed, so that it was not checked"):
        ipca.save_adapter(trained(llama(), targets=["q_proj"]), tmp_path)


def test_the_check_of_a_large_model_takes_seconds():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig())
    layers = {
        name: LayerFormat("linear", tuple(module.weight.shape), 32, 32.0)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name != "lm_head"
    }
    began = time.perf_counter()
    assert len(readable_config(model, layers, {})["target_modules"]) == 7
    assert time.perf_counter() - began < 30
