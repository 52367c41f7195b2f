"""A sweep's rows: complete, paired, the same bits again, and going on after a kill."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import ipca
from ipca.lab import baselines, sweep
from ipca.lab.sweep.trial import COLUMNS
from ipca.model.apply import adapt
from tests.helpers import sweep_task

TASK = Path(sweep_task.__file__)
GRID = {"windows": (0.0, 0.5, 1.0), "lrs": (1e-3, 1e-2), "seeds": 2, "early": 2, "progress": False, "report": False}
SMALL = {"windows": (0.5,), "methods": (), "lrs": (1e-3,), "seeds": 1, "comparisons": ("same",), "early": 2}
TRIALS = (
    (3 + 7) * 4 + 3 * 4 + 3 * 4
)  # at the same rate; √σ: windows; equal updates: windows without the reference, LoRA


def read(folder):
    with (folder / "rows.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "out"
    return folder, sweep.run(TASK, folder, **GRID)


def test_every_trial_has_its_row(swept):
    folder, rows = swept
    written = read(folder)
    assert len(rows) == len(written) == 1 + TRIALS
    assert list(written[0]) == [*COLUMNS, "noise"]
    assert written[0]["method"] == "base"
    assert all(row["status"] == "ok" for row in written)
    assert {row["method"] for row in written[1:]} == {"0.0", "0.5", "1.0", "lora", *baselines.CONTROLS}
    assert {row["comparison"] for row in written[1:]} == {"same", "sqrt-sigma", "update"}


def test_the_table_reads_back_to_the_bit(swept):
    folder, rows = swept
    for row, written in zip(rows, read(folder), strict=True):
        for name in ("lr", "lr_used", "early_update", "update", "target", "retained"):
            assert (float(written[name]) if written[name] else None) == row[name]


def test_methods_share_their_batches_and_differ_in_what_they_train(swept):
    _, rows = swept
    trained = {row["method"]: row["trainable"] for row in rows[1:]}
    whole = 8 * 3 + 3
    assert trained["0.5"] == trained["lora"] == trained["haar"] == 2 * (12 + 10 + 10 + 8) + whole
    assert trained["frozen-A"] == 2 * (10 + 8) + whole
    assert trained["frozen-B"] == 2 * (12 + 10) + whole


def test_equal_updates_are_nearer_than_those_of_the_same_rate(swept):
    _, rows = swept

    def spread(comparison):
        """Of ``early_update`` over methods, as the largest ratio to the reference's."""
        found = {
            r["method"]: r["early_update"]
            for r in rows[1:]
            if (r["lr"], r["seed"]) == (1e-3, 0)
            and r["comparison"] == comparison
            and r["method"] in ("0.0", "1.0", "lora")
        }
        middle = next(r["early_update"] for r in rows[1:] if (r["method"], r["lr"], r["seed"]) == ("0.5", 1e-3, 0))
        return max(max(value / middle, middle / value) for value in found.values())

    assert spread("update") < 1.2 < spread("same")


def test_a_row_is_what_a_run_by_hand_gives(swept):
    _, rows = swept
    expected = next(
        r for r in rows[1:] if (r["method"], r["comparison"], r["lr"], r["seed"]) == ("1.0", "same", 1e-2, 1)
    )
    model = sweep_task.build()
    adapt(model, replace(sweep_task.SETTINGS, window="minor"), progress=False)
    torch.manual_seed(1)
    sweep_task.train(model, ipca.param_groups(model, 1e-2), 1)
    found = sweep_task.evaluate(model)
    assert (found["target"], found["retained"]) == (expected["target"], expected["retained"])
    assert ipca.analysis.update_norm(model) == expected["update"]


