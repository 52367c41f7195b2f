"""Every kernel that ships compiles for the GPUs it is meant for, without one; the gate says so where one does not."""

import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import triton
import triton.language as tl

from bench.kernel_cases import COMPILED, SMALL, shipped
from bench.kernel_report import read_records, record, recorded
from bench.offline import SHIPPED, Compiled, Row, compile_all, instructions_after_loop

ROOT = Path(__file__).parents[2]
VERSIONS = ("3.6.0", "3.7.1", "3.9.0")
"""Of Triton: the oldest, the tested and the newest."""


@pytest.mark.slow
def test_shipped_kernels():
    """Compiled is what is new or changed since the table was made, and of each kernel one configuration in any case.

    One test, as it may take minutes: pytest-xdist would have every worker compile for its share of several.
    """
    table = read_records(triton.__version__)
    main = [line for line in table if line["arch"] in [f"sm_{arch}" for arch in COMPILED]]
    again = {(line["kernel"], line["arch"]): line["digest"] for line in main}.values()
    known = {line["digest"]: recorded(line) for line in table if line["digest"] not in again}
    found = compile_all(SHIPPED, known={digest: made for digest, made in known.items() if made})
    assert found
    problems = [problem for row in found for problem in row.problems()]
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)
    assert [row for row in found if row.compiled.uses_tma != ("TMA" in row.variant)] == []
    if table:
        assert [record(row, triton.__version__) for row in found] == table, "run `make kernels` and commit its table"
    digests = [row.digest for row in found]
    for version in VERSIONS:
        assert [line["digest"] for line in read_records(version)] == digests, "run `make kernels` and commit its table"


@pytest.mark.parametrize("version", VERSIONS)
def test_nothing_spills_in_any_version(version):
    table = read_records(version)
    assert {line["arch"] for line in table} == {f"sm_{arch}" for arch in (*COMPILED, *SMALL)}
    assert {line["spills"] for line in table} == {"0"}


def test_the_versions_are_those_of_the_package():
    assert f'"triton>={VERSIONS[0].removesuffix(".0")};' in (ROOT / "pyproject.toml").read_text()
    assert f"triton=={VERSIONS[0]}\n" in (ROOT / "constraints-oldest.txt").read_text()
    assert f"triton=={VERSIONS[1]}\n" in (ROOT / "constraints.txt").read_text()
    assert f"TRITONS := {' '.join(VERSIONS)}\n" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("version", VERSIONS)
def test_two_programs_of_products_share_a_multiprocessor(version):
    """Those of a plain layer's first choice on sm_90, which has 228 KiB and keeps one of them for each program."""
    (line,) = [
        line
        for line in read_records(version)
        if (line["kernel"], line["variant"], line["arch"]) == ("products", "16-bit, r=16", "sm_90")
    ]
    assert 2 * (int(line["smem"]) + 1024) <= 228 * 1024


@pytest.mark.slow
def test_only_what_is_not_known_is_compiled(found):
    good = rows_of(found, "good")
    assert len({row.digest for row in found}) == len(found)
    known = {row.digest: replace(row.compiled, registers=-1) for row in good[:2]}
    again = rows_of(compile_all(f"{__file__}:good", known=known), "good")
    assert [row.compiled.registers for row in again] == [-1, -1, good[2].compiled.registers]
    assert [row.digest for row in again] == [row.digest for row in good]


def test_a_line_of_the_table_says_what_was_compiled(found):
    for row in rows_of(found, "good"):
        line = record(row, triton.__version__)
        assert record(replace(row, compiled=recorded(line)), triton.__version__) == line
    (broken,) = rows_of(found, "broken")
    assert recorded(record(broken, triton.__version__)) is None


