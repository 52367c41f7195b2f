"""How layers are shared out: among threads, among processes, and with a cache of what was decomposed before."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import ipca
from ipca.model.decompose import partition as share

RANKS = """
import sys, hashlib
from datetime import timedelta
import torch, torch.distributed as dist
from torch import nn
import ipca
torch.set_num_threads(1)
rank, folder, failing = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "failing"
store = dist.FileStore(f"{folder}/store", 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
torch.manual_seed(rank if sys.argv[3] == "different" else 0)
model = nn.Sequential(*[nn.Linear(70 + 10 * i, 90) for i in range(5)])
decomposed = []
import ipca.model.decompose as starts
right = starts.cached_window_svd
def counted(weight, *args, **options):
    decomposed.append(tuple(weight.shape))
    if failing and rank == 1:
        raise RuntimeError("no luck")
    return right(weight, *args, **options)
starts.cached_window_svd = counted
try:
    ipca.apply_pc(model, rank=4, progress=False)
except (RuntimeError, ValueError) as error:
    print("error", error)
else:
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.state_dict().values() if p is not None
        and p.dtype == torch.float32))
    print("bits", digest.hexdigest(), len(decomposed))
dist.destroy_process_group()
"""


def small_model(layers=4):
    return nn.Sequential(*[nn.Linear(64 + 8 * i, 72) for i in range(layers)])


def two_ranks(folder, mode):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, "-c", RANKS, str(rank), str(folder), mode] for rank in (0, 1)]
    running = [
        subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for c in commands
    ]
    done = [process.communicate(timeout=120) for process in running]
    assert all(process.returncode == 0 for process in running), done
    return [out.split(maxsplit=1) for out, _ in done]


@pytest.mark.slow
def test_two_processes_share_the_layers_and_end_with_the_same_bits(tmp_path):
    (first, bits), (second, same) = two_ranks(tmp_path, "fine")
    assert (first, second) == ("bits", "bits")
    (digest, mine), (other, others) = bits.split(), same.split()
    assert digest == other
    assert int(mine) + int(others) == 5
    assert 1 <= int(mine) <= 4


@pytest.mark.slow
def test_the_error_of_one_process_ends_all_with_its_message(tmp_path):
    (_, here), (_, there) = two_ranks(tmp_path, "failing")
    assert "rank 1:" in here
    assert "no luck" in here
    assert "no luck" in there


@pytest.mark.slow
def test_other_weights_in_one_process_are_named_in_all(tmp_path):
    (first, here), (second, there) = two_ranks(tmp_path, "different")
    assert (first, second) == ("error", "error")
    for said in (here, there):
        assert re.match(
            r"[0-4] has other values in the process of rank [01] \([1-4] of 5 layers differ\).*the same weig", said
        )


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_even_whole_and_in_order(size):
    costs = [float(c) for c in (5, 1, 1, 1, 4, 3, 3, 8, 2, 2)]
    shares = share(costs, size)
    assert sorted(i for part in shares for i in part) == list(range(len(costs)))
    assert all(part == sorted(part) for part in shares)
    loads = [sum(costs[i] for i in part) for part in shares]
    assert max(loads) - min(loads) <= max(costs)
    assert shares == share(costs, size)
    assert share([], size) == [[] for _ in range(size)]


def test_layers_run_in_parallel_and_stay_in_order():
    torch.manual_seed(0)
    alone, together = small_model(), small_model()
    together.load_state_dict(alone.state_dict())
    ipca.apply_pc(alone, rank=4, progress=False)
    torch.set_num_threads(2)
    try:
        ipca.apply_pc(together, rank=4, progress=False)
    finally:
        torch.set_num_threads(1)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one.base_weight, other.base_weight)
        torch.testing.assert_close(one.lora_A, other.lora_A)


@pytest.mark.parametrize("as_path", [True, False])
def test_a_cache_keeps_what_was_decomposed(tmp_path, as_path, monkeypatch):
    from ipca.svd import cache as cache_module

    torch.manual_seed(0)
    first, second = small_model(), small_model()
    second.load_state_dict(first.state_dict())
    cache = Path(tmp_path) if as_path else ipca.SpectralCache(tmp_path)
    ipca.apply_pc(first, rank=4, cache=cache, progress=False)
    monkeypatch.setattr(cache_module, "window_svd", lambda *_, **__: pytest.fail("decomposed again"))
    ipca.apply_pc(second, rank=4, cache=cache, progress=False)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.lora_A, other.lora_A)
        assert torch.equal(one.base_weight, other.base_weight)


def test_the_bar_counts_layers_and_names_paths(capsys):
    ipca.apply_pc(small_model(3), rank=4)
    shown = capsys.readouterr().err
    assert "Window SVD: 100%" in shown
    assert "3/3" in shown
    assert "gram_eigh=3" in shown


@pytest.mark.parametrize("folder", ["", True])
def test_a_cache_that_is_no_folder(folder):
    with pytest.raises(ValueError, match="a cache needs a folder"):
        ipca.apply_pc(small_model(), rank=4, cache=folder, progress=False)


def test_an_error_whose_type_takes_other_arguments_keeps_its_words(monkeypatch):
    import ipca.model.decompose as starts

    def undecodable(*_, **__):
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "planted")

    monkeypatch.setattr(starts, "cached_window_svd", undecodable)
    with pytest.raises(RuntimeError, match=r"0: .*planted"):
        ipca.apply_pc(small_model(), rank=4, progress=False)
