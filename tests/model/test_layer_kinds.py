"""Convolutions, embeddings and experts in whole models: exact before training, merged, plain again, refused."""

import copy

import pytest
import torch
from torch import nn

import ipca
from ipca import Window
from ipca.model import AdapterSettings
from ipca.model.apply import adapted_layers
from ipca.model.targets import find_targets
from ipca.nn.experts import ExpertsPC, StackPC
from tests.helpers.layer_kinds import CASES, STACKS, Convs2d, Table, mixtral, output, relative
from tests.helpers.models import snapshot

FORMS = ("residual", "intact")


def adapted(name: str, form: str = "intact", **changes) -> nn.Module:
    case = CASES[name]
    options = {"rank": 3, "targets": case.targets, "form": form, "progress": False, **case.options, **changes}
    return ipca.apply_pc(case.build().eval(), **options)


def jitter(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in ipca.adapter_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_intact_form_computes_the_base_to_the_bit_and_every_factor_gets_a_gradient(name, dtype):
    case = CASES[name]
    model = case.build().to(dtype)
    x = case.x()
    x = x.to(dtype) if x.is_floating_point() else x
    with torch.no_grad():
        y = output(model, x)
    ipca.apply_pc(model, rank=3, targets=case.targets, form="intact", progress=False, **case.options)
    assert len(adapted_layers(model)) == case.count
    trained = output(model, x)
    assert torch.equal(trained, y)
    trained.float().pow(2).mean().backward()
    for parameter in ipca.adapter_parameters(model):
        assert parameter.dtype == torch.float32
        assert parameter.grad.abs().max() > 0
    assert {p.grad is None for p in model.parameters() if not p.requires_grad} == {True}


@pytest.mark.parametrize("name", CASES)
def test_residual_form_computes_the_base_up_to_rounding(name):
    case = CASES[name]
    model, x = case.build(), case.x()
    with torch.no_grad():
        y = output(model, x)
    ipca.apply_pc(model, rank=3, targets=case.targets, form="residual", progress=False, **case.options)
    assert relative(output(model, x), y) <= 1e-6
    assert all(layer.certificate.holds and layer.certificate.bound > 0 for layer in adapted_layers(model).values())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_merged_disabled_and_unloaded(name, form):
    case = CASES[name]
    base, x = case.build().eval(), case.x()
    types, keys = [type(module) for module in base.modules()], list(base.state_dict())
    model = copy.deepcopy(base)
    ipca.apply_pc(model, rank=3, targets=case.targets, form=form, progress=False, **case.options)
    jitter(model)
    with torch.no_grad():
        plain, y = output(base, x), output(model, x)
        assert relative(y, plain) > 1e-2
        with ipca.disabled(model):
            assert relative(output(model, x), plain) <= (0.0 if form == "intact" else 1e-6)
        assert relative(output(ipca.merge_adapter(model), x), y) <= 1e-6
        with ipca.disabled(model):
            assert relative(output(model, x), plain) <= (0.0 if form == "intact" else 1e-6)
        assert torch.equal(output(ipca.unmerge_adapter(model), x), y)
        back = ipca.unload(copy.deepcopy(model), merge=False)
        assert relative(output(back, x), plain) <= (0.0 if form == "intact" else 1e-6)
        merged = ipca.unload(model)
        assert relative(output(merged, x), y) <= 1e-6
    assert [type(module) for module in merged.modules()] == types
    assert list(merged.state_dict()) == keys
    assert not any(p.requires_grad for p in merged.parameters())


@pytest.mark.parametrize("name", CASES)
def test_own_state_dict_restores_the_model(name):
    model = adapted(name)
    jitter(model)
    other, x = adapted(name), CASES[name].x()
    other.load_state_dict(model.state_dict())
    assert torch.equal(output(other, x), output(model, x))


@pytest.mark.parametrize("name", ["conv2d", "embedding", "experts"])
def test_cast_of_the_residual_form_keeps_the_effective_weights(name):
    model = adapted(name, "residual")
    weights = {key: layer.effective_weight() for key, layer in adapted_layers(model).items()}
    for key, layer in adapted_layers(model.to(torch.bfloat16)).items():
        assert relative(layer.effective_weight(), weights[key]) <= torch.finfo(torch.bfloat16).eps


def test_patterns_reach_every_kind():
    layers = adapted_layers(adapted("conv2d"))
    assert layers["wide"].window == Window(4, 3)
    assert (layers["same"].alpha, layers["same"].scaling) == (7.5, 2.5)
    layers = adapted_layers(adapted("experts"))
    assert layers["model.layers.0.mlp.experts.down_proj"].window == Window(10, 3)
    assert layers["model.layers.1.mlp.experts.down_proj"].window == Window(11, 2)


def test_summary_shows_stacks_and_flattened_convolutions():
    text = str(ipca.summary(adapted("experts")))
    assert "2 × (4, 48, 32)  window [14, 17) of 32" in text
    assert "6 of 6 windows certified" in text
    assert "1 × (5, 63)" in str(ipca.summary(adapted("conv2d")))


def test_all_linear_means_linear_layers_alone():
    model = nn.ModuleDict({"convs": Convs2d(), "table": Table()})
    assert [t.name for t in find_targets(model, AdapterSettings(rank=2))] == ["table.head"]
    found = [t.name for t in find_targets(mixtral(), AdapterSettings(rank=2))]
    assert found
    assert not any("experts" in name or "embed" in name for name in found)


@pytest.mark.parametrize("form", FORMS)
def test_the_stacks_of_one_module_can_be_adapted_one_after_the_other(form):
    base, x = mixtral().eval(), CASES["experts"].x()
    together = ipca.apply_pc(copy.deepcopy(base), rank=3, targets=STACKS, form=form, progress=False)
    one_by_one = ipca.apply_pc(copy.deepcopy(base), rank=3, targets=STACKS[1], form=form, progress=False)
    ipca.apply_pc(one_by_one, rank=3, targets=STACKS[0], form=form, progress=False)
    assert list(adapted_layers(one_by_one)) == list(adapted_layers(together))
    assert torch.equal(output(one_by_one, x), output(together, x))


def test_every_implementation_of_the_experts_sees_the_effective_weights():
    model, x = adapted("experts"), CASES["experts"].x()
    jitter(model)
    y = output(model, x)
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        assert relative(output(model, x), y) <= 1e-6


def test_one_expert_without_tokens_gets_a_zero_gradient():
    model = adapted("one stack", targets="experts.down_proj")
    output(model, torch.zeros(1, 1, dtype=torch.long)).sum().backward()
    for layer in adapted_layers(model).values():
        used = layer.lora_A.grad.abs().amax(dim=(1, 2)) > 0
        assert used.sum() == 2


def test_a_target_that_matches_nothing_is_told_what_there_is():
    words = r"'expert'; linear layers .*q_proj.*, other layers that can be adapted down_proj, embed_tokens, gate"
    with pytest.raises(ValueError, match=words):
        ipca.apply_pc(mixtral(), rank=2, targets="expert", progress=False)


class Unreached(nn.Module):
    def __init__(self):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 8, 8))


