"""The devices of a sweep, as far as a machine without a GPU can tell."""

import json
import os
import platform
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from ipca._hashing import tensor_sha256
from ipca.lab import baselines, sweep
from ipca.lab.sweep.decompose import auto_settings
from ipca.lab.sweep.device import deterministic, device_name, device_of, see_only, use_device
from ipca.lab.sweep.trial import evaluate_task
from ipca.model.apply import adapted_layers
from ipca.svd import SpectralCache
from tests.helpers import sweep_task

GRID = {"windows": (0.0, 0.5), "lrs": (1e-3, 1e-2), "seeds": 2, "early": 2, "progress": False, "report": False}
CALIBRATED = replace(sweep_task.task(), calibration=sweep_task.calibration)


def test_a_named_device_gives_the_rows_of_the_one_that_build_chose(tmp_path):
    options = {**GRID, "methods": ("full", "auto")}
    rows = sweep.run(CALIBRATED, tmp_path / "chosen", **options)
    assert sweep.run(CALIBRATED, tmp_path / "named", devices=("cpu",), **options) == rows
    fixed = [json.loads((tmp_path / name / "settings.json").read_text())["fixed"] for name in ("chosen", "named")]
    assert fixed[0] == fixed[1]
    assert fixed[0]["device"] == f"cpu {platform.machine()}"


@pytest.mark.slow
def test_processes_share_the_devices_and_give_the_same_bytes(tmp_path):
    options = {**GRID, "windows": (0.5,), "lrs": (1e-3,), "methods": ("auto",), "comparisons": ("same",)}
    sweep.run(CALIBRATED, tmp_path / "one", **options)
    sweep.run(CALIBRATED, tmp_path / "two", devices=("cpu",), workers=2, **options)
    assert (tmp_path / "two" / "rows.csv").read_bytes() == (tmp_path / "one" / "rows.csv").read_bytes()


@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("gpu", "devices contains 'gpu', which is not a device; use names such as 'cuda:0' or 'cpu'"),
        ("cuda:97", r"devices contains 'cuda:97', but torch sees \d+ CUDA devices on this machine"),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_anything_is_written(device, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        sweep.run(sweep_task.task(), tmp_path / "out", devices=("cpu", device), **GRID)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("before", [0, 1, 2])
def test_what_is_computed_on_a_cuda_device_has_the_deterministic_and_the_mode_is_put_back(before):
    torch.set_deterministic_debug_mode(before)
    try:
        with deterministic(torch.device("cuda:0")):
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            assert not torch.utils.deterministic.fill_uninitialized_memory
            torch.use_deterministic_algorithms(False)  # as a task may
        assert torch.get_deterministic_debug_mode() == before
        assert torch.utils.deterministic.fill_uninitialized_memory
        with deterministic(torch.device("cpu")):
            assert torch.get_deterministic_debug_mode() == before
    finally:
        torch.set_deterministic_debug_mode(0)


def test_training_and_judging_run_in_the_mode_of_their_device(tmp_path, monkeypatch):
    seen = []

    def train(model, groups, seed):
        seen.append(("train", torch.are_deterministic_algorithms_enabled()))
        sweep_task.train(model, groups, seed)

    def evaluate(model):
        seen.append(("evaluate", torch.are_deterministic_algorithms_enabled()))
        return sweep_task.evaluate(model)

    task = replace(sweep_task.task(), train=train, evaluate=evaluate)
    options = {**GRID, "windows": (0.5,), "lrs": (1e-3,), "seeds": 1, "methods": (), "comparisons": ("same",)}
    rows = sweep.run(task, tmp_path / "cpu", **options)
    assert seen == [("evaluate", False), ("train", False), ("evaluate", False)]
    seen.clear()
    monkeypatch.setattr("ipca.lab.sweep.trial.device_of", lambda model: torch.device("cuda:0"))
    assert sweep.run(task, tmp_path / "cuda", **options) == rows  # these operations have one implementation alone
    assert seen == [("evaluate", True), ("train", True), ("evaluate", True)]
    assert not torch.are_deterministic_algorithms_enabled()


def test_judging_is_in_evaluation_mode_and_leaves_modes_and_random_states():
    seen = []

    def evaluate(model):
        seen.append((model[0].training, model[1].training, torch.is_grad_enabled()))
        return {"target": torch.rand(()), "retained": np.random.rand() + random.random()}

    model = nn.Sequential(nn.Linear(2, 3), nn.Dropout())
    model[0].eval()
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    evaluate_task(replace(sweep_task.task(), evaluate=evaluate), model, "it")
    assert seen == [(False, False, False)]
    assert [module.training for module in model] == [False, True]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]
    assert torch.is_grad_enabled()


