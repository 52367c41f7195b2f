"""A task with every method: the function stays when it begins and ends, costs are exact, errors change nothing."""

import copy
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import ipca
from ipca.lab.continual import METHODS, ContinualLearner, TaskRecord, lora
from ipca.model import AdapterSettings
from tests.helpers.continual import SETTINGS, SHAPES, learn, plain, train
from tests.helpers.models import snapshot
from tests.helpers.quantized_layers import quantize

TASKS = 3
FACTORS, BOTH = 3 * (12 + 20), 2  # parameters of one layer's A and B; layers
HEAD = 20 * 5 + 5


def close(y, other):
    return (y - other).abs().max() <= 16 * torch.finfo(torch.float32).eps * other.abs().max()


@pytest.mark.parametrize("method", METHODS)
def test_beginning_and_ending_a_task_keep_the_function(method):
    model, x = plain(), torch.randn(7, 20)
    learner = ContinualLearner(model, method, SETTINGS, tasks=TASKS)
    for _ in range(TASKS):
        before = model(x)
        learner.begin_task()
        assert close(model(x), before)
        train(learner)
        after = model(x)
        assert not close(after, before)
        learner.end_task()
        assert close(model(x), after)
    assert learner.finish() is model
    assert close(model(x), after)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain().modules()]
    assert not any(p.requires_grad for layer in (model.a, model.b) for p in layer.parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_task_that_diverged_is_not_folded(method, value):
    learner = learn(ContinualLearner(plain(), method, SETTINGS, tasks=TASKS), 1)
    parameter = learner.begin_task()[0]
    with torch.no_grad():
        parameter[..., -1] = value
    name = next(name for name, p in learner.model.named_parameters() if p is parameter)
    before = {key: tensor.clone() for key, tensor in learner.model.state_dict().items() if torch.is_tensor(tensor)}
    with pytest.raises(ValueError, match=f"task 1: {name} holds NaN or Inf, so training diverged; nothing was folded"):
        learner.end_task()
    now = learner.model.state_dict()
    assert all(torch.equal(now[key].nan_to_num(), tensor.nan_to_num()) for key, tensor in before.items())
    assert learner.running
    assert len(learner.records) == 1


@pytest.mark.parametrize("method", METHODS)
def test_only_the_task_and_what_trains_whole_train(method):
    model = plain().eval()
    learner = ContinualLearner(model, method, SETTINGS, tasks=TASKS)
    learn(learner, 1)
    parameters = learner.begin_task()
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"head.weight", "head.bias"} < names
    assert not any(name.endswith(("bias", "base_weight", "a.weight", "b.weight")) for name in names - {"head.bias"})
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bits(method):
    weights = []
    for _ in range(2):
        torch.manual_seed(11)
        learner = learn(ContinualLearner(plain(), method, SETTINGS, tasks=2, seed=4), 2)
        weights.append([p.detach().clone() for p in learner.finish().parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


BASIS = sum(3 * (out + inside) + 3 for out, inside in SHAPES)
KEPT = {
    "fresh": [(0, 0)] * TASKS,
    "fixed": [(BASIS, 8 * BASIS)] * TASKS,
    "disjoint": [(TASKS * BASIS, 8 * TASKS * BASIS)] * TASKS,
    "pissa": [(0, 0)] * TASKS,
    "milora": [(0, 0)] * TASKS,
    "lora": [(2 * BOTH * FACTORS, 8 * BOTH * FACTORS)] * TASKS,
    "lora-fresh": [(0, 0)] * TASKS,
    "o-lora": [(3 * 32 * t, 12 * 32 * t) for t in (1, 2, 3)],  # A of both layers: rank · (20 + 12)
    "sd-lora": [(BOTH * (t * FACTORS + t - 1), 4 * BOTH * (t * FACTORS + t - 1)) for t in (1, 2, 3)],
    "osf": [(0, 0)] * TASKS,
}
OSF = sum(6 * (out + inside) + 6 for out, inside in SHAPES)  # 6 of 12 components are protected


@pytest.mark.parametrize("method", METHODS)
def test_what_trains_and_what_is_kept_is_counted(method):
    learner = learn(ContinualLearner(plain(), method, SETTINGS, tasks=TASKS), TASKS)
    trained = [HEAD + (OSF if method == "osf" else BOTH * FACTORS)] * TASKS
    if method == "sd-lora":
        trained = [count + BOTH * t for t, count in enumerate(trained)]
    expected = [TaskRecord(count, *kept) for count, kept in zip(trained, KEPT[method], strict=True)]
    assert learner.records == expected


@pytest.mark.parametrize("method", ["fresh", "lora", "o-lora"])
def test_a_running_task_is_an_adapter_of_the_weights_it_began_with(method, tmp_path):
    model, x = plain(), torch.randn(7, 20)
    learner = learn(ContinualLearner(model, method, SETTINGS), 1)
    base = copy.deepcopy(ipca.unload(copy.deepcopy(model), merge=False) if method == "lora" else model)
    learner.begin_task()
    train(learner)
    ipca.save_adapter(model, tmp_path)
    assert close(ipca.load_adapter(base, tmp_path)(x), model(x))


@pytest.mark.parametrize("by_settings", [False, True])
@pytest.mark.parametrize(("method", "factor"), [("lora-fresh", "A"), ("fresh", "A"), ("fresh", "B")])
def test_a_frozen_factor_does_not_train(method, factor, by_settings):
    model = plain()
    options = {"settings": replace(SETTINGS, train="AB".replace(factor, ""))} if by_settings else {"frozen": factor}
    learner = ContinualLearner(model, method, **{"settings": SETTINGS, **options})
    learner.begin_task()
    start = model.a.get_parameter(f"lora_{factor}").clone()
    train(learner)
    assert torch.equal(model.a.get_parameter(f"lora_{factor}"), start)
    assert learner.end_task().trained == HEAD + 3 * 32  # one factor of each layer


@pytest.mark.parametrize("method", [name for name in METHODS if name != "sd-lora"])
def test_a_task_that_cannot_begin_leaves_the_model_alone(method):
    model = plain()
    learner = ContinualLearner(model, method, SETTINGS, tasks=2)
    with torch.no_grad():
        model.b.weight[3, 4] = torch.nan
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"\bb: .*NaN or Inf"):
        learner.begin_task()
    assert snapshot(model) == before
    assert not learner.running
    assert not hasattr(model, "peft_config")


def test_a_task_of_sd_lora_that_cannot_begin_leaves_the_model_alone(monkeypatch):
    model = plain()
    learner = learn(ContinualLearner(model, "sd-lora", SETTINGS), 1)
    start = lora.plain_lora_factors

    def fails(weight, *args, **options):
        if weight.shape == (20, 12):
            raise RuntimeError("no memory")
        return start(weight, *args, **options)

    monkeypatch.setattr(lora, "plain_lora_factors", fails)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="no memory"):
        learner.begin_task()
    assert snapshot(model) == before
    assert not learner.running