def test_two_processes_give_the_same_bytes(swept, tmp_path):
    folder, _ = swept
    sweep.run(TASK, tmp_path / "again", workers=2, **GRID)
    assert (tmp_path / "again" / "rows.csv").read_bytes() == (folder / "rows.csv").read_bytes()


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_gives_the_same_bytes(swept, tmp_path):
    folder, _ = swept
    out = tmp_path / "killed"
    options = {**GRID, "workers": 2}
    start = f"sweep.run({str(TASK)!r}, {str(out)!r}, **{options!r})"
    script = f"from ipca.lab import sweep\nif __name__ == '__main__':\n    {start}"
    program = tmp_path / "program.py"
    program.write_text(script)
    process = subprocess.Popen([sys.executable, str(program)], start_new_session=True)
    while len(list((out / "trials").glob("*.json"))) < 5:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    _no_process_is_left(process.pid)
    done = {path.name: path.stat().st_mtime_ns for path in (out / "trials").glob("*.json")}
    assert 5 <= len(done) < TRIALS
    sweep.run(TASK, out, **GRID)
    assert (out / "rows.csv").read_bytes() == (folder / "rows.csv").read_bytes()
    assert all((out / "trials" / name).stat().st_mtime_ns == at for name, at in done.items())


def _no_process_is_left(group):
    for _ in range(200):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(group, signal.SIGKILL)
    raise AssertionError("workers outlived the process that was killed")


def test_more_seeds_keep_what_is_done(tmp_path, monkeypatch):
    options = {**GRID, "comparisons": ("same",), "methods": ()}
    sweep.run(TASK, tmp_path, **options)
    ran = []
    monkeypatch.setattr("ipca.lab.sweep.workers.run_trial", lambda task, base, trial, **k: ran.append(trial) or [])
    sweep.run(TASK, tmp_path, **{**options, "seeds": 3})
    assert {trial.seed for trial in ran} == {2}
    assert len(ran) == 3 * 2


def test_checkpoints_have_rows_of_their_own_and_change_nothing(swept, tmp_path):
    _, rows = swept
    options = {**GRID, "comparisons": ("same",), "methods": ("lora",), "checkpoints": (1, 4)}
    found = sweep.run(sweep_task.task(), tmp_path, **options)
    assert [row["step"] for row in found[1:4]] == [1, 4, None]
    ends = [row for row in found if row["step"] is None][1:]
    before = {(r["method"], r["lr"], r["seed"]): r for r in rows[1:] if r["comparison"] == "same"}
    assert all(row == before[row["method"], row["lr"], row["seed"]] for row in ends)
    assert found[1]["early_update"] is None


def diverging(model, groups, seed):
    sweep_task.train(model, groups, seed)
    with torch.no_grad():
        if groups[0]["lr"] > 5e-3:
            groups[0]["params"][0].fill_(float("nan"))


def test_a_run_that_is_over_before_a_checkpoint_has_no_row_for_it_and_threads_are_put_back(tmp_path):
    before = torch.get_num_threads()
    options = {**GRID, "windows": (0.5,), "methods": (), "comparisons": ("same",), "threads": before + 1}
    rows = sweep.run(sweep_task.task(), tmp_path, checkpoints=(2, 50), **options)
    assert {row["step"] for row in rows[1:]} == {2, None}
    assert torch.get_num_threads() == before


def test_a_diverged_run_is_a_row_that_says_so(tmp_path):
    task = replace(sweep_task.task(), train=diverging)
    rows = sweep.run(task, tmp_path, **{**GRID, "comparisons": ("same",), "methods": ("full",)})
    failed = [row for row in rows if row["status"] != "ok"]
    assert {row["lr"] for row in failed} == {1e-2}
    assert len(failed) == 4 * 2
    assert failed[0]["status"].startswith("failed: diverged, update")
    assert failed[0]["target"] is None


def test_tuning_without_optuna_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"tuning needs Optuna; run: pip install 'ipca-lora\[sweep\]'"):
        sweep.run(TASK, tmp_path, **{**GRID, "comparisons": ("same",), "methods": (), "windows": (0.5,), "tune": 1})


def test_auto_uses_the_calibration(tmp_path):
    task = replace(sweep_task.task(), calibration=sweep_task.calibration)
    options = {**GRID, "comparisons": ("same",), "methods": ("auto",)}
    rows = sweep.run(task, tmp_path, **options)
    assert sum(row["kind"] == "auto" for row in rows) == 4
    with pytest.raises(ValueError, match="'auto' needs the task's `calibration`"):
        sweep.run(sweep_task.task(), tmp_path / "b", **options)


