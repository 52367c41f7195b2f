"""``ipca sweep``: a verdict, a table and a report, or one line that names the error."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ipca._atomic import locked_folder
from ipca.cli.main import _stdout_elsewhere, main
from ipca.lab.baselines import CONTROLS
from tests.helpers import sweep_task
from tests.helpers.sweep_rows import Made

TASK = Path(sweep_task.__file__)
OPTIONS = (
    "--windows",
    "0.0",
    "0.5",
    "1.0",
    "--lrs",
    "1e-3",
    "1e-2",
    "--seeds",
    "2",
    "--early",
    "2",
    "--methods",
    "lora",
)


def test_a_sweep_writes_its_table_and_report_and_says_the_verdict(tmp_path, capsys):
    assert main(["sweep", str(TASK), "-o", str(tmp_path), *OPTIONS, "--json", "--quiet"]) == 0
    said = json.loads(capsys.readouterr().out)
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert said["rows"] == len(rows) == 1 + (4 + 3 + 3) * 4
    assert said["failed"] == 0
    assert "too few seeds" in said["verdict"].lower()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "too few seeds" in page.lower()
    assert page.count("<svg") >= 3
    assert main(["sweep", str(TASK), "-o", str(tmp_path), *OPTIONS]) == 0
    output = capsys.readouterr().out
    assert said["verdict"] in output
    assert f"{len(rows)} rows, 0 failed" in output


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--lrs", "-1"), "argument --lrs: must be a positive number, got '-1'"),
        (("--methods", "pissa"), "argument --methods: invalid choice: 'pissa'"),
        (("--comparisons", "same", "best"), "argument --comparisons: invalid choice: 'best'"),
        (("--comparisons", "update"), "--comparisons must include same"),
        (("--windows", "1"), "argument --windows: window 1 is ambiguous, an index or a fraction: write 'start=1'"),
    ],
)
def test_a_wrong_option_is_wrong_usage_and_nothing_is_read(options, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sweep", str(tmp_path / "none.py"), "-o", str(tmp_path / "out"), *options])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("ipca sweep: error: ")
    assert says in error
    assert not (tmp_path / "out").exists()


def test_windows_without_the_reference_are_one_line_and_nothing_is_written(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["sweep", str(TASK), "-o", str(out), "--windows", "0.3"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("ipca: error: equal updates are those of the reference window '0.5'")
    assert not out.exists()


def test_a_count_that_is_none_and_the_names_of_the_controls(capsys):
    with pytest.raises(SystemExit):
        main(["sweep", str(TASK), "-o", "out", "--seeds", "x"])
    assert "argument --seeds: must be a whole number of at least 1, got 'x'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["sweep", "--help"])
    said = "".join(capsys.readouterr().out.split())  # lines may break after a hyphen
    assert all(name in said for name in CONTROLS)


def test_an_error_of_the_task_is_one_line_that_names_the_trial(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import replace\nfrom tests.helpers import sweep_task\n"
        "def train(model, groups, seed):\n    raise KeyError('mine')\n"
        "def task():\n    return replace(sweep_task.task(), train=train)\n"
    )
    assert main(["sweep", str(path), "-o", str(tmp_path / "out"), *OPTIONS, "--quiet"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("ipca: error: KeyError: 'mine'. In the trial 0.0 (same rate, lr 0.001, seed 0).")


def test_a_missing_task_is_one_line(tmp_path, capsys):
    assert main(["sweep", str(tmp_path / "none.py"), "-o", str(tmp_path / "out")]) == 1
    assert "no task file at" in capsys.readouterr().err


ERRORS = {
    "train": "def train(model, groups, seed):\n    raise {}('full')\n",
    "evaluate": "def evaluate(model):\n    raise {}('full')\n",
    "build": "def build():\n    raise {}('full')\n",
}


@pytest.mark.parametrize("kind", ["RuntimeError", "ValueError", "OSError", "KeyError", "ZeroDivisionError"])
@pytest.mark.parametrize("name", ERRORS)
def test_an_error_of_the_task_has_its_type_and_place(name, kind, tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import replace\nfrom tests.helpers import sweep_task\n"
        + ERRORS[name].format(kind)
        + f"def task():\n    return replace(sweep_task.task(), {name}={name})\n"
    )
    assert main(["sweep", str(path), "-o", str(tmp_path / "out"), *OPTIONS, "--quiet"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"ipca: error: {kind}: ")
    assert error.endswith(f" Raised at {path}:4.")


def test_an_error_of_syntax_has_its_line(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text("def task():\n    return (\n")
    assert main(["sweep", str(path), "-o", str(tmp_path / "out"), *OPTIONS, "--quiet"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "SyntaxError" in error
    assert "mine.py, line 2" in error


FEW = ("--windows", "0.5", "--lrs", "1e-3", "--seeds", "1", "--early", "2", "--methods", "--comparisons", "same")


def test_an_edited_task_keeps_its_trials(tmp_path, capsys):
    path, log = tmp_path / "mine.py", tmp_path / "log"
    text = (
        "from dataclasses import replace\nfrom tests.helpers import sweep_task\n"
        f"def train(*given):\n    open({str(log)!r}, 'a').write('x')\n    return sweep_task.train(*given)\n"
        "def task():\n    return replace(sweep_task.task(), train=train, labels={'target': 'accuracy'})\n"
    )
    command = ["sweep", str(path), "-o", str(tmp_path / "out"), *FEW, "--quiet"]
    path.write_text(text)
    assert main(command) == 0
    path.write_text(text.replace("'accuracy'", "'accuracy on 100'"))
    assert main(command) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "line 7 was " in error
    assert "accuracy on 100" in error
    assert error.endswith("; keep them with --accept-task-change, or use a new folder.")
    assert main([*command, "--accept-task-change"]) == 0
    assert main(command) == 0
    assert log.read_text() == "x"
    assert "accuracy on 100" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    path.write_text(text)
    assert main([*command, "--force"]) == 0
    assert log.read_text() == "xx"


def test_a_task_that_changes_the_folder_is_reported_all_the_same(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import os\nfrom dataclasses import replace\nfrom tests.helpers import sweep_task\n"
        f"def train(*given):\n    os.chdir({str(tmp_path.parent)!r})\n    return sweep_task.train(*given)\n"
        "def task():\n    return replace(sweep_task.task(), train=train)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "mine.py", "-o", "out", *FEW]) == 0
    assert "2 rows, 0 failed: out/rows.csv" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_second_sweep_in_the_folder_is_one_line(tmp_path, capsys):
    with locked_folder(tmp_path, "sweep runs"):
        assert main(["sweep", str(TASK), "-o", str(tmp_path), *FEW, "--force"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == f"ipca: error: another sweep runs in {tmp_path}; wait for it, or choose another folder."
    assert not any(tmp_path.iterdir())


def test_checkpoints_beyond_the_end_are_said(tmp_path, capsys):
    command = ["sweep", str(TASK), "-o", str(tmp_path / "out"), *FEW, "--checkpoints", "3", "500", "700"]
    with pytest.warns(RuntimeWarning, match=r"checkpoints 500, 700 are beyond the last optimizer step of 0\.5 \("):
        assert main(command) == 0
    assert "no run took so many optimizer steps as --checkpoints 500 700" in capsys.readouterr().out


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["sweep", str(TASK), "-o", str(out), *OPTIONS, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(
        "3 windows + lora × 2 rates × 2 seeds: at most 40 trainings (16 same, 12 sqrt-sigma, 12 upda"
    )
    assert "the time is not known before the first" in said
    assert not out.exists()
    assert main(["sweep", str(TASK), "-o", str(out), *FEW, "--quiet"]) == 0
    assert main(["sweep", str(TASK), "-o", str(out), *FEW[:5], "4", *FEW[6:], "--dry-run", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["trainings"], record["finished"], record["exact"]) == (4, 1, True)
    assert record["seconds_left"] == pytest.approx(3 * record["seconds_each"])


CHATTY = """
import os
from dataclasses import replace
from tests.helpers import sweep_task

