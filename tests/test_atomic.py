"""Writing: complete files or the old ones, whatever fails in between, and never a trace of the attempt."""

import copy
import errno
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from torch import nn

import ipca
import ipca.io.adapter
import ipca.io.peft_format
from ipca._atomic import locked_folder, staged_files, staged_folder
from ipca.io.adapter_folder import read_adapter
from ipca.io.output_folder import check_output
from tests.helpers.models import Net, adapted, snapshot

WEIGHTS, CONFIG, SIDECAR = "adapter_model.safetensors", "adapter_config.json", "ipca.json"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


WRITERS = {
    "save": ipca.save_adapter,
    "peft": lambda model, folder: ipca.export(model, folder, overwrite=True),
    "residual": lambda model, folder: ipca.export(model, folder, format="residual"),
    "truncated": lambda model, folder: ipca.export(model, folder, format="truncated", rank=6, overwrite=True),
}


@pytest.fixture
def saved(tmp_path):
    """A base and the folder of an adapter for it."""
    base = Net()
    ipca.save_adapter(adapted(copy.deepcopy(base)), tmp_path / "adapter")
    return base, tmp_path / "adapter"


def test_folder_holds_three_readable_files(saved):
    _, folder = saved
    assert sorted(os.listdir(folder)) == sorted([WEIGHTS, CONFIG, SIDECAR])
    umask = os.umask(0)
    os.umask(umask)
    assert {stat.S_IMODE((folder / name).stat().st_mode) for name in os.listdir(folder)} == {0o666 & ~umask}
    record = json.loads((folder / SIDECAR).read_text())
    assert record["format"] == 1
    assert record["modules_to_save"] == ["norm"]
    assert record["layers"]["a"]["shape"] == [12, 20]
    assert set(record["versions"]) == {"ipca", "torch"}


@pytest.mark.parametrize("below", ["file/adapter", "file/deep/adapter", "file"])
@pytest.mark.parametrize("write", WRITERS)
def test_folder_that_cannot_be_made(tmp_path, below, write):
    (tmp_path / "file").write_text("kept")
    model = adapted(Net())
    before = snapshot(model)
    with pytest.raises(OSError, match=r"cannot write .*file"):
        WRITERS[write](model, tmp_path / below)
    assert contents(tmp_path) == {"file": b"kept"}
    assert snapshot(model) == before


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc, which refuses even root")
def test_folder_that_even_root_cannot_write():
    with pytest.raises(OSError, match="cannot write /proc/adapter"):
        ipca.save_adapter(adapted(Net()), "/proc/adapter")


def broken(error: BaseException):
    def write(tensors, filename, metadata=None):
        Path(filename).write_bytes(b"garbage")
        raise error

    return write


ERRORS = [OSError(28, "No space left on device"), SafetensorError("I/O error"), KeyboardInterrupt(), MemoryError()]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_failure_while_writing_leaves_the_old_files(saved, error, monkeypatch, tmp_path):
    base, folder = saved
    (folder / "notes.txt").write_text("mine")
    before, model = contents(tmp_path), adapted(copy.deepcopy(base))
    monkeypatch.setattr(ipca.io.peft_format, "save_file", broken(error))
    expected = OSError if isinstance(error, SafetensorError) else type(error)
    for name, target in [("save", folder), ("peft", folder), *((name, tmp_path / "new") for name in WRITERS)]:
        with pytest.raises(expected):
            WRITERS[name](model, target)
        assert contents(tmp_path) == before
        assert os.listdir(tmp_path) == ["adapter"]
        assert sorted(os.listdir(folder)) == sorted([WEIGHTS, CONFIG, SIDECAR, "notes.txt"])
    read_adapter(folder)


@pytest.fixture
def files_up_to():
    """A function that makes the system refuse to write any file beyond so many bytes, as a full disk does."""
    resource = pytest.importorskip("resource", reason="needs POSIX, whose limits stand in for a full disk")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 1, 600, 2000])