def test_cublas_is_told_once_and_a_users_own_choice_stays(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    use_device("cuda:1")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    for name in (None, "cpu", "cuda"):
        use_device(name)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert chosen == ["cuda:1"]


@pytest.mark.parametrize(
    ("seen", "name", "then", "called"),
    [
        (None, "cuda:2", "2", "cuda:0"),
        ("5,7", "cuda:1", "7", "cuda:0"),
        ("GPU-a,GPU-b", "cuda", "GPU-a", "cuda:0"),
        ("5,7", "cpu", "5,7", "cpu"),
        ("5,7", None, "5,7", None),
    ],
)
def test_a_worker_sees_its_own_gpu_alone(seen, name, then, called, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen or "")
    assert see_only(name) == called
    assert os.environ["CUDA_VISIBLE_DEVICES"] == then


def test_devices_by_name():
    assert device_name(torch.device("cpu")) == f"cpu {platform.machine()}"
    assert device_of(nn.Linear(2, 3)) == device_of(nn.ReLU()) == torch.device("cpu")
    assert device_of(nn.Linear(2, 3, device="meta")).type == "meta"


def test_the_windows_of_auto_are_found_once_and_are_those_of_apply(tmp_path):
    model, calls = sweep_task.build(), []

    def calibration():
        calls.append(1)
        return sweep_task.calibration()

    path, cache = tmp_path / "auto.json", SpectralCache(tmp_path / "spectra")
    found = [auto_settings(model, sweep_task.SETTINGS, calibration, path, cache, progress=False) for _ in range(2)]
    assert calls == [1]
    assert found[0] == found[1]
    by_hand = baselines.apply(sweep_task.build(), "auto", sweep_task.SETTINGS, calibration=sweep_task.calibration())
    windows = {name: layer.window for name, layer in adapted_layers(by_hand).items()}
    assert len(cache.entries()) == len(windows) == 2
    again = baselines.apply(sweep_task.build(), "0.5", found[0], cache=cache)
    for name, layer in adapted_layers(again).items():
        assert layer.window == windows[name]
        assert tensor_sha256(layer.lora_A) == tensor_sha256(adapted_layers(by_hand)[name].lora_A)


def test_a_table_is_there_before_the_first_trial_and_seeds_come_one_after_another(tmp_path, monkeypatch):
    order = []

    def stop(task, base, trial, **options):
        order.append(trial.seed)
        if len(order) == 8:
            raise KeyboardInterrupt
        return []

    options = {**GRID, "methods": ("lora",), "comparisons": ("same",)}
    with monkeypatch.context() as patch:
        patch.setattr("ipca.lab.sweep.workers.run_trial", stop)
        patch.setattr("ipca.lab.sweep.driver._TABLE_SECONDS", 0.0)
        written = []
        patch.setattr("ipca.lab.sweep.store.Store.table", lambda store, *a: written.append(len(order)) or [])
        with pytest.raises(KeyboardInterrupt):
            sweep.run(sweep_task.task(), tmp_path, **options)
    assert written == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert order == [0] * 6 + [1] * 2  # three methods at two rates
