"""The formats for servers: the live model's function by the rule of each server; warnings of other files."""

import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import ipca
from ipca.cli.inspect_adapter import adapter_record
from ipca.cli.main import main
from ipca.io.serving import server_faults
from ipca.peft import PCConfig
from tests.helpers.layer_kinds import CASES, STACKS, mixtral, output, relative
from tests.helpers.models import Net, snapshot
from tests.helpers.models import adapted as adapted_net

WEIGHTS, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
ROOT = Path(__file__).parents[2]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
ADAPTERS = {
    "uniform": {"rank": 4},
    "ranks": {"rank": 4, "rank_pattern": {"up_proj": 7, "v_proj": 2}},
    "ranks, one alpha": {"rank": 4, "alpha": 8.0, "rank_pattern": {"up_proj": 7}, "alpha_pattern": {"up_proj": 8.0}},
    "alphas": {"rank": 4, "alpha_pattern": {"q_proj": 9.5}},
    "a fractional alpha": {"rank": 3, "alpha": 0.7},
    "embeddings": {"rank": 4, "targets": ["embed_tokens", "lm_head", "q_proj"], "alpha_pattern": {"embed_tokens": 6.0}},
    "some blocks": {"rank": 4, "targets": [r"model\.layers\.1\..*_proj", "v_proj"], "rank_pattern": {"down_proj": 2}},
}
FIELDS = {
    "ranks": {"rank_pattern", "alpha_pattern"},
    "ranks, one alpha": {"rank_pattern"},
    "alphas": {"alpha_pattern"},
    "a fractional alpha": {"lora_alpha"},
    "embeddings": {"alpha_pattern"},
    "some blocks": {"rank_pattern", "alpha_pattern"},
    "rsLoRA": {"rank_pattern", "alpha_pattern"},
}
"""The fields of the standard folder of each that servers read wrongly."""


def llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    heads = {"num_key_value_heads": 2, "vocab_size": 60, "tie_word_embeddings": False}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **heads)).eval()


def train(model: nn.Module, by: float = 0.1) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn_like(parameter))
    return model


def rslora(folder: Path) -> nn.Module:
    """The adapter of a PCConfig with rsLoRA, as ipca loads it."""
    config = PCConfig(r=4, target_modules=["q_proj", "up_proj"], use_rslora=True, rank_pattern={"up_proj": 7})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(get_peft_model(llama(), config)).save_pretrained(folder)
    return ipca.load_adapter(llama(), folder)


@pytest.fixture(params=[*ADAPTERS, "rsLoRA"])
def model(request, tmp_path):
    if request.param == "rsLoRA":
        return rslora(tmp_path / "peft")
    return train(ipca.apply_pc(llama(), progress=False, **ADAPTERS[request.param]))


