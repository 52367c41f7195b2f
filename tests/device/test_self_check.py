"""The check of kernels: what is right passes, what is wrong is found, and ``"auto"`` follows the record."""

import importlib.metadata
import json
import warnings

import pytest
import torch
import triton
from triton.runtime.errors import OutOfResources

import ipca
from ipca.device import check_cases, self_check
from ipca.kernels import tables, tuning
from ipca.kernels.configs import CONFIGS, fitting
from ipca.ops import backend, cuda, pc_linear
from tests.helpers.kernel_inputs import DEVICE
from tests.helpers.pretend_cuda import DEVICE as PRETENDED
from tests.helpers.pretend_cuda import NAME, pretend_cuda, without_kernels

HERE = torch.device(DEVICE)
PASSED = dict.fromkeys(check_cases.DTYPES, "")
KERNELS = ("linear", "input_grad", "project", "products", "outer", "few_tokens")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    yield pretend_cuda(monkeypatch, tmp_path)
    tables.forget()


def run(todo):
    return self_check.self_check(HERE, todo, progress=False)


def small(kernel, arithmetics=("float32",)):
    """The cases of one kernel at the smallest shape."""
    return [
        case for case in check_cases.cases(HERE, arithmetics) if case.family.kernel == kernel and case.shape[0] == 5
    ]


@pytest.mark.parametrize(
    "arithmetic", [pytest.param(kind, marks=pytest.mark.slow) for kind in check_cases.DTYPES], ids=str
)
def test_every_kernel_passes(arithmetic):
    todo = check_cases.cases(HERE, [arithmetic])
    found = run(todo)
    assert len(found) == len(todo)
    assert self_check.faults(todo, found) == {arithmetic: ""}


def test_every_kernel_passes_at_an_odd_shape():
    todo = [case for case in check_cases.cases(HERE) if case.shape[0] == 5]
    assert {case.arithmetic for case in todo} == set(PASSED)
    assert self_check.faults(todo, run(todo)) == PASSED


def test_every_configuration_that_fits_takes_its_turn(gpu):
    todo = check_cases.cases(PRETENDED)
    for kernel, kind in CONFIGS:
        seen = {case.config for case in todo if (case.family.kernel, case.arithmetic) == (kernel, kind)}
        hard = [{"dropout": p, "tma": tma} for p in (False, True) for tma in (False, True)]
        fit = [set(fitting(kernel, kind, 16, tuning.limits(PRETENDED), **each)) for each in hard]
        assert set.intersection(*fit) <= seen <= set.union(*fit)
    assert {case.dropout for case in todo if case.family.kernel == "few_tokens"} == {False, True}
    assert len(todo) < 160  # about a minute


def test_descriptors_are_checked_where_there_are_some(gpu, monkeypatch):
    def tma():
        return {case.arithmetic for case in check_cases.cases(PRETENDED) if case.family.tma}

    assert tma() == {"16-bit", "tf32"}
    for other in ((8, 6), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, other=other: other)
        assert tma() == set()


def break_kernel(monkeypatch, name, spoil):
    right = getattr(check_cases, name)

    def wrong(*args, **options):
        found = right(*args, **options)
        several = isinstance(found, tuple)
        spoilt = [spoil(tensor) for tensor in (found if several else (found,))]
        return tuple(spoilt) if several else spoilt[0]

    monkeypatch.setattr(check_cases, name, wrong)


def one_wrong_entry(tensor):
    tensor.view(-1)[-1] += 1
    return tensor


def unwritten_row(tensor):
    tensor[-1] = torch.nan
    return tensor


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "spoil", [one_wrong_entry, unwritten_row, lambda tensor: 1.02 * tensor], ids=["one", "nan", "scale"]
)
@pytest.mark.parametrize("arithmetic", ["16-bit", "float32"])
def test_a_broken_kernel_is_found_and_named(monkeypatch, kernel, spoil, arithmetic):
    break_kernel(monkeypatch, kernel, spoil)
    todo = small(kernel, [arithmetic])
    found = run(todo)
    assert len(found) == len(todo)  # a wrong value ends nothing
    assert all("allowed" in check.problem for check in found)
    fault = self_check.faults(todo, found)[arithmetic]
    assert fault.startswith(f"{kernel}")
    assert "M, N, K, R = " in fault


def test_a_crash_ends_its_family_only(monkeypatch):
    def too_large(*args, **options):
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(check_cases, "products", too_large)
    todo = [*small("products"), *small("products"), *small("project")]
    found = run(todo)
    assert [bool(check.problem) for check in found] == [True, False]
    assert json.dumps([check.record() for check in found], allow_nan=False)
    assert "OutOfResources: out of resource: shared memory" in self_check.faults(todo, found)["float32"]


def test_a_lost_device_ends_everything(monkeypatch):
    def illegal(*args, **options):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be …")

    monkeypatch.setattr(check_cases, "project", illegal)
    monkeypatch.setattr(self_check, "_is_lost", lambda device: True)
    todo = [*small("project", ["16-bit"]), *small("outer")]
    found = run(todo)
    assert len(found) == 1
    faults = self_check.faults(todo, found)
    assert "RuntimeError: CUDA error: an illegal memory access was encountered" in faults["16-bit"]
    assert faults["float32"] == "not all was checked, since the device was lost (project)"


