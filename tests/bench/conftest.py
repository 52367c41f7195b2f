import pytest


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch):
    """On a CPU the benches refuse Triton's kernels; nobody times an interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