def changes(model: nn.Module) -> dict[str, torch.Tensor]:
    """The change of the weight of each layer, in float64 from the factors, ``(out, in)``."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, ipca.nn.WindowLayer):
            A, B, A0, B0 = (f.detach().double() for f in (layer.lora_A, layer.lora_B, layer.lora_A0, layer.lora_B0))
            found[name] = layer.scaling * (B @ A - B0 @ A0)
    return found


# -- each server's rule, as its loader computes it


def pairs(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """``lora_A (r, in), lora_B (out, r)`` by path."""
    held: dict[str, dict[str, np.ndarray]] = {}
    for key, value in load_file(folder / WEIGHTS).items():
        path, _, end = key.removeprefix(PREFIX).partition(".lora_")
        held.setdefault(path, {})[end.removeprefix("embedding_")[0]] = value.double().numpy()
    return {path: (each["A"], each["B"]) for path, each in held.items()}


def vllm_before_0_32(A, B, config):
    """It allocates r rows, and reads lora_alpha, r and use_rslora."""
    assert len(A) <= config["r"]
    return config["lora_alpha"] / config["r"] ** (0.5 if config["use_rslora"] else 1) * B @ A


def sglang(A, B, config):
    assert isinstance(config["target_modules"], list)
    assert len(A) == config["r"]
    return config["lora_alpha"] / config["r"] * B @ A


def llama_cpp(A, B, config):
    return config["lora_alpha"] / len(A) * B @ A


def ollama(A, B, config):
    assert isinstance(config["lora_alpha"], int)
    return config["lora_alpha"] / len(A) * B @ A


@pytest.mark.filterwarnings("ignore:the adapter's rank")
def test_every_server_computes_the_change_of_the_weights(model, tmp_path):
    ipca.export(model, tmp_path / "out", format="serve")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"]
    assert not config["use_rslora"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert not config.get("modules_to_save")
    assert not (tmp_path / "out" / "ipca.json").exists()
    held, wanted = pairs(tmp_path / "out"), changes(model)
    assert held.keys() == wanted.keys()
    for rule in (vllm_before_0_32, sglang, llama_cpp, ollama):
        for name, (A, B) in held.items():
            off = np.linalg.norm(rule(A, B, config) - wanted[name].numpy()) / wanted[name].norm()
            assert off < 1e-6, (rule.__name__, name)


@pytest.mark.filterwarnings("ignore:the adapter's rank")
def test_mlx_computes_the_change_of_the_weights(model, tmp_path):
    ipca.export(model, tmp_path / "out", format="mlx")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {CONFIG, "adapters.safetensors"}
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    tensors = load_file(tmp_path / "out" / "adapters.safetensors")
    lora, wanted = config["lora_parameters"], changes(model)
    assert config["fine_tune_type"] == "lora"
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json is that of an adapter of mlx-lm, which only"):
        adapter_record(tmp_path / "out")
    blocks = list(range(SIZES["num_hidden_layers"]))[-config["num_layers"] :]
    adapts = {f"model.layers.{i}.{key}" for i in blocks for key in lora["keys"]} | set(lora["keys"])
    assert {key.rpartition(".")[0] for key in tensors} == wanted.keys() <= adapts
    for name in wanted:
        a, b = (tensors[f"{name}.lora_{part}"].double() for part in "ab")
        assert a.shape[1] == b.shape[0] == lora["rank"]
        assert relative(lora["scale"] * (a @ b).T, wanted[name]) < 1e-6


@pytest.mark.filterwarnings("ignore:the adapter's rank")
def test_stock_peft_computes_the_same_without_ipca(tmp_path):
    x = torch.arange(20)[None]
    for name, options in ADAPTERS.items():
        model = train(ipca.apply_pc(llama(), progress=False, **options))
        ipca.export(model, tmp_path / "cases" / name / "adapter", format="serve")
        case = {"base": llama(), "x": x, "y": model(x).logits.detach(), "transformers": True, "auto": False}
        torch.save(case, tmp_path / "cases" / name / "case.pt")
    command = [sys.executable, "-m", "tests.helpers.stock_process", str(tmp_path / "cases")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found.keys() == ADAPTERS.keys()
    assert all(off < 1e-5 for case in found.values() for off in case.values()), found


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv3d", "embedding", "experts", "experts transposed"])
def test_other_kinds_of_layers_in_stock_peft(name, tmp_path):
    case = CASES[name]
    torch.manual_seed(0)
    base, x = case.build().eval(), case.x()
    options = {"rank": 3, **case.options}
    model = train(ipca.apply_pc(copy.deepcopy(base), targets=case.targets, progress=False, **options))
    ipca.export(model, tmp_path, format="serve")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    with torch.no_grad():
        assert relative(output(model, x), output(base, x)) > 1e-3
        assert relative(output(loaded, x), output(model, x)) < 1e-5


def deepseek() -> transformers.DeepseekV2ForCausalLM:
    """A dense and a mixture layer, whose projections PEFT takes for experts when it reads their names."""
    torch.manual_seed(0)
    heads = {"vocab_size": 60, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16}
    more = {"num_key_value_heads": 4, "q_lora_rank": None, "topk_group": 1, "n_group": 1, "first_k_dense_replace": 1}
    sizes = SIZES | {"num_hidden_layers": 2}
    return transformers.DeepseekV2ForCausalLM(transformers.DeepseekV2Config(**sizes, **heads, **experts, **more)).eval()


@pytest.mark.parametrize("targets", ["all-linear", ["gate_proj", "q_proj"], [*STACKS, "q_proj"]])
def test_mixtures_in_stock_peft(targets, tmp_path):
    x = torch.arange(20)[None]
    patterns = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 5.0}}
    model = train(ipca.apply_pc(deepseek(), rank=2, targets=targets, progress=False, **patterns))
    ipca.export(model, tmp_path, format="serve")
    loaded = PeftModel.from_pretrained(deepseek(), tmp_path).eval()
    torch.testing.assert_close(loaded(x).logits, model(x).logits, atol=1e-5, rtol=1e-4)


def test_rsLoRA_in_stock_peft(tmp_path):
    model, x = rslora(tmp_path / "peft"), torch.arange(20)[None]
    ipca.export(model, tmp_path / "out", format="serve")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "out").eval()
    torch.testing.assert_close(loaded(x).logits, model(x).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_files_of_16_bits_round_the_change_and_not_the_window(dtype, tmp_path):
    model = train(ipca.apply_pc(llama(), rank=4, progress=False), by=1e-4).to(dtype)
    ipca.save_adapter(model, tmp_path / "saved")
    ipca.export(model, tmp_path / "serve", format="serve")
    wanted, start = changes(model), ipca.apply_pc(llama(), rank=4, progress=False).to(dtype)
    off = {}
    for folder in ("saved", "serve"):
        config = json.loads((tmp_path / folder / CONFIG).read_text())
        off[folder] = max(
            float(np.linalg.norm(llama_cpp(A, B, config) - wanted[name].numpy()) / wanted[name].norm())
            for name, (A, B) in pairs(tmp_path / folder).items()
        )
    assert off["serve"] < 4 * torch.finfo(dtype).eps
    ipca.export(start, tmp_path / "start", format="serve")
    assert all(not (B @ A).any() for A, B in pairs(tmp_path / "start").values())


# -- refusals, before anything is written


@pytest.mark.parametrize("format", ["serve", "mlx"])
def test_modules_that_train_whole_are_refused(format, tmp_path):
    model = adapted_net(Net())
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"norm: trained whole, .*Merge the adapter into the model.*ipca merge"):
        ipca.export(model, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["conv2d", "experts", "a"])
def test_layers_that_mlx_does_not_have_are_refused(name, tmp_path):
    model = ipca.apply_pc(Net(), rank=3, targets="a", progress=False) if name == "a" else None
    if model is None:
        model = ipca.apply_pc(CASES[name].build(), rank=3, targets=CASES[name].targets, progress=False)
    with pytest.raises(ValueError, match=r"mlx-lm adapts linear layers called model\.layers\.NUMBER\.….*; merge the"):
        ipca.export(model, tmp_path / "out", format="mlx")
    assert not (tmp_path / "out").exists()


class Ends(nn.Module):
    """``fc`` is also the end of ``deep.fc``, and ``deep.fc`` that of ``deep.deep.fc``."""

    def __init__(self, depth: int = 2):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        if depth:
            self.deep = Ends(depth - 1)

    def forward(self, x):
        return self.fc(self.deep(x) if hasattr(self, "deep") else x)


def test_targets_are_a_list_even_where_a_name_is_the_end_of_another(tmp_path):
    base, x = Ends(), torch.randn(3, 8)
    model = train(ipca.apply_pc(copy.deepcopy(base), rank=2, targets=r"fc|deep\.fc", progress=False))
    assert sorted(changes(model)) == ["deep.fc", "fc"]
    ipca.export(model, tmp_path / "out", format="serve")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (config["target_modules"], config["exclude_modules"]) == (["fc", "deep.fc"], ["deep.deep.fc"])
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out")
    torch.testing.assert_close(loaded(x), model(x), atol=1e-6, rtol=1e-4)


def test_targets_that_no_list_can_name_are_refused(tmp_path):
    model = ipca.apply_pc(Ends(), rank=2, targets=r"fc|deep\.deep\.fc", progress=False)
    with pytest.raises(ValueError, match=r"deep\.deep\.fc is adapted and deep\.fc is not.*: adapt both, or merge"):
        ipca.export(model, tmp_path / "out", format="serve")
    assert not (tmp_path / "out").exists()


# -- what is said


@pytest.mark.parametrize(("rank", "says"), [(8, ""), (9, "32"), (16, "32"), (150, "320"), (257, "is above 512")])
def test_the_rank_that_a_server_must_allow_is_said(rank, says, tmp_path):
    model = ipca.apply_pc(nn.ModuleDict({"a": nn.Linear(300, 290)}), rank=rank, progress=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ipca.export(model, tmp_path, format="serve")
    said = " ".join(str(each.message) for each in caught)
    assert (says in said and f"rank {2 * rank}" in said) if says else said == ""


def test_saving_warns_of_what_servers_read_wrongly(model, tmp_path, request):
    name = request.node.callspec.params["model"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ipca.save_adapter(model, tmp_path / "saved")
        ipca.export(model, tmp_path / "peft-format")
    said = [str(each.message) for each in caught]
    fields = FIELDS.get(name, set())
    assert len(said) == 2 * bool(fields)
    for each in said:
        assert all(field in each for field in fields)
        assert "SGLang" in each or "Ollama" in each
        assert "ipca export --format serve" in each
    assert all(each.filename == __file__ for each in caught)


def test_saving_through_peft_warns_too(tmp_path):
    config = PCConfig(r=4, target_modules=["q_proj", "v_proj"], use_rslora=True)
    model = get_peft_model(llama(), config)
    with pytest.warns(RuntimeWarning, match=r"use_rslora \(misread by SGLang, llama\.cpp\)") as caught:
        model.save_pretrained(tmp_path)
    assert [each.filename for each in caught] == [__file__]


def test_faults_name_their_servers():
    plain = {"r": 8, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    assert server_faults(plain) is None
    assert server_faults({}) is None
    assert "rank_pattern (misread by vLLM before 0.32, SGLang" in server_faults(plain | {"rank_pattern": {"a": 4}})
    assert "llama.cpp" in server_faults(plain | {"alpha_pattern": {"a": 4}})
    assert "Ollama" in server_faults(plain | {"lora_alpha": 1.4})


def test_the_command_line(tmp_path, capsys):
    llama().save_pretrained(tmp_path / "model")
    model = train(ipca.apply_pc(llama(), rank=16, targets=["q_proj"], alpha_pattern={r".*0.*": 8.0}, progress=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ipca.save_adapter(model, tmp_path / "adapter")
    words = ["export", str(tmp_path / "model"), str(tmp_path / "adapter"), "--format"]
    with pytest.warns(RuntimeWarning, match="the adapter's rank 32 .*: start vLLM with --max-lora-rank 32"):
        assert main([*words, "serve", "-o", str(tmp_path / "out")]) == 0
    assert main(["inspect", str(tmp_path / "adapter")]) == 0
    assert "alpha_pattern (misread by vLLM before 0.32, SGLang, llama.cpp)" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["servers"] is None
    assert main([*words, "mlx", "-o", str(tmp_path / "mlx")]) == 0
    assert (tmp_path / "mlx" / "adapters.safetensors").is_file()


def test_experts_stay_parameters(tmp_path):
    model = ipca.apply_pc(mixtral(), rank=2, targets=[*STACKS, "q_proj"], progress=False)
    ipca.export(model, tmp_path, format="serve")
    config = json.loads((tmp_path / CONFIG).read_text())
    assert len(config["target_parameters"]) == 4
    assert config["target_modules"] == ["q_proj"]
