import pytest
from folders import save_gpt2, save_llama

import ipca.svd.cache


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch):
    monkeypatch.delenv("IPCA_CACHE", raising=False)


@pytest.fixture
def llama(tmp_path):
    return save_llama(tmp_path / "llama")


@pytest.fixture
def gpt2(tmp_path):
    return save_gpt2(tmp_path / "gpt2")


@pytest.fixture
def decomposed(monkeypatch):
    """The shapes that this process decomposed."""
    shapes, plain = [], ipca.svd.cache.window_svd

    def counted(weight, *args, **options):
        shapes.append(tuple(weight.shape))
        return plain(weight, *args, **options)

    monkeypatch.setattr(ipca.svd.cache, "window_svd", counted)
    return shapes
