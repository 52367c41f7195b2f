"""Adapters of PEFT and of apply_pc on one model: refused in both orders, since each library saves only its own."""

import copy
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

import ipca
from ipca.nn import LinearPC
from ipca.peft import PCConfig, prepare
from tests.helpers.models import snapshot
from tests.helpers.peft_cases import off, output, train
from tests.helpers.peft_models import Small, ids, llama

LORA = LoraConfig(r=2, target_modules=["q_proj"])
CONFIGS = {
    "LoRA": LORA,
    "window": PCConfig(r=2, target_modules=["q_proj"]),
    "LoHa": peft.LoHaConfig(r=2, target_modules=["q_proj"]),
    "IA3": peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}
CALLS = {
    **{
        name: lambda model, config=config: get_peft_model(model, copy.deepcopy(config))
        for name, config in CONFIGS.items()
    },
    "mixed": lambda model: get_peft_model(model, LORA, mixed=True),
    "injected": lambda model: inject_adapter_in_model(LORA, model),
    "transformers": lambda model: model.add_adapter(LORA),
    "prepared": lambda model: prepare(model, PCConfig(r=2, target_modules=["q_proj"])),
}
ADAPTED = (
    r"o_proj: it is adapted by ipca, and PEFT's save_pretrained would leave that out; call ipca\.unload\(model\) first"
)


def trained(model, x):
    ipca.apply_pc(model, rank=2, targets=["o_proj"], progress=False)
    train(model, x)
    return model


@pytest.mark.parametrize("call", CALLS)
def test_peft_adds_nothing_to_an_adapted_model(call):
    model = trained(llama(), ids())
    before = snapshot(model)
    with pytest.raises(ValueError, match=ADAPTED):
        CALLS[call](model)
    assert snapshot(model) == before
    assert not hasattr(model, "peft_config")
    ipca.unload(model)
    CALLS[call](model)


def test_a_saved_adapter_of_peft_is_not_loaded_onto_an_adapted_model(tmp_path):
    get_peft_model(llama(), LORA).save_pretrained(tmp_path)
    model = trained(llama(), ids())
    before = snapshot(model)
    for load in (
        lambda: PeftModel.from_pretrained(model, tmp_path),
        lambda: model.load_adapter(str(tmp_path)),
    ):
        with pytest.raises(ValueError, match=ADAPTED):
            load()
    assert snapshot(model) == before


@pytest.mark.parametrize("config", [LORA, CONFIGS["window"]], ids=["LoRA", "window"])
def test_an_unloaded_model_is_a_base_for_peft(config, tmp_path):
    x = ids()
    base = ipca.unload(trained(llama().eval(), x))
    plain = copy.deepcopy(base)
    model = get_peft_model(base, copy.deepcopy(config)).eval()
    train(model, x)
    model.save_pretrained(tmp_path)
    assert off(output(PeftModel.from_pretrained(plain, tmp_path).eval(), x), output(model, x)) < 1e-6


class Own(nn.Module):
    """A model with an adapted layer in its own code."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(20, 12), LinearPC.from_linear(nn.Linear(12, 20), rank=2)

    def forward(self, x):
        return self.second(self.first(x).relu())


def test_a_layer_of_the_models_own_code_is_refused_while_it_trains(tmp_path):
    model, config = Own().eval(), LoraConfig(r=2, target_modules=["first"], init_lora_weights=False)
    with pytest.raises(
        ValueError, match="second: it is adapted by ipca, and PEFT's save_pretrained would leave that out"
    ):
        get_peft_model(model, config)
    base, x = copy.deepcopy(model.requires_grad_(False)), torch.randn(3, 20)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(x), adapted(x))


IN_PEFT = r"it belongs to a PEFT adapter; merge and unload that first, or adapt inside PEFT with ipca\.peft\.PCConfig"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_of_peft_is_not_adapted(name, tmp_path):
    ipca.save_adapter(trained(llama(), ids()), tmp_path / "adapter")
    base = llama()
    model = get_peft_model(base, copy.deepcopy(CONFIGS[name]))
    before = snapshot(model)
    changes = [
        lambda: ipca.apply_pc(model, rank=2, targets=["o_proj"], progress=False),
        lambda: ipca.apply_pc(model, rank=2, targets=["down_proj"], modules_to_save=["norm"], progress=False),
        lambda: ipca.load_adapter(base, tmp_path / "adapter", check_base=False),
    ]
    for change in changes[: 2 if name == "prompt" else 3]:  # of which nothing is in the base
        with pytest.raises(ValueError, match=IN_PEFT):
            change()
    assert snapshot(model) == before
    if name != "prompt":
        ipca.apply_pc(model.merge_and_unload(), rank=2, targets=["o_proj"], progress=False)


def test_an_imported_adapter_is_not_put_beside_one_of_peft(tmp_path):
    base = Small()
    stock = get_peft_model(copy.deepcopy(base), PCConfig(r=2, target_modules=["a"]))
    train(stock, ids())
    stock.save_pretrained(tmp_path)
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["b"]), base)
    before = snapshot(model)
    with pytest.raises(ValueError, match=IN_PEFT):
        ipca.import_peft(model, tmp_path, progress=False)
    assert snapshot(model) == before


WITHOUT = """
import sys, ipca, peft, torch
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
ipca.apply_pc(model, rank=2, targets=["0"], progress=False)
try:
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["1"]))
except ValueError as error:
    assert "ipca.peft" not in sys.modules
    print(error)
"""


@pytest.mark.slow
def test_a_process_without_ipcas_part_for_peft_refuses_as_well():
    run = subprocess.run([sys.executable, "-c", WITHOUT], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("0: it is adapted by ipca, and PEFT's save_pretrained would leave that out")