def test_decompositions_come_from_the_cache(tmp_path, decomposed):
    for _ in range(2):
        learn(ContinualLearner(plain(), "disjoint", SETTINGS, tasks=2, cache=tmp_path), 2)
    assert sorted(decomposed) == sorted(SHAPES)


WRONG = [
    ("ewc", {}, "unknown method 'ewc'; choose one of fresh, fixed, disjoint"),
    ("fresh", {"tasks": 0}, "tasks must be an int of at least 1, got 0"),
    ("fresh", {"tasks": True}, "tasks must be an int of at least 1, got True"),
    ("disjoint", {}, "method 'disjoint' divides the components among all tasks; pass their number as tasks=…"),
    ("disjoint", {"tasks": 5}, "5 tasks of rank 3 need 15 disjoint components, but a has 12; use fewer tasks"),
    ("lora", {"keep": True}, "method 'lora' folds nothing after a task"),
    ("fresh", {"frozen": "C"}, "frozen must be 'A', 'B' or None, got 'C'"),
    ("osf", {"frozen": "A"}, "method 'osf' does not train a single pair of factors"),
    ("lora", {"frozen": "B"}, "method 'lora' cannot freeze B: it starts at B = 0 and would learn nothing"),
    ("o-lora", {"frozen": "A"}, "method 'o-lora' cannot freeze A: its penalty acts on A only"),
    ("osf", {"settings": replace(SETTINGS, train="A")}, "method 'osf' does not train a single pair of factors"),
    ("lora", {"settings": replace(SETTINGS, train="A")}, "method 'lora' cannot freeze B"),
    ("fresh", {"settings": replace(SETTINGS, train="A"), "frozen": "A"}, "leave no factor; omit one"),
    ("lora", {"orthogonality": 1.0}, "orthogonality applies to method 'o-lora' only, not to 'lora'"),
    ("o-lora", {"orthogonality": -1.0}, "orthogonality must be at least 0, got -1.0"),
    ("fresh", {"protected": 0.5}, "protected applies to method 'osf' only, not to 'fresh'"),
    ("osf", {"protected": 1.0}, "above 0 and below 1, got 1.0"),
]


