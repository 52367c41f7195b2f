"""ExpertsPC and its stacks: what a module of experts computes, its gradients, its state, and stacks put in and out."""

import copy

import pytest
import torch
from torch import Tensor, nn

from ipca import Window
from ipca.nn.experts import ExpertsPC, StackPC
from ipca.nn.initialization import initial_factors
from ipca.nn.layer_kinds import ExpertStack
from ipca.nn.registry import get_layer, named_layers, set_layer
from tests.helpers.layer_kinds import relative

FORMS = ("residual", "intact")


class Experts(nn.Module):
    """``Σ_e tanh(x up_eᵀ + bias_e) down_e``, ``down (E, in, out)`` where ``is_transposed``."""

    def __init__(self, is_transposed: bool = False):
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn(3, 9, 7) / 3)
        self.bias = nn.Parameter(torch.randn(3, 9))
        self.down = nn.Parameter(torch.randn(3, 5, 9) / 3)

    def forward(self, x: Tensor) -> Tensor:
        up, down = (w.mT if self.is_transposed else w for w in (self.up, self.down))
        h = torch.einsum("ti,eoi->eto", x, up) + self.bias[:, None]
        return torch.einsum("eti,eoi->to", h.tanh(), down)


def experts(transposed: bool) -> Experts:
    module = Experts(transposed)
    if transposed:
        module.up, module.down = nn.Parameter(module.up.mT.contiguous()), nn.Parameter(module.down.mT.contiguous())
    return module


def adapt(model: nn.Module, name: str, form: str, rank: int = 2, **options) -> StackPC:
    layer = StackPC.from_layer(get_layer(model, name), Window("middle", rank), form=form, **options)
    set_layer(model, name, layer)
    return layer


def jitter(*layers: StackPC) -> None:
    with torch.no_grad():
        for layer in layers:
            layer.lora_A.add_(0.1 * torch.randn_like(layer.lora_A))
            layer.lora_B.add_(0.1 * torch.randn_like(layer.lora_B))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_output_and_gradients_are_those_of_the_effective_weights(form, transposed):
    model, x = nn.Sequential(experts(transposed)), torch.randn(4, 7)
    y, plain = model(x), copy.deepcopy(model[0])
    up, down = adapt(model, "0.up", form, alpha=3.5), adapt(model, "0.down", form)
    assert relative(model(x), y) <= (0.0 if form == "intact" else 1e-6)
    jitter(up, down)
    model(x).square().sum().backward()
    wide = plain.double()
    weights, factors = {}, []
    for name, layer in (("up", up), ("down", down)):
        A, B = (t.detach().double().requires_grad_() for t in (layer.lora_A, layer.lora_B))
        low = B @ A - layer.lora_B0.double() @ layer.lora_A0.double()
        if form == "residual":
            low = low + layer.lora_B0.double() @ layer.lora_A0.double()
        matrix = layer.as_matrix(layer.base_weight.detach()).double() + layer.scaling * low
        weights[name] = matrix.mT if transposed else matrix
        factors += [(layer.lora_A, A), (layer.lora_B, B)]
    y64 = torch.func.functional_call(wide, weights, (x.double(),))
    y64.square().sum().backward()
    assert relative(model(x), y64) <= 1e-6
    for found, wanted in factors:
        assert relative(found.grad, wanted.grad) <= 1e-5


def test_every_experts_window_is_its_own():
    model = nn.Sequential(experts(False))
    weight = model[0].up.detach().double()
    layer = adapt(model, "0.up", "residual", rank=3)
    assert layer.window == Window(2, 3)
    for e in range(3):
        U, S, Vh = torch.linalg.svd(weight[e], full_matrices=False)
        assert relative(layer.lora_B0[e] @ layer.lora_A0[e], U[:, 2:5] * S[2:5] @ Vh[2:5]) <= 1e-6
    assert relative(layer.pretrained_weight(), weight) <= 1e-6
    assert relative(layer.residual_weight() + layer.lora_B0 @ layer.lora_A0, weight) <= 1e-6


def test_report_is_the_worst_experts_with_the_time_of_all():
    model = nn.Sequential(experts(False))
    with torch.no_grad():
        model[0].up[1] = torch.eye(9, 7)
    report = adapt(model, "0.up", "intact").svd_report
    assert not report.certified
    assert "tie" in report.certificate


def test_a_stack_whose_windows_start_in_different_places_is_refused():
    stack = torch.stack([torch.diag(torch.tensor(d)) for d in ([9.0, 1, 1, 1, 1, 1], [3.0, 3, 3, 3, 3, 1])])
    options = {"scaling": 1.0, "form": "intact", "adapter_dtype": torch.float32, "tol": "default"}
    with pytest.raises(ValueError, match="windows of this stack of 2 weights start at 1 to 4, but a stack has one"):
        initial_factors(stack, Window("energy=0.8", 2), **options)


def test_put_in_and_out_in_any_order_keeps_the_parameters_order_and_the_bits():
    model = nn.Sequential(experts(False))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapt(model, "0.down", "intact")
    adapt(model, "0.up", "intact")
    assert isinstance(model[0], ExpertsPC)
    assert list(model[0].stacks()) == ["up", "down"]
    assert [n for n, p in model.named_parameters() if p.shape == (3, 9)] == ["0.base.bias"]
    for name in ("up", "down"):
        set_layer(model, f"0.{name}", model[0].stacks()[name].to_plain(base=True))
    assert isinstance(model[0], Experts)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_places_of_plain_and_adapted_stacks():
    model = nn.Sequential(experts(False), nn.Conv1d(2, 2, 3))
    assert [n for n, m in named_layers(model).items() if isinstance(m, ExpertStack)] == ["0.up", "0.down"]
    adapt(model, "0.up", "intact")
    assert list(named_layers(model)) == ["", "0", "0.down", "0.base", "0.up", "1"]
    assert isinstance(get_layer(model, "0.up"), StackPC)
    assert isinstance(get_layer(model, "0.down"), ExpertStack)


@pytest.mark.parametrize("form", FORMS)
def test_merged_disabled_and_compiled(form):
    model, x = nn.Sequential(experts(True)).eval(), torch.randn(4, 7)
    plain = model(x)
    layer = adapt(model, "0.up", form)
    jitter(layer)
    y = model(x)
    assert relative(y, plain) > 1e-2
    with layer.disabled():
        assert relative(model(x), plain) <= (0.0 if form == "intact" else 1e-6)
    layer.merge()
    assert relative(model(x), y) <= 1e-6
    model.train()
    with pytest.raises(RuntimeError, match="A merged StackPC cannot train"):
        model(x)
    layer.unmerge()
    assert torch.equal(model(x), y)
    assert relative(torch.compile(model, backend="eager", fullgraph=True)(x), y) <= 1e-6


def test_what_is_refused():
    model = nn.Sequential(experts(False))
    with pytest.raises(TypeError, match="expected a stack of experts' weights, got Experts"):
        StackPC.from_layer(model[0], Window("middle", 2))
    with pytest.raises(ValueError, match="cannot adapt a stack of experts' weights: the input of one expert's product"):
        adapt(model, "0.up", "intact", dropout=0.1)
    with pytest.raises(ValueError, match=r"rank 8 is above the 7 singular values of a \(9, 7\) weight"):
        adapt(model, "0.up", "intact", rank=8)
