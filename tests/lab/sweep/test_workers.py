"""Processes side by side: what their errors say, and that none of them goes on for nobody."""

import os
from dataclasses import replace

import pytest
import torch

from ipca.lab import sweep
from ipca.lab.sweep.workers import check_sendable, model_sha256
from tests.helpers import sweep_task

GRID = {"windows": (0.5,), "lrs": (1e-3,), "seeds": 2, "methods": (), "comparisons": ("same",), "early": 2}
OPTIONS = {**GRID, "workers": 2, "progress": False, "report": False}
SEED_1 = "In the trial 0.5 (same rate, lr 0.001, seed 1)."
TASK = """
import os, time
from dataclasses import replace
from pathlib import Path
import torch
from tests.helpers import sweep_task

HERE = Path(__file__).parent

def train(model, groups, seed):
    if seed == 0:
        (HERE / "began").touch()
        time.sleep(20)
        (HERE / "ended").touch()
    while not (HERE / "began").exists():
        time.sleep(0.05)
    {end}

def build():
    model = sweep_task.build()
    if {other} and os.getpid() != int((HERE / "parent").read_text()):
        with torch.no_grad():
            model.head.bias.add_(1)
    return model

def task():
    return replace(sweep_task.task(), train=train, build=build)
"""


@pytest.mark.parametrize(
    ("end", "other", "error", "says"),
    [
        ("raise KeyError('my own mistake')", False, KeyError, "my own mistake"),
        ("os.kill(os.getpid(), 9)", False, RuntimeError, "a worker process ended: it was killed, possibly for lack of"),
        ("pass", True, RuntimeError, r"build\(\) returned a different model in a second process"),
    ],
)
def test_an_error_in_one_process_says_what_it_is_and_ends_the_others(end, other, error, says, tmp_path):
    (tmp_path / "parent").write_text(str(os.getpid()))
    path = tmp_path / "mine.py"
    path.write_text(TASK.format(end=end, other=other))
    with pytest.raises(error, match=says) as caught:
        sweep.run(path, tmp_path / "out", **OPTIONS)
    assert (getattr(caught.value, "__notes__", None) == [SEED_1]) == (error is KeyError)
    assert not (tmp_path / "ended").exists()
    assert not list((tmp_path / "out" / "trials").iterdir())


def test_a_task_that_no_other_process_can_have_is_refused(tmp_path):
    task = replace(sweep_task.task(), evaluate=lambda model: sweep_task.evaluate(model))
    with pytest.raises(TypeError, match=r"the task cannot be sent to another process: .*; or use one worker\."):
        sweep.run(task, tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()
    check_sendable(sweep_task.task())


def test_a_weight_made_of_several_tensors_counts_in_the_model_s_hash():
    torchao = pytest.importorskip("torchao.quantization")

    def made(change=0.0):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        with torch.no_grad():
            model[0].weight[3, 5] += change
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        return model

    assert model_sha256(made()) == model_sha256(made())
    assert model_sha256(made()) != model_sha256(made(9.0))