def test_every_baseline_runs_and_is_reported(tmp_path):
    task = replace(sweep_task.task(), calibration=sweep_task.calibration)
    options = {**GRID, "comparisons": ("same",), "methods": baselines.BASELINES, "windows": (0.5,), "lrs": (1e-2,)}
    rows = sweep.run(task, tmp_path, **{**options, "report": True})
    found = [row for row in rows if row["kind"] == "baseline"]
    assert len(found) == 2 * len(baselines.BASELINES)
    assert all(row["status"] == "ok" and row["update"] > 0 and row["early_update"] > 0 for row in found)
    assert {row["method"] for row in found} == set(baselines.BASELINES)
    assert "LoRA-Null" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert sweep.run(task, tmp_path / "again", **options) == rows
    with pytest.raises(ValueError, match="'corda-ipm' needs the task's `calibration`"):
        sweep.run(TASK, tmp_path / "c", **options)


def test_windows_of_the_inputs_are_windows_of_a_sweep(tmp_path):
    task = replace(sweep_task.task(), calibration=sweep_task.calibration)
    options = {**GRID, "windows": (0.5, "inputs:minor", "inputs:0.5"), "methods": ("lora-null", "lora"), "lrs": (1e-2,)}
    rows = sweep.run(task, tmp_path, **{**options, "report": True})
    of_inputs = [row for row in rows if row["method"].startswith("inputs:") and row["comparison"] == "same"]
    assert len(of_inputs) == 4
    assert all(row["status"] == "ok" and row["kind"] == "window" for row in of_inputs)
    null = [row for row in rows if row["method"] == "lora-null" and row["comparison"] == "same"]
    minor = [row for row in of_inputs if row["method"] == "inputs:minor"]
    assert [row["update"] for row in null] == [row["update"] for row in minor]
    assert "inputs:0.5" in (tmp_path / "report.html").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="'inputs:minor' needs the task's `calibration`"):
        sweep.run(TASK, tmp_path / "c", **options)


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.out, self.head, self.old = Conv1D(8, 12), nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(8, 3)


UNFIT = {
    "lora": ("lora", {"train": "A"}, "method 'lora' starts from B = 0, and with train='A' that never trains"),
    "oplora": ("oplora", {"train": "A"}, "method 'oplora' starts from B = 0, and with train='A' that never trains"),
    "oft": ("oft", {"rank_pattern": {"body": 3}}, "'oft' has one block size, 4 · rank, for all layers"),
    "haar": ("haar", {"window": "inputs:minor"}, "the control 'haar' differs from the window of the settings"),
}


@pytest.mark.parametrize(("method", "options", "words"), UNFIT.values(), ids=UNFIT)
def test_a_method_that_the_settings_do_not_fit_is_refused_before_anything_runs(method, options, words, tmp_path):
    task = sweep_task.task()
    task = replace(task, settings=replace(task.settings, **options), calibration=sweep_task.calibration)
    grid = {**GRID, "comparisons": ("same",), "methods": (method,)}
    with pytest.raises(ValueError, match=words):
        sweep.run(task, tmp_path / "out", **grid)
    assert not list((tmp_path / "out").glob("*.*"))
    planned = {name: value for name, value in grid.items() if name not in ("progress", "report")}
    with pytest.raises(ValueError, match=words):
        sweep.plan_sweep(task, tmp_path / "out", **planned)


@pytest.mark.parametrize("method", ["kasa", "osf", "oft"])
def test_a_method_that_the_layers_do_not_fit_is_refused_before_anything_runs(method, tmp_path):
    task = replace(sweep_task.task(), build=Transposed)
    with pytest.raises(TypeError, match=f"body is a layer of the kind 'conv1d'; PEFT's {method} is for linear layers"):
        sweep.run(task, tmp_path / "out", **{**GRID, "comparisons": ("same",), "methods": (method,)})
    assert not list((tmp_path / "out").glob("*.*"))