def test_a_disk_that_is_full_halfway_leaves_the_old_files(saved, size, files_up_to, tmp_path):
    base, folder = saved
    before, model = contents(tmp_path), adapted(copy.deepcopy(base))
    unchanged = snapshot(model)
    targets = [
        ("save", folder),
        ("peft", folder),
        ("truncated", folder),
        *((name, tmp_path / "new") for name in WRITERS),
    ]
    assert size < min(len(data) for name, data in before.items() if name.endswith(WEIGHTS))
    for name, target in targets:
        files_up_to(size)
        with pytest.raises(OSError, match=r"cannot write .*(File too large|I/O error)") as found:
            WRITERS[name](model, target)
        files_up_to(1 << 40)
        assert "\n" not in str(found.value)
        assert contents(tmp_path) == before
        assert os.listdir(tmp_path) == ["adapter"]
    assert snapshot(model) == unchanged
    read_adapter(folder)


def test_failure_after_the_tensors_leaves_the_old_files(saved, monkeypatch, tmp_path):
    base, folder = saved
    before = contents(tmp_path)
    monkeypatch.setattr(ipca.io.adapter, "file_sha256", lambda path: path / 0)
    with pytest.raises(TypeError):
        ipca.save_adapter(adapted(copy.deepcopy(base)), folder)
    assert contents(tmp_path) == before
    assert len(os.listdir(folder)) == 3


def test_saving_again_replaces_our_files_alone(saved):
    base, folder = saved
    (folder / "notes.txt").write_text("mine")
    before = contents(folder)
    model = adapted(copy.deepcopy(base))
    ipca.save_adapter(model, folder)
    after = contents(folder)
    assert after.keys() == before.keys()
    assert after["notes.txt"] == b"mine"
    assert after[WEIGHTS] != before[WEIGHTS]
    ipca.load_adapter(base, folder)
    assert torch.equal(base.b.lora_B, model.b.lora_B)


def test_staged_files_appear_together(tmp_path):
    with staged_files(tmp_path / "x" / "y") as stage:
        (stage / "one").write_text("1")
        assert contents(tmp_path / "x").keys() == {str((stage / "one").relative_to(tmp_path / "x"))}
        assert not (tmp_path / "x" / "y" / "one").exists()
    assert contents(tmp_path) == {"x/y/one": b"1"}
    assert os.listdir(tmp_path / "x" / "y") == ["one"]


def fill(stage: Path, text: str, error: BaseException | None = None) -> None:
    (stage / "sub").mkdir()
    (stage / "sub" / "one").write_text(text)
    if error is not None:
        raise error


@pytest.mark.parametrize("exists", [False, True])
def test_staged_folder_appears_whole_or_not_at_all(tmp_path, exists):
    target = tmp_path / "x" / "y"
    if exists:
        target.mkdir(parents=True)
    with pytest.raises(ZeroDivisionError), staged_folder(target) as stage:
        fill(stage, "1", ZeroDivisionError())
    assert contents(tmp_path) == {}
    assert target.exists() == exists
    with staged_folder(target) as stage:
        fill(stage, "1")
        assert not exists or [stage.name] == os.listdir(target)
    assert contents(tmp_path) == {"x/y/sub/one": b"1"}
    assert os.listdir(tmp_path / "x") == ["y"]


@pytest.fixture
def own_folder():
    """An empty folder of a user who may not write in its parent; the test runs as that user."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        folder = Path(parent, "out")
        folder.mkdir()
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
        try:
            yield folder
        finally:
            os.seteuid(0)


def test_an_empty_folder_is_filled_in_a_parent_without_permission(own_folder):
    with staged_folder(own_folder) as stage:
        fill(stage, "1")
    assert contents(own_folder) == {"sub/one": b"1"}
    assert os.listdir(own_folder) == ["sub"]


@pytest.mark.parametrize("there", ["empty", "new", "new below"])
def test_a_link_is_followed(there, tmp_path):
    real = tmp_path / "disk" / "real"
    (real if there == "empty" else real.parent).mkdir(parents=True)
    (tmp_path / "link").symlink_to(real / "deep" if there == "new below" else real)
    with staged_folder(tmp_path / "link") as stage:
        fill(stage, "1")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "link" / "sub" / "one").read_text() == "1"
    assert sorted(os.listdir(tmp_path)) == ["disk", "link"]
    with staged_files(tmp_path / "link") as stage:
        (stage / "two").write_text("2")
    assert sorted(os.listdir(tmp_path / "link")) == ["sub", "two"]


def test_a_folder_on_which_a_file_system_is_mounted_is_filled(tmp_path, monkeypatch):
    target, replace = tmp_path / "mounted", os.replace
    target.mkdir()

    def busy(source, to):  # as rename does across and onto a mount
        if os.fspath(to) == os.fspath(target) or (target in Path(to).parents and target not in Path(source).parents):
            raise OSError(errno.EBUSY, "Device or resource busy")
        replace(source, to)

    monkeypatch.setattr(os, "replace", busy)
    with staged_folder(target) as stage:
        fill(stage, "1")
    assert contents(target) == {"sub/one": b"1"}


KILLED = """
import os, sys
from ipca import _atomic
moved = []
replace = os.replace
def stop(source, target):
    if len(moved) == int(sys.argv[2]):
        os._exit(9)
    moved.append(replace(source, target))
