"""The work folder: an interrupted run is resumed, and nothing is done twice."""

import errno
import os
from dataclasses import asdict

import pytest

import ipca
import ipca.offline.decompose
from ipca._atomic import locked_folder
from ipca.io.checkpoint import WHOLE
from ipca.model import AdapterSettings
from ipca.offline.work_folder import DONE, WORK, WorkFolder
from tests.helpers.model_folders import contents
from tests.helpers.models import Plain
from tests.helpers.offline_runs import Run

FORMS = ("intact", "residual")


def interrupted(run, monkeypatch, after: int, error: BaseException) -> None:
    """Run until ``error`` comes up with the layer after the first ``after``."""
    plain, calls = ipca.offline.decompose.window_of, []

    def stop(*args, **options):
        calls.append(1)
        if len(calls) > after:
            raise error
        return plain(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ipca.offline.decompose, "window_of", stop)
        with pytest.raises(type(error)):
            run()


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("NaN")], ids=repr)
@pytest.mark.parametrize("form", FORMS)
def test_a_stopped_job_goes_on_where_it_was(tmp_path, monkeypatch, decomposed, form, after, error):
    run = Run(tmp_path, Plain(), AdapterSettings(rank=3, form=form))
    interrupted(run, monkeypatch, after, error)
    assert os.listdir(run.out) == [WORK]
    assert WorkFolder(run.out).count() == after
    assert len(decomposed) == after
    run()
    assert len(decomposed) == 3
    twin = Run(tmp_path, run.base, run.settings)
    twin.out = tmp_path / "twin"
    twin()
    mine, theirs = contents(run.out), contents(twin.out)
    assert WORK not in os.listdir(run.out)
    for name in ("adapter/adapter_config.json",) * (form == "residual"):
        del mine[name], theirs[name]
    assert mine == theirs


def test_a_damaged_layer_is_made_again(run, decomposed, monkeypatch):
    interrupted(run, monkeypatch, 1, KeyboardInterrupt())
    (path,) = (run.out / WORK / "layers").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(RuntimeWarning, match=r"00000\.safetensors is damaged: .*; the layer is made again"):
        run()
    assert len(decomposed) == 3
    ipca.load_adapter(run.base, run.out)


def test_another_job_is_refused_with_the_way_out(run, monkeypatch):
    interrupted(run, monkeypatch, 1, KeyboardInterrupt())
    before = contents(run.out)
    other = WorkFolder(run.out)
    with pytest.raises(FileExistsError) as error:
        other.open({"settings": "another", "rank": 5})
    assert str(error.value).startswith(f"{run.out / WORK} holds the finished layers of a different run (settings ")
    assert 'now "another"; rank null, now 5); repeat that one to finish it, choose another folder, or' in str(
        error.value
    )
    assert other.abandon() == 0
    assert contents(run.out) == before
    run()


def test_a_job_with_nothing_finished_gives_way(run, monkeypatch):
    interrupted(run, monkeypatch, 0, KeyboardInterrupt())
    run.settings = AdapterSettings(rank=2, form="intact")
    run()
    assert ipca.load_adapter(run.base, run.out).a.rank == 2


def test_two_processes_do_not_share_a_folder(run):
    first, second = WorkFolder(run.out), WorkFolder(run.out)
    first.open({})
    with pytest.raises(FileExistsError, match=r"another process is running in .*; wait until it has ended"):
        second.open({})
    first.close()
    second.open({})
    second.close()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_will_do(run, monkeypatch, code):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    run()
    assert ipca.load_adapter(run.base, run.out).a.rank == run.settings.rank
    with locked_folder(run.out, "sweep runs"):
        pass


@pytest.mark.parametrize("existed", [False, True])
def test_an_abandoned_job_leaves_nothing(tmp_path, existed):
    out = tmp_path / "out"
    if existed:
        out.mkdir()
    work = WorkFolder(out)
    work.open({})
    assert work.abandon() == 0
    assert out.exists() == existed
    assert not existed or os.listdir(out) == []


