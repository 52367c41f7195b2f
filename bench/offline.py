"""Offline compilation of Triton kernels for sm_80, sm_90 and sm_100 without a GPU, and the resources they use.

A stub of Triton's driver reports the architecture; ``warmup`` then specializes a kernel as a launch would and stops
before loading it. ptxas and cuobjdump are those bundled with Triton. Triton is imported inside functions, since a
worker has to leave interpreter mode first, and may take another version.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TENSOR_MEMORY_LIMIT = 512
"""Columns of tensor memory of an sm_100 multiprocessor. A kernel that needs more compiles silently to a trap."""

SHIPPED = "bench.kernel_cases:shipped"
MATRIX_INSTRUCTION = re.compile(r"\b(?:UTC)?[HIQDOF]G?MMA\b")
INTEGERS = {"i32": 16, "i64": 1 << 40}  # values for a launch: the value determines the type, and 16 divides it


class CompileFailure(Exception):
    """A kernel that does not compile; the message is the compiler's."""


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel.

    ``spills`` in bytes of local memory a thread, ``tensor_memory`` in columns; ``after_loop`` see
    :func:`instructions_after_loop`.
    """

    registers: int
    spills: int
    shared: int
    tensor_memory: int
    after_loop: int | None
    sass: str = field(repr=False)

    @property
    def matrix_instructions(self) -> frozenset[str]:
        """Such as ``{"HMMA"}`` (sm_80), ``{"HGMMA"}`` (sm_90), ``{"UTCHMMA"}`` (sm_100)."""
        return frozenset(MATRIX_INSTRUCTION.findall(self.sass))

    @property
    def float64_instructions(self) -> frozenset[str]:
        """Arithmetic in float64, and conversions to it."""
        return frozenset(re.findall(r"\bD(?:ADD|MUL|FMA)\b|\b\w2F\.F64\S*", self.sass))

    @property
    def uses_tma(self) -> bool:
        """Whether tiles are loaded through descriptors."""
        return "UTMALDG" in self.sass


@dataclass(frozen=True)
class Row:
    """One case on one architecture: the compiled kernel, or the ``error``.

    ``digest`` is a hash of all inputs but the version of Triton, which includes the assembler: the source of the kernel
    and of what it calls, arguments, configuration, architecture.
    """

    kernel: str
    variant: str
    config: str
    arch: int
    matrix: bool
    compiled: Compiled | None = None
    error: str = ""
    seconds: float = 0.0
    digest: str = ""

    def problems(self) -> list[str]:
        """The violated limits, each as a line that names the kernel."""
        where = f"{self.kernel} | {self.variant} | {self.config} | sm_{self.arch}: "
        return [where + problem for problem in self._problems()]

    def _problems(self) -> Iterator[str]:
        if self.compiled is None:
            yield f"does not compile: {self.error}"
            return
        from bench.kernel_cases import LIMITS

        made, limit = self.compiled, LIMITS[self.arch].shared
        if made.tensor_memory > TENSOR_MEMORY_LIMIT:
            yield f"{made.tensor_memory} columns of tensor memory, the limit is {TENSOR_MEMORY_LIMIT}"
        elif self.matrix and not made.matrix_instructions:
            yield "no matrix instruction"
        elif not self.matrix and made.matrix_instructions:
            yield f"rounds float32: {' '.join(sorted(made.matrix_instructions))} in a product that asks for none"
        if made.spills:
            yield f"spills registers: {made.spills} bytes a thread"
        if made.shared > limit:
            yield f"{made.shared} bytes of shared memory, the limit is {limit}"


def compile_kernel(
    kernel: Any,
    args: Mapping[str, Any],
    arch: int,
    num_warps: int = 4,
    num_stages: int = 3,
    divisible_by_16: Collection[str] | None = None,
) -> Compiled:
    """Compile ``kernel`` as a launch with these arguments would.

    Args:
        kernel: a ``@triton.jit`` function.
        args: a value for every argument. A type, ``"*bf16"``, ``"i32"``, ``"fp32"``, stands for some value of it. A
            number, ``None`` or a ``tl.constexpr`` argument's value is passed on: a stride of 1 becomes a constant.
            ``"fp64"`` is what torch.compile makes of a Python float; a launch makes it ``"fp32"``.
        arch: compute capability times 10, such as 90.
        num_warps, num_stages: as in the launch.
        divisible_by_16: the pointers and integers, given as types, that 16 divides; by default all of them.

    Raises:
        CompileFailure: with the compiler's message.
    """
    from triton.runtime.driver import driver

    if not hasattr(kernel, "warmup"):
        raise TypeError(f"{kernel} is not a compiled kernel; TRITON_INTERPRET must not be set when it is defined.")
    if set(args) != set(kernel.arg_names):
        raise CompileFailure(
            f"{sorted(set(args) ^ set(kernel.arg_names))}: in the kernel's arguments or in `args`, not in both"
        )
    values = {}
    for parameter in kernel.params:
        value = args[parameter.name]
        if isinstance(value, str) and not parameter.is_constexpr:
            value = _stand_in(value, divisible_by_16 is None or parameter.name in divisible_by_16)
        values[parameter.name] = value
    before = driver._active
    driver.set_active(Driver(arch))
    with _messages() as messages:
        try:
            options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
            made = kernel.warmup(**values, **options, grid=(1,))
            if "fp64" in args.values():
                made = _with_float64(made.src, args, arch, options)
        except Exception as error:
            raise CompileFailure(messages(error)) from error
        finally:
            driver._active = before  # `reset_active` would look for a GPU
    registers, spills, sass = _disassemble(made.asm["cubin"])
    shared, columns = made.metadata.shared, made.metadata.tmem_size or 0
    return Compiled(registers, spills, shared, columns, instructions_after_loop(sass), sass)


def _with_float64(source: Any, args: Mapping[str, Any], arch: int, options: dict[str, Any]) -> Any:
    """What was launched, compiled again with float64 where ``args`` say so."""
    from triton import compile
    from triton.compiler import ASTSource

    signature = source.signature | {name: kind for name, kind in args.items() if kind == "fp64"}
    again = ASTSource(source.fn, signature, source.constants, source.attrs)
    return compile(again, target=Driver(arch).get_current_target(), options=options)


def instructions_after_loop(sass: str) -> int | None:
    """The instructions behind the main loop in the code, without padding; None where no loop multiplies matrices.

    A loop goes from the target of a branch backward to that branch. The main loop is the first one that holds a matrix
    instruction and no other loop: that over K. What follows runs once a tile: the epilogue, and in a persistent kernel
    the way to the next tile.
    """
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/ +([^;]*?) *;", sass)]
    branches = ((at, re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)) for at, text in code)
    loops = [(int(to[1], 16), at) for at, to in branches if to and int(to[1], 16) < at]
    for first, last in sorted(loops):
        inner = any(first <= start and end < last for start, end in loops)
        if not inner and any(first <= at <= last and MATRIX_INSTRUCTION.search(text) for at, text in code):
            return sum(at > last and not text.startswith("NOP") for at, text in code)
    return None


def compile_all(
    source: str = SHIPPED, workers: int = 2, known: Mapping[str, Compiled] | None = None, triton: str = ""
) -> list[Row]:
    """Compile every case of ``source`` for each of its architectures, ``workers`` at a time.

    ``source`` is ``"module:function"`` or ``"path.py:function"``. The function yields cases with the fields of
    :class:`bench.kernel_cases.Case`, and ``args`` as for :func:`compile_kernel`. Cases whose digest is in ``known``
    are not compiled again. ``triton`` is a folder that has another version than the installed one.
    """
    known = known or {}
    with tempfile.TemporaryDirectory() as cache_dir:
        with _pool(workers, cache_dir, triton) as pool:
            rows = pool.submit(_uncompiled, source).result()
            done = {
                i: replace(row, compiled=known[row.digest]) for i, (*_, row) in enumerate(rows) if row.digest in known
            }
            futures = {i: pool.submit(_compile_case, source, *rows[i]) for i in range(len(rows)) if i not in done}
            done |= {
                i: future.result()
                for i, future in futures.items()
                if not isinstance(future.exception(), BrokenProcessPool)
            }
        # A crashing compiler takes all unfinished cases with it: retry each in its own process.
        for i, (case, arch, row) in enumerate(rows):
            if i not in done:
                done[i] = replace(row, error="the compiler's process crashed")
                with _pool(1, cache_dir, triton) as pool, contextlib.suppress(BrokenProcessPool):
                    done[i] = pool.submit(_compile_case, source, case, arch, row).result()
    return [done[i] for i in range(len(rows))]


class Driver:
    """Stub of Triton's driver for a launch; every architecture is its own device."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def cuda_answers(facts: SimpleNamespace) -> dict[str, Any]:
    """Stand-ins for what :mod:`torch.cuda` is asked before a kernel runs: one device, with ``facts`` as its properties.

    Args:
        facts: ``name``, ``major``, ``minor``, ``multi_processor_count``, and others that are asked for.
    """
    return {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: facts.name,
        "get_device_capability": lambda device=None: (facts.major, facts.minor),
        "get_device_properties": lambda device=None: facts,
        "is_current_stream_capturing": lambda: False,
        "device": lambda device: contextlib.nullcontext(),
    }


