"""A task file is found out before anything runs."""

from dataclasses import replace

import pytest

from ipca.lab.sweep import load_task
from ipca.model.settings import AdapterSettings
from tests.helpers import sweep_task


def test_a_task_file_is_loaded(tmp_path):
    (tmp_path / "other.py").write_text("NAME = 'middle'\n")
    path = tmp_path / "mine.py"
    path.write_text("from tests.helpers import sweep_task\nimport other\ndef task():\n    return sweep_task.task()\n")
    assert load_task(path) == sweep_task.task()


@pytest.mark.parametrize(
    ("text", "says"),
    [("x = 1\n", "defines no function task"), ("def task():\n    return 3\n", "returned a int; it must return")],
)
def test_files_without_a_task_say_so(text, says, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(TypeError, match=says):
        load_task(path)


def test_an_error_in_a_task_file_names_the_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import no_such_module_anywhere\n")
    with pytest.raises(ImportError, match="no_such_module_anywhere") as found:
        load_task(path)
    assert found.value.__notes__ == [f"In the task file {path}."]


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no task file at"):
        load_task(tmp_path / "none.py")


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"train": 3}, TypeError, "train must be a function, got 3"),
        ({"labels": "accuracy"}, TypeError, "labels must be a mapping, .*; got 'accuracy'"),
        ({"settings": {"rank": 2}}, TypeError, "settings must be an ipca.model.AdapterSettings"),
        ({"settings": AdapterSettings(window_pattern={"a": "minor"})}, ValueError, "leave window_pattern out"),
    ],
)
def test_wrong_fields_say_so(change, error, says):
    with pytest.raises(error, match=says):
        replace(sweep_task.task(), **change)
