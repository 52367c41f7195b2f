"""The spectral cache: the same window again without an SVD, and never a wrong one, whatever happens to its files."""

import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
import time
import warnings

import pytest
import torch
from safetensors.torch import save_file

from ipca import Window, window_svd
from ipca._atomic import TEMPORARY, CorruptFileError, read_checksummed, write_checksummed
from ipca._hashing import tensor_sha256
from ipca.svd.cache import CacheKey, SpectralCache, cache_key, cached_window_svd

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
WINDOW = Window.middle(4)


@pytest.fixture
def cache(tmp_path):
    return SpectralCache(tmp_path / "deep" / "cache")


def same(a, b) -> bool:
    pairs = ((a.U, b.U), (a.S, b.S), (a.Vh, b.Vh))
    return a.reports == b.reports and all(torch.equal(x, y) and x.dtype == y.dtype for x, y in pairs)


def only_file(cache):
    (path,) = cache.folder.iterdir()
    return path


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("result", [None, torch.float32, torch.float64, torch.bfloat16])
def test_an_entry_comes_back_to_the_bit(cache, decomposed, dtype, result):
    W = torch.randn(33, 48).to(dtype)
    first = cached_window_svd(W, WINDOW, dtype=result, cache=cache)
    again = cached_window_svd(W.clone(), WINDOW, dtype=result, cache=SpectralCache(cache.folder))
    assert decomposed == [(33, 48)]
    assert same(again, first)
    plain = window_svd(W, WINDOW, dtype=result)
    assert torch.equal(plain.U, first.U)
    assert torch.equal(plain.Vh, first.Vh)


def test_without_a_cache_it_is_window_svd(tmp_path, decomposed):
    W = torch.randn(20, 9)
    assert torch.equal(cached_window_svd(W, WINDOW).Vh, window_svd(W, WINDOW).Vh)
    assert decomposed == [(20, 9)]
    assert list(tmp_path.iterdir()) == []


def test_every_part_of_the_key_counts(cache, decomposed):
    W = torch.randn(24, 24)
    near = W.clone()
    near[3, 4] = torch.nextafter(near[3, 4], torch.tensor(9.0))
    asked = [
        (W, WINDOW, {}),
        (near, WINDOW, {}),
        (W.double(), WINDOW, {}),
        (W.mT.contiguous(), WINDOW, {}),
        (W, Window.middle(5), {}),
        (W, Window(3, 4), {}),
        (W, Window.energy(0.5, 4), {}),
        (W, Window.effective_rank(4), {}),
        (W, WINDOW, {"tol": "fast"}),
        (W, WINDOW, {"dtype": torch.float64}),
    ]
    for M, window, options in asked:
        cached_window_svd(M, window, cache=cache, **options)
    assert len(decomposed) == len(list(cache.folder.iterdir())) == len(asked)


def test_rules_without_a_spectrum_share_the_entry_of_their_index(cache, decomposed):
    W = torch.randn(24, 30)
    for window in (WINDOW, Window(10, 4), Window.at(0.5, 4)):
        assert cached_window_svd(W, window, cache=cache, tol=1e-6).report.window == Window(10, 4)
    cached_window_svd(W.mT.mT, WINDOW, cache=cache, tol="default")
    assert len(decomposed) == 1


def test_a_stack_decomposes_what_is_missing_together(cache, decomposed):
    W = torch.randn(4, 20, 12)
    second = cached_window_svd(W[1], WINDOW, cache=cache)
    found = cached_window_svd(W, WINDOW, cache=cache)
    assert decomposed == [(20, 12), (3, 20, 12)]
    assert torch.equal(found.U[1], second.U)
    assert found.reports[1] == second.report
    assert same(cached_window_svd(W, WINDOW, cache=cache), found)
    assert len(decomposed) == 2
    plain = window_svd(W, WINDOW)
    torch.testing.assert_close(found.U * found.S[:, None] @ found.Vh, plain.U * plain.S[:, None] @ plain.Vh)


def test_a_known_hash_is_not_computed_again(cache, monkeypatch):
    W = torch.randn(20, 12)
    digest = tensor_sha256(W)
    cached_window_svd(W, WINDOW, cache=cache)
    monkeypatch.setattr("ipca.svd.cache.tensor_sha256", lambda W: pytest.fail("hashed again"))
    assert cache.get(cache_key(W, WINDOW, digest=digest)) is not None
    cached_window_svd(W, WINDOW, cache=cache, digests=[digest])


@pytest.mark.parametrize(
    ("W", "words"),
    [
        (torch.full((8, 8), float("nan")), "holds NaN or Inf"),
        (torch.ones(8), "expected a matrix"),
        (torch.ones(2, 2), "there are only 2"),
    ],
)
def test_bad_input_fails_as_without_a_cache_and_leaves_nothing(cache, W, words):
    with pytest.raises(ValueError, match=words):
        cached_window_svd(W, WINDOW, cache=cache)
    assert not cache.folder.exists()


def test_a_key_is_of_one_matrix():
    with pytest.raises(ValueError, match=r"one matrix \(m, n\), got shape \(2, 8, 8\)"):
        cache_key(torch.ones(2, 8, 8), WINDOW)


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