def traced():
    """A case of each kernel that takes Python floats, with and without dropout, where torch.compile types them."""
    cases = {}
    for case in shipped():
        if "fp32" in case.args.values() and "16-bit, pointers" not in case.variant:
            float64 = {name: "fp64" if kind == "fp32" else kind for name, kind in case.args.items()}
            cases.setdefault((case.name, case.args.get("DROPOUT")), case._replace(args=float64, archs=(90,)))
    return cases.values()


@pytest.mark.slow
def test_no_kernel_computes_in_float64_under_torch_compile():
    """Inductor types a Python float as float64: it is narrowed once, before anything is computed with it."""
    rows = compile_all(f"{__file__}:traced")
    assert {row.kernel for row in rows} == {"linear", "few_tokens", "project", "outer", "reduce"}
    assert [row.error for row in rows if row.error] == []
    assert {row.kernel: row.compiled.float64_instructions for row in rows if row.compiled.float64_instructions} == {}


@triton.jit
def _scaled(x_ptr, y_ptr, scaling, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs) * scaling)


@triton.jit
def _product(x_ptr, w_ptr, y_ptr, K, stride_x, stride_k, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    offs_m, offs_n, offs_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + offs_m[:, None] * stride_x + offs_k[None, :] * stride_k
    w_ptrs = w_ptr + offs_n[None, :] * stride_x + offs_k[:, None] * stride_k
    acc = tl.zeros((M, N), tl.float32)
    for k in range(0, K, BLOCK_K):
        acc = tl.dot(tl.load(x_ptrs + k), tl.load(w_ptrs + k), acc)
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], acc)


@triton.jit
def _three_products(x_ptr, w_ptr, y_ptr, K, stride, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    offs_m, offs_n, offs_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + offs_m[:, None] * stride + offs_k[None, :]
    w_ptrs = w_ptr + offs_n[None, :] * stride + offs_k[:, None]
    acc0, acc1, acc2 = tl.zeros((M, N), tl.float32), tl.zeros((M, N), tl.float32), tl.zeros((M, N), tl.float32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptrs + k)
        acc0 = tl.dot(x, tl.load(w_ptrs + k), acc0)
        acc1 = tl.dot(x, tl.load(w_ptrs + N * stride + k), acc1)
        acc2 = tl.dot(x, tl.load(w_ptrs + 2 * N * stride + k), acc2)
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], acc0 - acc1 - acc2)


@triton.jit
def _copy(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))


@triton.jit
def _broken(x_ptr, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK == 32, "a block of 32")


def case(kernel, variant, args, arch, num_warps=4, num_stages=3):
    config = SimpleNamespace(num_warps=num_warps, num_stages=num_stages, describe=lambda: f"{num_warps} warps")
    fields = {"kernel": kernel, "name": "planted", "variant": variant, "config": config, "args": args}
    return SimpleNamespace(**fields, archs=(arch,), matrix=variant != "exact")


def product(variant, arch, M, N, BLOCK_K, num_warps, num_stages, stride_k=1):
    args = {"x_ptr": "*bf16", "w_ptr": "*bf16", "y_ptr": "*fp32", "K": "i32", "stride_x": "i32", "stride_k": stride_k}
    return case(_product, variant, {**args, "M": M, "N": N, "BLOCK_K": BLOCK_K}, arch, num_warps, num_stages)


class Crash:
    warmup, arg_names = None, ()

    @property
    def params(self):
        os.abort()


def good():
    for arch in (80, 90, 100):
        yield product("good", arch, 128, 128, 64, 8, 3)


