import pytest

from tests.helpers.model_folders import save_gpt2, save_llama


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch):
    monkeypatch.delenv("IPCA_CACHE", raising=False)


@pytest.fixture
def llama(tmp_path):
    return save_llama(tmp_path / "llama")


@pytest.fixture
def gpt2(tmp_path):
    return save_gpt2(tmp_path / "gpt2")
