"""A task file is found out before anything runs."""

import pickle
from dataclasses import replace

import pytest

from ipca._error_note import _place_in_user_code, error_note
from ipca.lab.sweep import load_task
from ipca.model.settings import AdapterSettings
from ipca.svd.decompose import tolerance
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


WHERE = {
    "the file": ("raise KeyError('mine')\n", 1),
    "task()": ("def task():\n    raise KeyError('mine')\n", 2),
    "a call of a library": ("import json\ndef task():\n\n    return json.loads('{')\n", 4),
}


@pytest.mark.parametrize(("text", "line"), WHERE.values(), ids=WHERE)
def test_an_error_knows_the_line_of_the_file(text, line, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises((KeyError, ValueError)) as found:
        load_task(path)
    assert found.value.place == f"{path}:{line}"


def test_the_place_of_an_error_goes_to_another_process():
    try:
        with error_note("In the trial x."):
            raise KeyError("mine")
    except KeyError as error:
        sent = pickle.loads(pickle.dumps(error))
    assert sent.place.startswith(f"{__file__}:")
    assert sent.__notes__ == ["In the trial x."]


def test_an_error_of_ipca_itself_has_no_place():
    with pytest.raises(ValueError, match="quick") as found, error_note("While testing."):
        tolerance("quick")
    assert found.value.place.startswith(__file__)  # it was called from here
    assert _place_in_user_code(ValueError("never raised")) is None
