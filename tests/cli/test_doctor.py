"""``ipca doctor``: what is installed, what is missing, and what a fault does."""

import importlib.metadata
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ipca
from ipca.cli import doctor_checks, doctor_command
from ipca.cli.main import main
from ipca.device import check_cases, self_check
from ipca.kernels import tables
from tests.helpers.pretend_cuda import DEVICE, NAME, pretend_cuda

CPU = torch.device("cpu")
PROJECT = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A pretended GPU whose kernels run in Triton's interpreter: one small case of each arithmetic."""
    cache = pretend_cuda(monkeypatch, tmp_path)
    small = [case for case in check_cases.cases(CPU) if case.family.kernel == "linear" and case.shape[0] == 5]
    todo = list({case.arithmetic: case for case in small}.values())
    run = self_check.self_check
    monkeypatch.setattr(check_cases, "cases", lambda device: todo)
    monkeypatch.setattr(self_check, "self_check", lambda device, todo, progress: run(CPU, todo, progress=progress))
    yield cache
    tables.forget()


@pytest.fixture
def quick(monkeypatch):
    """One check of the machine in the place of all."""
    monkeypatch.setattr(doctor_checks, "CHECKS", {"the start": doctor_checks._start})
    monkeypatch.setattr(doctor_checks, "has_peft", lambda: False)


def doctor(capsys, *words, status=0):
    assert main(["doctor", "--quiet" if "--json" in words else "--debug", *words]) == status
    return capsys.readouterr().out