os.replace = stop
with _atomic.staged_folder(sys.argv[1]) as stage:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (stage / name).write_text(name)
"""


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_model_that_is_moved_halfway_does_not_load_and_is_named(after, tmp_path):
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(after)]).returncode == 9
    there = sorted(name for name in os.listdir(tmp_path) if not name.startswith(".ipca-"))
    assert there == ["model.safetensors", "tokenizer.json"][:after]
    says = (
        r"is not empty; choose a new folder" if after else r"holds \.ipca-\w+, of a process that .* was killed; delete"
    )
    with pytest.raises(FileExistsError, match=says), staged_folder(tmp_path):
        pass
    with pytest.raises(FileExistsError, match=says):
        check_output(tmp_path, whole=True)


def test_staged_folder_must_be_new_or_empty(tmp_path):
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "mine").write_text("1")
    with pytest.raises(FileExistsError, match="y is not empty; choose a new folder"), staged_folder(tmp_path / "y"):
        pass
    with pytest.raises(FileExistsError, match="y is not empty; choose a new folder"):
        ipca.export(adapted(Net()), tmp_path / "y", format="residual")
    assert contents(tmp_path) == {"y/mine": b"1"}


def test_export_names_its_formats(tmp_path):
    with pytest.raises(ValueError, match="format must be one of peft, serve, mlx, residual, truncated; got 'onnx'"):
        ipca.export(adapted(Net()), tmp_path / "new", format="onnx")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("rank", [1, 3])
def test_a_file_is_as_small_as_a_stock_lora_of_twice_the_rank(rank, tmp_path):
    base = nn.Sequential(*(nn.Linear(67, 129) if i % 2 else nn.Linear(129, 67) for i in range(4)))
    ipca.save_adapter(ipca.apply_pc(copy.deepcopy(base), rank=rank, progress=False), tmp_path / "ours")
    names = ["0", "1", "2", "3"]
    get_peft_model(base, LoraConfig(r=2 * rank, target_modules=names)).save_pretrained(tmp_path / "stock")
    ours, stock = ((tmp_path / folder / WEIGHTS).stat().st_size for folder in ("ours", "stock"))
    assert ours <= 1.01 * stock


# -- one at a time in a folder

HOLD = "import sys, time; from pathlib import Path; from ipca._atomic import locked_folder\n"
HOLD += "with locked_folder(Path(sys.argv[1]), 'sweep runs'): print('locked', flush=True); time.sleep(60)"


def test_a_folder_is_locked_until_the_process_is_killed(tmp_path):
    held = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert held.stdout.readline() == b"locked\n"
        with (
            pytest.raises(RuntimeError, match=r"another process trains in .*; wait for it, or choose another folder"),
            locked_folder(tmp_path, "process trains"),
        ):
            pass
    finally:
        held.kill()
        held.wait()
        held.stdout.close()
    with locked_folder(tmp_path, "process trains"):
        pass


def test_a_forked_process_does_not_keep_the_lock(tmp_path):
    with locked_folder(tmp_path, "sweep runs"):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with locked_folder(tmp_path, "sweep runs"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_folder_that_was_made_and_left_empty_is_removed(tmp_path):
    with pytest.raises(ValueError, match="mine"), locked_folder(tmp_path / "out", "sweep runs"):
        raise ValueError("mine")
    assert not (tmp_path / "out").exists()
    with locked_folder(tmp_path / "out", "sweep runs"):
        (tmp_path / "out" / "rows").touch()
    (tmp_path / "empty").mkdir()
    with locked_folder(tmp_path / "empty", "sweep runs"):
        pass
    assert {path.name for path in tmp_path.rglob("*")} == {"out", "rows", "empty"}
    with pytest.raises(NotADirectoryError, match="rows is not a folder"), locked_folder(tmp_path / "out/rows", "x"):
        pass