def train(model, groups, seed):
    print("printed", flush=True)
    os.system("echo from a program")
    sweep_task.train(model, groups, seed)

def task():
    return replace(sweep_task.task(), train=train)
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_stdout_is_for_the_record(workers, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(CHATTY)
    command = [sys.executable, "-m", "ipca", "sweep", str(path), *FEW, "--seeds", "2", "--workers", workers]
    found = {
        options: subprocess.run(
            [*command, "-o", str(tmp_path / "-".join(("out", *options))), *options], capture_output=True, text=True
        )
        for options in [("--json",), ("--quiet",), ("--json", "--quiet"), ()]
    }
    assert all(run.returncode == 0 for run in found.values()), found
    assert json.loads(found["--json",].stdout)["rows"] == json.loads(found["--json", "--quiet"].stdout)["rows"]
    assert found["--quiet",].stdout == ""
    for words in ("printed", "from a program"):
        assert found["--json",].stderr.count(words) == found[()].stdout.count(words) == 2
        assert words not in found["--quiet",].stderr + found["--json", "--quiet"].stderr


@pytest.mark.parametrize(
    ("options", "out", "err"),
    [((False, False), "abc", ""), ((True, False), "", "abc"), ((False, True), "", ""), ((True, True), "", "")],
)
def test_other_processes_print_where_the_command_does(options, out, err, capfd):
    with _stdout_elsewhere(*options):
        print("a", end="", flush=True)
        subprocess.run([sys.executable, "-c", "print('b', end='')"], check=True)
        os.write(1, b"c")
    assert capfd.readouterr() == (out, err)
    print("d", end="", flush=True)
    assert capfd.readouterr().out == "d"


def test_a_plan_line_stands_before_the_bars(tmp_path, capsys):
    assert main(["sweep", str(TASK), "-o", str(tmp_path), *FEW]) == 0
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("1 window × 1 rate × 1 seed: 1 training (1 same). None is finished")


def test_a_task_of_another_kind_of_file_is_named(tmp_path, capsys):
    path = tmp_path / "vit.pt"
    path.write_bytes(b"weights")
    assert main(["sweep", str(path), "-o", str(tmp_path / "out")]) == 1
    assert f"{path} is not a Python file; see `ipca sweep --example`." in capsys.readouterr().err


@pytest.mark.parametrize(("given", "name"), [(["--example"], "lm"), (["--example", "images"], "images")])
def test_an_example_is_printed_and_nothing_else_is_needed(given, name, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sweep", *given])
    assert stop.value.code == 0
    assert f"ipca sweep --example {name} > task.py" in capsys.readouterr().out


def test_a_report_of_two_sweeps_and_one_again(tmp_path, capsys):
    made = {"windows": ("0.5",), "methods": (), "lrs": (1e-3,), "seeds": 1, "comparisons": ("same",), "extra": ()}
    folders = [str(Made(**made).write(tmp_path / name)) for name in "ab"]
    out = tmp_path / "paper"
    out.mkdir()
    (out / "mine").write_text("precious")
    command = ["report", *folders, "--labels", "SST-2", "RTE", "-o", str(out), "--format", "svg"]
    assert main(command) == 1
    assert (
        "paper holds mine, which is not of an earlier report; choose a new folder. --force" in capsys.readouterr().err
    )
    assert main([*command, "--force", "--json"]) == 0
    assert (out / "mine").read_text() == "precious"
    record = json.loads(capsys.readouterr().out)
    assert set(record["verdicts"]) == set(folders)
    assert {path.name for path in (out / "figures").iterdir()} == {f"{name}.svg" for name in record["figures"]}
    assert main(["report", folders[0]]) == 0
    assert capsys.readouterr().out.endswith(f"report: {folders[0]}/report.html\n")
    assert main(["report", str(out / "figures")]) == 1
    assert "contains no rows.csv; pass the folder that a sweep wrote" in capsys.readouterr().err


@pytest.mark.parametrize("options", [("b",), ("--labels", "A"), ("--format", "pdf")])
def test_a_report_with_files_needs_a_folder_for_them(options, capsys):
    with pytest.raises(SystemExit):
        main(["report", "a", *options])
    assert "several sweeps, --labels and --format need --out" in capsys.readouterr().err
