"""State dicts hold copies of a window's factors: writes into these are warned of, unless they are loaded."""

import copy
import pickle
import re
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ipca.peft import PCConfig
from ipca.peft.layers import WindowLora
from tests.helpers.peft_cases import disturb, off, output, wrap
from tests.helpers.peft_models import CASES, Small

WRITTEN = r": somebody wrote into what state_dict\(\) gave.* Average model\.parameters\(\) instead.* load_state_dict"


def written(said):
    return [str(each.message) for each in said if "somebody wrote" in str(each.message)]


def adapted(name="llama"):
    case = CASES[name]
    model = wrap(case.build().eval(), PCConfig(r=2, **case.options)).eval()
    disturb(model)
    return model, case.x()


@torch.no_grad()
def average(model, other):
    """As of EMA models: into what the state dict gives, which stock models follow."""
    for mine, theirs in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        mine.copy_(0.9 * mine + 0.1 * theirs)


@pytest.mark.parametrize("name", CASES)
def test_an_average_by_state_dicts_is_warned_of_once(name):
    model, _ = adapted(name)
    average(ema := copy.deepcopy(model), model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            average(ema, model)
    (message,) = written(said)
    assert re.search(WRITTEN, message)
    assert message.partition(":")[0] in {layer.path for layer in ema.modules() if isinstance(layer, WindowLora)}


@pytest.mark.parametrize("name", CASES)
def test_the_next_forward_warns_too(name):
    model, x = adapted(name)
    held = model.state_dict()
    output(model, x)  # nothing is written yet
    with torch.no_grad():
        for tensor in held.values():
            tensor.mul_(1.0)
    with pytest.warns(RuntimeWarning, match=WRITTEN):
        output(model, x)


def test_saving_warns_too(tmp_path):
    model, _ = adapted()
    for tensor in model.state_dict().values():
        tensor.detach().mul_(1.0)
    with pytest.warns(RuntimeWarning, match=WRITTEN):
        model.save_pretrained(tmp_path)


def by_hand(model, tensors, folder):
    given = model.state_dict()
    for name, tensor in given.items():
        tensor.copy_(tensors[name])
    model.load_state_dict(given)


def by_checkpoint(model, tensors, folder):
    dcp.save(tensors, checkpoint_id=folder, no_dist=True)
    given = model.state_dict()
    dcp.load(given, checkpoint_id=folder, no_dist=True)
    model.load_state_dict(given)


@pytest.mark.parametrize("way", [by_hand, by_checkpoint])
@pytest.mark.parametrize("name", ["llama", "embedding", "conv2d", "experts"])
@torch.no_grad()
def test_what_was_written_and_is_loaded_is_right(name, way, tmp_path):
    model, x = adapted(name)
    other = copy.deepcopy(model)
    disturb(other)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        way(model, other.state_dict(), tmp_path)
        assert off(output(model, x), output(other, x)) < 1e-6
        model.state_dict()
    assert not written(said)


def test_an_average_of_parameters_is_right_and_needs_no_warning():
    model, x = adapted()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    right = {name: p.detach().clone() for name, p in model.named_parameters()}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ema.update_parameters(model)
        for _ in range(2):
            disturb(model)
            ema.update_parameters(model)
            right = {name: 0.9 * right[name] + 0.1 * p.detach() for name, p in model.named_parameters()}
        output(ema, x)
        ema.state_dict()
    found = dict(ema.module.named_parameters())
    assert max(off(found[name], value) for name, value in right.items()) < 1e-5
    assert not written(said)


def test_nobody_is_warned_who_only_reads(tmp_path):
    model, x = adapted()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        held = model.state_dict()
        disturb(model)
        model.save_pretrained(tmp_path)
        model.load_state_dict({name: tensor + 1 for name, tensor in held.items()})
        torch.save(held, tmp_path / "state.pt")
        output(model.bfloat16(), x)
        with torch.inference_mode():
            for tensor in model.state_dict().values():
                tensor.mul(2)
            output(model, x)
    assert not written(said)


COPIES = {"copy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("twin", COPIES.values(), ids=COPIES)
def test_a_copy_has_handed_out_nothing(twin):
    model, x = adapted()
    held = model.state_dict()
    with torch.no_grad():
        for tensor in held.values():
            tensor.mul_(1.0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        other = twin(model)
        output(other, x)
        other.state_dict()
    assert not written(said)
    average(other, model)
    with pytest.warns(RuntimeWarning, match=WRITTEN):
        output(other, x)


def test_no_memory_is_held_for_it():
    model = wrap(Small(), target_modules=["words", "a", "b"])
    model.state_dict()
    layers = [model.base_model.model.words, model.base_model.model.a]
    owners = [owner for layer in layers for owner in layer.owners("default")]
    counters = [vars(owner)[f"handed_out_{name}"].counter for owner, name in owners]
    assert all(counter.untyped_storage().nbytes() == 0 for counter in counters)
    model.delete_adapter("default")
    assert not [name for name in vars(layers[0].lora_embedding_A) if "handed_out" in name]
