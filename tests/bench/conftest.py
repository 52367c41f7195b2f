"""The benches are scripts: their files import each other by name."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch):
    """On a CPU the benches refuse Triton's kernels; nobody times an interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