def test_old_files_are_replaced_together_and_others_kept(run):
    run.out.mkdir()
    for name in ("adapter_model.safetensors", "ipca.json", "notes.txt"):
        (run.out / name).write_text("old")
    work = run(finish=False)
    assert (run.out / "ipca.json").read_text() == "old"
    work.finish()
    assert contents(run.out)["notes.txt"] == b"old"
    ipca.load_adapter(run.base, run.out)
    assert sorted(os.listdir(run.out)) == sorted(
        ["adapter_config.json", "adapter_model.safetensors", "ipca.json", "notes.txt"]
    )


@pytest.mark.parametrize("failing", [1, 2, 3, 4, 5])
def test_a_move_that_fails_undoes_the_others(run, monkeypatch, failing):
    run.out.mkdir()
    for name in ("adapter_config.json", "ipca.json"):
        (run.out / name).write_text("old")
    work, plain, calls = run(finish=False), os.replace, []

    def replace(source, target):
        if str(source).startswith(str(work.final)) or str(target).startswith(str(work.folder / "old")):
            calls.append(1)
            if len(calls) == failing:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        plain(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("ipca.offline.work_folder.os.replace", replace)
        with pytest.raises(OSError, match=f"cannot write {run.out}: Input/output error"):
            work.finish()
    assert {path.name: path.read_text() for path in run.out.glob("*.json")} == {
        "adapter_config.json": "old",
        "ipca.json": "old",
    }
    assert not (run.out / "adapter_model.safetensors").exists()
    work.finish()
    ipca.load_adapter(run.base, run.out)


@pytest.mark.parametrize("moves", range(5))
def test_a_job_killed_while_it_moves_is_finished_by_the_next(run, monkeypatch, moves, decomposed):
    """The process dies: nothing is undone."""
    run.out.mkdir()
    (run.out / "ipca.json").write_text("old")
    work, plain, done = run(finish=False), os.replace, []

    def replace(source, target):
        if str(target).startswith(str(run.out)) and not str(target).endswith("ready"):
            if len(done) == moves:
                raise KeyboardInterrupt
            done.append(target)
        plain(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("ipca.offline.work_folder.os.replace", replace)
        with pytest.raises(KeyboardInterrupt):
            work.finish()
    work.close()
    later = WorkFolder(run.out)
    assert later.ready
    later.open({"settings": asdict(run.settings)})
    later.finish()
    assert len(decomposed) == 2
    ipca.load_adapter(run.base, run.out)
    assert len(os.listdir(run.out)) == 3


def test_what_a_finished_job_left_is_cleared_away(run):
    (run.out / DONE / "layers").mkdir(parents=True)
    run()
    assert len(os.listdir(run.out)) == 3


@pytest.mark.parametrize("where", ["layer", "factors", "shard"])
def test_a_full_disk_keeps_what_is_done_and_what_was_there(tmp_path, monkeypatch, where, decomposed):
    run = Run(tmp_path, Plain(), AdapterSettings(rank=3, form="residual" if where == "shard" else "intact"))
    run.out.mkdir()
    if where != "shard":
        (run.out / "ipca.json").write_text("old")

    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    place = {
        "layer": "ipca._atomic.safetensors.torch.save",
        "factors": "ipca.offline.adapter_files.raw_bytes",
        "shard": "ipca.offline.adapter_files.write_in_place",
    }[where]
    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        with pytest.raises(OSError, match=f"cannot write {run.out}: No space left on device"):
            run()
    assert where == "shard" or (run.out / "ipca.json").read_text() == "old"
    assert WorkFolder(run.out).count() == (0 if where == "layer" else 3)
    run()
    assert len(decomposed) == (4 if where == "layer" else 3)
    assert not list(run.out.rglob(".tmp-*"))


def test_shards_that_are_done_are_not_written_again(tmp_path, monkeypatch):
    run = Run(tmp_path, Plain(), AdapterSettings(rank=3, form="residual"))
    work = run(finish=False)
    shard = work.final / "base" / WHOLE
    before = shard.stat().st_mtime_ns
    run()
    assert (run.out / "base" / WHOLE).stat().st_mtime_ns == before
