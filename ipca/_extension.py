"""The CUDA extension ``ipca._C``: built with the package, or at its first use on a machine with a GPU, or absent.

``IPCA_BUILD_CUDA=1`` requires it and raises where it cannot be built, ``IPCA_BUILD_CUDA=0`` does without it. Unset, it
is built where a CUDA toolkit, a C++ compiler and pybind11's headers are found.

Nothing of PyTorch is compiled in or linked, so one build serves every version of it. setup.py loads this file by its
path and the package loads it as a module: both compile through :func:`compile_extension`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "csrc"
USUAL = Path("/usr/local/cuda")
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
ARCHITECTURES = (80, 90, 100)
"""Compute capabilities that a package is built for; newer GPUs compile portable code when it is loaded."""

INSTEAD = (
    "The PyTorch versions of the window SVD's inner loops run instead, slower. "
    "IPCA_BUILD_CUDA=0 turns this warning off."
)


class CannotBuild(RuntimeError):
    """The extension is not available; the message names what is missing."""


def wanted() -> bool | None:
    """``IPCA_BUILD_CUDA``: True requires the extension, False does without it, None builds it where possible."""
    value = os.environ.get("IPCA_BUILD_CUDA", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"IPCA_BUILD_CUDA={value!r}; 1 insists on the CUDA extension, 0 does without it.")
    return {"": None, "0": False, "1": True}[value]


def source_hash() -> str:
    """A hash of the sources and of this file. It is compiled in: an extension of other sources is not used."""
    files = sorted(path for path in SOURCES.iterdir() if path.suffix in (".cu", ".cuh", ".h", ".cpp"))
    read = [path.name.encode() + path.read_bytes() for path in (*files, Path(__file__))]
    return hashlib.sha256(b"".join(read)).hexdigest()[:16]


def architectures() -> tuple[int, ...]:
    """``IPCA_CUDA_ARCHS``, such as ``"80 90"``, else those of :data:`ARCHITECTURES` that this nvcc knows."""
    text = os.environ.get("IPCA_CUDA_ARCHS", "")
    if not re.fullmatch(r"[\d\s,;]*", text):
        raise ValueError(f"IPCA_CUDA_ARCHS={text!r}; numbers such as 80 90 fit.")
    known = _known(toolkit())
    return tuple(map(int, re.findall(r"\d+", text))) or tuple(arch for arch in ARCHITECTURES if arch in known)


def toolkit() -> Path:
    """The root of the CUDA toolkit: the one that ``CUDA_HOME`` or ``CUDA_PATH`` names, else the first that is found.

    Raises:
        CannotBuild: none is found, or the named one is incomplete. An ``nvcc`` on PATH may be a wrapper that lies
            elsewhere, so a root counts only with its header in place.
    """
    named = [(name, Path(os.environ[name])) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    found = [("nvcc on PATH", Path(on_path).resolve().parents[1])] if on_path else []
    said = [] if on_path or named else ["CUDA_HOME is not set", "nvcc is not on PATH"]
    for name, root in named[:1] or [*found, ("the usual place", USUAL)]:
        missing = [part for part in ("bin/nvcc", "include/cuda_runtime.h") if not (root / part).is_file()]
        if not missing:
            return root
        said.append(f"{name}, {root}, has no {' and no '.join(missing)}")
    raise CannotBuild(
        f"a CUDA toolkit ({'; '.join(said)}). Set CUDA_HOME to a folder with bin/nvcc and include/cuda_runtime.h."
    )


def include_folders() -> list[Path]:
    """Python's headers and pybind11's: its package's, else those that torch brings."""
    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").is_file():
        raise CannotBuild(f"Python's headers ({python}/Python.h). Install the system's python3-dev or the like.")
    for package in ("pybind11", "torch"):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if Path(folder, "include", "pybind11", "pybind11.h").is_file():
                return [python, Path(folder, "include")]
    raise CannotBuild(
        "pybind11's headers: neither pybind11 nor torch is installed where the package is built. "
        "Without build isolation (pip install --no-build-isolation) it sees those of this environment."
    )


def check_tools() -> None:
    """Raise :class:`CannotBuild` where the extension cannot be compiled."""
    if sys.platform != "linux":
        raise CannotBuild(f"Linux; this is {sys.platform}.")
    toolkit()
    include_folders()
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        raise CannotBuild(f"a C++ compiler ({compiler} is not on PATH). Install g++ or set CXX.")


