"""Which layers are chosen, and every reason to refuse one: named, and with the model left as it was."""

import math

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations

import ipca
from ipca import Window
from ipca.model import AdapterSettings
from ipca.model.apply import adapt, adapted_layers
from ipca.model.patterns import matches, matches_any
from ipca.model.targets import find_modules_to_save, find_targets
from ipca.nn import LinearPC
from tests.helpers.models import Plain, snapshot


class Subclass(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class SubTensor(torch.Tensor): ...


def blocks() -> nn.Module:
    block = {"q_proj": (16, 16), "up_proj": (16, 24), "down_proj": (24, 16)}
    layers = [nn.ModuleDict({name: nn.Linear(*shape) for name, shape in block.items()}) for _ in range(3)]
    return nn.ModuleDict({"layers": nn.ModuleList(layers), "norm": nn.LayerNorm(16), "proj": nn.Linear(16, 4)})


def names(model: nn.Module, **options) -> list[str]:
    return [target.name for target in find_targets(model, AdapterSettings(**{"rank": 2, **options}))]


EVERY = [f"layers.{i}.{name}" for i in range(3) for name in ("q_proj", "up_proj", "down_proj")]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, [*EVERY, "proj"]),
        ({"targets": "all-linear", "exclude": ["proj"]}, EVERY),
        ({"targets": "proj"}, ["proj"]),
        ({"targets": ["q_proj", "down_proj"]}, [n for n in EVERY if "up" not in n]),
        ({"targets": "1.up_proj"}, ["layers.1.up_proj"]),
        ({"targets": ["layers.1.up_proj", "proj"]}, ["layers.1.up_proj", "proj"]),
        ({"targets": r"layers\.[02]\.(q|up)_proj"}, [n for n in EVERY if "1" not in n and "down" not in n]),
        ({"targets": r".*_proj", "exclude": ["layers.0", r".*\.2\.q_proj"]}, [*EVERY[3:6], *EVERY[7:]]),
        ({"exclude": ["layers"]}, ["proj"]),
        ({"modules_to_save": ["layers.0", "proj"]}, EVERY[3:]),
    ],
    ids=str,
)
def test_patterns_choose_layers_in_the_order_of_the_model(options, wanted):
    assert names(blocks(), **options) == wanted


def test_exceptions_by_pattern_and_the_first_match_counts():
    config = AdapterSettings(
        rank=4,
        targets=("q_proj", "up_proj"),
        rank_pattern={"layers.0.q_proj": 2, "q_proj": 3},
        window_pattern={r"layers\.2\..*": "start=5", "up_proj": "minor"},
        alpha_pattern={"up_proj": 7.5},
    )
    found = {t.name: (t.window.rank, t.window.text, t.alpha) for t in find_targets(blocks(), config)}
    assert found == {
        "layers.0.q_proj": (2, "middle", 2.0),
        "layers.0.up_proj": (4, "minor", 7.5),
        "layers.1.q_proj": (3, "middle", 3.0),
        "layers.1.up_proj": (4, "minor", 7.5),
        "layers.2.q_proj": (3, "start=5", 3.0),
        "layers.2.up_proj": (4, "start=5", 7.5),
    }
    model = adapt(blocks(), config, progress=False)
    layer = model["layers"][0]["up_proj"]
    assert (layer.window, layer.alpha, layer.scaling) == (Window(12, 4), 7.5, 7.5 / 4)


@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_leaves_the_output_head_and_attention_alone(tied):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, vocab_size=40, tie_word_embeddings=tied, num_key_value_heads=2)
    )
    found = names(model)
    assert len(found) == 7
    assert "lm_head" not in found
    if tied:
        with pytest.raises(ValueError, match="cannot adapt lm_head: its weight is tied to another module's"):
            names(model, targets="lm_head", form="intact")
    else:
        assert names(model, targets="lm_head", form="intact") == ["lm_head"]
    with pytest.warns(UserWarning, match=r"leaves out self_attn\.out_proj: nn.MultiheadAttention reads its weight"):
        assert names(nn.TransformerEncoderLayer(8, 2, 8)) == ["linear1", "linear2"]


