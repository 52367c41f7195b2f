"""Registers, spills and shared memory of the CUDA C++ kernels for sm_80, sm_90 and sm_100, compiled without a GPU.

Writes bench/results/csrc_kernels.csv; exits with 1 if a kernel may not ship. Needs a CUDA toolkit and g++.
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ipca._extension import ARCHITECTURES, SOURCES, CannotBuild, check_tools, toolkit

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "csrc_kernels.csv"
SHARED_LIMITS = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448}
REGISTERS = 65_536
"""Of a multiprocessor; a block that wants more does not start."""
LARGEST_P, MOST_STEPS = 512, 48
"""Sizes that shared memory is reported for: columns of a Gram matrix, Lanczos steps."""

BLOCKS = {
    "ldlt_top_kernel": ("SQUARE_THREADS", "sizeof(TopMemory<T>)"),
    "ldlt_below_kernel": ("BELOW_THREADS", "sizeof(BelowMemory<T>)"),
    "scaled_cholesky_kernel": ("SQUARE_THREADS", f"sizeof(CholeskyMemory<T>) + {LARGEST_P} * sizeof(T)"),
    "lanczos_step_kernel": ("CHAIN_THREADS", f"sizeof(ChainMemory) + {MOST_STEPS + 1} * sizeof(double)"),
}
"""Threads and shared memory that csrc/launch.cu asks for."""


class Row(NamedTuple):
    """One kernel on one architecture; ``spills`` is local memory in bytes a thread, ``shared`` in bytes a block."""

    kernel: str
    dtype: str
    arch: str
    threads: int
    registers: int
    spills: int
    shared: int
    atomics: int

    def problems(self) -> Iterator[str]:
        """Why this kernel may not ship."""
        where = f"{self.kernel} | {self.dtype} | {self.arch}: "
        if self.spills:
            yield f"{where}spills registers: {self.spills} bytes a thread"
        if self.threads * self.registers > REGISTERS:
            yield f"{where}{self.threads} threads of {self.registers} registers, there are {REGISTERS}"
        if self.shared > SHARED_LIMITS[self.arch]:
            yield f"{where}{self.shared} bytes of shared memory, the limit is {SHARED_LIMITS[self.arch]}"
        if self.atomics:
            yield f"{where}{self.atomics} atomic operations, whose order is not fixed"


def compile_all(sources: Path = SOURCES, archs: tuple[int, ...] = ARCHITECTURES) -> list[Row]:
    """Compile every kernel for every architecture.

    Raises:
        CannotBuild: there is no toolkit, or the sources do not compile.
    """
    check_tools()
    blocks, rows = _blocks(sources), []
    for arch in archs:
        said, ptx = _compile(sources, arch)
        for name, (registers, spills) in _resources(said).items():
            kernel, dtype = _parts(name)
            threads, shared = blocks[kernel, dtype]
            atomics = len(re.findall(r"^\s*(?:@\S+\s+)?(?:atom|red)\.", _body(ptx, name), re.MULTILINE))
            rows.append(Row(kernel, dtype, f"sm_{arch}", threads, registers, spills, shared, atomics))
    return rows


def _compile(sources: Path, arch: int) -> tuple[str, str]:
    """The output of ptxas, and the assembly that it was given."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["-std=c++17", "-O3", f"-arch=sm_{arch}", "-Xptxas=-v", "-cubin", "--keep", f"--keep-dir={folder}"]
        said = _run([f"{toolkit()}/bin/nvcc", *flags, f"{sources}/launch.cu", "-o", f"{folder}/kernels.cubin"])
        return said, Path(folder, "launch.ptx").read_text()


def _blocks(sources: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """Threads and bytes of shared memory of a block, by kernel and dtype: printed by a program of the same headers."""
    lines = [
        f'using T = {T}; std::printf("{kernel} {dtype} %d %zu\\n", {threads}, {shared});'
        for T, dtype in (("float", "float32"), ("double", "float64"))
        for kernel, (threads, shared) in BLOCKS.items()
    ]
    program = "\n".join(f"{{ {line} }}" for line in lines)
    text = f'#include <cstdio>\n#include "launch.cu"\nint main() {{ using namespace ipca;\n{program}\n}}\n'
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "sizes.cpp").write_text(text)
        flags = ["-std=c++17", "-DIPCA_HOST", "-Wno-unknown-pragmas", f"-I{sources}", f"-I{ROOT}/tests/csrc"]
        _run(["g++", *flags, f"{folder}/sizes.cpp", "-o", f"{folder}/sizes"])
        said = _run([f"{folder}/sizes"])
    found = [line.split() for line in said.splitlines()]
    return {(kernel, dtype): (int(threads), int(shared)) for kernel, dtype, threads, shared in found}


def _resources(said: str) -> dict[str, tuple[int, int]]:
    """Registers and bytes of local memory by the mangled name of a kernel, of what ptxas said."""
    pattern = r"entry function '(\w+)'[\s\S]*?(\d+) bytes stack frame, (\d+) bytes spill[\s\S]*?Used (\d+) registers"
    return {
        name: (int(registers), int(stack) + int(spills)) for name, stack, spills, registers in re.findall(pattern, said)
    }


def _parts(mangled: str) -> tuple[str, str]:
    """Such as ``("ldlt_top_kernel", "float64")``."""
    found = re.search(r"\d([a-z_]+_kernel)I([fd])E", mangled)
    assert found is not None, mangled
    return found[1], {"f": "float32", "d": "float64"}[found[2]]


def _body(ptx: str, name: str) -> str:
    return ptx.split(f".entry {name}(", 1)[1].split(".entry ", 1)[0]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CannotBuild(f"sources that compile: {' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def main() -> int:
    """Compile, print, write."""
    try:
        rows = compile_all()
    except CannotBuild as error:
        sys.stderr.write(f"csrc is not compiled, {RESULTS.name} stays as it is. Missing: {error}\n")
        return 0
    nvcc = re.findall(r"V([\d.]+)", _run([f"{toolkit()}/bin/nvcc", "--version"]))[-1]
    lines = [(*Row._fields, "nvcc"), *((*map(str, row), nvcc) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(entry.ljust(width) for entry, width in zip(line, widths, strict=True)).rstrip())
    with RESULTS.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)
    problems = [problem for row in rows for problem in row.problems()]
    sys.stderr.writelines(f"{problem}\n" for problem in problems)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