@pytest.fixture
def tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("tf32")
def test_settings_are_as_before():
    run(small("project"))
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert not torch.are_deterministic_algorithms_enabled()


# What follows from the record.


def auto(dtype=torch.bfloat16, dropout=False):
    return backend.choose("auto", backend.LinearShape(PRETENDED, dtype, 8192, 4096, 4096, 16, True, dropout, True))


def test_auto_takes_no_kernel_that_was_not_checked_and_says_so_once(gpu):
    with pytest.warns(RuntimeWarning, match=rf"PyTorch's products run .* not checked on {NAME} .* run `ipca doctor`"):
        found = auto()
    assert (found.backend, found.low_rank_in_triton) == ("addmm", False)
    assert "16-bit kernels are not checked on Test GPU 80GB with these versions; run `ipca doctor`" in found.reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert auto(torch.float32, dropout=True).backend == "addmm"
        assert backend.choose("triton", backend.LinearShape(PRETENDED, torch.bfloat16, 1, 1, 1, 1, True, False, True))


def test_auto_takes_what_passed(gpu):
    self_check.store(PRETENDED, PASSED | {"float32": "outer, float32: an error of 1"})
    assert (auto().backend, auto().low_rank_in_triton, auto(dropout=True).backend) == ("addmm", True, "triton")
    with pytest.warns(RuntimeWarning, match="found a fault in Triton's float32 kernels on Test GPU 80GB: outer, fl"):
        assert not auto(torch.float32).low_rank_in_triton
    (file,) = gpu.iterdir()
    assert json.loads(file.read_text())["device"] == NAME


@pytest.mark.usefixtures("gpu", "tf32")
def test_the_arithmetic_of_float32_is_that_in_force():
    self_check.store(PRETENDED, PASSED | {"float32": "linear"})
    assert auto(torch.float32).low_rank_in_triton
    self_check.store(PRETENDED, PASSED | {"tf32": "linear"})
    with pytest.warns(RuntimeWarning, match="tf32"):
        assert not auto(torch.float32).low_rank_in_triton


@pytest.mark.filterwarnings("ignore:PyTorch's products run:RuntimeWarning")
@pytest.mark.parametrize(
    ("home", "name"), [(tables, "driver_version"), *((m, "__version__") for m in (torch, triton, tables))]
)
def test_a_check_is_of_its_versions(gpu, monkeypatch, home, name):
    self_check.store(PRETENDED, PASSED)
    monkeypatch.setattr(home, name, (lambda: "12.8") if name == "driver_version" else "0.0.0")
    tables.forget()
    assert not auto().low_rank_in_triton
    self_check.store(PRETENDED, PASSED)
    assert auto().low_rank_in_triton
    (file,) = gpu.iterdir()
    assert len(json.loads(file.read_text())["checks"]) == 2


def test_a_shipped_check_counts_under_every_driver(gpu, monkeypatch):
    self_check.store(PRETENDED, PASSED)
    tables.SHIPPED.mkdir()
    (file,) = gpu.iterdir()
    file.rename(tables.SHIPPED / file.name)
    monkeypatch.setattr(tables, "driver_version", lambda: "12.8")
    tables.forget()
    assert auto().low_rank_in_triton
    monkeypatch.setattr(tables, "__version__", "0.0.0")
    tables.forget()
    with pytest.warns(RuntimeWarning):
        assert not auto().low_rank_in_triton


def test_the_record_is_read_once(gpu, monkeypatch):
    self_check.store(PRETENDED, PASSED)
    auto()
    monkeypatch.setattr(tables, "versions", lambda: pytest.fail("asked again"))
    monkeypatch.setattr(tables, "read", lambda path: pytest.fail("read again"))
    assert auto().low_rank_in_triton


def test_a_check_gives_torch_compile_another_build(gpu):
    before = cuda._build()
    self_check.store(PRETENDED, PASSED)
    assert cuda._build() != before


@pytest.mark.filterwarnings("ignore:PyTorch's products run:RuntimeWarning")
@pytest.mark.parametrize("passed", [False, True])
def test_the_op_launches_only_what_passed(gpu, monkeypatch, passed):
    if passed:
        self_check.store(PRETENDED, PASSED)
    before = ipca.set_backend("auto")
    with without_kernels(monkeypatch) as launched:
        x, weight = (torch.randn(64, 32, device=PRETENDED, dtype=torch.bfloat16) for _ in range(2))
        A, B = torch.randn(4, 32, device=PRETENDED), torch.randn(64, 4, device=PRETENDED)
        assert pc_linear(x, weight, A, B).shape == (64, 64)
    ipca.set_backend(before)
    assert launched == (["_project_kernel"] if passed else [])


def test_the_versions_are_those_installed(gpu):
    assert tables.versions() == [
        "13.0",
        importlib.metadata.version("torch"),
        importlib.metadata.version("triton"),
        ipca.__version__,
    ]