class _Pointer:
    """Stub of a tensor for a launch."""

    def __init__(self, dtype: str, address: int) -> None:
        self.dtype, self.address = dtype, address

    def data_ptr(self) -> int:
        return self.address


def _stand_in(kind: str, divisible: bool) -> Any:
    """A value that a launch specializes to the type ``kind``."""
    if kind.startswith("*"):
        return _Pointer(kind[1:], 0 if divisible else 8)
    return 1.5 if kind in ("fp32", "fp64") else INTEGERS[kind] + (not divisible)


@contextlib.contextmanager
def _messages() -> Iterator[Callable[[BaseException], str]]:
    """Silence the compiler; yield a function that formats an exception, its causes and the compiler's messages.

    MLIR writes to the stderr of the process, not to ``sys.stderr``; its dumps of the module are filtered out.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as written, contextlib.redirect_stdout(io.StringIO()):
        stderr = os.dup(2)
        os.dup2(written.fileno(), 2)

        def messages(error: BaseException | None) -> str:
            said = []
            while error is not None:
                said.append(f"{type(error).__name__}: {error}")
                error = error.__cause__
            written.seek(0)
            said += re.findall(r".*(?:error:|note: Pipeline|Assertion).*", written.read())
            return "\n".join(said)

        try:
            yield messages
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _disassemble(cubin: bytes) -> tuple[int, int, str]:
    """Registers, bytes of local memory, and the code."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) .* LOCAL:(\d+)", text)
    assert usage is not None, text[:1000]
    registers, stack, local = map(int, usage.groups())
    return registers, stack + local, text


