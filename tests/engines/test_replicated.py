"""DistributedDataParallel and accelerate on two processes train and save what one process does, to the bit."""

import re

import pytest

import ipca
from tests.engines import launch

pytestmark = pytest.mark.slow  # two processes of their own


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The folder, and the facts of both processes."""
    folder = tmp_path_factory.mktemp("replicated")
    return folder, launch.two_processes("replicated.py", folder)


@pytest.mark.parametrize(
    ("engine", "form", "saved"),
    [
        ("intact", "intact", "intact-ddp"),
        ("residual", "residual", "residual-ddp"),
        ("accelerate", "intact", "accelerate"),
    ],
)
def test_losses_and_adapter_are_those_of_one_process(told, engine, form, saved, tmp_path):
    folder, facts = told
    model = launch.adapted(form)
    alone = launch.losses_of_halves(model, launch.optimizer(model), range(4))
    assert [list(pair) for pair in zip(*(fact[engine]["losses"] for fact in facts), strict=True)] == alone
    ipca.save_adapter(model, tmp_path)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / saved / name).read_bytes()


def test_accelerate_ran_on_two_processes(told):
    for facts in told[1]:
        assert facts["accelerate"]["kind"] == "DistributedType.MULTI_CPU"
        assert facts["accelerate"]["resumed"] == facts["accelerate"]["then"]


@pytest.mark.parametrize("form", ["intact", "residual"])
def test_the_wrapper_is_refused(told, form):
    for facts in told[1]:
        assert re.match(r"ValueError: module\.0\.up belongs to a wrapper", facts[form]["wrapper"])


def test_flat_parameters_are_refused(told):
    for facts in told[1]:
        once, nested = facts["fsdp1"]
        assert re.match(r"ValueError: 0\.up: its factors are flat pieces.* shard with .*fully_shard", once)
        assert re.match(r"ValueError: 0\._fsdp_wrapped_module\.up: its factors are flat pieces", nested)
    assert not (told[0] / "refused").exists()


def test_a_model_that_is_wrapped_already_is_refused(told):
    _, facts = told
    for found in facts:
        assert len(found["wrapped first"]) == 4
        for said in found["wrapped first"]:
            assert "wrapped by DistributedDataParallel already" in said
            assert "adapt the model first, then wrap it" in said