def without(monkeypatch, **versions):
    """Packages that are not installed (None), or in another version."""
    real = importlib.metadata.version

    def version(name):
        if name in versions and versions[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_a_cpu_passes_every_check(capsys):
    record = json.loads(doctor(capsys, "--json"))
    assert record["failed"] == 0
    assert [check["problem"] for check in record["checks"]] == [""] * 7
    assert record["checks"][-1]["name"] == "stock PEFT loads a saved adapter"
    assert record["versions"]["torch"] == torch.__version__
    assert record["kernels"] == []


@pytest.mark.usefixtures("quick")
def test_the_text_is_short_and_ends_with_the_verdict(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("IPCA_CACHE", str(tmp_path / "here"))
    lines = doctor(capsys).splitlines()
    assert [line for line in lines[:-1] if not line.startswith(" ")] == ["versions", "machine", "extras", "checks"]
    assert lines[-1] == "all checks passed"
    assert f"  cache           {tmp_path / 'here'}, 0.0 MiB, writable" in lines
    assert max(map(len, lines)) < 200


@pytest.mark.usefixtures("quick")
def test_a_fault_is_named_and_is_status_1(capsys, monkeypatch):
    monkeypatch.setattr(doctor_checks, "CHECKS", {"one": lambda: "off by 3", "two": lambda: 1 / 0, "three": lambda: ""})
    out = doctor(capsys, status=1)
    assert "FAILED          one: off by 3 (0.0 s)" in out
    assert "FAILED          two: ZeroDivisionError: division by zero" in out
    assert "ok              three" in out
    assert out.endswith("2 checks failed\n")
    assert json.loads(doctor(capsys, "--json", status=1))["failed"] == 2


def times_1001(value):
    """A result that is off by a thousandth."""
    if isinstance(value, torch.Tensor):
        return 1.001 * value
    if isinstance(value, torch.nn.Module):
        with torch.no_grad():
            next(value.parameters()).mul_(1.001)
        return value
    return replace(value, S=1.001 * value.S)


@pytest.mark.parametrize(
    ("check", "home", "name"),
    [
        (doctor_checks._start, doctor_checks.LinearPC, "forward"),
        (doctor_checks._gradients, doctor_checks, "pc_linear"),
        (doctor_checks._window, ipca, "window_svd"),
        (doctor_checks._adapter, ipca, "load_adapter"),
        (doctor_checks._stock_peft, doctor_checks, "output_in_peft"),
    ],
)
def test_a_check_sees_what_is_off_by_a_thousandth(check, home, name, monkeypatch):
    right = getattr(home, name)
    assert check() == ""
    monkeypatch.setattr(home, name, lambda *args, **options: times_1001(right(*args, **options)))
    assert check()


@pytest.mark.parametrize(
    ("cuda", "words"), [(None, "torch is a build without CUDA; install"), ("13.0", "sees no device")]
)
def test_a_gpu_that_torch_does_not_see(monkeypatch, tmp_path, cuda, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor_command, "DRIVER", tmp_path / "version")
    assert doctor_command.gpu_note() == ""
    (tmp_path / "version").touch()
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert words in doctor_command.gpu_note()


@pytest.mark.usefixtures("quick")
def test_a_missing_extra_is_no_fault_and_has_its_command(capsys, monkeypatch):
    without(monkeypatch, optuna=None, jinja2="2.11.3")
    out = doctor(capsys)
    words = "missing jinja2>=3.1 (2.11.3 is installed), optuna>=4.0 (ipca sweep: its report, tuning): "
    assert f"  sweep           {words}pip install 'ipca-lora[sweep]'" in out


@pytest.mark.usefixtures("quick")
def test_a_required_package_that_is_too_old_is_a_fault(capsys, monkeypatch):
    without(monkeypatch, numpy="1.25.2")
    out = doctor(capsys, status=1)
    assert "versions: missing numpy>=1.26 (1.25.2 is installed); run: pip install --upgrade ipca-lora" in out


@pytest.mark.usefixtures("quick")
def test_a_cache_that_cannot_be_written_is_said(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("IPCA_CACHE", str(tmp_path / "file"))
    assert "is not a folder; set IPCA_CACHE to another folder" in doctor(capsys, status=1)


@pytest.mark.usefixtures("quick")
def test_a_gpu_is_checked_and_recorded(gpu, capsys):
    out = doctor(capsys)
    assert f"GPU 0           {NAME}, compute capability 9.0, 80.0 GiB, driver for CUDA 13.0" in out
    assert re.search(rf"3 of 3 checks on {NAME} in \d+ s", out)
    assert [f"  ok              {kind}" in out for kind in check_cases.DTYPES] == [True] * 3
    assert tables.checked(DEVICE) == dict.fromkeys(check_cases.DTYPES, "")


@pytest.mark.usefixtures("quick")
def test_a_broken_kernel_is_named_recorded_and_status_1(gpu, capsys, monkeypatch):
    right = check_cases.linear
    monkeypatch.setattr(check_cases, "linear", lambda *args, **options: right(*args, **options) + 0.1)
    record = json.loads(doctor(capsys, "--json", status=1))
    (kernels,) = record["kernels"]
    assert all(fault.startswith("linear") for fault in kernels["faults"].values())
    assert record["failed"] == len(kernels["faults"]) == 3
    assert kernels["checks"][0]["problem"]
    assert tables.checked(DEVICE) == kernels["faults"]
    assert "The backend auto uses PyTorch's products instead" in doctor(capsys, status=1)


@pytest.mark.usefixtures("quick")
def test_an_old_gpu_is_skipped(gpu, capsys, monkeypatch):
    from tests.helpers import pretend_cuda as device

    monkeypatch.setattr(device.FACTS, "major", 7)
    assert f"skipped         Triton's kernels on {NAME}: they need compute capability 8.0" in doctor(capsys)
    assert not gpu.exists()


@pytest.mark.usefixtures("quick", "gpu")
def test_a_broken_triton_is_a_fault(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipca.device.self_check", None)
    monkeypatch.delattr(ipca.device, "self_check")
    assert "FAILED          triton: it cannot be imported: " in doctor(capsys, status=1)


@pytest.mark.usefixtures("quick", "gpu")
def test_no_minute_is_spent_on_a_record_that_cannot_be_kept(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("IPCA_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(self_check, "self_check", lambda *args, **options: pytest.fail("checked"))
    said = doctor(capsys, status=1)
    assert re.search(r"FAILED +the cache can be written: cannot write .* set IPCA_CACHE to another folder", said)
    assert "versions" in said


def requirements(text):
    return {re.sub(r";.*", "", found).strip() for found in re.findall(r'"([^"]+)"', text)}


def test_what_is_asked_for_is_what_pyproject_asks_for():
    assert requirements(re.search(r"^dependencies = \[(.*?)^\]", PROJECT, flags=re.DOTALL | re.MULTILINE)[1]) == set(
        doctor_command.REQUIRED.split()
    )
    table = PROJECT.split("[project.optional-dependencies]")[1].split("[project.scripts]")[0]
    extras = {name: requirements(body) for name, body in re.findall(r"^(\w+) = \[(.*)\]", table, flags=re.MULTILINE)}

    def expanded(name):
        inner = {each for each in extras[name] if each.startswith("ipca-lora[")}
        nested = [other for each in inner for other in each[len("ipca-lora[") : -1].split(",")]
        return (extras[name] - inner).union(*map(expanded, nested))

    assert {name: set(extra.packages.split()) for name, extra in doctor_command.EXTRAS.items()} == {
        name: expanded(name) for name in extras if name not in ("docs", "study", "dev")
    }
