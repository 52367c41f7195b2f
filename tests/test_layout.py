"""Imports go down only: a module may import its own package and what lies on strictly lower levels."""

import ast
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import ipca

LEVELS = {
    **dict.fromkeys(("_cache_folder", "_version"), -1),
    **dict.fromkeys(("window", "_hashing", "_extension", "_C"), 0),
    **dict.fromkeys(("_atomic", "_dtensor", "_error_note"), 0.5),
    "kernels": 0.75,
    **dict.fromkeys(("svd", "ops"), 1),
    "device": 2,
    "nn": 2,
    "model": 4,
    "io": 5,
    "": 5.5,  # ipca/__init__.py offers all of the above
    **dict.fromkeys(("offline", "analysis", "peft"), 6),
    "train": 6.5,
    "lab": 7,
    "cli": 8,
    "__main__": 9,
}
WITH_PEFT = ("lab", "peft", "train")
PEFT_READER = "ipca.io.peft_reader"  # asks PEFT what it makes of a file, where PEFT is installed
WITH_TRANSFORMERS = ("lab", "peft", "train", "cli")


def sources():
    """``(dotted module name, whether it is a package, source text)`` of every file, through symbolic links too."""
    root = Path(ipca.__file__).parent
    for folder, _, names in os.walk(root, followlinks=True):
        for path in sorted(Path(folder, name) for name in names if name.endswith(".py")):
            parts = ("ipca", *path.relative_to(root).with_suffix("").parts)
            is_package = parts[-1] == "__init__"
            yield ".".join(parts[:-1] if is_package else parts), is_package, path.read_text(encoding="utf-8")


def part_of(dotted):
    """The name below ``ipca`` that has a level; what ``ipca/__init__.py`` itself defines is its part ``""``."""
    below = dotted.split(".")[1:2]
    return below[0] if below and below[0] in LEVELS else ""


