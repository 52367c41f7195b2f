"""Adapters of convolutions, embeddings and experts: stock PEFT computes the same, and they resume without an SVD."""

import copy
import json
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

import ipca
import ipca.nn.initialization
import ipca.svd.cache
from tests.helpers.layer_kinds import CASES, STACKS, Convs2d, mixtral, output, relative
from tests.helpers.models import snapshot

FORMS = ("residual", "intact")


def trained(name: str, base: nn.Module, form: str = "intact") -> nn.Module:
    case = CASES[name]
    model = copy.deepcopy(base)
    ipca.apply_pc(model, rank=3, targets=case.targets, form=form, progress=False, **case.options)
    with torch.no_grad():
        for parameter in ipca.adapter_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def no_svd(monkeypatch) -> None:
    for module in (ipca.nn.initialization, ipca.svd.cache):
        monkeypatch.setattr(module, "window_svd", lambda *a, **k: pytest.fail("an SVD ran"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_stock_peft_computes_the_same_and_merges_to_the_same(name, form, tmp_path):
    base, x = CASES[name].build().eval(), CASES[name].x()
    model = trained(name, base, form)
    with torch.no_grad():
        y = output(model, x)
        assert relative(y, output(base, x)) > 1e-2
        ipca.save_adapter(model, tmp_path)
        for lean in (False, True):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=lean).eval()
            assert [str(w.message) for w in caught if "missing" in str(w.message)] == []
            assert relative(output(stock, x), y) <= 1e-5
        assert relative(output(stock.merge_and_unload(), x), y) <= 1e-5
        if hasattr(base, "load_adapter"):
            base.load_adapter(str(tmp_path))
            assert relative(output(base, x), y) <= 1e-5


@pytest.mark.parametrize("name", CASES)
def test_residual_export_is_right_on_its_own_base(name, tmp_path):
    base, x = CASES[name].build().eval(), CASES[name].x()
    model = trained(name, base)
    ipca.export(model, tmp_path / "out", format="residual")
    if hasattr(base, "from_pretrained"):
        residual = type(base).from_pretrained(tmp_path / "out" / "base")
    else:
        residual = copy.deepcopy(base)
        residual.load_state_dict(load_file(tmp_path / "out" / "base" / "model.safetensors"))
    with torch.no_grad():
        y = output(model, x)
        assert relative(output(residual.eval(), x), output(base, x)) > 1e-2
        stock = PeftModel.from_pretrained(residual, tmp_path / "out" / "adapter").eval()
        assert relative(output(stock, x), y) <= 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_round_trip_and_resuming_are_exact_and_need_no_svd(name, form, tmp_path, monkeypatch):
    base, x = CASES[name].build().eval(), CASES[name].x()
    model = trained(name, base, form)
    ipca.save_adapter(model, tmp_path)
    no_svd(monkeypatch)
    loaded = ipca.load_adapter(copy.deepcopy(base), tmp_path)
    assert torch.equal(output(loaded, x), output(model, x))
    with torch.no_grad():
        for parameter in ipca.adapter_parameters(loaded):
            parameter.zero_()
    assert torch.equal(output(ipca.load_adapter(loaded, tmp_path), x), output(model, x))
    other = "residual" if form == "intact" else "intact"
    assert relative(output(ipca.load_adapter(base, tmp_path, form=other), x), output(model, x)) <= 1e-5


def shapes(model: nn.Module, folder) -> dict[str, tuple[int, ...]]:
    ipca.save_adapter(model, folder)
    return {k.removeprefix("base_model.model."): tuple(v.shape) for k, v in load_file(folder / WEIGHTS).items()}


WEIGHTS = "adapter_model.safetensors"


def test_factors_of_a_convolution_are_kernels(tmp_path):
    assert shapes(trained("conv2d", Convs2d()), tmp_path) == {
        "wide.lora_A.weight": (6, 3, 3, 2),
        "wide.lora_B.weight": (7, 6, 1, 1),
        "same.lora_A.weight": (6, 7, 3, 3),
        "same.lora_B.weight": (5, 6, 1, 1),
        "point.lora_A.weight": (6, 5, 1, 1),
        "point.lora_B.weight": (6, 6, 1, 1),
    }


def test_factors_of_an_embedding_have_names_of_their_own(tmp_path):
    found = shapes(trained("embedding", CASES["embedding"].build()), tmp_path)
    assert (found["table.lora_embedding_A"], found["table.lora_embedding_B"]) == ((6, 19), (8, 6))


def test_experts_are_target_parameters_the_first_one_innermost(tmp_path):
    found = shapes(trained("experts", mixtral()), tmp_path)
    first, second = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"
    assert found[f"{first}.base_layer.lora_A.weight"] == (24, 32)  # gate_up_proj (4, 48, 32)
    assert found[f"{first}.base_layer.lora_B.weight"] == (48, 24)
    assert found[f"{first}.lora_A.weight"] == (24, 24)  # down_proj (4, 32, 24)
    assert found[f"{second}.lora_A.weight"] == (16, 24)  # of rank 2
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] == [f"{f}.{s}" for f in (first, second) for s in ("gate_up_proj", "down_proj")]
    assert config["target_modules"] == ["q_proj"]


def test_another_base_is_known_by_one_expert(tmp_path):
    base = mixtral()
    ipca.save_adapter(trained("experts", base), tmp_path)
    with torch.no_grad():
        base.model.layers[0].mlp.experts.down_proj[3, 5, 7] += 1e-3
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"0\.mlp\.experts\.down_proj: this is not the base weight"):
        ipca.load_adapter(base, tmp_path)
    assert snapshot(base) == before


class Twin(nn.Module):
    """``experts`` at the root is also the end of ``block.experts``."""

    def __init__(self):
        super().__init__()
        self.experts = copy.deepcopy(mixtral().model.layers[0].mlp.experts)
        self.block = nn.ModuleDict({"experts": copy.deepcopy(self.experts)})


def test_a_stack_that_peft_would_take_another_for_is_refused(tmp_path):
    model = ipca.apply_pc(Twin(), rank=2, targets=r"experts\.down_proj", progress=False)
    with pytest.raises(
        ValueError, match=r"PEFT would take the weights of block\.experts for those of experts\.down_pr"
    ):
        ipca.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_experts_beside_a_conv1d_are_refused(tmp_path):
    from transformers.pytorch_utils import Conv1D

    conv1d = Conv1D(8, 8)
    model = nn.ModuleDict({"dense": conv1d, "moe": mixtral().model.layers[0].mlp})
    ipca.apply_pc(model, rank=2, targets=["dense", STACKS[1].removeprefix("mlp.")], progress=False)
    with pytest.raises(ValueError, match=r"PEFT cannot have moe\.experts\.down_proj in one adapter with a Conv1D"):
        ipca.save_adapter(model, tmp_path / "adapter")
