import pytest
from common import Net
from streamed import Run

import ipca.io.streaming
from ipca import PCConfig


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path, Net(), PCConfig(rank=3, form="intact"))


@pytest.fixture
def decomposed(monkeypatch):
    """The shapes that were decomposed."""
    shapes, plain = [], ipca.io.streaming.cached_window_svd

    def counted(weight, *args, **options):
        shapes.append(tuple(weight.shape))
        return plain(weight, *args, **options)

    monkeypatch.setattr(ipca.io.streaming, "cached_window_svd", counted)
    return shapes