def imported(node, package):
    """The absolute dotted names that one syntax node imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        base = ".".join([*parents, *([node.module] if node.module else [])])
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and "import" in ast.unparse(node.func) and node.args:
        return [node.args[0].value] if isinstance(getattr(node.args[0], "value", None), str) else []
    return []


def complaint(target, part, lazy, reads_peft=False):
    """What is wrong with a module of ``part`` importing ``target``, or None."""
    root = target.split(".")[0]
    if root == "kernels":
        return "a bare `kernels` is another distribution; import ipca.kernels"
    if root == "peft" and part not in WITH_PEFT and not (reads_peft and lazy):
        return f"only {', '.join(WITH_PEFT)} may import peft"
    if root == "transformers" and part not in WITH_TRANSFORMERS and not lazy:
        return "transformers is imported inside functions only"
    below = part_of(target)
    if root == "ipca" and below != part and LEVELS[below] >= LEVELS[part]:
        return f"{part or 'ipca'} (level {LEVELS[part]}) may not import {below or 'ipca'} (level {LEVELS[below]})"
    return None


def check(module, is_package, text):
    """Every complaint about one source text."""
    top = module.split(".")[1:2]
    if top and top[0] not in LEVELS:
        return [f"{module}: {top[0]} has no level"]
    tree = ast.parse(text)
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lazy = {inner for function in functions for inner in ast.walk(function)}
    package = module if is_package else module.rpartition(".")[0]
    found = [
        (node.lineno, complaint(target, part_of(module), node in lazy, module == PEFT_READER))
        for node in ast.walk(tree)
        for target in imported(node, package)
    ]
    return [f"{module}:{line}: {words}" for line, words in found if words]


def test_every_module_belongs_to_a_level_and_imports_only_what_it_may():
    files = list(sources())
    assert {"ipca", "ipca.window", "ipca.svd.decompose", "ipca.io.adapter"} <= {module for module, *_ in files}
    assert [words for file in files for words in check(*file)] == []


def test_every_part_that_exists_is_where_the_levels_say():
    parts = {part_of(module) for module, *_ in sources()}
    assert {"window", "svd", "ops", "nn", "model", "io", ""} <= parts <= set(LEVELS)


PLANTED = [
    ("ipca.window", "from ipca.svd import window_svd", "window (level 0) may not import svd (level 1)"),
    ("ipca.window", "import ipca._hashing", "window (level 0) may not import _hashing (level 0)"),
    ("ipca.svd.krylov", "from ipca.ops.linear import pc_linear", "svd (level 1) may not import ops (level 1)"),
    ("ipca.svd.krylov", "from ..nn import LinearPC", "svd (level 1) may not import nn (level 2)"),
    ("ipca.svd.krylov", "from .. import nn", "svd (level 1) may not import nn (level 2)"),
    ("ipca.nn.linear", "from ipca import model", "nn (level 2) may not import model (level 4)"),
    ("ipca.nn.linear", "from ipca import apply_pc", "nn (level 2) may not import ipca (level 5.5)"),
    ("ipca.nn.linear", "from ipca import *", "nn (level 2) may not import ipca (level 5.5)"),
    ("ipca.nn.linear", "import ipca", "nn (level 2) may not import ipca (level 5.5)"),
    ("ipca.nn.linear", "import torch, ipca.model", "nn (level 2) may not import model (level 4)"),
    ("ipca.nn.linear", "def f():\n    from ipca.io import export", "nn (level 2) may not import io (level 5)"),
    ("ipca.nn.linear", "importlib.import_module('ipca.model')", "nn (level 2) may not import model (level 4)"),
    ("ipca.model.apply", "from ipca.io.adapter import save_adapter", "model (level 4) may not import io (level 5)"),
    ("ipca.peft.hub", "from ipca.analysis import angles", "peft (level 6) may not import analysis (level 6)"),
    ("ipca.analysis.angles", "import ipca.lab.demo.data", "analysis (level 6) may not import lab (level 7)"),
    ("ipca.lab.demo.encoder", "from ipca.cli import main", "lab (level 7) may not import cli (level 8)"),
    ("ipca.io.adapter_folder", "import peft", "only lab, peft, train may import peft"),
    ("ipca.io.peft_reader", "import peft", "only lab, peft, train may import peft"),
    ("ipca.io.peft_format", "def f():\n    import peft", "only lab, peft, train may import peft"),
    ("ipca.cli", "def f():\n    from peft import LoraConfig", "only lab, peft, train may import peft"),
    (
        "ipca.nn.layer_kinds",
        "from transformers.pytorch_utils import Conv1D",
        "transformers is imported inside functions only",
    ),
    ("ipca.analysis.text", "class A:\n    import transformers", "transformers is imported inside functions only"),
    ("ipca.ops.linear", "import kernels", "a bare `kernels` is another distribution"),
    ("ipca.ops.linear", "def f():\n    from kernels.linear import run", "a bare `kernels` is another distribution"),
    ("ipca.cli", "__import__('kernels')", "a bare `kernels` is another distribution"),
    ("ipca.plots", "", "plots has no level"),
    ("ipca.extra.plots", "import torch", "extra has no level"),
]


@pytest.mark.parametrize(("module", "text", "words"), PLANTED, ids=[f"{m}: {t!r}" for m, t, _ in PLANTED])
def test_the_checker_sees_a_planted_violation(module, text, words):
    (found,) = check(module, False, text)
    assert found.startswith(module)
    assert words in found


@pytest.mark.parametrize("part", ["cli", "lab", "peft", "analysis"])
def test_the_checker_keeps_the_front_free_of_what_lies_above_it(part):
    assert check("ipca", True, f"from ipca.{part} import main")
    assert check("ipca", True, f"from .{part} import main")
    assert check("ipca", True, f"from . import {part}")
    assert check(f"ipca.{part}", True, "import ipca") == []


@pytest.mark.parametrize(
    ("module", "is_package", "text"),
    [
        ("ipca", True, "from ipca import nn\nfrom ipca.io import export\nfrom . import model"),
        ("ipca.svd", True, "from ipca.svd.decompose import window_svd\nfrom .result import WindowSVD"),
        ("ipca.svd.krylov", False, "from ipca.window import Window\nfrom . import blocks\nfrom ..window import Window"),
        ("ipca.ops.linear", False, "def f():\n    from ipca.kernels.pc_linear import run"),
        ("ipca.nn.layer_kinds", False, "def f():\n    from transformers.pytorch_utils import Conv1D"),
        ("ipca.lab.demo.encoder", False, "import ipca, peft, transformers\nfrom ipca.analysis import angles"),
        ("ipca.peft.hub", False, "from peft import LoraConfig\nimport ipca.io"),
        ("ipca.io.peft_reader", False, "def f():\n    from peft import LoraConfig"),
        (
            "ipca.cli",
            False,
            "import transformers, ipca.lab.demo\nfrom ipca import apply_pc\nimport kernels_of_another_name",
        ),
    ],
)
def test_the_checker_allows_what_is_allowed(module, is_package, text):
    assert check(module, is_package, text) == []


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )


def test_importing_the_package_imports_nothing_heavy():
    code = """
