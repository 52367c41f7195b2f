"""The steps of bench/gpu.py with other commands in their place."""

import importlib
import json
import sys
import time

import pytest
import torch

import ipca
from bench import backend_table, gpu, pc_linear
from bench.providers import Cell, Provider, Sample
from ipca.kernels import tables
from ipca.ops import check_cases, self_check


def python(code, **options):
    name = options.pop("name", "step")
    return gpu.Step(name, ("-c", code), options.pop("limit", 60), **options)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(gpu, "START_SECONDS", 1)
    monkeypatch.setattr(gpu, "SUMMARY_SECONDS", 0)


def mark(path):
    return f"open({str(path)!r}, 'a').write('x')"


def test_steps_that_are_done_are_not_run_again_and_those_that_resume_are(tmp_path):
    once, always = tmp_path / "once", tmp_path / "always"
    steps = (python(mark(once), name="a"), python(mark(always), name="b", resumes=True))
    assert gpu.run_all(steps, tmp_path, 60) == 0
    assert gpu.run_all(steps, tmp_path, 60) == 0
    assert (once.read_text(), always.read_text()) == ("x", "xx")


def test_a_failing_step_leaves_the_rest_their_turn_and_is_tried_again(tmp_path, capsys):
    later = tmp_path / "later"
    steps = (python("print('why it failed'); raise SystemExit(5)", name="a"), python(mark(later), name="b"))
    assert gpu.run_all(steps, tmp_path, 60) == 1
    assert later.exists()
    assert json.loads((tmp_path / "state.json").read_text())["a"]["status"] == "failed"
    said = capsys.readouterr().out
    assert "why it failed" in said
    assert "a: failed, exit 5" in said
    assert gpu.run_all((python("", name="a"),), tmp_path, 60) == 0


def test_a_hanging_step_is_stopped_with_all_that_it_started(tmp_path):
    child, later = tmp_path / "child", tmp_path / "later"
    sleeper = f"import time; time.sleep(2.5); {mark(child)}"
    hang = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleeper!r}])"
    began = time.monotonic()
    assert gpu.run_all((python(hang, name="a", limit=1.5), python(mark(later), name="b")), tmp_path, 60) == 1
    assert time.monotonic() - began < 2.5
    assert later.exists()
    assert gpu.read_state(tmp_path)["a"]["words"].startswith("stopped after")
    time.sleep(max(0.0, began + 3 - time.monotonic()))
    assert not child.exists()


def test_no_step_begins_without_time_and_one_leaves_what_the_next_needs(tmp_path):
    said = tmp_path / "said"
    tell = gpu.Step("a", ("-c", f"import sys; open({str(said)!r}, 'w').write(sys.argv[1])", "{seconds}"), 1000, keep=30)
    assert gpu.run_all((tell,), tmp_path, 60) == 0
    assert 25 <= int(said.read_text()) <= 29
    late = python("", name="late")
    assert gpu.run_all((late,), tmp_path, 0) == 0
    assert gpu.read_state(tmp_path)["late"]["status"] == "no time"
    assert gpu.run_all((late,), tmp_path, 60) == 0
    assert gpu.read_state(tmp_path)["late"]["status"] == "done"


def test_a_bench_that_lost_the_device_goes_on_in_a_new_process(tmp_path):
    count = tmp_path / "count"
    code = f"{mark(count)}; raise SystemExit(3 if len(open({str(count)!r}).read()) < 3 else 0)"
    assert gpu.run_all((python(code, resumes=True),), tmp_path, 60) == 0
    assert count.read_text() == "xxx"


def test_the_status_of_a_lost_device_is_that_of_the_bench():
    assert gpu.AGAIN == pc_linear.DEVICE_LOST


def test_a_missing_memory_checker_is_said_and_is_no_failure(tmp_path, capsys):
    step = gpu.Step("memcheck", ("-c", ""), 60, before=("no-such-checker", "--tool", "memcheck"))
    assert gpu.run_all((step,), tmp_path, 60) == 0
    assert "memcheck: skipped, no-such-checker is not on PATH" in capsys.readouterr().out


def test_the_summary_is_written_and_says_what_was_not_measured(tmp_path, capsys):
    gpu.run_all((python("", name="a"),), tmp_path, 60)
    gpu.summarize(tmp_path)
    assert (tmp_path / "summary.txt").read_text() in capsys.readouterr().out
    assert "a: done" in (tmp_path / "summary.txt").read_text()


def test_the_steps_name_files_and_options_that_exist(tmp_path, monkeypatch, capsys):
    checked = [step.arguments for step in gpu.STEPS if step.arguments[1].startswith("bench.")]
    assert len(checked) >= 5
    for _, name, *words in checked:
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit):
            importlib.import_module(name).main()
        text = capsys.readouterr().out
        assert [option for option in words if option.startswith("--") and option not in text] == []


CELL = Cell(300, 512, 256, rank=8, dropout=0.1)


@pytest.mark.gpu
def test_auto_takes_the_backend_that_was_measured_fastest(tmp_path, monkeypatch):
    monkeypatch.setenv("IPCA_CACHE", str(tmp_path))
    device = torch.device("cuda")
    path = tables.cache_file(device)
    self_check.store(device, dict.fromkeys(check_cases.DTYPES, ""))
    assert backend_table.measure_backends([CELL], path, device, seconds=60)
    rows = {tuple(row[0]): row[2] for row in tables.read(path)["backends"]}
    assert len(rows) == 4
    sample = Sample(CELL, device, 0)
    layer = sample.layer(Provider("ipca-auto", "residual"))
    times = rows["bfloat16", False, True, True]
    assert "merged" not in times
    assert ipca.nn.explain(layer, sample.x).backend == min(times, key=times.get)
