"""A sweep's folder: what it refuses, and what a mistake leaves behind."""

import json
import shutil
import sys
from dataclasses import replace

import pytest

from ipca.lab import sweep
from ipca.lab.sweep.store import AUTO, SETTINGS, Store, TaskChangedError
from ipca.model import AdapterSettings
from tests.helpers import sweep_task

GRID = {"windows": (0.5,), "lrs": (1e-3,), "seeds": 1, "methods": (), "comparisons": ("same",), "early": 2}
QUIET = {"progress": False, "report": False}


def opened(folder, **fixed):
    store = Store(folder, fixed)
    store.prepare()
    store.describe({})
    return store


def test_a_folder_without_a_trial_takes_what_was_mended(tmp_path):
    opened(tmp_path, early=1)
    (tmp_path / AUTO).write_text("{}")
    (tmp_path / "rows.csv").write_text("the untrained model's row")
    Store(tmp_path, {"early": 2}).prepare()  # killed before the grid is known
    assert [path.name for path in tmp_path.iterdir()] == ["trials"]
    store = opened(tmp_path, early=2)
    assert json.loads((tmp_path / SETTINGS).read_text())["fixed"] == {"early": 2}
    assert not (tmp_path / AUTO).exists()
    store.put("a", [], 1.0)
    with pytest.raises(ValueError, match=r"contains another sweep: early differ \(early was 2, is now 3\)"):
        Store(tmp_path, {"early": 3})
    assert opened(tmp_path, early=2).get("a") == []


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"fixed": 3}'])
def test_settings_of_something_else_are_refused(text, tmp_path):
    (tmp_path / SETTINGS).write_text(text)
    with pytest.raises(ValueError, match=r"settings.json was not written by a sweep, or is damaged; use a new folder"):
        Store(tmp_path, {"early": 3})
    assert (tmp_path / SETTINGS).read_text() == text


@pytest.mark.parametrize("name", ["rows.csv", "seconds.csv", "report.html", "auto.json"])
def test_files_of_somebody_else_are_not_overwritten(name, tmp_path):
    (tmp_path / name).write_text("precious")
    with pytest.raises(ValueError, match=f"contains a {name} but no settings.json of a sweep; use a new folder"):
        sweep.run(sweep_task.task(), tmp_path, **GRID, **QUIET)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("precious")
    with pytest.raises(NotADirectoryError, match="out is a file; a sweep needs a folder"):
        sweep.run(sweep_task.task(), tmp_path / "out", **GRID, **QUIET)


def test_of_another_config_the_field_is_named(tmp_path):
    opened(tmp_path, settings={"rank": 2, "alpha": None}).put("a", [], 1.0)
    with pytest.raises(ValueError, match=r"settings.rank differ \(settings.rank was 2, is now 4\)"):
        Store(tmp_path, {"settings": {"rank": 4, "alpha": None}})


def test_a_layer_that_is_not_there_leaves_no_folder(tmp_path):
    task = replace(sweep_task.task(), settings=AdapterSettings(rank=2, targets=("nope",)))
    with pytest.raises(ValueError, match="no module matches the target 'nope'"):
        sweep.run(task, tmp_path / "out", **GRID, **QUIET)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("package", "option"), [("jinja2", {"report": True}), ("optuna", {"tune": 1})])
def test_a_missing_package_is_found_before_anything_runs(package, option, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match="pip install 'ipca-lora"):
        sweep.run(sweep_task.task(), tmp_path / "out", **GRID, **{**QUIET, **option})
    assert not (tmp_path / "out").exists()


# -- a changed task file

TEXT = "def task():\n    rank = 2\n    return rank\n"


def of_task(folder, text, sha, **options):
    store = Store(folder, {"early": 1, "task_sha256": sha}, source=text, **options)
    store.prepare()
    store.describe({})
    return store


