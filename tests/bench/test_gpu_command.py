"""The steps of bench/gpu.py with other commands in their place."""

import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import ipca
from bench import gpu, pc_linear
from bench.grid import Cell
from bench.providers import Provider, Sample
from bench.rows import read_rows
from ipca.device import check_cases, self_check, tune
from ipca.kernels import tables


def python(code, **options):
    name = options.pop("name", "step")
    return gpu.Step(name, ("-c", code), options.pop("limit", 60), **options)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(gpu, "START_SECONDS", 1)
    monkeypatch.setattr(gpu, "SUMMARY_SECONDS", 0)


def mark(path):
    return f"open({str(path)!r}, 'a').write('x')"


def test_steps_that_are_done_are_not_run_again_and_unfinished_ones_are_once_a_call(tmp_path):
    once, always = tmp_path / "once", tmp_path / "always"
    steps = (python(mark(once), name="a"), python(f"{mark(always)}; raise SystemExit({gpu.UNFINISHED})", name="b"))
    assert gpu.run_all(steps, tmp_path, 60) == 0
    assert gpu.run_all(steps, tmp_path, 60) == 0
    assert (once.read_text(), always.read_text()) == ("x", "xx")
    assert {name: entry["status"] for name, entry in gpu.read_state(tmp_path).items()} == {
        "a": "done",
        "b": "unfinished",
    }


def test_a_failing_step_leaves_the_rest_their_turn_and_is_tried_again(tmp_path, capsys):
    later = tmp_path / "later"
    steps = (python("print('why it failed'); raise SystemExit(5)", name="a"), python(mark(later), name="b"))
    assert gpu.run_all(steps, tmp_path, 60) == 1
    assert later.exists()
    assert json.loads((tmp_path / "state.json").read_text())["a"]["status"] == "failed"
    said = capsys.readouterr().out
    assert "why it failed" in said
    assert re.search(r"^a +failed +\d+\.\d s  exit 5$", said, re.MULTILINE)
    assert gpu.run_all((python("", name="a"),), tmp_path, 60) == 0


def test_a_hanging_step_is_stopped_with_all_that_it_started(tmp_path):
    child, later = tmp_path / "child", tmp_path / "later"
    sleeper = f"import time; time.sleep(2.5); {mark(child)}"
    hang = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleeper!r}])"
    began = time.monotonic()
    assert gpu.run_all((python(hang, name="a", limit=1.5), python(mark(later), name="b")), tmp_path, 60) == 1
    assert time.monotonic() - began < 2.5
    assert later.exists()
    assert gpu.read_state(tmp_path)["a"]["words"] == "out of time"
    time.sleep(max(0.0, began + 3 - time.monotonic()))
    assert not child.exists()


def test_a_step_is_told_its_share_and_none_begins_without_time(tmp_path):
    said = tmp_path / "said"
    for limit, least, most in ((30, 27, 29), (1000, 55, 59)):
        told = ("-c", f"import sys; open({str(said)!r}, 'w').write(sys.argv[1])", "{seconds}")
        assert gpu.run_all((gpu.Step(f"of {limit}", told, limit),), tmp_path, 60) == 0
        assert least <= int(said.read_text()) <= most
    late = python("", name="late")
    assert gpu.run_all((late,), tmp_path, 0) == 0
    assert gpu.read_state(tmp_path)["late"]["status"] == "no time"
    assert gpu.run_all((late,), tmp_path, 60) == 0
    assert gpu.read_state(tmp_path)["late"]["status"] == "done"


def test_a_bench_that_lost_the_device_goes_on_in_a_new_process(tmp_path):
    count = tmp_path / "count"
    code = f"{mark(count)}; raise SystemExit(3 if len(open({str(count)!r}).read()) < 3 else 0)"
    assert gpu.run_all((python(code),), tmp_path, 60) == 0
    assert count.read_text() == "xxx"


def test_the_exit_statuses_are_those_of_the_benches():
    assert (gpu.AGAIN, gpu.UNFINISHED) == (pc_linear.DEVICE_LOST, pc_linear.UNFINISHED)


def test_a_missing_memory_checker_is_said_and_is_no_failure(tmp_path, capsys):
    step = gpu.Step("memcheck", ("-c", ""), 60, before=("no-such-checker", "--tool", "memcheck"))
    assert gpu.run_all((step,), tmp_path, 60) == 0
    assert re.search(
        r"^memcheck +skipped +0\.0 s  no-such-checker is not on PATH$", capsys.readouterr().out, re.MULTILINE
    )


def test_the_summary_is_written_and_says_what_was_not_measured(tmp_path, capsys):
    gpu.run_all((python("", name="a"),), tmp_path, 60)
    (tmp_path / "pc_linear_some-gpu.csv").write_text(",".join(pc_linear.COLUMNS) + "\n")
    text = gpu.summarize(tmp_path)
    assert (tmp_path / "summary.txt").read_text() == f"{text}\n"
    assert re.match(r"a +done", text)
    assert "goal: not measured" in text