import builtins, json, sys
import torch
plain, before, tried = builtins.__import__, set(sys.modules), []
def watched(name, globals=None, locals=None, fromlist=(), level=0):
    if not level:
        tried.append(name)
    return plain(name, globals, locals, fromlist, level)
builtins.__import__ = watched
import ipca
found = [sorted({*tried, *set(sys.modules) - before})]
ipca.apply_pc
print(json.dumps([*found, sorted(set(sys.modules) - before), torch.cuda.is_initialized()]))
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    names, used, cuda_started = json.loads(done.stdout)
    roots = {name.split(".")[0] for name in names}
    assert "ipca" in roots
    assert roots & {"torch", "scipy", "sympy", "triton", "transformers", "peft", "matplotlib", "kernels"} == set()
    assert "ipca.cli" not in names
    assert "ipca.lab" not in names
    used = {name.split(".")[0] for name in used}
    assert "safetensors" in used
    assert used & {"scipy", "sympy", "triton", "transformers", "peft", "matplotlib", "kernels"} == set()
    assert not cuda_started


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        *(([command, "--help"], 0) for command in ("init", "inspect", "sweep", "cache", "doctor", "demo")),
        (["completion", "bash"], 0),
        (["init", "--rank", "0"], 2),
        ([], 2),
    ],
)
def test_help_completion_and_wrong_usage_do_not_import_torch(words, status):
    code = f"""
import sys
from ipca.cli.main import main
try:
    status = main({words!r})
except SystemExit as stop:
    status = stop.code
print(status, sorted({{name.split(".")[0] for name in sys.modules}} & {{"torch", "numpy", "transformers"}}))
"""
    done = run_python(code)
    assert done.stdout.splitlines()[-1] == f"{status} []", done.stderr


def test_every_public_name_is_there():
    homes = [name for names in ipca._HOMES.values() for name in names]
    assert sorted([*homes, "nn"]) == ipca.__all__ == sorted(ipca.__all__)
    for name in (*ipca.__all__, *ipca._MODULES):
        assert getattr(ipca, name) is not None
        assert name in dir(ipca)
    with pytest.raises(AttributeError, match="module 'ipca' has no attribute 'nothing'"):
        getattr(ipca, "nothing")  # noqa: B009


def test_no_namesake_is_no_error(monkeypatch):
    asked = []

    def missing(name):
        asked.append(name)
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert ipca._check_distribution() is None
    assert asked == ["ipca"]


def test_a_namesake_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: SimpleNamespace(version="0.6.7"))
    with pytest.raises(ImportError, match=r"distribution 'ipca' 0\.6\.7 .* installed beside 'ipca-lora'") as error:
        ipca._check_distribution()
    assert "Uninstall both and install ipca-lora again" in str(error.value)


def test_an_installed_namesake_stops_the_import(tmp_path):
    folder = tmp_path / "ipca-0.6.7.dist-info"
    folder.mkdir()
    folder.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: ipca\nVersion: 0.6.7\n")
    done = run_python("import ipca", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "ImportError: The distribution 'ipca' 0.6.7" in done.stderr
