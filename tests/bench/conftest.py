import pytest


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch):
    """On a CPU the benches refuse Triton's kernels; nobody times an interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A complete made-up study, with its tables: a U whose ends forget by their singular values."""
    import findings
    import study_made
    from study_rows import Study

    folder = study_made.study(tmp_path_factory.mktemp("study"))
    findings.write(Study(folder))
    return folder
