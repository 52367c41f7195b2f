"""``ipca doctor``: what is installed, and whether it computes the right numbers on this machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ipca import _extension
from ipca._atomic import check_writable
from ipca._cache_folder import default_cache_folder
from ipca._version import __version__
from ipca.cli.doctor_checks import Check, run_checks

Record = dict[str, Any]

REQUIRED = "torch>=2.11 triton>=3.6 numpy>=1.26 scipy>=1.13 safetensors>=0.4.5 tqdm>=4.66.3"
DRIVER = Path("/proc/driver/nvidia/version")
SHOWN = ("torch", "triton", "numpy", "scipy", "safetensors", "transformers", "peft")


class Extra(NamedTuple):
    """An extra of the distribution: what it is for, and what it installs."""

    purpose: str
    packages: str


_PEFT = "transformers>=5.1 shtab>=1.7 peft>=0.21 matplotlib>=3.9"
_TRAIN = f"{_PEFT} accelerate>=1.10 trl>=1.14 datasets>=4.7 pillow>=10 pyyaml>=6"
EXTRAS = {
    "train": Extra("ipca train, ipca tradeoff", _TRAIN),
    "hf": Extra("commands over Hugging Face folders, completion", "transformers>=5.1 shtab>=1.7"),
    "peft": Extra("ipca.peft", "transformers>=5.1 peft>=0.21"),
    "plot": Extra("pictures", "matplotlib>=3.9"),
    "quantized": Extra("bases quantized by either", "bitsandbytes>=0.50 torchao>=0.18"),
    "sweep": Extra("ipca sweep: its report, tuning", "matplotlib>=3.9 jinja2>=3.1 optuna>=4.0"),
    "demo": Extra("ipca demo", _TRAIN),
    "examples": Extra("examples/", f"{_TRAIN} lightning>=2.5 scikit-learn>=1.4"),
}


def doctor(args: argparse.Namespace) -> tuple[Record, str]:
    """Report on the installation and check what it computes; status 1 where a check fails."""
    record: Record = {
        "versions": {"ipca": __version__, "python": platform.python_version(), **{n: version(n) for n in SHOWN}},
        "cpu": {"threads": torch.get_num_threads(), "cores": os.cpu_count()},
        "gpus": gpus(),
        "gpu_note": gpu_note(),
        "cuda_extension": _extension.state(),
        "cache": cache_state(default_cache_folder()),
        "extras": {name: extra_state(name) for name in EXTRAS},
    }
    unwritable = record["cache"]["problem"]
    found = [Check("versions", 0.0, outdated(REQUIRED)), Check("the cache can be written", 0.0, unwritable)]
    found += run_checks(progress=not args.quiet)
    record["checks"] = [check._asdict() for check in found]
    # Where nothing can be kept, "auto" would not learn what the checks found.
    checked = [] if unwritable else _one_of_each(record["gpus"])
    record["kernels"] = [check_kernels(gpu, progress=not args.quiet) for gpu in checked]
    faults = [fault for kernels in record["kernels"] for fault in kernels["faults"].values()]
    record["failed"] = sum(bool(problem) for problem in (*(check.problem for check in found), *faults))
    args.status = int(record["failed"] > 0)
    return record, report(record)


def version(package: str) -> str | None:
    """The installed version, None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing(packages: str) -> list[str]:
    """Which of the requirements ``name>=version`` are not met, with the version that is there instead."""
    found = []
    for requirement in packages.split():
        name, least = requirement.split(">=")
        have = version(name)
        if have is None:
            found.append(requirement)
        elif _numbers(have) < _numbers(least):
            found.append(f"{requirement} ({have} is installed)")
    return found


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", re.split(r"[+a-z]", text)[0])]


def outdated(required: str) -> str:
    """What is wrong with the versions of required packages; empty if nothing is."""
    absent = [each for each in missing(required) if sys.platform == "linux" or not each.startswith("triton")]
    return f"missing {', '.join(absent)}; run: pip install --upgrade ipca-lora" if absent else ""


def extra_state(name: str) -> Record:
    """What an extra is for, what of it is missing, and the command that installs it."""
    purpose, packages = EXTRAS[name]
    absent = missing(packages)
    command = f"pip install 'ipca-lora[{name}]'" if absent else None
    return {"for": purpose, "missing": absent, "command": command}


def gpus() -> list[Record]:
    """Every GPU that torch sees."""
    if not torch.cuda.is_available():
        return []
    from ipca.kernels.tables import driver_version

    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found.append(
            {
                "index": index,
                "name": facts.name,
                "capability": f"{facts.major}.{facts.minor}",
                "bytes": facts.total_memory,
                "driver": driver_version(),
            }
        )
    return found


