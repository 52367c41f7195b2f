"""Checks of PEFT's models with a PCConfig, and for comparison of stock LoRA."""

from __future__ import annotations

import copy
import shutil

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

import ipca
from ipca.model.apply import adapted_layers
from ipca.peft import PCConfig
from tests.zoo.case import RANK, Case, NotApplicableError, Way, once, trainable, warned
from tests.zoo.checks.native import has_head
from tests.zoo.outputs import assert_close, assert_equal, loss, run


def lora_layers(model: nn.Module) -> set[str]:
    """The paths of the layers that PEFT adapted."""
    found = (name for name, module in model.named_modules() if isinstance(module, LoraLayer))
    return {name.removeprefix("base_model.model.") for name in found}


@once
def stock_lora(case: Case, way: Way) -> PeftModel:
    """A model with stock LoRA, not to be changed."""
    config = LoraConfig(r=RANK, init_lora_weights=False, **case.selected(way))
    return get_peft_model(case.fresh(), config).eval()


def lora_apply(case: Case, way: Way) -> str:
    """Stock LoRA adapts the model, and it computes and trains."""
    model = copy.deepcopy(stock_lora(case, way))
    loss(model, case.inputs).backward()
    return f"{len(lora_layers(model))} layers"


def lora_load(case: Case, way: Way) -> None:
    """Stock LoRA's folder loads as what was saved."""
    model, folder = copy.deepcopy(stock_lora(case, way)), case.folder / "lora"
    wanted = run(model, case.inputs)
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(case.fresh(), folder).eval()
    shutil.rmtree(folder)
    assert_close(run(again, case.inputs), wanted, case.tol)


def lora_merge(case: Case, way: Way) -> None:
    """Stock LoRA merges."""
    model = copy.deepcopy(stock_lora(case, way))
    wanted = run(model, case.inputs)
    assert_close(run(model.merge_and_unload(), case.inputs), wanted, case.tol)


def apply(case: Case, way: Way) -> str:
    """PEFT adapts the model: every layer that ``apply_pc`` and stock LoRA adapt."""
    found = lora_layers(case.apply(way))
    both = lora_layers(stock_lora(case, way)) & set(adapted_layers(case.apply(Way(way.selection, "intact"))))
    assert both <= found, f"leaves out {sorted(both - found)[:3]}, which apply_pc and stock LoRA adapt"
    return f"{len(found)} layers"


def head(case: Case, way: Way) -> None:
    """A task's head trains whole, as one of ``modules_to_save``, and has no window."""
    if way.selection != "linear" or not has_head(case.plain):
        raise NotApplicableError("has no head of a task")
    model, prefix = case.apply(way), f"base_model.model.{case.plain.base_model_prefix}."
    outside = {name: p for name, p in model.named_parameters() if not name.startswith(prefix)}
    windows = [name for name in outside if ".lora_" in name]
    assert not windows, f"{windows[:3]} of the head got a window"
    idle = [n for n, p in outside.items() if not p.requires_grad and "original_module" not in n]
    assert not idle, f"{idle[:3]} of the head do not train"


def start(case: Case, way: Way) -> None:
    """Before training, and while the adapter is disabled, the model computes the base's bits."""
    model = case.adapted(way)
    assert_equal(run(model, case.inputs), case.wanted)
    with model.disable_adapter():
        assert_equal(run(model, case.inputs), case.wanted)


def gradients(case: Case, way: Way) -> None:
    """Gradients are finite; a factor has none only where stock LoRA's has none, or the weight in the base.

    Stock LoRA that trains everywhere computes another function, whose routers may choose other experts.
    """
    model, stock = case.adapted(way), copy.deepcopy(stock_lora(case, way))
    for adapted in (model, stock):
        loss(adapted, case.inputs).backward()
    assert all(p.grad.isfinite().all() for p in trainable(model) if p.grad is not None), "gradients are not finite"
    idle = [{n for n, p in m.named_parameters() if p.requires_grad and p.grad is None} for m in (model, stock)]
    unused = {name.removesuffix(".weight") for name, grad in case.gradients().items() if grad is None}
    wrong = {n for n in idle[0] - idle[1] if n.removeprefix("base_model.model.").partition(".lora_")[0] not in unused}
    assert not wrong, f"no gradient of {sorted(wrong)[:3]}, which stock LoRA trains"


def save(case: Case, way: Way) -> None:
    """A trained adapter is written."""
    case.save(way)


def load(case: Case, way: Way) -> None:
    """Loaded with its PCConfig it computes the same bits."""
    folder = case.save(way)
    config = PCConfig.from_pretrained(folder)
    model = PeftModel.from_pretrained(case.fresh(), folder, config=config, is_trainable=True).eval()
    assert_equal(run(model, case.inputs), case.train(way)[1])


def load_natively(case: Case, way: Way) -> None:
    """``ipca.load_adapter`` computes the same from the folder."""
    model = ipca.load_adapter(case.fresh(), case.save(way)).eval()
    assert_close(run(model, case.inputs), case.train(way)[1], case.tol, case.told[".".join(way)])


def load_native_folder(case: Case, way: Way) -> None:
    """A folder of ``ipca.save_adapter`` loads with its PCConfig and computes the same."""
    native = Way(way.selection, "intact")
    folder = case.save(native)
    model = PeftModel.from_pretrained(case.fresh(), folder, config=PCConfig.from_pretrained(folder)).eval()
    assert_close(run(model, case.inputs), case.train(native)[1], case.tol, case.told[".".join(native)])


def merge(case: Case, way: Way) -> None:
    """``merge_and_unload`` gives a plain model that computes the same."""
    model, wanted = case.trained(way)
    merged: list[nn.Module] = []
    told = warned(lambda: merged.append(model.merge_and_unload()))
    assert_close(run(merged[0], case.inputs), wanted, case.tol, told)