def test_a_baseline_of_peft_without_peft_is_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"method 'mica' needs PEFT .*; pip install 'ipca-lora\[peft\]'"):
        sweep.run(TASK, tmp_path, **{**GRID, "comparisons": ("same",), "methods": ("mica",)})
    assert not (tmp_path / "rows.csv").exists()


def test_tuning_goes_on_where_it_was(tmp_path, monkeypatch):
    options = {**GRID, "comparisons": ("same",), "methods": ("lora",), "windows": (0.5,), "tune": 3}
    rows = sweep.run(TASK, tmp_path, **options)
    tuned = [row for row in rows if row["comparison"] == "tuned"]
    assert [(row["method"], row["seed"]) for row in tuned] == [("0.5", 0), ("0.5", 1), ("lora", 0), ("lora", 1)]
    assert all(1e-3 / 4 <= row["lr"] <= 4e-2 for row in tuned)
    monkeypatch.setattr("ipca.lab.sweep.workers.run_trial", None)  # nothing is left to run
    assert sweep.run(TASK, tmp_path, **options) == rows


def no_step(model, groups, seed):
    return None


def own_rate(model, groups, seed):
    sweep_task.train(model, [{"params": [p for group in groups for p in group["params"]], "lr": 0.5}], seed)


def not_a_number(model):
    return {"target": float("nan"), "retained": 1.0}


def cannot_judge(model):
    raise KeyError("my own mistake")


def only_target(model):
    return {"target": 1.0}


def raising(model, groups, seed):
    raise KeyError("my own mistake")


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"train": no_step}, ValueError, r"0.0 \(same rate, lr 0.001, seed 0\): train\(\) took 0 optimizer steps"),
        ({"train": own_rate}, ValueError, r"train\(\) used the learning rates 0.5 and none of those in `groups`"),
        ({"evaluate": only_target}, ValueError, "evaluate\\(\\) must return 'target' and 'retained'"),
        ({"evaluate": not_a_number}, ValueError, "the untrained model: target is nan; evaluate"),
        ({"evaluate": cannot_judge}, KeyError, "my own mistake"),
        ({"build": dict}, TypeError, r"build\(\) must return the pretrained model, an nn.Module; it returned {}"),
        ({"train": raising}, KeyError, "my own mistake"),
    ],
)
def test_a_wrong_task_stops_the_sweep(change, error, says, tmp_path):
    with pytest.raises(error, match=says):
        sweep.run(replace(sweep_task.task(), **change), tmp_path, **GRID)


def test_an_error_in_judging_the_untrained_model_says_so(tmp_path):
    with pytest.raises(KeyError) as found:
        sweep.run(replace(sweep_task.task(), evaluate=cannot_judge), tmp_path, **GRID)
    assert found.value.__notes__ == ["While evaluating the untrained model."]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"windows": ("start=40",)}, "body: .*ends at 42, but there are only 10 singular values"),
        ({"methods": ("auto",)}, "expected an iterable of batches"),
    ],
)
def test_a_grid_that_cannot_run_leaves_a_good_sweep_as_it_is(options, says, tmp_path):
    task = replace(sweep_task.task(), calibration=int)
    small = {**GRID, "windows": (0.5,), "lrs": (1e-3,), "seeds": 1, "methods": (), "comparisons": ("same",)}
    sweep.run(task, tmp_path, **small)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    with pytest.raises((TypeError, ValueError), match=says):
        sweep.run(task, tmp_path, **{**small, **options})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()} == before


def test_what_is_no_task_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"task must be an ipca.lab.sweep.Task or a Python file .*, got 5"):
        sweep.run(5, tmp_path, **GRID)