def _pool(workers: int, cache_dir: str, triton: str) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, get_context("spawn"), _start, (cache_dir, triton))


def _start(cache_dir: str, triton: str) -> None:
    """Use an empty cache and the given Triton, and leave interpreter mode, in which the tests may run."""
    if triton:
        assert "triton" not in sys.modules
        sys.path.insert(0, triton)
    os.environ["TRITON_CACHE_DIR"] = cache_dir
    os.environ.pop("TRITON_INTERPRET", None)


@cache
def _cases(source: str) -> list[Any]:
    name, function = source.rsplit(":", 1)
    if not name.endswith(".py"):
        return list(getattr(importlib.import_module(name), function)())
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(getattr(module, function)())


def _uncompiled(source: str) -> list[tuple[int, int, Row]]:
    """Number of the case, architecture, and the row without its result."""
    return [
        (i, arch, Row(case.name, case.variant, case.config.describe(), arch, case.matrix, digest=_digest(case, arch)))
        for i, case in enumerate(_cases(source))
        for arch in case.archs
    ]


def _digest(case: Any, arch: int) -> str:
    kernel = getattr(case.kernel, "cache_key", None)
    options = case.args, case.config.num_warps, case.config.num_stages, arch
    return hashlib.sha256(repr((kernel, *options)).encode()).hexdigest()[:16]


def _compile_case(source: str, i: int, arch: int, row: Row) -> Row:
    case = _cases(source)[i]
    made, error, start = None, "", time.perf_counter()
    try:
        made = compile_kernel(case.kernel, case.args, arch, case.config.num_warps, case.config.num_stages)
    except CompileFailure as failure:
        error = str(failure)
    seconds = time.perf_counter() - start
    return replace(row, compiled=made, error=error, seconds=seconds)
