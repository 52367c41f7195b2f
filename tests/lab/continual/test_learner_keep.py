"""Factors of earlier tasks: kept beside the weights they are folded into, removed again, saved for stock PEFT."""

import pytest
import torch

from ipca.lab.continual import METHODS, ContinualLearner
from ipca.model import AdapterSettings
from tests.helpers.continual import SETTINGS, learn, plain
from tests.helpers.layer_kinds import CASES, output, relative

FOLDING = [name for name, kind in METHODS.items() if kind.folds]


def learner_of(method, **options):
    torch.manual_seed(9)
    return learn(ContinualLearner(plain(), method, SETTINGS, tasks=2, **options), 2)


def weights(model):
    return [layer.weight.detach().clone() for layer in (model.a, model.b)]


@pytest.mark.parametrize("method", FOLDING)
def test_keeping_changes_nothing_about_the_model(method):
    merged, kept = learner_of(method), learner_of(method, keep=True)
    pairs = zip(merged.model.parameters(), kept.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("method", FOLDING)
def test_what_is_kept_is_counted(method):
    merged, kept = learner_of(method), learner_of(method, keep=True)
    for task, (one, other) in enumerate(zip(merged.records, kept.records, strict=True)):
        more = 2 * 2 * 3 * (12 + 20) * (task + 1)  # A, B, A0, B0 of both layers
        if method == "o-lora":
            more -= 3 * (12 + 20) * (task + 1)  # the penalty needs A anyway
        assert other.kept_parameters - one.kept_parameters == more
        assert other.kept_bytes - one.kept_bytes == 4 * more


@pytest.mark.parametrize("method", FOLDING)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_removing_every_task_gives_the_pretrained_weights(method, order):
    learner = learner_of(method, keep=True)
    for task in order:
        learner.remove_task(task)
    for found, original in zip(weights(learner.model), weights(plain()), strict=True):
        assert (found - original).norm() <= 8 * torch.finfo(torch.float32).eps * original.norm()


def test_removing_one_task_leaves_the_change_of_the_others():
    learner = learner_of("fresh", keep=True)
    layer = learner.kept[1]["a"]
    change = layer.scaling * (layer.lora_B @ layer.lora_A - layer.lora_B0 @ layer.lora_A0)
    learner.remove_task(0)
    assert change.norm() > 0.01
    assert (learner.model.a.weight - plain().a.weight - change).norm() <= 1e-5 * change.norm()
    assert list(learner.kept) == [1]


def test_a_task_is_removed_from_a_convolution_in_channels_last_order():
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3))
    original = model[0].weight.detach().clone()
    learner = ContinualLearner(model, "fresh", AdapterSettings(rank=3, targets=("0",)), tasks=1, keep=True)
    learner.begin_task()
    with torch.no_grad():
        model[0].lora_B.mul_(2)
    learner.end_task()
    model.to(memory_format=torch.channels_last)
    assert (model[0].weight - original).norm() > 0.01
    learner.remove_task(0)
    assert (model[0].weight - original).norm() <= 8 * torch.finfo(torch.float32).eps * original.norm()


@pytest.mark.parametrize("method", ["disjoint", "o-lora"])
def test_the_saved_tasks_are_stock_adapters_that_add_up_to_the_weights(method, tmp_path):
    import peft

    learner = learner_of(method, keep=True)
    base, x = plain(), torch.randn(7, 20)
    base.head.load_state_dict(learner.model.head.state_dict())  # is fully trained, and is in no task's file
    for task in (0, 1):
        learner.save_task(task, tmp_path / str(task))
        base = peft.PeftModel.from_pretrained(base, tmp_path / str(task)).merge_and_unload()
    expected = learner.model(x)
    assert (base(x) - expected).abs().max() <= 32 * torch.finfo(torch.float32).eps * expected.abs().max()


@pytest.mark.parametrize("method", ["fresh", "disjoint", "o-lora"])
@pytest.mark.parametrize("name", CASES)
def test_other_kinds_of_layers_are_folded_kept_and_removed(name, method):
    case = CASES[name]
    torch.manual_seed(1)
    model, x = case.build().eval(), case.x()
    settings = AdapterSettings(**{"rank": 2, "targets": tuple(case.targets), **case.options})
    before = output(model, x).detach()
    learner = ContinualLearner(model, method, settings, tasks=2, keep=True)
    for _ in range(2):
        with torch.no_grad():
            for parameter in learner.begin_task():
                parameter.add_(0.05 * torch.randn_like(parameter))
        learned = output(model, x).detach()
        learner.end_task()
        assert relative(output(model, x), learned) < 1e-5
    assert relative(learned, before) > 1e-3
    for task in (1, 0):
        learner.remove_task(task)
    assert relative(output(model, x), before) < 1e-5


def test_only_kept_tasks_can_be_removed_or_saved(tmp_path):
    learner = learner_of("fresh", keep=True)
    learner.remove_task(0)
    with pytest.raises(ValueError, match=r"the factors of task 0 are not kept; kept: 1\.$"):
        learner.remove_task(0)
    with pytest.raises(ValueError, match="the factors of task 5 are not kept; kept: 1"):
        learner.save_task(5, tmp_path)
    with pytest.raises(ValueError, match=r"kept: none\. A learner with keep=True keeps the factors"):
        learner_of("fresh").save_task(0, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_removed_while_a_task_runs():
    learner = learn(ContinualLearner(plain(), "fresh", SETTINGS, keep=True), 1)
    learner.begin_task()
    with pytest.raises(RuntimeError, match="task 1 is still running"):
        learner.remove_task(0)