class Scaled(nn.Embedding):
    def forward(self, ids):
        return 2 * super().forward(ids)


def twice(model: nn.Module) -> nn.Module:
    model.model.layers[1].mlp.experts = model.model.layers[0].mlp.experts
    return model


def tied_stack(model: nn.Module) -> nn.Module:
    model.model.layers[1].mlp.experts.down_proj = model.model.layers[0].mlp.experts.down_proj
    return model


@pytest.mark.parametrize(
    ("build", "targets", "options", "words"),
    [
        (lambda: nn.Conv2d(4, 6, 3, groups=2), "0", {}, r"0: it has groups=2, which PEFT's low-rank convolution"),
        (lambda: nn.Conv1d(4, 6, 3, dilation=2), "0", {}, r"0: it has dilation=\(2,\), which PEFT's"),
        (lambda: nn.Conv2d(4, 6, 3, padding_mode="circular"), "0", {}, "0: it has padding_mode=circular, which PEFT"),
        (lambda: nn.ConvTranspose2d(4, 6, 3), "0", {}, r"0: it is a ConvTranspose2d, not an nn\.Linear, nn\.Embedding"),
        (lambda: nn.ConvTranspose1d(4, 6, 3), "0", {}, r"0: it is a ConvTranspose1d, not an nn\.Linear, nn\.Embedding"),
        (lambda: nn.Bilinear(4, 5, 6), "0", {}, r"0: it is a Bilinear, not an nn\.Linear, nn\.Embedding"),
        (lambda: nn.Conv2d(2, 9, 1), "0", {"rank": 3}, "0: .*there are only 2"),
        (lambda: nn.Embedding(9, 6, max_norm=1.0), "0", {}, "0: its max_norm rewrites rows"),
        (lambda: nn.Embedding(9, 6, sparse=True), "0", {}, "0: its sparse or scale_grad_by_freq is about the gradient"),
        (lambda: nn.Embedding(9, 6), "0", {"dropout": 0.1}, "0: its input is indices, of which dropout can drop"),
        (lambda: Scaled(9, 6), "0", {}, r"0: it is a Scaled, not an nn\.Linear"),
        (Unreached, "0.stack", {}, r"0\.stack: the Unreached that holds it is never called"),
        (mixtral, "down_proj", {"dropout": 0.1}, "down_proj: the input of one expert's product cannot be reached"),
        (mixtral, "down_proj", {"window": "energy=0.5"}, "down_proj: window 'energy=0.5' may differ between"),
        (mixtral, "down_proj", {"rank": 25}, r"0\.model\.layers\.0\.mlp\.experts\.down_proj.*there are only 24"),
        (lambda: twice(mixtral()), "0.mlp.experts.down_proj", {}, "the same module stands in several places"),
        (lambda: tied_stack(mixtral()), "down_proj", {}, "its weight is tied to another module's"),
    ],
)
def test_what_cannot_be_adapted_is_refused_by_name(build, targets, options, words):
    model = nn.Sequential(build())
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"cannot adapt .*{words}"):
        ipca.apply_pc(model, targets=targets, progress=False, **{"rank": 2, "form": "intact", **options})
    assert snapshot(model) == before


