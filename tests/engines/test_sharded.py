"""FSDP2 on two processes: what is trained, resumed and saved is what one process does, to the bit."""

import json
import re

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import ipca
from tests.engines import launch

pytestmark = pytest.mark.slow

FORMS = ("intact", "residual")
both_forms = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The folder, and the facts of both processes."""
    folder = tmp_path_factory.mktemp("sharded")
    return folder, launch.two_processes("sharded.py", folder)


@pytest.fixture(scope="module")
def alone():
    """For each form the model trained by one process with the arithmetic of two, and its losses."""
    found = {}
    for form in FORMS:
        model = launch.adapted(form)
        found[form] = model, launch.losses_of_halves(model, launch.optimizer(model), range(4))
    return found


def sidecar(folder):
    """``ipca.json`` without the times of the decompositions."""
    record = json.loads((folder / "ipca.json").read_text())
    for layer in record["layers"].values():
        del layer["svd"]["seconds"]
    return record


def same_adapter(one, other):
    names = ("adapter_model.safetensors", "adapter_config.json")
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


@both_forms
def test_losses_are_those_of_one_process(told, alone, form):
    found = [
        list(pair) for pair in zip(*(facts[form]["first"] + facts[form]["then"] for facts in told[1]), strict=True)
    ]
    assert found == alone[form][1]


@both_forms
def test_halves_of_a_batch_train_as_the_whole(alone, form):
    model = launch.adapted(form)
    whole = launch.losses(model, launch.optimizer(model), range(4))
    halves = [sum(pair) / 2 for pair in alone[form][1]]
    assert halves == pytest.approx(whole, rel=1e-5)


@both_forms
def test_a_distributed_checkpoint_goes_on_with_the_same_losses(told, form):
    for facts in told[1]:
        assert facts[form]["resumed"] == facts[form]["then"]


@both_forms
def test_one_process_goes_on_from_the_checkpoint_of_two(told, alone, form):
    model = launch.adapted(form)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    optimizer = launch.optimizer(model)
    state, optimizer_state = get_state_dict(model, optimizer)
    checkpoint = told[0] / f"{form}-form" / "checkpoint"
    dcp.load({"model": state, "optimizer": optimizer_state}, checkpoint_id=checkpoint, no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=optimizer_state)
    assert launch.losses_of_halves(model, optimizer, range(2, 4)) == alone[form][1][2:]


@both_forms
def test_the_adapter_is_byte_for_byte_that_of_one_process(told, alone, form, tmp_path):
    start, folder = launch.adapted(form), told[0] / f"{form}-form"
    ipca.save_adapter(start, tmp_path / "start")
    ipca.save_adapter(alone[form][0], tmp_path / "adapter")
    for name in ("start", "adapter"):
        assert same_adapter(folder / name, tmp_path / name)
        assert sidecar(folder / name) == sidecar(tmp_path / name)


@both_forms
def test_exports_are_byte_for_byte_those_of_one_process(told, alone, form, tmp_path):
    folder = told[0] / f"{form}-form"
    for kind in ("peft", "residual"):
        ipca.export(alone[form][0], tmp_path / kind, format=kind, base_model=str(folder / "residual" / "base"))
    here, there = (load_file(root / "residual/base/model.safetensors") for root in (tmp_path, folder))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[key], there[key]) for key in here)
    assert same_adapter(tmp_path / "residual/adapter", folder / "residual/adapter")
    weights = "peft/adapter_model.safetensors"
    assert (tmp_path / weights).read_bytes() == (folder / weights).read_bytes()


def test_a_server_gets_one_factor_of_a_sharded_model(told, tmp_path):
    ipca.export(launch.one_factor(), tmp_path, format="serve")
    assert same_adapter(told[0] / "one-factor", tmp_path)


@both_forms
def test_other_kinds_of_layers_train_and_save_as_in_one_process(told, form, tmp_path):
    model = launch.kinds(form)
    launch.kinds_step(model, [launch.half(0), launch.half(1)])
    ipca.save_adapter(model, tmp_path)
    assert same_adapter(told[0] / f"{form}-kinds", tmp_path)


@both_forms
def test_the_adapter_of_two_processes_loads_onto_the_base(told, alone, form):
    model = ipca.load_adapter(launch.base(), told[0] / f"{form}-form" / "adapter")
    x = launch.batch(9)[0]
    assert torch.equal(model(x), alone[form][0](x))


@both_forms
def test_a_sharded_layer_tells_its_weight_and_merges(told, form):
    for facts in told[1]:
        assert facts[form]["weight_error"] <= 4 * torch.finfo(torch.float32).eps  # weights below 1
        assert facts[form]["merged_error"] <= 1e-5


def test_a_cast_of_a_sharded_model_adds_up(told):
    for facts in told[1]:
        assert facts["cast"] <= 1


def test_with_a_bfloat16_policy_the_intact_form_starts_as_the_base(told):
    for facts in told[1]:
        assert facts["mixed_precision"]["dtype"] == "torch.bfloat16"
        assert facts["mixed_precision"]["intact"] == 0
        assert facts["mixed_precision"]["residual"] <= 4 * torch.finfo(torch.bfloat16).eps  # W_res is rounded by itself


REFUSED = {
    "op": "TypeError: pc_linear got a DTensor.*within the forward pass of the module that was wrapped",
    "unload": "ValueError: .* is sharded over processes; save_adapter gathers it: load that onto the plain base",
    "load_adapter": "ValueError: .* is sharded over processes; load the adapter first, then shard",
    "apply_pc": "ValueError: cannot adapt .*: its weight is sharded already; adapt the model first",
}


@both_forms
@pytest.mark.parametrize("what", list(REFUSED))
def test_what_a_sharded_model_refuses(told, form, what):
    for facts in told[1]:
        assert re.match(REFUSED[what], facts[form][what])


@both_forms
def test_an_error_of_the_writer_reaches_every_process(told, form):
    first, second = (facts[form]["unwritable"] for facts in told[1])
    assert re.match(r"NotADirectoryError: cannot write .*ipca\.json.* is not a folder", first)
    assert second == f"RuntimeError: rank 0 could not write: {first}"


def test_a_tensor_parallel_plan_takes_the_layers_that_are_not_adapted(told):
    for facts in told[1]:
        assert facts["tensor_parallel"]["rest"] <= 1e-5
        assert re.match(r"NotImplementedError: ColwiseParallel .* nn\.Linear", facts["tensor_parallel"]["plan"])


def test_a_tensor_parallel_layer_is_not_adapted(told):
    for facts in told[1]:
        assert facts["tensor_parallel"]["late"].startswith("ValueError: cannot adapt 1: its weight is sharded already")