def test_the_steps_name_files_and_options_that_exist(tmp_path, monkeypatch, capsys):
    checked = [step.arguments for step in gpu.STEPS if step.arguments[1].startswith("bench.")]
    assert len(checked) >= 5
    for _, name, step, *words in checked:
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit):
            importlib.import_module(name).main()
        text = capsys.readouterr().out
        assert [option for option in words if option.startswith("--") and option not in text] == []
        assert step in text


def test_a_step_finds_the_triton_cache_beside_the_results(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    said = tmp_path / "said"
    tell = f"import os; open({str(said)!r}, 'w').write(os.environ.get('TRITON_CACHE_DIR', 'none'))"
    gpu.run_all((python(tell, name="a"),), tmp_path, 60)
    assert said.read_text() == "none"
    (tmp_path / "triton-cache").mkdir()
    gpu.run_all((python(tell, name="b"),), tmp_path, 60)
    assert said.read_text() == str(tmp_path / "triton-cache")


def test_results_of_a_gpu_and_of_a_dry_run_do_not_meet(tmp_path, monkeypatch):
    (tmp_path / "environment.json").write_text(json.dumps({"device": "Some GPU"}))
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry-run", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="holds the results of Some GPU; name another folder with --out"):
        gpu.main()


def dry_run(out):
    """The command, in a session of its own."""
    words = [sys.executable, "-m", "bench.gpu", "--dry-run", "--out", str(out)]
    return subprocess.Popen(words, cwd=gpu.ROOT, stdout=subprocess.PIPE, text=True)


def interrupt(process, out, step, with_signal):
    """Send a signal during ``step``; what the command printed, when its children are gone."""
    ended = time.monotonic() + 300
    log = out / "log.txt"
    while not (log.exists() and f"gpu_steps {step} " in log.read_text()) and time.monotonic() < ended:
        time.sleep(0.1)
    time.sleep(1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert children
    process.send_signal(with_signal)
    said = process.communicate()[0]
    while any(Path("/proc", child).exists() for child in children) and time.monotonic() < ended:
        time.sleep(0.1)
    assert time.monotonic() < ended
    return said


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Triton and /proc")
def test_a_dry_run_reaches_every_step_and_resumes(tmp_path):
    said = interrupt(dry_run(tmp_path), tmp_path, "goal-tune", signal.SIGTERM)
    assert re.search(r"\n\nenvironment +done", said), "a summary, although it was stopped"
    interrupt(dry_run(tmp_path), tmp_path, "goal-cell", signal.SIGKILL)
    assert "goal-cell" not in gpu.read_state(tmp_path)

    said = dry_run(tmp_path).communicate()[0]
    state = gpu.read_state(tmp_path)
    found = {step.name: state[step.name]["status"] for step in gpu.STEPS}
    missing = {step.name: "skipped" for step in gpu.STEPS if step.before and not shutil.which(step.before[0])}
    assert found == {step.name: "done" for step in gpu.STEPS} | missing, (tmp_path / "log.txt").read_text()[-5000:]
    assert said.endswith((tmp_path / "summary.txt").read_text())

    log = (tmp_path / "log.txt").read_text()
    assert [log.count(f"gpu_steps {step} ") for step in ("environment", "goal-tune", "goal-cell", "sizes")] == [
        1,
        2,
        2,
        1,
    ]
    files = sorted(tmp_path.glob("*_*.csv"))
    assert [path.name.split("_dry")[0] for path in files] == ["pc_linear", "single_layer", "training", "window_svd"]
    for path in files:
        rows = read_rows(path)
        assert {row["device"] for row in rows} == {gpu.DRY_RUN}
        assert {row["status"].split(":")[0] for row in rows} <= {"ok", "refused"}
    before = {path: path.read_bytes() for path in files}
    dry_run(tmp_path).communicate()
    assert (tmp_path / "log.txt").read_text() == log
    assert {path: path.read_bytes() for path in files} == before


CELL = Cell(300, 512, 256, rank=8, dropout=0.1)


@pytest.mark.gpu
def test_auto_takes_the_backend_that_was_measured_fastest(tmp_path, monkeypatch):
    monkeypatch.setenv("IPCA_CACHE", str(tmp_path))
    device = torch.device("cuda")
    path = tables.cache_file(device)
    self_check.store(device, dict.fromkeys(check_cases.DTYPES, ""))
    problem = tune.Cell(CELL.M, CELL.N, CELL.K, CELL.rank, CELL.dtype, CELL.dropout)
    assert tune.measure_backends([problem], device, seconds=60)
    rows = {tuple(row[0]): row[2] for row in tables.read(path)["backends"]}
    assert len(rows) == 4
    sample = Sample(CELL, device, 0)
    layer = sample.layer(Provider("ipca-auto", "residual"))
    times = rows["bfloat16", False, True, True]
    assert "merged" not in times
    assert ipca.nn.explain(layer, sample.x).backend == min(times, key=times.get)
