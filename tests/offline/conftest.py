import pytest

from ipca import PCConfig
from tests.helpers.models import Net
from tests.helpers.offline_runs import Run


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path, Net(), PCConfig(rank=3, form="intact"))
