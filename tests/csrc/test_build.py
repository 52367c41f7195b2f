"""Wheels and source distributions: with the extension, without it, and what a build says."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from ipca import _extension
from ipca._extension import CannotBuild

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _untouched_environment(monkeypatch):
    for name in ("IPCA_BUILD_CUDA", "IPCA_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What is in the repository of the files that a build reads."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools, which builds the package, is not installed here")
    folder = tmp_path_factory.mktemp("checkout")
    skip = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("ipca", "kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=skip)
    for name in (
        "pyproject.toml",
        "setup.py",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
    ):
        shutil.copy(ROOT / name, folder / name)
    return folder


def setuptools_builds(kind, checkout, out, **environment):
    code = f"import setuptools.build_meta as b; print('built', b.build_{kind}({str(out)!r}))"
    options = {
        "cwd": checkout,
        "env": {**os.environ, **environment},
        "capture_output": True,
        "text": True,
        "timeout": 300,
    }
    return subprocess.run([sys.executable, "-c", code], **options)


def test_a_wheel_without_cuda_is_pure_and_brings_the_sources(checkout, tmp_path):
    done = setuptools_builds("wheel", checkout, tmp_path, IPCA_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("py3-none-any.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith(("ipca/csrc/", "ipca/_"))}
    sources = {f"ipca/csrc/{path.name}" for path in _extension.SOURCES.iterdir() if path.suffix != ".md"}
    assert names >= sources | {"ipca/_extension.py"}
    assert not [name for name in names if name.endswith(".so")]


def test_a_build_without_a_toolkit_says_so_and_goes_on(checkout, tmp_path):
    done = setuptools_builds("wheel", checkout, tmp_path, CUDA_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "ipca: no CUDA extension in this build. Missing: a CUDA toolkit (CUDA_HOME" in done.stdout
    assert list(tmp_path.glob("*none-any.whl"))


def test_a_build_that_insists_names_what_is_missing(checkout, tmp_path):
    done = setuptools_builds("wheel", checkout, tmp_path, CUDA_HOME=str(tmp_path), IPCA_BUILD_CUDA="1")
    assert done.returncode == 1
    assert "IPCA_BUILD_CUDA=1, but the CUDA extension cannot be built. Missing: a CUDA toolkit" in done.stderr
    assert "has no bin/nvcc and no include/cuda_runtime.h" in done.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_a_source_distribution_builds_the_same_wheel(checkout, tmp_path):
    done = setuptools_builds("sdist", checkout, tmp_path, IPCA_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("ipca*/")
    done = setuptools_builds("wheel", unpacked, tmp_path, IPCA_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert {"ipca/csrc/launch.cu", "ipca/csrc/platform.h", "ipca/_extension.py"} <= set(
        zipfile.ZipFile(wheel).namelist()
    )


@pytest.mark.slow
def test_a_wheel_with_cuda(checkout, tmp_path):
    """One architecture, by the real nvcc. Without a GPU the kernels do not run; the error then has CUDA's words."""
    try:
        _extension.check_tools()
    except CannotBuild as error:
        pytest.skip(f"missing: {error}")
    done = setuptools_builds("wheel", checkout, tmp_path, IPCA_BUILD_CUDA="1", IPCA_CUDA_ARCHS="90")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "none-any" not in wheel.name
    name = f"ipca/_C{_extension.SUFFIX}"
    module = _extension._import(Path(zipfile.ZipFile(wheel).extract(name, tmp_path)))
    assert module.sources == _extension.source_hash()
    linked = subprocess.run(["ldd", module.__file__], capture_output=True, text=True).stdout
    assert "torch" not in linked
    assert "cudart" not in linked
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"CUDA.*\(cudaError\w+\)"):
            module.try_device(0)
