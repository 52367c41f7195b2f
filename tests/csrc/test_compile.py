"""Every CUDA kernel compiles for the GPUs it is meant for, without one; the gate says so where one may not ship."""

import shutil

import pytest

from bench.csrc_report import SHARED_LIMITS, Row, compile_all
from ipca._extension import SOURCES, CannotBuild, check_tools

try:
    check_tools()
except CannotBuild as error:
    pytestmark = pytest.mark.skip(reason=f"missing: {error}")

KERNELS = {"ldlt_top_kernel", "ldlt_below_kernel", "scaled_cholesky_kernel", "lanczos_step_kernel"}


@pytest.mark.slow
def test_shipped_kernels():
    rows = compile_all()
    made = {(row.kernel, row.dtype, row.arch) for row in rows}
    assert made == {
        (kernel, dtype, arch) for kernel in KERNELS for dtype in ("float32", "float64") for arch in SHARED_LIMITS
    }
    problems = [problem for row in rows for problem in row.problems()]
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


@pytest.mark.slow
def test_planted_faults_are_named(tmp_path):
    sources = shutil.copytree(SOURCES, tmp_path / "csrc")
    atomic = "\n#ifndef IPCA_HOST\natomicAdd(chains.beta, T(norm));\n#endif\n"
    for file, old, new in (
        ("ldlt.cuh", "__launch_bounds__(SQUARE_THREADS)", "__launch_bounds__(SQUARE_THREADS, 6)"),
        ("lanczos.cuh", "chains.beta[chain * chains.beta_stride] = T(norm);", atomic),
        ("sizes.h", "BELOW_ROWS = 64", "BELOW_ROWS = 512"),
    ):
        text = (sources / file).read_text()
        assert text.count(old) == 1
        (sources / file).write_text(text.replace(old, new))
    problems = [problem for row in compile_all(sources, (90,)) for problem in row.problems()]
    for words in (
        "ldlt_top_kernel | float64 | sm_90: spills registers: ",
        "lanczos_step_kernel | float32 | sm_90: 1 atomic operations",
        "ldlt_below_kernel | float64 | sm_90: 296448 bytes of shared memory, the limit is 232448",
    ):
        assert [line for line in problems if line.startswith(words)]


def test_limits_hold_to_the_byte_and_the_register():
    def of(shared, threads, registers):
        return list(Row("kernel", "float64", "sm_90", threads, registers, 0, shared, 0).problems())

    assert of(232_448, 256, 255) == of(0, 512, 128) == []
    assert len(of(232_449, 256, 255)) == len(of(0, 512, 129)) == 1


def test_sources_that_do_not_compile_are_said_with_the_compilers_words(tmp_path):
    sources = shutil.copytree(SOURCES, tmp_path / "csrc")
    with (sources / "launch.cu").open("a") as file:
        file.write("int broken = missing_name;\n")
    with pytest.raises(CannotBuild, match="missing_name"):
        compile_all(sources, (90,))
