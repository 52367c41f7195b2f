"""Groups hold every trainable parameter once; matched rates make windows move their weight alike."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import ipca
from ipca.lab import baselines
from ipca.model import AdapterSettings
from ipca.peft import PCConfig
from tests.helpers.layer_kinds import mixtral
from tests.helpers.models import Plain
from tests.helpers.peft_cases import wrap
from tests.helpers.peft_models import Convs2d, Small, Table

OUT, IN, RANK = 33, 48, 3
S = torch.logspace(4, -4, OUT, base=2.0, dtype=torch.float64)  # 16 … 1 / 16


class One(nn.Module):
    """A layer with the spectrum S, and a head."""

    def __init__(self):
        super().__init__()
        U, V = (torch.linalg.qr(torch.randn(n, OUT, dtype=torch.float64)).Q for n in (OUT, IN))
        self.layer, self.head = nn.Linear(IN, OUT).double(), nn.Linear(OUT, 5).double()
        with torch.no_grad():
            self.layer.weight.copy_(U @ S.diag() @ V.mT)

    def forward(self, x):
        return self.head(self.layer(x))


def adapted(model, **options):
    options = {"rank": RANK, "targets": ["layer"], "modules_to_save": ["head"], **options}
    return ipca.apply_pc(copy.deepcopy(model), progress=False, **options)


def rates(groups):
    return {group["name"]: group["lr"] for group in groups}


def ids_of(groups):
    return sorted(id(p) for group in groups for p in group["params"])


def trainable(model):
    return sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("match", [None, "sqrt-sigma"])
def test_every_trainable_parameter_is_in_one_group(match):
    model = ipca.apply_pc(Plain(), rank=3, targets=["a", "b"], modules_to_save=["head"], progress=False)
    groups = ipca.param_groups(model, 1e-3, match=match)
    assert ids_of(groups) == trainable(model)
    names = ["lora_A", "lora_B"] if match is None else ["a.lora_A", "a.lora_B", "b.lora_A", "b.lora_B"]
    assert [group["name"] for group in groups] == [*names, "modules_to_save"]
    assert {id(p) for p in groups[-1]["params"]} == {id(p) for p in model.head.parameters()}
    torch.optim.SGD(groups)


@pytest.mark.parametrize("size", [1e-30, 1e-25, 1e20])
def test_matched_rates_do_not_depend_on_the_size_of_the_weight(size):
    found = []
    for each in (1.0, size):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(IN, OUT))
        with torch.no_grad():
            model[0].weight.copy_(torch.randn(OUT, IN) * each)
        found.append(
            rates(ipca.param_groups(ipca.apply_pc(model, rank=RANK, progress=False), 1e-3, match="sqrt-sigma"))
        )
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_a_frozen_factor_is_in_no_group(frozen):
    model = adapted(One())
    getattr(model.layer, frozen).requires_grad_(False)
    groups = ipca.param_groups(model, 1e-3, match="sqrt-sigma")
    assert ids_of(groups) == trainable(model)
    assert {group["name"] for group in groups} == {"layer.lora_A", "layer.lora_B", "modules_to_save"} - {
        f"layer.{frozen}"
    }


def test_without_match_all_train_at_lr():
    assert rates(ipca.param_groups(adapted(One()), 2e-3)) == {"lora_A": 2e-3, "lora_B": 2e-3, "modules_to_save": 2e-3}


def test_lora_plus_scales_the_rate_of_B_alone():
    found = rates(ipca.param_groups(adapted(One()), 2e-3, lora_plus=8.0))
    assert found == {"lora_A": 2e-3, "lora_B": 16e-3, "modules_to_save": 2e-3}
    matched = rates(ipca.param_groups(adapted(One()), 2e-3, match="sqrt-sigma", lora_plus=8.0))
    assert matched["layer.lora_B"] == 8 * matched["layer.lora_A"]


@pytest.mark.parametrize("form", ["residual", "intact"])
@pytest.mark.parametrize("alpha", [None, 7.5])
@pytest.mark.parametrize("window", ["principal", "middle", "minor"])
def test_matched_rates_are_those_of_the_formula(window, alpha, form):
    model = adapted(One(), window=window, alpha=alpha, form=form)
    start = model.layer.window.index
    expected = 2e-3 * math.sqrt(S.square().mean().sqrt() / S[start : start + RANK].mean())
    found = rates(ipca.param_groups(model, 2e-3, match="sqrt-sigma"))
    assert found == {
        "layer.lora_A": pytest.approx(expected, rel=1e-9),
        "layer.lora_B": pytest.approx(expected, rel=1e-9),
        "modules_to_save": 2e-3,
    }


def test_a_rate_that_is_raised_more_than_twofold_is_warned_of():
    factor = math.sqrt(S.square().mean().sqrt() / S[-RANK:].mean())
    assert factor > 2
    words = rf"raises the rate of 1 of 1 layers more than 2-fold \(layer × {factor:.1f}\): these windows move further"
    with pytest.warns(UserWarning, match=words):
        ipca.param_groups(adapted(One(), window="minor"), 1e-3, match="sqrt-sigma")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ipca.param_groups(adapted(One(), window="minor"), 1e-3)
        ipca.param_groups(adapted(One(), window="principal"), 1e-3, match="sqrt-sigma")


def test_matched_rates_do_not_change_with_training():
    model = adapted(One())
    before = rates(ipca.param_groups(model, 1e-3, match="sqrt-sigma"))
    with torch.no_grad():
        model.layer.lora_A.mul_(5.0)
    assert rates(ipca.param_groups(model, 1e-3, match="sqrt-sigma")) == before


def first_step(base, window, match):
    """``‖ΔW‖_F`` of one step of Adam."""
    model = adapted(base, window=window)
    optimizer = torch.optim.Adam(ipca.param_groups(model, 1e-4, match=match))
    model(torch.randn(64, IN, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    return (model.layer.effective_weight() - base.layer.weight).norm().item()


def test_matched_windows_move_their_weight_alike():
    """The formula leaves out the inner product of its two terms: at a cosine of ±1/2 a factor of √1.5 or √0.5.

    Unmatched, the ends of the spectrum differ by √(σ_w of the first / of the last), here more than 13, times as much.
    """
    base = One()
    moved = {match: [first_step(base, w, match) for w in (0.0, 0.25, 0.5, 0.75, 1.0)] for match in (None, "sqrt-sigma")}
    spread = {match: max(norms) / min(norms) for match, norms in moved.items()}
    assert spread["sqrt-sigma"] < 2
    assert spread[None] > math.sqrt(S[:RANK].mean() / S[-RANK:].mean()) / 2
    expected = 1e-4 * math.sqrt(RANK * (OUT + IN) * S.square().mean().sqrt())
    assert all(expected / 2**0.5 < norm < expected * 2**0.5 for norm in moved["sqrt-sigma"])


def test_a_stack_of_experts_takes_the_means_over_its_weights():
    model = ipca.apply_pc(mixtral(), rank=3, targets=["mlp.experts.down_proj"], progress=False)
    found = rates(ipca.param_groups(model, 1.0, match="sqrt-sigma"))
    layer = model.model.layers[0].mlp.experts.down_proj
    spectra, start = torch.linalg.svdvals(layer.pretrained_weight().double()), layer.window.index
    reference = spectra.square().mean(-1).sqrt().mean()
    expected = (reference / spectra[:, start : start + 3].mean()).sqrt().item()
    assert found["model.layers.0.mlp.experts.down_proj.lora_A"] == pytest.approx(expected, rel=1e-5)


PEFT_CASES = [
    (Small, {"target_modules": ["a", "b"]}, ["a", "b"]),
    (Table, {"target_modules": ["table", "head"]}, ["table", "head"]),
    (Convs2d, {"target_modules": ["wide"]}, ["wide"]),
    (mixtral, {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}, ["q_proj", "down_proj"]),
]


@pytest.mark.parametrize(("build", "options", "targets"), PEFT_CASES, ids=["linear", "embedding", "conv", "experts"])
def test_windows_inside_peft_get_the_same_rates(build, options, targets):
    base = build()
    inside = ipca.param_groups(wrap(base, **options), 1e-3, match="sqrt-sigma", lora_plus=2.0)
    own = ipca.apply_pc(base, rank=3, targets=targets, form="intact", progress=False)
    ours = ipca.param_groups(own, 1e-3, match="sqrt-sigma", lora_plus=2.0)
    assert sorted(g["lr"] for g in inside) == pytest.approx(sorted(g["lr"] for g in ours), rel=1e-5)
    assert {group["name"].rpartition(".")[2] for group in inside} == {"lora_A", "lora_B"}


def test_stock_lora_in_peft_has_groups_and_no_match():
    model = get_peft_model(Small(), LoraConfig(r=3, target_modules=["a", "words"], modules_to_save=["b"]))
    groups = ipca.param_groups(model, 1e-3, lora_plus=4.0)
    assert rates(groups) == {"lora_A": 1e-3, "lora_B": 4e-3, "modules_to_save": 1e-3}
    assert ids_of(groups) == trainable(model)
    with pytest.raises(ValueError, match=r"\.a: match needs the factors a layer started from.*Leave match out"):
        ipca.param_groups(wrap(Small(), LoraConfig(r=3, target_modules=["a"])), 1e-3, match="sqrt-sigma")


def test_two_adapters_of_a_layer_keep_their_own_rates():
    model = wrap(Small(), target_modules=["a"], window="principal")
    model.add_adapter("last", PCConfig(r=3, target_modules=["a"], window="minor"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    groups = ipca.param_groups(model, 1e-3, match="sqrt-sigma")
    assert ids_of(groups) == trainable(model)
    assert len({group["lr"] for group in groups}) == 2


def test_plain_lora_cannot_be_matched():
    model = baselines.apply(Plain(), "lora", AdapterSettings(rank=3, targets=("a",)), seed=0)
    with pytest.raises(ValueError, match=r"^a: .* Plain LoRA starts from B0 = 0 .* leave match out"):
        ipca.param_groups(model, 1e-3, match="sqrt-sigma")
    assert rates(ipca.param_groups(model, 1e-3)) == {"lora_A": 1e-3, "lora_B": 1e-3}


def test_a_window_of_rounding_cannot_be_matched():
    model = One()
    with torch.no_grad():
        model.layer.weight.copy_(torch.randn(OUT, 4, dtype=torch.float64) @ torch.randn(4, IN, dtype=torch.float64))
    with pytest.warns(UserWarning, match="components that are 0 in the window"):
        model = adapted(model, window="minor")
    with pytest.raises(ValueError, match=r"null space of a weight choose an earlier one"):
        ipca.param_groups(model, 1e-3, match="sqrt-sigma")


def test_a_model_without_factors_is_refused():
    with pytest.raises(ValueError, match=r"no low-rank factor of this Plain trains: call apply_pc first"):
        ipca.param_groups(Plain(), 1e-3)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"lr": "1e-3"}, TypeError, r"lr must be a number, got '1e-3'"),
        ({"lr": 0.0}, ValueError, r"lr must be positive, got 0\.0"),
        ({"lr": 1e-3, "lora_plus": math.nan}, ValueError, r"lora_plus must be positive, got nan"),
        ({"lr": 1e-3, "match": "sigma"}, ValueError, r"match must be \"sqrt-sigma\" or None, got 'sigma'"),
    ],
)
def test_bad_arguments_are_named(options, error, words):
    with pytest.raises(error, match=words):
        ipca.param_groups(adapted(One()), **options)


def test_a_rate_may_be_any_real_number():
    model = ipca.apply_pc(Plain(), rank=3, targets=["a"], progress=False)
    groups = ipca.param_groups(model, np.float32(1e-3), lora_plus=np.float32(2))
    assert [(type(group["lr"]), group["lr"]) for group in groups] == [
        (float, float(np.float32(1e-3))),
        (float, 2 * float(np.float32(1e-3))),
    ]