def gpu_note() -> str:
    """Why torch sees no GPU, where one may be expected."""
    if torch.cuda.is_available() or not DRIVER.exists():
        return ""
    if torch.version.cuda is None:
        return "an NVIDIA driver is here, but torch is a build without CUDA; install torch's CUDA build"
    return f"an NVIDIA driver is here, but torch {torch.__version__} sees no device; is the driver new enough?"


def cache_state(folder: Path) -> Record:
    """Where the cache is, its size, and why it cannot be written."""
    try:
        check_writable(folder)
        problem = ""
    except OSError as error:
        problem = f"{str(error).rstrip('.')}; set IPCA_CACHE to another folder"
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    return {"folder": str(folder), "bytes": sum(path.stat().st_size for path in files), "problem": problem}


def _one_of_each(found: Sequence[Record]) -> list[Record]:
    """One GPU of each name, by which the record of checks is kept."""
    return list({gpu["name"]: gpu for gpu in found}.values())


def check_kernels(gpu: Record, *, progress: bool) -> Record:
    """Check every kernel on one GPU and keep what was found, for ``"auto"``."""
    record: Record = {"device": gpu["name"], "skipped": "", "seconds": 0.0, "planned": 0, "faults": {}, "checks": []}
    if float(gpu["capability"]) < 8.0:
        return {**record, "skipped": "they need compute capability 8.0"}
    if version("triton") is None:
        return {**record, "skipped": "triton is not installed"}
    try:
        from ipca.device import check_cases, self_check
    except ImportError as error:
        return {**record, "faults": {"triton": f"it cannot be imported: {error}"}}
    device, began = torch.device("cuda", gpu["index"]), time.perf_counter()
    with torch.cuda.device(device):
        todo = check_cases.cases(device)
        found = self_check.self_check(device, todo, progress=progress)
    faults = self_check.faults(todo, found)
    self_check.store(device, faults)
    return {
        **record,
        "seconds": time.perf_counter() - began,
        "planned": len(todo),
        "faults": faults,
        "checks": [check.record() for check in found],
    }


def report(record: Record) -> str:
    """The record as text."""
    sections = {
        "versions": [(name, number or "not installed") for name, number in record["versions"].items()],
        "machine": _machine_lines(record),
        "extras": [(name, _extra_words(state)) for name, state in record["extras"].items()],
        "checks": [(f"{'FAILED' if check['problem'] else 'ok'}", _check_words(check)) for check in record["checks"]],
        "kernels": [line for kernels in record["kernels"] for line in _kernel_lines(kernels)],
    }
    lines = []
    for title, rows in sections.items():
        if rows:
            lines += [title, *(f"  {name:<15} {words}" for name, words in rows)]
    failed = record["failed"]
    lines.append(f"{failed} check{'s' * (failed > 1)} failed" if failed else "all checks passed")
    return "\n".join(lines)


def _machine_lines(record: Record) -> list[tuple[str, str]]:
    cpu, cache = record["cpu"], record["cache"]
    lines = [("CPU", f"torch uses {cpu['threads']} of {cpu['cores']} cores")]
    lines += [
        (
            f"GPU {gpu['index']}",
            f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['bytes'] / 2**30:.1f} GiB, "
            f"driver for CUDA {gpu['driver']}",
        )
        for gpu in record["gpus"]
    ] or [("GPU", record["gpu_note"] or "none that torch sees")]
    size = f"{cache['bytes'] / 2**20:.1f} MiB"
    usable = cache["problem"] or "writable"
    return [*lines, ("CUDA extension", record["cuda_extension"]), ("cache", f"{cache['folder']}, {size}, {usable}")]


def _extra_words(state: Record) -> str:
    if not state["missing"]:
        return "installed"
    return f"missing {', '.join(state['missing'])} ({state['for']}): {state['command']}"


def _check_words(check: Record) -> str:
    return f"{check['name']}{': ' if check['problem'] else ''}{check['problem']} ({check['seconds']:.1f} s)"


def _kernel_lines(kernels: Record) -> list[tuple[str, str]]:
    device = kernels["device"]
    if kernels["skipped"]:
        return [("skipped", f"Triton's kernels on {device}: {kernels['skipped']}")]
    count, seconds = len(kernels["checks"]), kernels["seconds"]
    lines = [("", f"{count} of {kernels['planned']} checks on {device} in {seconds:.0f} s")]
    for kind, fault in kernels["faults"].items():
        words = f"{kind}: {fault}. The backend auto uses PyTorch's products instead" if fault else kind
        lines.append(("FAILED" if fault else "ok", words))
    return lines