def compile_extension(out: Path, archs: tuple[int, ...]) -> None:
    """Compile the sources for ``archs`` into the module ``out``, with portable code of the newest one."""
    check_tools()
    root = toolkit()
    if unknown := set(archs) - _known(root):
        raise CannotBuild(f"an nvcc that knows sm_{min(unknown)}; {root}/bin/nvcc does not.")
    command = [f"{root}/bin/nvcc", "-shared", "-std=c++17", "-O3", "-lineinfo", "-cudart=static"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    command += [f"-gencode=arch=compute_{max(archs)},code=compute_{max(archs)}", f"--threads={os.cpu_count() or 1}"]
    command += ["-Xcompiler=-fPIC,-fvisibility=hidden", *(f"-I{folder}" for folder in include_folders())]
    command += [f"-ccbin={os.environ['CXX']}"] if os.environ.get("CXX") else []
    command += [f'-DIPCA_SOURCES="{source_hash()}"', f"{SOURCES}/launch.cu", f"{SOURCES}/module.cpp", f"-o={out}"]
    out.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stdout + done.stderr)[-4000:]
        raise CannotBuild(f"sources that compile:\n{' '.join(command)}\n{said}")


def load(device: int, capability: tuple[int, int]) -> ModuleType | None:
    """The extension for a GPU: the installed one if it is of these sources, else one compiled for this GPU and cached.

    Returns:
        None where it is not available, after one warning that says why.

    Raises:
        CannotBuild: the same, with ``IPCA_BUILD_CUDA=1``.
    """
    if wanted() is False:
        return None
    try:
        if capability < (8, 0):
            raise CannotBuild(
                f"a GPU of compute capability 8.0 or newer; this one has {capability[0]}.{capability[1]}."
            )
        module = _installed() or _cached(capability[0] * 10 + capability[1])
        try:
            module.try_device(device)
        except RuntimeError as error:
            raise CannotBuild(f"a driver that runs its kernels ({error}).") from error
        return module
    except CannotBuild as error:
        message = f"ipca has no CUDA extension. Missing: {error}"
        if wanted():
            raise CannotBuild(f"IPCA_BUILD_CUDA=1, but {message}") from error
        warnings.warn(f"{message} {INSTEAD}", RuntimeWarning, stacklevel=2)
        return None


def state() -> str:
    """Whether the extension is there, or what it would take, in words."""
    if wanted() is False:
        return "turned off by IPCA_BUILD_CUDA=0"
    try:
        if _installed():
            return "built with the package"
        if built := next(_build_folder().glob(f"{source_hash()}-sm_*/_C{SUFFIX}"), None):
            return f"built before: {built}"
        check_tools()
    except CannotBuild as error:
        return f"not built, and cannot be. Missing: {error}"
    return f"not built; {toolkit()}/bin/nvcc compiles it at its first use on a GPU"


def _installed() -> ModuleType | None:
    """The extension that was built with the package, if it is of these sources."""
    path = HERE / f"_C{SUFFIX}"
    module = _import(path) if path.is_file() else None
    return module if module and module.sources == source_hash() else None


def _cached(arch: int) -> ModuleType:
    """The extension for one architecture from ``IPCA_BUILD_DIR``, by default ~/.cache/ipca/extension; compiled once.

    Compiled in a temporary folder and moved into place: processes that start together never see half a file.
    """
    path = _build_folder() / f"{source_hash()}-sm_{arch}" / f"_C{SUFFIX}"
    if not path.is_file():
        check_tools()
        print(f"ipca: compiling CUDA kernels for sm_{arch}, once, into {path.parent} …", file=sys.stderr, flush=True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as aside:
                compile_extension(Path(aside, path.name), (arch,))
                os.replace(Path(aside, path.name), path)
        except OSError as error:
            raise CannotBuild(
                f"a folder to build in ({error}). Set IPCA_BUILD_DIR to one that can be written."
            ) from error
    return _import(path)


def _build_folder() -> Path:
    return Path(os.environ.get("IPCA_BUILD_DIR") or Path.home() / ".cache" / "ipca" / "extension")


def _import(path: Path) -> ModuleType:
    # pybind11 caches modules by name: under the same name a second build would be the first one again.
    name = f"ipca.{hashlib.sha256(str(path).encode()).hexdigest()[:16]}._C"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise CannotBuild(f"an extension that loads ({error}). Delete {path}; it is built again.") from error
    return module


@cache
def _known(root: Path) -> set[int]:
    """Architectures that this toolkit's nvcc compiles for."""
    listed = subprocess.run([root / "bin" / "nvcc", "--list-gpu-code"], capture_output=True, text=True).stdout
    return {int(number) for number in re.findall(r"sm_(\d+)", listed)}


def main() -> None:
    """``python -m ipca._extension``: build it for this machine's GPU where that is not done yet, and print its path."""
    import torch

    module = load(torch.cuda.current_device(), torch.cuda.get_device_capability())
    if module is None:
        sys.exit("IPCA_BUILD_CUDA=0: no extension" if wanted() is False else 1)
    print(module.__file__)


if __name__ == "__main__":
    main()
