import pytest
from common import Net
from streamed import Run

from ipca import PCConfig


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path, Net(), PCConfig(rank=3, form="intact"))