class Unfit(nn.Module):
    """Layers of which no window of rank 4 fits some."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"wide": nn.Linear(8, 8), "gate": nn.Linear(8, 1)}) for _ in range(12)
        )
        self.narrow, self.tied, self.table = nn.Linear(8, 3), nn.Linear(8, 8), nn.Embedding(8, 8)
        self.table.weight = self.tied.weight
        self.one = self.two = nn.Linear(8, 8)
        self.rotated = nn.utils.parametrizations.orthogonal(nn.Linear(8, 8))
        self.own = Subclass(8, 8)


LEFT_OUT = (
    r"'all-linear' leaves out blocks\.\*\.gate \(12\): rank 4 is above the 1 singular value, and rank_pattern can give "
    r"another; narrow: rank 4 is above the 3 singular values.*; tied: its weight is tied.*; one: the same module .*; "
    r"rotated: its weight is parametrized.*; own: a Subclass may compute something else than an nn.Linear\."
)


def test_all_linear_leaves_out_in_one_line_what_no_window_fits():
    model = Unfit()
    with pytest.warns(UserWarning, match=LEFT_OUT) as said:
        ipca.apply_pc(model, rank=4, progress=False)
    assert len(said) == 1
    assert list(ipca.model.apply.adapted_layers(model)) == [f"blocks.{i}.wide" for i in range(12)]
    with pytest.warns(UserWarning, match=r"leaves out tied: ") as said:
        found = names(Unfit(), rank_pattern={"gate": 1}, exclude=["narrow"])
    assert sum("gate" in name for name in found) == 12


@pytest.mark.filterwarnings("ignore:'all-linear' leaves out")
@pytest.mark.parametrize(
    "named", [{"targets": ["wide", "gate"]}, {"rank_pattern": {"gate": 2}}], ids=["target", "rank"]
)
def test_a_narrow_layer_that_was_named_is_refused(named):
    model = Unfit()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"cannot adapt blocks\.0\.gate, .* there are only 1"):
        ipca.apply_pc(model, rank=4, progress=False, **named)
    assert snapshot(model) == before


def test_saved_modules_are_the_outermost_that_match():
    model = blocks()
    with pytest.raises(ValueError, match="'proj' would make PEFT save"):
        find_modules_to_save(model, AdapterSettings(modules_to_save=("norm", "proj")))
    found = find_modules_to_save(model, AdapterSettings(modules_to_save=(r"layers\.1.*", "q_proj")))
    assert found == ["layers.0.q_proj", "layers.1", "layers.2.q_proj"]


def test_a_model_without_linear_layers_says_what_else_it_has():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Embedding(9, 8))
    with pytest.raises(ValueError, match="no linear layer to adapt; name layers of other kinds in targets, such as 0,"):
        ipca.apply_pc(model, rank=2)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        (
            {"rank": 13},
            ValueError,
            r"cannot adapt a, b: .* only 12; lower the rank .*; head: .* only 5",
        ),
        (
            {"rank": 13, "window": "energy=0.5"},
            ValueError,
            "adapt a, b: rank 13 is above its 12 singular values .*; head: .* 5",
        ),
        ({"window": Window(4, 4)}, ValueError, r"cannot adapt head: window 'start=4' of rank 4 ends at 8, .*only 5"),
        (
            {"targets": "query"},
            ValueError,
            "no module matches the target 'query'; linear layers here are called a, b, hea",
        ),
        ({"targets": "a", "exclude": ["a"]}, ValueError, "no module matches the target 'a'.* called b, head"),
        ({"exclude": ["a", "b", "head"]}, ValueError, "Plain has no linear layer to adapt"),
        ({"targets": "("}, ValueError, r"'\(' is neither a module name nor a regular expression"),
        ({"exclude": ["["]}, ValueError, r"'\[' is neither a module name nor a regular expression"),
        ({"modules_to_save": ["hed"]}, ValueError, "modules_to_save 'hed' matches no module"),
        ({"rank_pattern": {"c": 3}}, ValueError, "rank_pattern 'c' matches none of the layers to adapt"),
        ({"alpha_pattern": {"head": 3}, "exclude": ["head"]}, ValueError, "alpha_pattern 'head' matches none"),
        ({"rank_pattern": {"head": 6}}, ValueError, "cannot adapt head: .* there are only 5"),
        ({"window_pattern": {"a": "mid"}}, ValueError, "Unknown window 'mid'"),
        ({"alpha": -1.0}, ValueError, r"alpha must be positive, got -1\.0"),
        ({"alpha_pattern": {"a": math.inf}}, ValueError, "alpha must be positive, got inf"),
        ({"form": "both"}, ValueError, "form must be one of intact, residual; got 'both'"),
        ({"dropout": 1.5}, ValueError, r"dropout must lie in \[0, 1\), got 1\.5"),
        ({"adapter_dtype": "int8"}, ValueError, "adapter_dtype must name a float dtype such as 'float32'; got 'int8'"),
        ({"tol": "best"}, ValueError, "tol must be a number or one of fast, default, exact; got 'best'"),
        ({"tol": 1e-20}, ValueError, "tol must be a number in"),
        ({"r": 4}, TypeError, "rank=2 and r=4 are two names of one argument; pass one of them"),
        ({"ranks": 4}, TypeError, "unexpected keyword argument 'ranks'"),
        ({"targets": [3]}, TypeError, r"targets must be strings, got \[3\]"),
    ],
    ids=str,
)
def test_bad_options_are_named_and_the_model_is_unchanged(options, error, words):
    model = Plain()
    before = snapshot(model)
    options = options if isinstance(options.get("window"), Window) else {"rank": 2, **options}
    with pytest.raises(error, match=words):
        ipca.apply_pc(model, progress=False, **options)
    assert snapshot(model) == before


def poison(value: float):
    def change(model):
        with torch.no_grad():
            model.b.weight[19, 11] = value

    return change


def integer(model):
    model.b.weight = nn.Parameter(torch.ones(20, 12, dtype=torch.int8), requires_grad=False)


def tied(model):
    model.table = nn.Embedding(20, 12)
    model.table.weight = model.b.weight


def shared(model):
    model.again = nn.ModuleDict({"inner": model.b})


def shared_parent(model):
    model.inner = nn.ModuleDict({"b": model.b})
    del model.b
    model.other = model.inner


def replaced_forward(model):
    model.b.forward = lambda x: x


def unusual(model):
    model.b.weight = nn.Parameter(model.b.weight.detach().as_subclass(SubTensor))


HOOKS = "b: it has hooks or a replaced forward, which would be lost"
PLACES = "the same module stands in several places of the model"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (poison(math.nan), "b: the tensor holds NaN or Inf"),
        (poison(math.inf), "b: the tensor holds NaN or Inf"),
        (integer, r"b: cannot decompose a torch\.int8 tensor; dequantize"),
        (lambda m: m.b.to("meta"), "b: the tensor is on the meta device.*load the weights first"),
        (tied, "b: its weight is tied to another module's: adapted they would differ.*untie them.*or exclude it"),
        (shared, f"b: {PLACES}"),
        (shared_parent, rf"inner\.b: {PLACES}"),
        (lambda m: m.b.register_forward_hook(print), HOOKS),
        (lambda m: m.b.register_forward_pre_hook(print), HOOKS),
        (lambda m: m.b.register_full_backward_hook(print), HOOKS),
        (replaced_forward, HOOKS),
        (unusual, "b: its weight is a SubTensor, not a plain tensor"),
    ],
    ids=["nan", "inf", "int8", "meta", "tied", "shared", "parent", "hook", "pre", "backward", "forward", "subtensor"],
)
def test_layers_that_cannot_be_adapted(change, words):
    model = Plain()
    change(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"cannot adapt {words}"):
        ipca.apply_pc(model, rank=2, targets=["a", "b", "head"], progress=False)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("build", "targets", "words"),
    [
        (lambda: nn.Sequential(Subclass(8, 8)), "0", "0: it is a Subclass, not an nn.Linear"),
        (lambda: nn.ModuleDict({"box": nn.Sequential(nn.Linear(8, 8))}), "box", "box: it is a Sequential"),
        (lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(8, 8))), "0", "0: its weight is parametrized"),
        (lambda: nn.TransformerEncoderLayer(8, 2, 8), "out_proj", "self_attn.out_proj: nn.MultiheadAttention reads"),
        (lambda: nn.Linear(8, 8), "all-linear", "Linear: it is the model itself; use LinearPC.from_linear"),
        (lambda: LinearPC(8, 8, 2), "all-linear", "LinearPC: it is adapted already"),
        (lambda: nn.Sequential(LinearPC(8, 8, 2)), "0", "0: it is adapted already; unload the adapter first"),
        (lambda: nn.Sequential(*[Subclass(8, 8) for _ in range(7)]), "[0-9]", "0, 1, 2 and 4 more: it is a Subclass"),
    ],
    ids=["subclass", "container", "parametrized", "out_proj", "itself", "pc", "adapted", "many"],
)
def test_modules_that_cannot_be_adapted(build, targets, words):
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"cannot adapt {words}"):
        ipca.apply_pc(model, rank=2, targets=targets, progress=False)
    assert snapshot(model) == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_quantized_layers_are_refused_by_name_and_passed_over_by_all_linear():
    model = torch.ao.quantization.quantize_dynamic(Plain(), {"b"}, dtype=torch.qint8)
    before, weight = snapshot(model), model.b.weight().dequantize()
    with pytest.raises(ValueError, match=r"cannot adapt b: it is a Linear, not an nn\.Linear"):
        ipca.apply_pc(model, rank=2, targets="b", progress=False)
    assert snapshot(model) == before
    assert names(model) == ["a", "head"]
    assert torch.equal(model.b.weight().dequantize(), weight)


@pytest.mark.parametrize("form", ["residual", "intact"])
@pytest.mark.parametrize("targets", ["b", "table"])
def test_tied_weights_are_refused_in_both_forms_from_both_sides_and_adapted_once_untied(form, targets):
    model = Plain()
    tied(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"cannot adapt {targets}: its weight is tied to another module's"):
        ipca.apply_pc(model, rank=2, form=form, targets=targets, progress=False)
    assert snapshot(model) == before
    model.table.weight = nn.Parameter(model.b.weight.detach().clone())
    ipca.apply_pc(model, rank=2, form=form, targets=targets, progress=False)


@pytest.mark.parametrize(
    ("pattern", "name", "wanted"),
    [
        ("a.b", "a.b", True),
        ("b", "a.b", True),
        ("b", "a.bb", False),
        ("b", "a.cb", False),
        ("a", "a.b", False),
        (r"a\..", "a.b", True),
        ("a.b", "axb", True),  # as a regular expression
        ("", "a", False),
    ],
)
def test_a_pattern_is_a_path_its_end_or_a_whole_regular_expression(pattern, name, wanted):
    assert matches(pattern, name) is wanted


def test_excluding_a_module_excludes_what_it_contains():
    assert matches_any(["a"], "a.b.c")
    assert matches_any([r"a\.\w"], "a.b.c")
    assert not matches_any(["c.d", "b.c.d"], "a.b.c")


def test_a_name_that_is_no_regular_expression_is_a_name_still():
    model = nn.Module()
    for name in ("a", "b*[", "c("):
        model.add_module(name, nn.Linear(6, 6))
    ipca.apply_pc(model, rank=2, targets=["b*[", "c("], rank_pattern={"c(": 3}, progress=False)
    assert {name: layer.rank for name, layer in adapted_layers(model).items()} == {"b*[": 2, "c(": 3}