def other_report(data: bytes) -> bytes:
    assert data.count(b'\\"start\\": 10') == 1
    return data.replace(b'\\"start\\": 10', b'\\"start\\": 11')


DAMAGE = {
    "truncated": cut,
    "a bit": flip,
    "report": other_report,
    "empty": lambda data: b"",
    "foreign": lambda data: b"not a tensor file",
    "no record": lambda data: json.dumps({}).encode().join([(2).to_bytes(8, "little"), b""]),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_never_returned_but_made_again(cache, decomposed, damage):
    W = torch.randn(24, 30)
    first = cached_window_svd(W, WINDOW, cache=cache)
    path = only_file(cache)
    sound = path.read_bytes()
    path.write_bytes(damage(sound))
    assert [found for found, _ in cache.verify()] == [path]
    assert cache.entries() == []
    with pytest.warns(RuntimeWarning, match=r"is damaged: .*; it is removed and made again"):
        again = cached_window_svd(W, WINDOW, cache=cache)
    assert len(decomposed) == 2
    assert torch.equal(again.Vh, first.Vh)
    assert cache.verify() == []
    assert same(cached_window_svd(W, WINDOW, cache=cache), again)


def test_an_entry_under_another_name_is_damaged(cache):
    W = torch.randn(24, 30)
    cached_window_svd(W, WINDOW, cache=cache)
    other = cache_key(W, Window(0, 4))
    only_file(cache).rename(cache.folder / other.file_name)
    with pytest.warns(RuntimeWarning, match="holds another entry than its name says"):
        assert cache.get(other) is None
    assert list(cache.folder.iterdir()) == []


def test_a_folder_that_cannot_be_used_costs_a_warning_alone(tmp_path):
    (tmp_path / "file").write_text("kept")
    W = torch.randn(24, 30)
    with pytest.warns(RuntimeWarning) as caught:
        found = cached_window_svd(W, WINDOW, cache=SpectralCache(tmp_path / "file"))
    assert torch.equal(found.Vh, window_svd(W, WINDOW).Vh)
    read, write = (str(warning.message) for warning in caught)
    assert read.startswith(f"cannot read the spectral cache {tmp_path / 'file'}: ")
    assert write.startswith(f"cannot write the spectral cache {tmp_path / 'file'}: ")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_full_disk_costs_a_warning_alone(cache, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("ipca._atomic.os.fsync", full)
    W = torch.randn(24, 30)
    with pytest.warns(RuntimeWarning, match="cannot write the spectral cache .*: No space left on device; results are"):
        found = cached_window_svd(W, WINDOW, cache=cache)
    assert torch.equal(found.Vh, window_svd(W, WINDOW).Vh)
    assert list(cache.folder.iterdir()) == []


def test_a_later_version_may_report_more(cache, tmp_path):
    W = torch.randn(24, 30)
    first = cached_window_svd(W, WINDOW, cache=cache)
    path = only_file(cache)
    record, tensors = read_checksummed(path)
    write_checksummed(path, {**record, "report": {**record["report"], "joules": 3}}, tensors)
    assert same(cached_window_svd(W, WINDOW, cache=cache), first)


def test_another_version_is_not_asked(cache, decomposed, monkeypatch):
    W = torch.randn(24, 30)
    key = cache_key(W, WINDOW)
    cached_window_svd(W, WINDOW, cache=cache)
    assert cache.get(dataclasses.replace(key, version=key.version + 1)) is None


WRITER = """
import sys, torch
from ipca import Window
from ipca.svd.cache import SpectralCache, cache_key
from ipca import window_svd
torch.manual_seed(0)
W = torch.randn(40, 30)
cache, key, found = SpectralCache(sys.argv[1]), cache_key(W, Window.middle(4)), window_svd(W, Window.middle(4))
print("ready", flush=True)
sys.stdin.readline()
for _ in range(25):
    cache.put(key, found)
    assert cache.get(key) is not None
"""


def test_two_processes_may_write_one_entry_at_once(cache):
    command = [sys.executable, "-W", "error", "-c", WRITER, str(cache.folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen(command, **pipes) for _ in range(2)]
    assert all(writer.stdout.readline() == "ready\n" for writer in writers)
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    W = torch.randn(40, 30)  # the same seed
    key, seen = cache_key(W, WINDOW), 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while any(writer.poll() is None for writer in writers):
            seen += cache.get(key) is not None
    assert [writer.communicate()[1] for writer in writers] == ["", ""]
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen
    assert cache.verify() == []
    assert os.listdir(cache.folder) == [key.file_name]


def aged(cache, ages):
    """One entry for each age in seconds."""
    paths = []
    for seed, age in enumerate(ages):
        W = torch.randn(24, 30, generator=torch.Generator().manual_seed(seed))
        cached_window_svd(W, WINDOW, cache=cache)
        path = cache.folder / cache_key(W, WINDOW).file_name
        os.utime(path, (time.time() - age,) * 2)
        paths.append(path)
    return paths


def test_entries_say_what_they_are(cache):
    old, new = aged(cache, [1000, 10])
    first, second = cache.entries()
    assert (first.path, second.path) == (new, old)
    assert first.key == CacheKey(first.key.weight, "start=10", 4, 1e-6, "default")
    assert first.shape == (24, 30)
    assert first.report.window == Window(10, 4)
    assert first.bytes == new.stat().st_size
    assert second.used == pytest.approx(time.time() - 1000, abs=60)


def test_prune_by_age_spares_what_was_used(cache):
    paths = aged(cache, [5000, 5000, 10])
    W = torch.randn(24, 30, generator=torch.Generator().manual_seed(1))
    assert cache.get(cache_key(W, WINDOW)) is not None
    assert cache.prune(older_than=100) == paths[:1]
    assert sorted(cache.folder.iterdir()) == sorted(paths[1:])


def test_prune_by_size_takes_the_oldest_first(cache):
    paths = aged(cache, [10, 3000, 200])
    size = paths[0].stat().st_size
    assert cache.prune(max_bytes=10 * size) == []
    assert cache.prune(max_bytes=5 * size // 2) == [paths[1]]  # sizes differ by the digits of the seconds within
    assert cache.prune(max_bytes=0) == [paths[2], paths[0]]
    assert list(cache.folder.iterdir()) == []


def test_prune_clears_away_what_killed_processes_left(cache):
    (path,) = aged(cache, [0])
    young, old = (cache.folder / f"{TEMPORARY}{digit * 16}" for digit in "ab")
    for file in (young, old, cache.folder / "notes.txt"):
        file.write_text("x")
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    assert cache.prune() == []
    assert sorted(cache.folder.iterdir()) == sorted([path, young, cache.folder / "notes.txt"])
    assert [entry.path for entry in cache.entries()] == [path]


def test_verify_removes_on_request(cache):
    sound, broken = aged(cache, [0, 0])
    broken.write_bytes(b"")
    ((path, words),) = cache.verify(remove=True)
    assert path == broken
    assert "is damaged" in words
    assert list(cache.folder.iterdir()) == [sound]


FOREIGN = ("model.safetensors", "model-00001-of-00002.safetensors", "adapter_model.safetensors", "a.safetensors")


def weights(path):
    """Weights of a model at ``path``, last changed before everything else."""
    save_file({"weight": torch.ones(3)}, path)
    os.utime(path, (time.time() - 90 * 86400,) * 2)


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_entry_is_not_looked_at(cache, name):
    (path,) = aged(cache, [1000])
    weights(cache.folder / name)
    assert [entry.path for entry in cache.entries()] == [path]
    assert cache.verify() == cache.verify(remove=True) == []
    assert cache.prune(max_bytes=10**6) == []
    assert cache.prune(max_bytes=0, older_than=1) == [path]
    assert [path.name for path in cache.folder.iterdir()] == [name]


def test_weights_with_the_name_of_an_entry_are_named_and_stay(cache):
    cache.folder.mkdir(parents=True)
    path = cache.folder / ("0" * 40 + ".safetensors")
    weights(path)
    words = f"{path} has the name of an entry but not its header, and is not deleted"
    with pytest.warns(RuntimeWarning, match=re.escape(words)):
        assert cache.prune(max_bytes=0) == []
    with pytest.warns(RuntimeWarning, match=re.escape(words)):
        assert cache.verify(remove=True) == []
    assert [found for found, _ in cache.verify()] == [path]
    assert path.exists()


def test_temporary_files_of_others_and_folders_stay(cache):
    (path,) = aged(cache, [0])
    other, folder = cache.folder / ".tmp-download", cache.folder / ("a" * 40 + ".safetensors")
    other.write_text("x")
    folder.mkdir()
    os.utime(other, (time.time() - 2 * 86400,) * 2)
    assert cache.prune(max_bytes=0) == [path]
    assert sorted(cache.folder.iterdir()) == sorted([other, folder])


def test_an_empty_cache(tmp_path):
    cache = SpectralCache(tmp_path / "none")
    assert cache.entries() == cache.verify() == cache.prune(max_bytes=0) == []
    assert not cache.folder.exists()


def test_a_sealed_file_holds_record_and_tensors(tmp_path):
    path = tmp_path / "x"
    record, tensors = {"a": [1, "é"]}, {"t": torch.arange(6.0).view(2, 3).mT, "b": torch.ones(2, dtype=torch.bfloat16)}
    write_checksummed(path, record, tensors)
    back, values = read_checksummed(path)
    assert back == record
    assert all(torch.equal(values[name], tensors[name]) for name in tensors)
    with pytest.raises(FileNotFoundError):
        read_checksummed(tmp_path / "none")
    path.write_bytes(b"\xff" * 40)
    with pytest.raises(CorruptFileError, match="x is damaged"):
        read_checksummed(path)


@pytest.mark.parametrize("window", ["middle", [Window.middle(2)], 3])
def test_a_window_of_another_type_is_named_with_and_without_a_cache(window, tmp_path):
    for cache in (None, SpectralCache(tmp_path)):
        with pytest.raises(TypeError, match="window must be a Window, for example"):
            cached_window_svd(torch.randn(8, 8), window, cache=cache)