@pytest.mark.parametrize(("method", "options", "words"), WRONG)
def test_a_wrong_argument_says_what_fits(method, options, words):
    model = plain()
    before = snapshot(model)
    with pytest.raises(ValueError, match=words):
        ContinualLearner(model, method, **{"settings": SETTINGS, **options})
    assert snapshot(model) == before


def test_a_configuration_of_another_type_is_refused():
    with pytest.raises(TypeError, match=r"settings must be an ipca\.model\.AdapterSettings, got 8"):
        ContinualLearner(plain(), "fresh", 8)


def test_osf_without_peft_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"method 'osf' needs PEFT .*pip install 'ipca-lora\[peft\]'"):
        ContinualLearner(plain(), "osf", SETTINGS)


def test_an_adapted_model_is_refused():
    model = ipca.apply_pc(plain(), rank=2, targets=["a"], progress=False)
    with pytest.raises(ValueError, match="a is already adapted"):
        ContinualLearner(model, "fresh", SETTINGS)


def test_a_quantized_layer_is_refused():
    model = quantize(nn.Sequential(nn.Linear(64, 64)), "int8")
    with pytest.raises(ValueError, match="0 is quantized, and a task cannot be folded into it"):
        ContinualLearner(model, "fresh", AdapterSettings(rank=2, targets="0", form="intact"))


def test_methods_for_linear_layers_refuse_others():
    model = nn.Sequential(nn.Embedding(9, 7))
    with pytest.raises(ValueError, match="method 'sd-lora' adapts linear layers only; 0 is a Embedding"):
        ContinualLearner(model, "sd-lora", AdapterSettings(rank=2, targets="0"))


def test_methods_without_dropout_refuse_it():
    with pytest.raises(ValueError, match=r"method 'osf' does not support dropout, got 0\.1"):
        ContinualLearner(plain(), "osf", AdapterSettings(rank=2, targets=("a",), dropout=0.1))


def test_steps_out_of_order_are_refused():
    learner = ContinualLearner(plain(), "fresh", SETTINGS, tasks=1)
    with pytest.raises(RuntimeError, match=r"no task is running; call begin_task\(\) before end_task"):
        learner.end_task()
    with pytest.raises(RuntimeError, match=r"before penalty"):
        learner.penalty()
    learner.begin_task()
    with pytest.raises(RuntimeError, match="task 0 is still running"):
        learner.begin_task()
    with pytest.raises(RuntimeError, match="task 0 is still running"):
        learner.finish()
    learner.end_task()
    with pytest.raises(RuntimeError, match="all 1 tasks are done"):
        learner.begin_task()
    learner.finish()
    with pytest.raises(RuntimeError, match="this learner has finished"):
        learner.begin_task()
