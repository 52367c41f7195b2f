"""Merging and unloading: weights that would overflow, inference mode, layers at several paths."""

import copy

import pytest
import torch
from torch import nn

import ipca
from tests.helpers.layer_kinds import CASES, output
from tests.helpers.models import Plain, snapshot
from tests.helpers.quantized_layers import quantized_model

FORMS = ("residual", "intact")
INTO_WEIGHTS = {"merge": ipca.merge_adapter, "unload": ipca.unload}


def adapted(model, factor=1.0, **options):
    """``model`` with adapted layers whose last one is ``factor`` times as large."""
    ipca.apply_pc(model, **{"rank": 3, "progress": False, **options})
    with torch.no_grad():
        *_, last = (layer for layer in model.modules() if isinstance(layer, ipca.nn.WindowLayer))
        last.lora_B.mul_(factor)
    return model


@pytest.mark.parametrize("into", INTO_WEIGHTS)
@pytest.mark.parametrize("form", FORMS)
def test_a_merged_weight_beyond_its_dtype_is_refused_before_any_layer_is(form, into):
    model = adapted(Plain().half(), 1e6, form=form)
    before = snapshot(model)
    words = r"^head: the merged weight would hold Inf: .* 6\.55e\+04, .* torch\.float16; cast the model to a wider"
    with pytest.raises(ValueError, match=words):
        INTO_WEIGHTS[into](model)
    assert snapshot(model) == before
    assert not any(layer.merged for layer in (model.a, model.b, model.head))
    wide = INTO_WEIGHTS[into](model.float())
    assert wide.head.weight.isfinite().all()
    assert wide.head.weight.abs().max() > 65504


@pytest.mark.parametrize("name", ["conv2d", "embedding", "experts"])
def test_every_kind_of_layer_is_checked(name):
    case = CASES[name]
    model = adapted(case.build().half(), 1e8, targets=case.targets)
    before = snapshot(model)
    for into in INTO_WEIGHTS.values():
        with pytest.raises(ValueError, match=r": the merged weight would hold Inf"):
            into(model)
    assert snapshot(model) == before
    ipca.unload(model, merge=False)


@pytest.mark.parametrize("into", INTO_WEIGHTS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_factors_that_are_not_finite_are_refused(value, into):
    model = adapted(Plain())
    model.b.merge()
    with torch.no_grad():
        model.head.lora_A[1, 2] = value
    with pytest.raises(ValueError, match=r"^head: its factors hold NaN or Inf, which merging would put into"):
        INTO_WEIGHTS[into](model)
    assert [layer.merged for layer in (model.a, model.b, model.head)] == [False, True, False]


@pytest.mark.parametrize("form", FORMS)
def test_large_factors_whose_merged_weight_fits_are_merged(form):
    model = adapted(nn.Sequential(nn.Linear(20, 12, dtype=torch.float16)), form=form).eval()
    layer = model[0]
    with torch.no_grad():  # A row of B meets a column of A only where the product is 0.
        layer.lora_A.zero_()[0, 0] = layer.lora_B.zero_()[0, 1] = 6e4
    x = torch.zeros(1, 20, dtype=torch.float16)
    y = ipca.merge_adapter(model)(x)
    assert y.isfinite().all()
    assert torch.equal(ipca.unload(model)(x), y)


PLAIN_KINDS = ["linear", "conv2d", "embedding", "experts"]


@pytest.mark.parametrize(
    ("case", "form"), [*((case, form) for case in PLAIN_KINDS for form in FORMS), ("quantized", "intact")]
)
def test_what_is_merged_in_inference_mode_takes_part_in_training(case, form):
    if case == "quantized":
        model, targets, x = quantized_model("torchao-int8")[0], ["a", "b"], torch.randn(3, 20)
    elif case == "linear":
        model, targets, x = Plain(), ["a", "b"], torch.randn(3, 20)
    else:
        model, targets, x = CASES[case].build(), CASES[case].targets, CASES[case].x()
    model = adapted(model, 2, targets=targets, form=form).eval()
    expected = output(copy.deepcopy(model), x)
    scale = nn.Parameter(torch.ones(()))
    with torch.inference_mode():
        ipca.merge_adapter(model)
    (scale * output(model, x)).sum().backward()
    with torch.inference_mode():
        ipca.unload(model)
    for parameter in model.parameters():
        assert not parameter.is_inference()
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    torch.testing.assert_close(output(model, x), expected, rtol=1e-4, atol=1e-4)
    output(model, x).sum().backward()


def test_large_weights_are_merged_in_inference_mode_by_several_threads():
    model = nn.Sequential(ipca.nn.LinearPC(1024, 1024, 4))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            weight = model[0].effective_weight()
            ipca.merge_adapter(model)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(weight, model[0].weight)


class Twice(nn.Module):
    """One layer under two names of its own, and once more in a list."""

    def __init__(self):
        super().__init__()
        self.a = self.b = nn.Linear(20, 20)
        self.all = nn.ModuleList([self.a])
        self.block = nn.Sequential(nn.Linear(20, 5))
        self.again = self.block

    def forward(self, x):
        return self.again(self.b(x) + self.all[0](self.a(x)))


@pytest.mark.parametrize("merge", [True, False])
def test_a_layer_at_several_paths_is_unloaded_at_each(merge):
    model, x = Twice(), torch.randn(3, 20)
    layer = ipca.nn.LinearPC.from_linear(model.a, rank=3)
    model.a = model.b = model.all[0] = layer
    model.block[0] = ipca.nn.LinearPC.from_linear(model.block[0], rank=3)
    with torch.no_grad():
        layer.lora_B.mul_(2)
        expected = model(x)
        if not merge:
            with ipca.disabled(model):
                expected = model(x)
    ipca.unload(model, merge=merge)
    assert type(model.a) is nn.Linear
    assert model.a is model.b is model.all[0]
    assert model.block is model.again
    assert type(model.block[0]) is nn.Linear
    torch.testing.assert_close(model(x), expected)


def test_a_module_of_experts_at_several_paths_is_unloaded_at_each():
    case = CASES["experts"]
    model, x = case.build().eval(), case.x()
    adapted(model, 2, targets=case.targets)
    path, experts = next((n, m) for n, m in model.named_modules() if isinstance(m, ipca.nn.ExpertsPC))
    model.alias = nn.ModuleList([experts])
    expected = output(model, x)
    ipca.unload(model)
    assert model.get_submodule(path) is model.alias[0] is experts.base
    assert not any(isinstance(m, ipca.nn.ExpertsPC | ipca.nn.WindowLayer) for m in model.modules())
    torch.testing.assert_close(output(model, x), expected)
