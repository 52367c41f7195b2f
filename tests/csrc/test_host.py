"""The CUDA kernels on a CPU, under a thread sanitizer, against PyTorch; and whether planted faults are seen."""

import shutil

import pytest

from tests.helpers import csrc_inputs as csrc_data
from tests.helpers.csrc_truth import complaints

NEEDS = pytest.mark.skipif(
    not shutil.which("g++"), reason="g++, which compiles the kernels for the CPU, is not on PATH"
)
CALLS = csrc_data.cases()
pytestmark = NEEDS


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    out = tmp_path_factory.mktemp("csrc") / "host"
    return csrc_data.build(csrc_data.CSRC, out, *csrc_data.SMALL, *csrc_data.STRICT)


@pytest.fixture(scope="module")
def ran(program):
    done = csrc_data.run(program, CALLS, program.parent)
    if "unexpected memory mapping" in done[1]:
        pytest.skip("the thread sanitizer cannot run here: " + done[1].splitlines()[0])
    return done


def test_nothing_races(ran):
    status, said, _ = ran
    assert status == 0, said


@pytest.mark.parametrize("i", range(len(CALLS)), ids=lambda i: f"{CALLS[i].name}, {str(CALLS[i].dtype)[6:]}")
def test_as_pytorch(ran, i):
    assert complaints(CALLS[i], ran[2][i]) == []


@pytest.mark.slow
def test_as_pytorch_with_the_tiles_of_a_gpu(tmp_path):
    calls = csrc_data.full_size_cases()
    status, said, found = csrc_data.run(
        csrc_data.build(csrc_data.CSRC, tmp_path / "host", *csrc_data.FULL), calls, tmp_path
    )
    assert status == 0, said
    assert [words for call, arrays in zip(calls, found, strict=True) for words in complaints(call, arrays)] == []


BARRIERS = [
    f"{path.name}:{number}"
    for path in sorted(csrc_data.CSRC.glob("*.cuh"))
    for number, line in enumerate(path.read_text().splitlines(), start=1)
    if "__syncthreads();" in line
]


@pytest.mark.usefixtures("ran")
@pytest.mark.parametrize("barrier", BARRIERS)
def test_a_missing_barrier_is_a_race(barrier, program, tmp_path):
    status, _, _ = csrc_data.run(program, CALLS, tmp_path, IPCA_WITHOUT_BARRIER=barrier)
    assert status == csrc_data.RACE


FAULTS = {  # what: in which file, what stands there, what to write instead
    "one column for two steps": ("block.cuh", "column[j % 2]", "column[0]"),
    "a zero pivot": ("block.cuh", "if (!(fabs(pivot) >= tiny)) pivot = -tiny;", ""),
    "the wrong sign of a tiny pivot": ("block.cuh", "pivot = -tiny", "pivot = tiny"),
    "a wrong sign": ("block.cuh", "x[c] -= known", "x[c] += known"),
    "off by one in a group": ("block.cuh", "later = c + 1", "later = c + 2"),
    "the last row": (
        "ldlt.cuh",
        "panels.rows - first < BELOW_ROWS ? panels.rows - first",
        "panels.rows - first - 1 < BELOW_ROWS ? panels.rows - first - 1",
    ),
    "a pivot counted that is not positive": ("ldlt.cuh", "lower[j][j] > 0", "lower[j][j] != 0"),
    "growth without its square": ("ldlt.cuh", "grown += l * l * fabs(pivot)", "grown += l * fabs(pivot)"),
    "zeros of T": ("cholesky.cuh", "row(v) < m + BLOCK", "true"),
    "no retry": ("cholesky.cuh", "attempt < ATTEMPTS", "attempt < 1"),
    "a zero column": ("cholesky.cuh", "g > 0 ? 1 / sqrt(g) : T(0)", "1 / sqrt(g)"),
    "an earlier vector left out": ("lanczos.cuh", "j <= step; ++j) left", "j < step; ++j) left"),
    "once orthogonalized": (
        "lanczos.cuh",
        "subtract_overlaps(overlap, basis, stride, w, n, step);\n  find",
        "__syncthreads();\n  find",
    ),
    "an exhausted space": ("lanczos.cuh", "norm > vanished * before", "norm > 0"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.slow
def test_a_planted_fault_is_seen(fault, tmp_path, ran):
    file, old, new = FAULTS[fault]
    csrc = shutil.copytree(csrc_data.CSRC, tmp_path / "csrc")
    text = (csrc / file).read_text()
    assert text.count(old) == 1
    (csrc / file).write_text(text.replace(old, new))
    launches = (csrc / "launch.cu").read_text().splitlines(keepends=True)
    (csrc / "launch.cu").write_text("".join(line for line in launches if "<float>" not in line))  # faster to compile
    doubles = [call for call in CALLS if call.dtype.itemsize == 8]
    program = csrc_data.build(csrc, tmp_path / "host", *csrc_data.SMALL, "-DIPCA_SINGLE=double")
    status, _, found = csrc_data.run(program, doubles, tmp_path)
    wrong = [words for call, arrays in zip(doubles, found, strict=False) for words in complaints(call, arrays)]
    assert status != 0 or wrong
