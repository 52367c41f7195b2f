"""Checks of ``apply_pc`` and its adapter files."""

from __future__ import annotations

import copy
import re
import shutil

import torch
from torch import nn

import ipca
from ipca._hashing import tensor_sha256
from ipca.model.apply import adapted_layers
from ipca.nn.layer_kinds import to_matrix
from tests.zoo.case import RANK, Case, NotApplicableError, Way, trainable, warned
from tests.zoo.outputs import assert_close, assert_equal, difference, loss, run

TASK = r"For\w*(Classification|QuestionAnswering|MultipleChoice)"
"""Classes whose head belongs to a task: nobody has pretrained it."""
GENERATED = 4
"""New tokens."""


def apply(case: Case, way: Way) -> str:
    """Adapting works; every parameter that trains is one of ``adapter_parameters``."""
    model = case.apply(way)
    known = {id(parameter) for parameter in ipca.adapter_parameters(model)}
    assert {id(parameter) for parameter in trainable(model)} == known
    return f"{len(adapted_layers(model))} layers"


def start(case: Case, way: Way) -> None:
    """Before training the model computes what the base computes; in the intact form to the bit."""
    found = run(case.adapted(way), case.inputs)
    assert_equal(found, case.wanted) if way.form == "intact" else assert_close(found, case.wanted, case.tol)


def head(case: Case, way: Way) -> str:
    """A task's head, all that a classifier has beside its base model, trains whole and has no window."""
    if not has_head(case.plain):
        raise NotApplicableError("has no head of a task")
    model = case.apply(way)
    outside = {n: p for n, p in model.named_parameters() if not n.startswith(f"{case.plain.base_model_prefix}.")}
    adapted = [n for n in adapted_layers(model) if not n.startswith(f"{case.plain.base_model_prefix}.")]
    assert not adapted, f"{adapted[:3]} of the head got a window"
    idle = [name for name, parameter in outside.items() if not parameter.requires_grad]
    assert not idle, f"{idle[:3]} of the head do not train"
    return ", ".join(sorted({name.partition(".")[0] for name in outside}))


def has_head(model: nn.Module) -> bool:
    """Whether the model is a base model and a task's head."""
    return re.search(TASK, type(model).__name__) is not None and hasattr(model, model.base_model_prefix)


def disabled(case: Case, way: Way) -> None:
    """So it does while the adapter is disabled."""
    model = case.adapted(way)
    with ipca.disabled(model):
        found = run(model, case.inputs)
    assert_equal(found, case.wanted) if way.form == "intact" else assert_close(found, case.wanted, case.tol)


def gradients(case: Case, way: Way) -> None:
    """The factors' gradients follow from the base's: ``dA = s Bᵀ dW``, ``dB = s dW Aᵀ``; nothing else changes."""
    model, wanted = case.adapted(way), case.gradients()
    layers = adapted_layers(model)
    loss(model, case.inputs).backward()
    floor = 1e-4 * max((g.abs().max().item() for g in wanted.values() if g is not None), default=1.0)
    for name, layer in layers.items():
        dW = wanted.get(f"{name}.weight", wanted.get(name))
        if dW is None:
            found = [p.grad for p in (layer.lora_A, layer.lora_B) if p.grad is not None]
            assert not any(grad.any() for grad in found), f"{name} has a gradient, its weight in the base has none"
            continue
        assert layer.lora_A.grad is not None, f"{name} has no gradient, its weight in the base has one"
        dW, A, B = to_matrix(layer.kind, dW).double(), layer.lora_A.detach().double(), layer.lora_B.detach().double()
        for found, right in ((layer.lora_A.grad, B.mT @ dW), (layer.lora_B.grad, dW @ A.mT)):
            off = (found.double() - layer.scaling * right).abs().max().item()
            off /= max((layer.scaling * right).abs().max().item(), floor)
            assert off < 2e-3, f"the gradient of {name} differs by {off:.2g}"
    before = frozen(model)
    torch.optim.AdamW(ipca.adapter_parameters(model), lr=1e-2, weight_decay=0).step()
    changed = [name for name, value in frozen(model).items() if before[name] != value]
    assert not changed, f"frozen tensors changed: {changed[:3]}"


def frozen(model: nn.Module) -> dict[str, str]:
    """A hash of every tensor of the state dict that does not train."""
    return {
        name: tensor_sha256(value.detach())
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, torch.Tensor) and not value.requires_grad and not value.is_meta
    }


def training_mode(case: Case, way: Way) -> None:
    """In training mode gradients are finite, and the same factors have one under gradient checkpointing."""
    model = case.adapted(way).train()
    loss(model, case.inputs).backward()
    found = [p.grad for p in trainable(model)]
    assert all(grad.isfinite().all() for grad in found if grad is not None), "gradients are not finite"
    if getattr(model, "supports_gradient_checkpointing", False):
        model.zero_grad(set_to_none=True)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss(model, case.inputs).backward()
        again = [p.grad for p in trainable(model)]
        assert [g is None for g in again] == [g is None for g in found], "checkpointing loses gradients"


def generate(case: Case, way: Way) -> None:
    """A disabled adapter generates what the base generates; an active one generates."""
    if not callable(getattr(case.plain, "can_generate", None)) or not case.plain.can_generate():
        raise NotApplicableError("generates nothing")
    inputs = {name: value for name, value in case.inputs.items() if not name.startswith("decoder_")}

    def generated(model: nn.Module) -> torch.Tensor:
        torch.manual_seed(0)
        model.config.use_cache = True
        return model.generate(**copy.deepcopy(inputs), max_new_tokens=GENERATED, do_sample=False)

    try:
        wanted = generated(copy.deepcopy(case.plain))
    except Exception as error:
        raise NotApplicableError(f"the base does not generate from these inputs: {type(error).__name__}") from error
    model, _ = case.trained(way)
    generated(model)
    with ipca.disabled(model):
        assert torch.equal(generated(model), wanted) or way.form == "residual", "other tokens"


