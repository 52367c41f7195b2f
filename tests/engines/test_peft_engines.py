"""A PeftModel with a PCConfig on two processes: losses, checkpoints and adapter files are those of one, to the bit."""

import pytest
from peft import PeftModel

from ipca.peft import PCConfig, save_gathered
from tests.engines import launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The folder, and the facts of both processes."""
    folder = tmp_path_factory.mktemp("peft")
    return folder, launch.two_processes("sharded_peft.py", folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of the adapter that one process trains with the arithmetic of two, and its losses."""
    model, folder = launch.in_peft(), tmp_path_factory.mktemp("alone")
    found = launch.losses_of_halves(model, launch.peft_optimizer(model), range(4))
    save_gathered(model, folder)
    return folder, found


def test_losses_are_those_of_one_process(told, alone):
    facts = told[1]
    assert [list(pair) for pair in zip(*(f["first"] + f["then"] for f in facts), strict=True)] == alone[1]
    assert [list(pair) for pair in zip(*(f["ddp"] for f in facts), strict=True)] == alone[1]


def test_a_checkpoint_goes_on_with_the_same_losses(told):
    assert [facts["resumed"] for facts in told[1]] == [facts["then"] for facts in told[1]]


@pytest.mark.parametrize("engine", ["fsdp2", "ddp"])
def test_the_adapter_is_that_of_one_process(told, alone, engine):
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (told[0] / engine / name).read_bytes() == (alone[0] / name).read_bytes()


def test_what_two_processes_saved_resumes_in_one_without_an_svd(told, alone, monkeypatch):
    monkeypatch.setattr("ipca.nn.initialization.window_svd", None)
    folder = told[0] / "fsdp2"
    model = PeftModel.from_pretrained(launch.base(), folder, config=PCConfig.from_pretrained(folder), is_trainable=True)
    x = launch.batch(7)[0]
    expected = PeftModel.from_pretrained(launch.base(), alone[0], config=PCConfig.from_pretrained(alone[0]))
    assert model(x).equal(expected(x))


def test_a_wrapper_is_refused(told):
    for facts in told[1]:
        assert facts["wrapper"].startswith("TypeError: expected a PeftModel, got a DistributedDataParallel")
