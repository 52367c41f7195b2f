"""The default folder of what is kept between runs."""

from ipca._cache_folder import default_cache_folder


def test_the_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("IPCA_CACHE", raising=False)
    assert default_cache_folder() == tmp_path / ".cache" / "ipca"
    monkeypatch.setenv("IPCA_CACHE", "~/elsewhere")
    assert default_cache_folder() == tmp_path / "elsewhere"