def test_a_stack_that_is_the_models_own_parameter_is_refused():
    with pytest.raises(ValueError, match="cannot adapt stack: it is a parameter of the model itself"):
        ipca.apply_pc(Unreached(), rank=2, targets="stack", progress=False)


def test_one_expert_with_nan_is_refused_and_the_model_is_unchanged():
    model = mixtral()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 5, 7] = torch.nan
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj: the tensor holds NaN or Inf"):
        ipca.apply_pc(model, rank=2, targets=STACKS, progress=False)
    assert snapshot(model) == before


def test_an_adapted_stack_is_a_part_of_its_experts():
    model = adapted("one stack", targets="experts.down_proj")
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, ExpertsPC)
    assert list(experts.stacks()) == ["down_proj"]
    assert isinstance(experts.down_proj, StackPC)
    assert experts.base.down_proj is None
    assert experts.base.gate_up_proj.shape == (4, 48, 32)
    with pytest.raises(ValueError, match=r"experts\.down_proj: it is adapted already"):
        ipca.apply_pc(model, rank=2, targets="experts.down_proj", progress=False)


def test_the_cache_serves_experts_too(tmp_path, decomposed):
    first = mixtral()
    second = copy.deepcopy(first)
    ipca.apply_pc(first, rank=2, targets=STACKS, cache=tmp_path, progress=False)
    assert len(decomposed) == 4
    ipca.apply_pc(second, rank=2, targets=STACKS, cache=tmp_path, progress=False)
    assert len(decomposed) == 4
    x = CASES["experts"].x()
    assert torch.equal(output(first, x), output(second, x))


class Block(nn.Module):
    """A stack of weights and other layers in one module."""

    def __init__(self):
        super().__init__()
        self.gate, self.stack = nn.Linear(8, 3), nn.Parameter(torch.randn(3, 6, 8))

    def forward(self, x):
        return torch.einsum("ne,nk,eok->no", self.gate(x), x, self.stack)


def block() -> nn.Module:
    return nn.ModuleDict({"block": Block(), "other": nn.Linear(8, 8)})


BESIDE = r"cannot adapt block\.(base\.)?gate: it stands in a module that holds a stack of weights which is adapted too"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (None, {"targets": ["gate", "stack"]}),
        (None, {"targets": ["stack"], "modules_to_save": ["gate"]}),
        ("gate", {"targets": ["stack"]}),
        ("stack", {"targets": ["gate"]}),
        ("stack", {"targets": ["other"], "modules_to_save": ["gate"]}),
    ],
)
def test_what_else_is_in_the_module_of_a_stack_cannot_train(first, second):
    model = block()
    if first:
        ipca.apply_pc(model, rank=2, targets=[first], progress=False)
    before = snapshot(model)
    with pytest.raises(ValueError, match=BESIDE):
        ipca.apply_pc(model, rank=2, progress=False, **second)
    assert snapshot(model) == before


def test_what_trains_beside_a_stack_is_not_saved_under_another_path(tmp_path):
    model = ipca.apply_pc(block(), rank=2, targets=["stack"], progress=False)
    model["block"].base.gate.requires_grad_(True)
    with pytest.raises(ValueError, match=r"block\.base\.gate trains beside an adapted stack of weights"):
        ipca.save_adapter(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stack_may_not_have_the_name_of_what_holds_it():
    model = block()
    model["block"].base = model["block"].stack
    del model["block"].stack
    with pytest.raises(ValueError, match=r"block\.base: ExpertsPC has an attribute 'base' of its own"):
        ipca.apply_pc(model, rank=2, targets=["block.base"], progress=False)


def test_the_module_of_experts_itself_is_no_target():
    model = mixtral()
    words = r"layers\.0\.mlp\.experts: .* name its stacks of weights, .*experts\.gate_up_proj and .*experts\.down_proj"
    with pytest.raises(ValueError, match=words):
        ipca.apply_pc(model, rank=2, targets="mlp.experts", progress=False)