def save(case: Case, way: Way) -> None:
    """A trained adapter is written."""
    case.save(way)


def load(case: Case, way: Way) -> None:
    """Loaded onto a new base it computes the same bits."""
    model = ipca.load_adapter(case.fresh(), case.save(way))
    assert_equal(run(model.eval(), case.inputs), case.train(way)[1])


def load_other_form(case: Case, way: Way) -> None:
    """Loaded in the other form it computes the same."""
    model = ipca.load_adapter(case.fresh(), case.save(way), form="residual" if way.form == "intact" else "intact")
    assert_close(run(model.eval(), case.inputs), case.train(way)[1], case.tol)


def export_residual(case: Case, way: Way) -> None:
    """The pair of a residual base and an adapter is written."""
    ipca.export(case.trained(way)[0], case.folder / "exported", format="residual")
    shutil.rmtree(case.folder / "exported")


def export_serve(case: Case, way: Way) -> None:
    """The LoRA for servers is written; stock PEFT loads it."""
    model, _ = case.trained(way)
    case.leave(way, f"{way.selection}.serve", lambda folder: ipca.export(model, folder, format="serve"))


def statistics(case: Case, way: Way) -> str:
    """Buffers that move in training mode, such as BatchNorm's statistics, are saved, or saving warns of them."""
    model, _ = case.trained(way)
    before = [buffer.clone() for buffer in model.buffers()]
    run(model.train(), case.inputs)
    model.eval()
    if all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True)):
        raise NotApplicableError("no buffer moves")
    folder = case.folder / "statistics"
    told = warned(lambda: ipca.save_adapter(model, folder))
    off = difference(run(ipca.load_adapter(case.fresh(), folder).eval(), case.inputs), run(model, case.inputs))
    assert off == 0 or told, f"differs by {off:.2g}, and nothing was told"
    return " ".join(told)


def save_pretrained(case: Case, way: Way) -> str:
    """What transformers' ``save_pretrained`` writes loads as what was trained, or it names ``save_adapter``."""
    model, wanted = case.trained(way)
    folder = case.folder / "saved"
    if not hasattr(model, "save_pretrained"):
        raise NotApplicableError("has no save_pretrained")
    try:
        model.save_pretrained(folder)
    except Exception as error:
        if "save_adapter" in str(error):
            return "refused, naming save_adapter"
        raise
    again = type(case.plain).from_pretrained(folder).eval()
    shutil.rmtree(folder)
    assert_close(run(again, case.inputs), wanted, case.tol)
    return "loads"


def merge(case: Case, way: Way) -> None:
    """Merged it computes the same; unmerged the same bits as before."""
    model, wanted = case.trained(way)
    ipca.merge_adapter(model)
    assert_close(run(model, case.inputs), wanted, case.tol)
    ipca.unmerge_adapter(model)
    assert_equal(run(model, case.inputs), wanted)


def unload(case: Case, way: Way) -> None:
    """Unloaded it is a plain model again, with the base's modules, that computes the same."""
    model, wanted = case.trained(way)
    model = ipca.unload(model)
    assert_close(run(model, case.inputs), wanted, case.tol)
    types = [{name: type(module).__name__ for name, module in m.named_modules()} for m in (model, case.plain)]
    assert types[0] == types[1], "modules of other types"
    assert set(model.state_dict()) == set(case.plain.state_dict()), "other names in the state dict"


def unload_save(case: Case, way: Way) -> None:
    """What ``save_pretrained`` writes of the unloaded model loads as what was trained."""
    if not hasattr(case.plain, "save_pretrained"):
        raise NotApplicableError("has no save_pretrained")
    model, _ = case.trained(way)
    model, folder = ipca.unload(model), case.folder / "unloaded"
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder).eval()
    found, wanted = run(again, case.inputs), run(model, case.inputs)
    shutil.rmtree(folder)
    if difference(found, wanted) > case.tol:
        case.plain.save_pretrained(folder)
        plain = run(type(model).from_pretrained(folder).eval(), case.inputs)
        shutil.rmtree(folder)
        assert difference(plain, case.wanted) > case.tol, f"differs by {difference(found, wanted):.2g}"
        raise NotApplicableError("the base does not survive its own save_pretrained")


def bfloat16(case: Case, way: Way) -> None:
    """In bfloat16 the model starts as the base to the bit, and loads with the same bits."""
    case.apply(way)
    plain = case.fresh().to(torch.bfloat16).requires_grad_(False)
    inputs = {name: to_bfloat16(name, value) for name, value in case.inputs.items()}
    try:
        wanted = run(plain, inputs)
    except RuntimeError as error:
        raise NotApplicableError("the base does not run in bfloat16") from error
    model = ipca.apply_pc(copy.deepcopy(plain), rank=RANK, progress=False, **case.selected(way))
    assert_equal(run(model, inputs), wanted)
    ipca.save_adapter(model, case.folder / "bfloat16")
    assert_equal(run(ipca.load_adapter(plain, case.folder / "bfloat16"), inputs), run(model, inputs))


def to_bfloat16(name: str, value: object) -> object:
    """Inputs as a model in bfloat16 takes them; masks and time steps stay."""
    floats = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(torch.bfloat16) if floats and name not in ("timestep", "attention_mask") else value