@pytest.mark.parametrize("name", ["early", "workers", "threads"])
def test_counts_are_positive(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        sweep.run(TASK, tmp_path / "out", **{**GRID, name: 0})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [2.5, 1.0, "2", None, True])
@pytest.mark.parametrize("name", ["early", "workers", "threads", "tune"])
def test_counts_are_whole_numbers(name, value, tmp_path):
    options = {"lrs": (1e-3,), "seeds": 1, "early": 2}
    for command in (sweep.run, sweep.plan_sweep):
        with pytest.raises(TypeError, match=f"{name} must be a whole number, got {value!r}"):
            command(TASK, tmp_path / "out", **{**options, name: value})
    assert not (tmp_path / "out").exists()


def test_rounds_of_tuning_are_not_negative(tmp_path):
    with pytest.raises(ValueError, match="tune must be at least 0, got -1"):
        sweep.run(TASK, tmp_path, **{**GRID, **SMALL}, tune=-1)


def test_counts_of_numpy_are_numbers(tmp_path):
    sweep.run(TASK, tmp_path, **{**GRID, **SMALL, "early": np.int64(2), "checkpoints": np.array([1])})
    assert sweep.plan_sweep(TASK, tmp_path, **SMALL, checkpoints=(1,)).left == 0


def test_a_task_that_changes_the_folder_loses_no_run(tmp_path, monkeypatch):
    def train(model, groups, seed):
        (tmp_path / "sub").mkdir(exist_ok=True)
        os.chdir(tmp_path / "sub")
        sweep_task.train(model, groups, seed)

    monkeypatch.chdir(tmp_path)
    rows = sweep.run(replace(sweep_task.task(), train=train), "out", **{**GRID, **SMALL, "report": True})
    assert len(read(tmp_path / "out")) == len(rows) == 2
    assert (tmp_path / "out" / "report.html").is_file()
    assert not any((tmp_path / "sub").iterdir())


@pytest.mark.parametrize("change", [{}, {"early": 3}, {"checkpoints": (1,)}, {"early": 3, "overwrite": True}])
def test_one_sweep_at_a_time_works_in_a_folder(change, tmp_path):
    refused = []

    def train(model, groups, seed):
        other = {**GRID, **SMALL, **change}
        with pytest.raises(RuntimeError, match=r"another sweep runs in .*out; wait for it, or choose another folder"):
            sweep.run(TASK, tmp_path / "out", **other)
        refused.append(seed)
        sweep_task.train(model, groups, seed)

    options = {**GRID, **SMALL, "seeds": 2}
    rows = sweep.run(replace(sweep_task.task(), train=train), tmp_path / "out", **options)
    assert refused == [0, 1]
    assert rows == sweep.run(sweep_task.task(), tmp_path / "again", **options)
    assert len(list((tmp_path / "out" / "trials").iterdir())) == 2


def test_a_folder_of_another_sweep_is_refused(swept):
    folder, _ = swept
    before = (folder / "rows.csv").read_bytes()
    with pytest.raises(ValueError, match="contains another sweep: early differ \\(early was 2, is now 3\\); use a new"):
        sweep.run(TASK, folder, **{**GRID, "early": 3})
    assert (folder / "rows.csv").read_bytes() == before
    assert json.loads((folder / "settings.json").read_text())["fixed"]["early"] == 2


def test_a_damaged_trial_is_run_again(swept, tmp_path):
    options = {**GRID, "comparisons": ("same",), "methods": (), "windows": (0.5,)}
    rows = sweep.run(TASK, tmp_path, **options)
    path = next((tmp_path / "trials").glob("*.json"))
    path.write_text(path.read_text()[:40])
    assert sweep.run(TASK, tmp_path, **options) == rows


def chatty(model, groups, seed):
    print("{'train_runtime': 1}")
    sweep_task.train(model, groups, seed)


@pytest.mark.parametrize("progress", [True, False])
def test_what_a_task_prints_arrives_whole_beside_the_bar(progress, tmp_path, capsys):
    options = {**GRID, "windows": (0.5,), "methods": (), "comparisons": ("same",), "progress": progress}
    sweep.run(replace(sweep_task.task(), train=chatty), tmp_path, **options)
    assert capsys.readouterr().out == "{'train_runtime': 1}\n" * 4