@pytest.mark.parametrize("text", [TEXT + "# a comment\n", TEXT.replace("\n    rank", "\n\n    rank"), "# x\n" + TEXT])
def test_comments_and_layout_need_no_permission(text, tmp_path):
    of_task(tmp_path, TEXT, "a").put("done", [], 1.0)
    store = of_task(tmp_path, text, "b")
    assert store.get("done") == []
    assert store.earlier_tasks == ["a"]


def test_another_task_file_is_refused_with_its_first_change_and_taken_on_request(tmp_path):
    of_task(tmp_path, TEXT, "a").put("done", [], 1.0)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = TEXT.replace("rank = 2", "rank = 3")
    with pytest.raises(
        TaskChangedError, match=r"since 1 trials in .* \(line 2 was 'rank = 2', is now 'rank = 3'\)"
    ) as e:
        of_task(tmp_path, other, "b")
    assert "pass accept_task_change=True to keep them, or use a new folder" in str(e.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert of_task(tmp_path, other, "b", accept_task_change=True).get("done") == []
    third = of_task(tmp_path, TEXT + "x = 1\n", "c", accept_task_change=True)
    assert third.get("done") == []
    assert json.loads((tmp_path / SETTINGS).read_text())["earlier_tasks"] == ["a", "b"]
    assert of_task(tmp_path, TEXT + "x = 1\n", "c").earlier_tasks == ["a", "b"]


def test_a_folder_that_does_not_know_the_old_text_asks(tmp_path):
    of_task(tmp_path, None, "a").put("done", [], 1.0)
    with pytest.raises(TaskChangedError, match=r"since 1 trials in .* were finished\. Their rows"):
        of_task(tmp_path, TEXT, "b")
    assert of_task(tmp_path, TEXT, "b", accept_task_change=True).get("done") == []


def test_the_permission_covers_the_task_file_only(tmp_path):
    of_task(tmp_path, TEXT, "a").put("done", [], 1.0)
    with pytest.raises(ValueError, match="contains another sweep: early, task_sha256 differ"):
        Store(tmp_path, {"early": 2, "task_sha256": "b"}, source=TEXT, accept_task_change=True)


# -- trials are never thrown away unasked


def test_trials_without_settings_are_refused_and_stay(tmp_path):
    opened(tmp_path, early=1).put("done", [], 1.0)
    (tmp_path / SETTINGS).unlink()
    with pytest.raises(ValueError, match=r"contains a folder 'trials' that is not empty but no settings\.json"):
        Store(tmp_path, {"early": 1})
    assert (tmp_path / "trials" / "done.json").is_file()


FOREIGN = ("patient-1.csv", "patients.json", "list.json", ".tmp-download", "site/visit.json")


def others(folder):
    """Files of somebody else in a folder named as that of a sweep's trials, with what they hold."""
    there = {folder / "trials" / name: b'[{"rows": 1}]' if name == "list.json" else b'{"rows": 1}' for name in FOREIGN}
    for path, text in there.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    return there


@pytest.mark.parametrize("name", FOREIGN)
def test_trials_of_somebody_else_are_refused_and_stay(name, tmp_path):
    path = tmp_path / "trials" / name
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    with pytest.raises(ValueError, match=r"contains a folder 'trials' that is not empty but no settings\.json"):
        sweep.run(sweep_task.task(), tmp_path, **GRID, **QUIET)
    assert [each.read_text() for each in tmp_path.rglob("*") if each.is_file()] == ["precious"]


@pytest.mark.parametrize("settings", ["none", "another", "same"])
def test_overwriting_leaves_what_no_sweep_wrote(settings, tmp_path):
    if settings != "none":
        opened(tmp_path, early=1).put("done", [], 1.0)
    there = others(tmp_path)
    Store(tmp_path, {"early": 1 if settings == "same" else 2}, overwrite=True).prepare()
    assert {path: path.read_bytes() for path in there} == there
    assert (tmp_path / "trials" / "done.json").exists() == (settings == "same")


def test_another_sweep_without_a_trial_takes_none_of_the_files_beside_it(tmp_path):
    opened(tmp_path, early=1)
    there = others(tmp_path)
    opened(tmp_path, early=2)
    assert {path: path.read_bytes() for path in there} == there


def test_a_file_in_place_of_the_trials_is_refused(tmp_path):
    (tmp_path / "trials").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(NotADirectoryError, match="trials is a file; a sweep needs a folder there"):
            Store(tmp_path, {"early": 1}, overwrite=overwrite)


def test_what_a_killed_sweep_left_is_cleared_away(tmp_path):
    left = opened(tmp_path, early=1).trials / f".tmp-{'a' * 16}"
    left.write_text("half")
    assert opened(tmp_path, early=1).trials.joinpath(left.name).exists()
    opened(tmp_path, early=2)
    assert not left.exists()


@pytest.mark.parametrize("settings", ["another", "damaged", "gone"])
def test_overwriting_deletes_them(settings, tmp_path):
    opened(tmp_path, early=1).put("done", [], 1.0)
    assert Store(tmp_path, {"early": 1}, overwrite=True).get("done") == []  # nothing else to replace
    if settings == "damaged":
        (tmp_path / SETTINGS).write_text("{")
    if settings == "gone":
        (tmp_path / SETTINGS).unlink()
    store = Store(tmp_path, {"early": 2 if settings == "another" else 1}, overwrite=True)
    assert store.get("done") is None
    assert (tmp_path / "trials" / "done.json").exists()
    store.prepare()
    assert [path.name for path in tmp_path.rglob("*")] == ["trials"]


# -- trials of other settings never mix


def test_a_trial_of_other_settings_is_refused_by_name(tmp_path):
    opened(tmp_path / "other", early=3).put("theirs", [], 1.0)
    store = opened(tmp_path / "own", early=2)
    store.put("mine", [], 1.0)
    shutil.copy(tmp_path / "other/trials/theirs.json", store.trials)  # as a sweep on a file system without locks does
    says = r"trials/theirs\.json is a run of other settings than those in .*settings\.json.*; delete the file"
    with pytest.raises(ValueError, match=says):
        store.read("theirs")
    with pytest.raises(ValueError, match=says):
        Store(tmp_path / "own", {"early": 2})
    assert (store.trials / "theirs.json").exists()
    again = Store(tmp_path / "own", {"early": 2}, overwrite=True)
    assert again.get("theirs") is None
    again.prepare()
    assert [path.name for path in store.trials.iterdir()] == ["mine.json"]


@pytest.mark.parametrize(
    "change",
    [{"early": 3}, {"settings": {"rank": 4}}, {"task_sha256": "b"}, {"checkpoints": [1]}, {"model_sha256": "n"}],
)
def test_every_fixed_setting_counts(change, tmp_path):
    fixed = {"early": 2, "settings": {"rank": 2}, "task_sha256": "a", "checkpoints": [], "model_sha256": "m"}
    opened(tmp_path / "other", **{**fixed, **change}).put("a", [], 1.0)
    shutil.copytree(tmp_path / "other/trials", opened(tmp_path / "own", **fixed).trials, dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"a\.json is a run of other settings"):
        Store(tmp_path / "own", fixed)


def test_a_trial_of_an_earlier_version_is_of_the_settings_of_its_folder(tmp_path):
    store = opened(tmp_path, early=1)
    (store.trials / "a.json").write_text('{"rows": [], "seconds": 1.0}')
    assert Store(tmp_path, {"early": 1}).get("a") == []
    with pytest.raises(ValueError, match="contains another sweep: early differ"):
        Store(tmp_path, {"early": 2})


@pytest.mark.parametrize("earlier", [None, "a"])
def test_trials_of_an_accepted_text_of_the_task_stay(earlier, tmp_path):
    of_task(tmp_path, TEXT if earlier else None, earlier).put("done", [], 1.0)
    of_task(tmp_path, TEXT + "x = 1\n", "b", accept_task_change=True).put("more", [], 1.0)
    store = of_task(tmp_path, TEXT + "x = 1\n", "b")
    assert store.get("done") == store.get("more") == []
