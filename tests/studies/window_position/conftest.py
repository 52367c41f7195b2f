import pytest


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A complete made-up study, with its tables: a U whose ends forget by their singular values."""
    from studies.window_position import findings
    from studies.window_position.rows import Study
    from tests.helpers import made_up_study

    folder = made_up_study.study(tmp_path_factory.mktemp("study"))
    findings.write(Study(folder))
    return folder
