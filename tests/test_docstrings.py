"""Docstrings of public names: their examples run, and they tell what every argument is and which errors come."""

import copy
import doctest
import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import ipca

for needed in ("peft", "transformers", "matplotlib"):
    pytest.importorskip(needed)

ROOT = Path(__file__).resolve().parents[1]


def api_page():
    spec = importlib.util.spec_from_file_location("api_page", ROOT / "docs" / "api_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


VALUES = {
    f"{package.__name__}.{name}": getattr(package, name)
    for package in api_page().packages()
    for name in package.__all__
}
PUBLIC = {path: value for path, value in VALUES.items() if inspect.isclass(value) or inspect.isfunction(value)}
EXAMPLES = [path for path, value in PUBLIC.items() if ">>>" in (value.__doc__ or "")]
HOME = {id(value): path for path, value in reversed(PUBLIC.items())}
FUNCTIONS = {path: value for path, value in PUBLIC.items() if inspect.isfunction(value) and HOME[id(value)] == path}
NO_ERRORS = {"ipca.lab.baselines.penalty", "ipca.lab.baselines.plain_lora_factors", "ipca.nn.quantization_kind"}


def arguments(function):
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls", "kwargs")]


@pytest.mark.parametrize("path", [path for path in EXAMPLES if HOME[id(PUBLIC[path])] == path])
def test_an_example_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"copy": copy, "ipca": ipca, "nn": nn, "torch": torch, "Path": Path}
    example = doctest.DocTestParser().get_doctest(inspect.getdoc(PUBLIC[path]), names, path, None, None)
    said = []
    doctest.DocTestRunner(verbose=False).run(example, out=said.append)
    assert said == []


def test_the_most_important_names_have_an_example():
    wanted = "apply_pc load_adapter export summary disabled unload param_groups window_svd Window"
    assert {f"ipca.{name}" for name in wanted.split()} <= set(EXAMPLES)
    assert {"ipca.peft.PCConfig", "ipca.nn.LinearPC", "ipca.analysis.drift"} <= set(EXAMPLES)


@pytest.mark.parametrize("path", FUNCTIONS)
def test_a_function_tells_its_arguments_and_errors(path):
    text = inspect.getdoc(FUNCTIONS[path])
    assert [name for name in arguments(FUNCTIONS[path]) if not re.search(rf"\b{name}\b", text)] == []
    if arguments(FUNCTIONS[path]):
        assert "Args:" in text
    if path not in NO_ERRORS:
        assert "Raises:" in text


CLASSES = {path for path, value in PUBLIC.items() if inspect.isclass(value) and not issubclass(value, Exception)}


@pytest.mark.parametrize("path", sorted(CLASSES - {"ipca.peft.PCConfig"}))  # most of its arguments are PEFT's
def test_a_class_tells_its_arguments(path):
    text = inspect.getdoc(PUBLIC[path])
    assert [name for name in arguments(PUBLIC[path]) if not re.search(rf"\b{name}\b", text)] == []
