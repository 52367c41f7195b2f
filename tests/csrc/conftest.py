"""The extension as Python sees it, with the kernels compiled for the CPU."""

import shutil
import subprocess
from pathlib import Path

import pytest

from ipca import _extension


@pytest.fixture(scope="session")
def host_build(tmp_path_factory):
    """A module like ``ipca._C`` whose pointers are the CPU's."""
    if not shutil.which("g++"):
        pytest.skip("g++, which compiles the kernels for the CPU, is not on PATH")
    out = tmp_path_factory.mktemp("module") / f"_C{_extension.SUFFIX}"
    flags = ["-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-DIPCA_HOST", "-Wno-unknown-pragmas"]
    ours = [_extension.SOURCES, Path(__file__).parent]  # the kernels, and host_shim.h
    folders = [f"-I{folder}" for folder in (*ours, *_extension.include_folders())]
    sources = ["-xc++", str(_extension.SOURCES / "launch.cu"), str(_extension.SOURCES / "module.cpp")]
    command = ["g++", *flags, *folders, f'-DIPCA_SOURCES="{_extension.source_hash()}"', *sources, "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def module(host_build):
    return _extension._import(host_build)
