"""``ipca init`` interrupted and resumed, and shared by several processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM as AutoModel

import ipca._hashing
import ipca.svd.cache
from ipca.cli.main import main
from ipca.offline.work_folder import WORK
from tests.helpers.model_folders import contents, spoil


def init(model: Path, out: Path, *options: str) -> int:
    return main(["init", str(model), "--rank", "4", "-o", str(out), *options])


def test_a_bad_layer_keeps_the_others_and_the_old_files(llama, tmp_path, capsys):
    spoil(llama)
    out = tmp_path / "out"
    out.mkdir()
    (out / "ipca.json").write_text("old")
    assert init(llama, out) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ipca:")]
    assert re.fullmatch(
        rf"ipca: \d+ finished layers are kept in {out / WORK}; run the same command again to resume", lines[0]
    )
    assert re.fullmatch(r"ipca: error: model\.layers\.1\S+: the tensor holds NaN or Inf.", lines[1])
    assert (out / "ipca.json").read_text() == "old"


def test_other_options_do_not_go_on_with_a_job(llama, tmp_path, monkeypatch, capsys):
    out, plain, calls = tmp_path / "out", ipca.svd.cache.window_svd, []

    def stop(*args, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ipca.svd.cache, "window_svd", stop)
        assert init(llama, out) == 130
    assert f"ipca: 3 finished layers are kept in {out / WORK}" in capsys.readouterr().err
    assert init(llama, out, "--alpha", "2") == 1
    error = capsys.readouterr().err
    assert "holds the finished layers of a different run (alpha null, now 2.0); repeat that one to finish it" in error
    assert init(llama, out, "--form", "residual") == 1
    os.utime(llama / "model.safetensors.index.json")
    assert init(llama, out) == 1
    assert 'a different run (model "' in capsys.readouterr().err
    shutil.rmtree(out)
    assert init(llama, out) == 0


def test_residual_needs_an_empty_folder_but_for_its_own_work(llama, tmp_path, monkeypatch, capsys, decomposed):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(
            "ipca.offline.adapter_files.write_in_place", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt())
        )
        assert init(llama, out, "--form", "residual") == 130
    assert len(decomposed) == 14
    (out / "notes.txt").write_text("mine")
    assert init(llama, out, "--form", "residual") == 1
    assert "is not empty; choose a new folder" in capsys.readouterr().err
    (out / "notes.txt").unlink()
    assert init(llama, out, "--form", "residual") == 0
    assert len(decomposed) == 14
    assert sorted(os.listdir(out)) == ["adapter", "base"]


KILLED = """
import os, signal, sys
import ipca.svd.cache
from ipca.cli.main import main
from ipca._hashing import tensor_sha256

log, limit, *arguments = sys.argv[1:]
plain, done = ipca.svd.cache.window_svd, []

def counted(weight, *args, **options):
    if len(done) == int(limit):
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(tensor_sha256(weight))
    with open(log, "a") as file:
        print(done[-1], file=file)
    return plain(weight, *args, **options)

ipca.svd.cache.window_svd = counted
sys.exit(main(arguments))
"""


def environment() -> dict[str, str]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return {**kept, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_killed_run_goes_on_and_does_nothing_twice(llama, tmp_path, monkeypatch, capsys):
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = ["init", str(llama), "--rank", "4", "--form", "residual", "-o", str(out)]
    command = [sys.executable, "-c", KILLED, str(log), "5", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=100)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(log.read_text().split()) == 5
    assert os.listdir(out) == [WORK]
    later, plain = [], ipca.svd.cache.window_svd

    def counted(weight, *args, **options):
        later.append(ipca._hashing.tensor_sha256(weight))
        return plain(weight, *args, **options)

    monkeypatch.setattr(ipca.svd.cache, "window_svd", counted)
    assert main([*arguments, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["finished_before"] == 5
    hashes = [*log.read_text().split(), *later]
    assert len(hashes) == len(set(hashes)) == record["layers"]
    assert main([*arguments[:-1], str(tmp_path / "twin")]) == 0
    mine, twin = contents(out), contents(tmp_path / "twin")
    name = "adapter/adapter_config.json"  # each names its own base
    assert mine.pop(name) != twin.pop(name)
    assert mine == twin


def torchrun(*arguments: str, script: str | None = None) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = ["-m", "ipca"] if script is None else [script]
    return subprocess.run(
        [*start, *program, *arguments], capture_output=True, text=True, env=environment(), timeout=100
    )


@pytest.mark.slow
def test_two_processes_share_the_layers_and_change_no_bit(llama, tmp_path, capsys):
    script = tmp_path / "watched.py"
    script.write_text(KILLED.replace("log, limit,", "log = sys.argv[1] + os.environ['RANK']\n_, limit,"))
    arguments = ["init", str(llama), "--rank", "4", "--json", "-o", str(tmp_path / "out")]
    done = torchrun(str(tmp_path / "log"), "99", *arguments, script=str(script))
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)  # of the first process alone
    assert record["layers"] == 14
    parts = [(tmp_path / f"log{rank}").read_text().split() for rank in (0, 1)]
    assert len(parts[0] + parts[1]) == len({*parts[0], *parts[1]}) == 14
    assert min(map(len, parts)) >= 5
    assert init(llama, tmp_path / "one") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    assert done.stderr.count("Window SVD:   0%") == 1


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_and_the_rest_is_kept(llama, tmp_path, capsys):
    spoil(llama)
    done = torchrun("init", str(llama), "--rank", "4", "--form", "residual", "-o", str(tmp_path / "out"))
    assert done.returncode == 1
    assert re.search(r"ipca: \d+ finished layers are kept in ", done.stderr)
    errors = [line for line in done.stderr.splitlines() if "ipca: error: " in line and "NaN or Inf" in line]
    assert len(errors) == 1, done.stderr
    assert re.search(r"model\.layers\.1\.\S+: the tensor holds NaN or Inf", errors[0])
    assert 'Traceback (most recent call last):\n  File "' + str(Path(ipca.__file__).parent) not in done.stderr
    assert os.listdir(tmp_path / "out") == [WORK]
    assert not (tmp_path / "out" / "base").exists()


def test_a_trained_adapter_is_not_replaced_by_a_start_and_an_untrained_one_is(llama, tmp_path, capsys):
    out = tmp_path / "out"
    assert init(llama, out) == 0
    assert init(llama, out) == 0
    model = ipca.load_adapter(AutoModel.from_pretrained(llama), out)
    with torch.no_grad():
        next(ipca.adapter_parameters(model)).add_(1.0)
    ipca.save_adapter(model, out)
    before = contents(out)
    capsys.readouterr()
    assert init(llama, out) == 1
    assert f"{out} holds an adapter that is trained or not readable; choose another folder." in capsys.readouterr().err
    assert contents(out) == before