def planted():
    yield from good()
    for scaling in ("fp32", "fp64"):
        args = {"x_ptr": "*fp32", "y_ptr": "*fp32", "scaling": scaling, "BLOCK": 128}
        yield case(_scaled, f"scaled in {scaling}", args, 90)
    yield product("unknown stride", 80, 128, 128, 64, 8, 3, stride_k="i32")
    yield product("exact", 80, 64, 64, 32, 4, 2)
    yield product("spilling", 80, 128, 256, 32, 4, 3)
    yield product("large", 90, 128, 256, 64, 8, 6)
    three = {"x_ptr": "*bf16", "w_ptr": "*bf16", "y_ptr": "*fp32", "K": "i32", "stride": "i32"}
    yield case(_three_products, "wide", {**three, "M": 128, "N": 256, "BLOCK_K": 32}, 100, 8, 2)
    yield case(_copy, "copy", {"x_ptr": "*fp32", "y_ptr": "*fp32", "BLOCK": 1024}, 90)
    yield case(_broken, "broken", {"x_ptr": "*fp32", "BLOCK": 64}, 90)
    yield case(_broken, "misnamed", {"x_ptr": "*fp32", "block": 32}, 90)
    yield case(Crash(), "crash", {}, 90)  # the last: a crash takes the cases that run or wait with it


@pytest.fixture(scope="module")
def found():
    return compile_all(f"{__file__}:planted")


def rows_of(found, variant):
    return [row for row in found if row.variant == variant]


def test_a_good_kernel_passes_with_the_matrix_instructions_of_its_architecture(found):
    good = rows_of(found, "good")
    assert [row.problems() for row in good] == [[], [], []]
    assert [set(row.compiled.matrix_instructions) for row in good] == [{"HMMA"}, {"HGMMA"}, {"UTCHMMA"}]


def test_a_stride_of_one_is_folded_into_the_kernel_as_a_launch_does(found):
    # Only then are 8 neighboring numbers known to lie together, to be copied at once.
    copies = re.compile(r"LDGSTS\.E\.BYPASS\.(LTC128B\.)?128")
    assert copies.search(rows_of(found, "good")[0].compiled.sass)
    assert not copies.search(rows_of(found, "unknown stride")[0].compiled.sass)


def test_instructions_after_the_loop():
    code = ["MOV R1", "HMMA R4", "BRA 0x10", "HMMA R4", "@P0 BRA 0x30", "STG R4", "@P1 BRA 0x00", "EXIT", "NOP"]
    sass = "\n".join(f"        /*{16 * i:04x}*/    {text} ;   /* 0x0 */" for i, text in enumerate(code))
    assert instructions_after_loop(sass) == 5  # of the first of two loops within a third
    assert instructions_after_loop(sass.replace("HMMA", "FFMA")) is None


def test_instructions_after_the_loop_of_a_compiled_kernel(found):
    for row in rows_of(found, "good"):
        assert 0 < row.compiled.after_loop < row.compiled.sass.count(";")
    assert rows_of(found, "copy")[0].compiled.after_loop is None


def test_float64_is_seen(found):
    assert rows_of(found, "scaled in fp32")[0].compiled.float64_instructions == set()
    assert "DMUL" in rows_of(found, "scaled in fp64")[0].compiled.float64_instructions


@pytest.mark.parametrize(
    ("variant", "arch", "words"),
    [
        ("spilling", 80, "spills registers: "),
        ("large", 90, "bytes of shared memory, the limit is 232448"),
        ("wide", 100, "columns of tensor memory, the limit is 512"),
        ("copy", 90, "no matrix instruction"),
        ("exact", 80, "rounds float32: HMMA in a product that asks for none"),
        ("broken", 90, "a block of 32"),
        ("misnamed", 90, "['BLOCK', 'block']"),
        ("crash", 90, "crashed"),
    ],
)
def test_a_bad_kernel_is_named_with_its_fault(found, variant, arch, words):
    (row,) = rows_of(found, variant)
    (problem,) = [line for line in row.problems() if words in line]
    assert problem.startswith(f"planted | {variant} | ")
    assert f"sm_{arch}: " in problem


def test_limits_hold_to_the_byte():
    def of(arch, shared):
        return Row("linear", "16-bit", "", arch, True, Compiled(128, 0, shared, 0, None, "HMMA.16816"))

    assert not of(80, 166_912).problems()
    assert of(80, 166_913).problems()
    assert not of(90, 232_448).problems()
    assert of(90, 232_449).problems()
