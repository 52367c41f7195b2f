"""The one way to a picture: what is written where, and that a drawing that fails leaves what was there."""

import sys

import pytest

from ipca.analysis.picture import picture

matplotlib = pytest.importorskip("matplotlib")


def test_the_ending_names_the_format_and_the_size_is_in_inches(tmp_path):
    with picture(tmp_path / "made" / "a.b.png", (3, 2)) as figure:
        figure.subplots().plot([1, 2])
    with picture(str(tmp_path / "a.svg")) as figure:
        figure.subplots().plot([1, 2])
    pixels = (tmp_path / "made" / "a.b.png").read_bytes()[16:24]
    assert [int.from_bytes(pixels[:4], "big"), int.from_bytes(pixels[4:], "big")] == [450, 300]
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.b.png", "a.svg", "made"]


@pytest.mark.parametrize("path", ["picture", "", "made/..", ".png"])
def test_a_path_without_an_ending_is_refused(path, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=f"'{path}' does not say the format; end it in .png"), picture(path):
        pass
    assert [found.name for found in tmp_path.rglob("*")] == ["here"]


def test_a_drawing_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("old")
    with pytest.raises(KeyError), picture(path):
        raise KeyError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_pyplot_is_not_imported_and_the_backend_stays(tmp_path, monkeypatch):
    before = matplotlib.rcParams["backend"]
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    with picture(tmp_path / "a.png") as figure:
        figure.subplots().plot([1, 2])
    assert "matplotlib.pyplot" not in sys.modules
    assert matplotlib.rcParams["backend"] == before


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with (
        pytest.raises(ImportError, match=r"a picture needs matplotlib; run: pip install 'ipca-lora\[plot\]'"),
        picture(tmp_path / "a.png"),
    ):
        pass
