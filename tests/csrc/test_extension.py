"""Finding, building, keeping and doing without the extension; a stand-in for nvcc hands out a build for the CPU."""

import importlib.util
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ipca import _extension
from ipca._extension import CannotBuild


@pytest.fixture(autouse=True)
def _untouched_environment(monkeypatch):
    for name in ("IPCA_BUILD_CUDA", "IPCA_BUILD_DIR", "IPCA_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_toolkit(monkeypatch, tmp_path):
    monkeypatch.setattr(_extension, "USUAL", tmp_path / "nowhere")
    monkeypatch.setattr(_extension, "HERE", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("IPCA_BUILD_DIR", str(tmp_path / "builds"))


def toolkit_at(root, nvcc="#!/bin/sh\n", header=True):
    (root / "bin").mkdir(parents=True)
    (root / "bin" / "nvcc").write_text(nvcc)
    (root / "bin" / "nvcc").chmod(0o755)
    if header:
        (root / "include").mkdir()
        (root / "include" / "cuda_runtime.h").touch()
    return root


@pytest.fixture
def stand_in(tmp_path, host_build, monkeypatch):
    """An nvcc that knows sm_90 and hands out the build for the CPU, slowly."""
    script = f"""#!/bin/sh
if [ "$1" = --list-gpu-code ]; then echo sm_80; echo sm_90; exit; fi
for argument; do case $argument in -o=*) out=${{argument#-o=}};; esac; done
echo "$@" >> {tmp_path}/calls; sleep 0.5; cp {host_build} $out
"""
    monkeypatch.setenv("CUDA_HOME", str(toolkit_at(tmp_path / "cuda", script)))
    monkeypatch.setenv("IPCA_BUILD_DIR", str(tmp_path / "builds"))
    monkeypatch.setattr(_extension, "HERE", tmp_path)  # whatever is installed beside the package
    return tmp_path


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
def test_a_named_toolkit_is_taken(tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, str(toolkit_at(tmp_path / "cuda")))
    assert _extension.toolkit() == tmp_path / "cuda"


def test_a_named_toolkit_that_is_not_whole_is_no_toolkit(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(toolkit_at(tmp_path / "cuda", header=False)))
    with pytest.raises(CannotBuild, match=r"CUDA_HOME, .*/cuda, has no include/cuda_runtime\.h"):
        _extension.toolkit()


def test_a_wrapper_on_the_path_is_no_toolkit(tmp_path, monkeypatch):
    wrapper = toolkit_at(tmp_path / "local", header=False)
    monkeypatch.setenv("PATH", str(wrapper / "bin"))
    monkeypatch.setattr(_extension, "USUAL", toolkit_at(tmp_path / "cuda"))
    assert _extension.toolkit() == tmp_path / "cuda"
    (wrapper / "include").mkdir()
    (wrapper / "include" / "cuda_runtime.h").touch()
    assert _extension.toolkit() == wrapper


@pytest.mark.usefixtures("no_toolkit")
def test_the_state_without_a_toolkit(monkeypatch):
    assert _extension.state().startswith("not built, and cannot be. Missing: a CUDA toolkit (CUDA_HOME is not set;")
    monkeypatch.setenv("IPCA_BUILD_CUDA", "0")
    assert _extension.state() == "turned off by IPCA_BUILD_CUDA=0"


@pytest.mark.slow
def test_the_state_before_and_after_a_build(stand_in):
    assert _extension.state() == f"not built; {stand_in}/cuda/bin/nvcc compiles it at its first use on a GPU"
    _extension._cached(90)
    assert _extension.state().startswith(f"built before: {stand_in}/builds/")


@pytest.mark.usefixtures("no_toolkit")
def test_no_toolkit_is_said_with_all_that_was_tried():
    words = r"CUDA_HOME is not set; nvcc is not on PATH; the usual place, .*/nowhere, has no bin/nvcc and no include/"
    with pytest.raises(CannotBuild, match=words):
        _extension.check_tools()


def test_headers_come_from_pybind11_else_from_torch(monkeypatch, tmp_path):
    def only(*packages):
        found = {name: SimpleNamespace(submodule_search_locations=[str(tmp_path / name)]) for name in packages}
        monkeypatch.setattr(importlib.util, "find_spec", found.get)

    for name in ("pybind11", "torch"):
        (tmp_path / name / "include" / "pybind11").mkdir(parents=True)
        (tmp_path / name / "include" / "pybind11" / "pybind11.h").touch()
    only("pybind11", "torch")
    assert _extension.include_folders()[1] == tmp_path / "pybind11" / "include"
    only("torch")
    assert _extension.include_folders()[1] == tmp_path / "torch" / "include"
    only()
    with pytest.raises(CannotBuild, match=r"neither pybind11 nor torch is installed .* --no-build-isolation"):
        _extension.include_folders()


def test_torch_brings_the_headers():
    """What makes pybind11 no dependency."""
    assert (Path(torch.__file__).parent / "include" / "pybind11" / "pybind11.h").is_file()


@pytest.mark.usefixtures("stand_in")
def test_no_compiler_is_said(monkeypatch):
    monkeypatch.setenv("CXX", "g++-0")
    with pytest.raises(CannotBuild, match=r"a C\+\+ compiler \(g\+\+-0 is not on PATH\)"):
        _extension.check_tools()


@pytest.mark.usefixtures("stand_in")
def test_architectures(monkeypatch):
    assert _extension.architectures() == (80, 90)  # of 80, 90, 100 those that this nvcc knows
    monkeypatch.setenv("IPCA_CUDA_ARCHS", "90;80")
    assert _extension.architectures() == (90, 80)
    monkeypatch.setenv("IPCA_CUDA_ARCHS", "sm_90")
    with pytest.raises(ValueError, match="IPCA_CUDA_ARCHS='sm_90'; numbers such as 80 90 fit"):
        _extension.architectures()
    with pytest.raises(CannotBuild, match=r"an nvcc that knows sm_120; .*/cuda/bin/nvcc does not"):
        _extension.compile_extension(Path("unused"), (90, 120))


def test_a_switch_that_is_none(monkeypatch):
    monkeypatch.setenv("IPCA_BUILD_CUDA", "yes")
    with pytest.raises(ValueError, match="IPCA_BUILD_CUDA='yes'; 1 insists"):
        _extension.load(0, (9, 0))


@pytest.mark.usefixtures("no_toolkit")
def test_without_a_toolkit_there_is_a_warning_or_an_error_or_silence(monkeypatch):
    with pytest.warns(
        RuntimeWarning, match=r"no CUDA extension\. Missing: a CUDA toolkit .* PyTorch versions .* slower"
    ):
        assert _extension.load(0, (9, 0)) is None
    monkeypatch.setenv("IPCA_BUILD_CUDA", "1")
    with pytest.raises(
        CannotBuild, match=r"IPCA_BUILD_CUDA=1, but ipca has no CUDA extension\. Missing: a CUDA toolkit"
    ):
        _extension.load(0, (9, 0))
    monkeypatch.setenv("IPCA_BUILD_CUDA", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _extension.load(0, (9, 0)) is None


def test_an_old_gpu_is_said():
    with pytest.warns(RuntimeWarning, match=r"compute capability 8\.0 or newer; this one has 7\.5"):
        assert _extension.load(0, (7, 5)) is None


def test_first_use_compiles_once_for_this_gpu_alone_and_says_so(stand_in, capsys):
    module = _extension.load(0, (9, 0))
    assert module.sources == _extension.source_hash()
    assert "ipca: compiling CUDA kernels for sm_90, once, into" in capsys.readouterr().err
    assert Path(module.__file__).parent == stand_in / "builds" / f"{_extension.source_hash()}-sm_90"
    assert _extension.load(0, (9, 0)).__file__ == module.__file__
    assert capsys.readouterr().err == ""
    (call,) = (stand_in / "calls").read_text().splitlines()
    assert "code=sm_90" in call
    assert "sm_80" not in call


def test_two_processes_at_once(stand_in):
    code = f"""
from pathlib import Path
from ipca import _extension
_extension.HERE = Path({str(stand_in)!r})
print(_extension.load(0, (9, 0)).__file__)
"""
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert said[0][0] == said[1][0]
    assert [path.name for path in (stand_in / "builds").rglob("*") if path.is_file()] == [f"_C{_extension.SUFFIX}"]


def test_a_folder_that_cannot_be_written_is_said(stand_in, monkeypatch):
    (stand_in / "file").touch()
    monkeypatch.setenv("IPCA_BUILD_DIR", str(stand_in / "file"))
    with pytest.warns(RuntimeWarning, match=r"a folder to build in .* Set IPCA_BUILD_DIR"):
        assert _extension.load(0, (9, 0)) is None


def test_a_compiler_that_fails_is_quoted(tmp_path, stand_in, monkeypatch):
    broken = "#!/bin/sh\n[ $1 = --list-gpu-code ] && echo sm_90 || { echo planted failure >&2; exit 1; }\n"
    monkeypatch.setenv("CUDA_HOME", str(toolkit_at(tmp_path / "broken", broken)))
    with pytest.warns(RuntimeWarning, match=r"sources that compile:[\s\S]*planted failure"):
        assert _extension.load(0, (9, 0)) is None


def test_an_installed_extension_is_taken_if_it_is_of_these_sources(stand_in, host_build, monkeypatch):
    shutil.copy(host_build, stand_in / host_build.name)
    assert Path(_extension.load(0, (9, 0)).__file__).parent == stand_in
    assert not (stand_in / "calls").exists()
    monkeypatch.setattr(_extension, "source_hash", lambda: "changed")
    assert Path(_extension.load(0, (9, 0)).__file__).parent == stand_in / "builds" / "changed-sm_90"


def test_the_hash_is_that_of_every_source(tmp_path, monkeypatch):
    before = _extension.source_hash()
    monkeypatch.setattr(_extension, "SOURCES", shutil.copytree(_extension.SOURCES, tmp_path / "csrc"))
    assert _extension.source_hash() == before
    with (tmp_path / "csrc" / "lanczos.cuh").open("a") as file:
        file.write("//")
    assert _extension.source_hash() != before


def test_a_driver_that_cannot_run_it_is_said(stand_in, monkeypatch):
    def refuse(device):
        raise RuntimeError("CUDA driver version is insufficient")

    monkeypatch.setattr(_extension, "_cached", lambda arch: SimpleNamespace(try_device=refuse))
    with pytest.warns(RuntimeWarning, match=r"a driver that runs its kernels \(CUDA driver version is insufficient\)"):
        assert _extension.load(0, (9, 0)) is None
