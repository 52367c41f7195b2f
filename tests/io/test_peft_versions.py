"""Earlier versions of PEFT load what we write, and compute the same; they run from their wheels, without ipca."""

import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn

import ipca
from ipca.peft import PCConfig
from tests.helpers.layer_kinds import STACKS, mixtral

ROOT = Path(__file__).parents[2]
VERSIONS = ("0.11.1", "0.13.2", "0.15.2", "0.18.1")
NATIVE = {
    "uniform rank": {"rank": 4},
    "rank_pattern": {"rank": 4, "rank_pattern": {"q_proj": 7, r"model\.layers\.1\.mlp\.up_proj": 2}},
    "alpha_pattern": {"rank": 4, "alpha_pattern": {"up_proj": 9.5}},
    "full paths": {"rank": 4, "targets": [r"model\.layers\.1\..*q_proj", "v_proj"]},
    "embeddings": {"rank": 4, "targets": ["embed_tokens", "q_proj"]},
    "a whole head": {"rank": 4, "modules_to_save": ["lm_head"]},
}
IN_PEFT = {
    "PCConfig": {"r": 4, "target_modules": ["q_proj", "up_proj"]},
    "PCConfig, rsLoRA": {"r": 4, "target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"q_proj": 7}},
}

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:adapter_config.json has")]


def wheel(version: str) -> Path:
    """``IPCA_PEFT_WHEELS`` is a folder of PEFT's wheels, as the Makefile downloads them."""
    folder = os.environ.get("IPCA_PEFT_WHEELS")
    if not folder:
        pytest.skip("IPCA_PEFT_WHEELS names no folder with PEFT's wheels; make test-slow sets it")
    (found,) = Path(folder).absolute().glob(f"peft-{version}-*.whl")
    return found


def read(version: str, cases: Path) -> subprocess.CompletedProcess[str]:
    """What ``version`` makes of the adapters in ``cases``."""
    command = [sys.executable, "-m", "tests.helpers.stock_process", str(cases)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(wheel(version)), str(ROOT)])}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@torch.no_grad()
def trained(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def keep(folder: Path, base: nn.Module, model: nn.Module) -> None:
    x = torch.arange(20)[None]
    case = {"base": base, "x": x, "y": model(x).logits.detach(), "transformers": False, "auto": False}
    torch.save(case, folder / "case.pt")


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    top = tmp_path_factory.mktemp("cases")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=60, tie_word_embeddings=False)
    base = transformers.LlamaForCausalLM(config).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, options in NATIVE.items():
            model = trained(ipca.apply_pc(copy.deepcopy(base), progress=False, **options))
            ipca.save_adapter(model, top / name / "adapter")
            keep(top / name, base, model)
        for name, options in IN_PEFT.items():
            model = trained(get_peft_model(copy.deepcopy(base), PCConfig(task_type="CAUSAL_LM", **options)))
            model.save_pretrained(top / name / "adapter")
            keep(top / name, base, model)
    return top


@pytest.mark.parametrize("version", VERSIONS)
def test_an_earlier_version_computes_the_same(version, cases):
    done = read(version, cases)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {*NATIVE, *IN_PEFT}
    assert max(off for case in found.values() for off in case.values()) < 1e-5, found


@pytest.mark.parametrize("version", VERSIONS)
def test_a_version_without_stacks_of_experts_says_so(version, tmp_path):
    torch.manual_seed(0)
    base = mixtral().eval()
    model = trained(ipca.apply_pc(copy.deepcopy(base), rank=3, targets=[*STACKS, "q_proj"], progress=False))
    ipca.save_adapter(model, tmp_path / "case" / "adapter")
    keep(tmp_path / "case", base, model)
    done = read(version, tmp_path)
    if done.returncode:
        assert "target_parameters" in done.stderr or "size mismatch" in done.stderr
    else:
        assert (
            "Unexpected keyword arguments ['target_parameters'] for class LoraConfig, these are ignored" in done.stderr
        )
