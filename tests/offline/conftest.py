import pytest

from ipca.model import AdapterSettings
from tests.helpers.models import Net
from tests.helpers.offline_runs import Run


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path, Net(), AdapterSettings(rank=3, form="intact"))
