"""``ipca cache list | verify | prune``."""

import json
import os
import time

import pytest
import torch

from ipca import Window
from ipca.cli.main import main
from ipca.svd.cache import SpectralCache, cached_window_svd


@pytest.fixture
def cache(tmp_path):
    """Three entries, used an hour, ten days and forty days ago."""
    held = SpectralCache(tmp_path / "cache")
    for seed, days in enumerate((1 / 24, 10, 40)):
        W = torch.randn(20, 12, generator=torch.Generator().manual_seed(seed))
        cached_window_svd(W, Window.middle(4), cache=held)
        newest = max(held.folder.iterdir(), key=lambda path: path.stat().st_mtime)
        os.utime(newest, (time.time() - 86400 * days,) * 2)
    return held


def run(cache, *words, status=0):
    assert main(["cache", *words, "--cache", str(cache.folder)]) == status


def test_list_shows_every_entry(cache, capsys):
    run(cache, "list")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert "20 × 12" in lines[1]
    assert "[4, 8)" in lines[1]
    assert lines[3].endswith("40.0 d")
    assert lines[4].startswith("3 entries, ")
    run(cache, "list", "--json")
    record = json.loads(capsys.readouterr().out)
    first = record["entries"][0]
    assert (first["shape"], first["window"], first["start"], first["rank"]) == ([20, 12], "start=4", 4, 4)
    assert (first["tol"], first["dtype"], first["certified"]) == (1e-6, "default", True)
    assert record["bytes"] == sum(path.stat().st_size for path in cache.folder.iterdir())


def test_verify_fails_on_a_damaged_entry_until_it_is_removed(cache, capsys):
    run(cache, "verify")
    assert f"no damaged entry in {cache.folder}" in capsys.readouterr().out
    path = cache.entries()[0].path
    path.write_bytes(path.read_bytes()[:-1])
    run(cache, "verify", status=1)
    assert f"1 entries are damaged ({path} is damaged: " in capsys.readouterr().err
    run(cache, "verify", "--remove", "--json")
    assert json.loads(capsys.readouterr().out)["removed"] == [path.name]
    run(cache, "verify")


def test_prune_by_age_and_by_size(cache, capsys):
    first, _, third = (entry.path for entry in cache.entries())
    run(cache, "prune", "--older-than", "30d", "--json")
    assert json.loads(capsys.readouterr().out)["removed"] == [third.name]
    run(cache, "prune", "--max-bytes", str(first.stat().st_size))
    assert "removed 1 entries" in capsys.readouterr().out
    assert list(cache.folder.iterdir()) == [first]


def test_a_model_in_the_folder_is_spared(cache, capsys):
    model = cache.folder / "model.safetensors"
    model.write_bytes(b"weights")
    run(cache, "verify", "--remove", "--json")
    assert json.loads(capsys.readouterr().out)["removed"] == []
    run(cache, "prune", "--max-bytes", "0")
    assert list(cache.folder.iterdir()) == [model]


def test_prune_wants_to_be_told_what(cache, capsys):
    with pytest.raises(SystemExit) as stop:
        run(cache, "prune")
    assert stop.value.code == 2
    assert "choose what to delete: --max-bytes, --older-than, or both" in capsys.readouterr().err
    assert len(cache.entries()) == 3


def test_the_default_folder_is_that_of_the_environment(cache, capsys, monkeypatch):
    monkeypatch.setenv("IPCA_CACHE", str(cache.folder))
    assert main(["cache", "list"]) == 0
    assert "3 entries" in capsys.readouterr().out


def test_a_file_is_no_cache(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert main(["cache", "list", "--cache", str(tmp_path / "file")]) == 1
    assert "is not a folder; give the folder of a cache" in capsys.readouterr().err
