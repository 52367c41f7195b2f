"""What a picture shows, whatever it looks like."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from studies.page import update_page
from studies.plots import digest, outdated, write_pictures


def panel(axis, **changed):
    shown = {
        "line": 1.0,
        "band": 1.0,
        "bar": 1.0,
        "point": 1.0,
        "interval": 1.0,
        "label": "l",
        "title": "t",
        "note": "n",
        "tick": "k",
        "text": "x",
        "curve": "c",
    }
    shown |= changed
    axis.plot([0, 1], [0, shown["line"]], label=shown["curve"])
    axis.fill_between([0, 1], [0, 0], [1, shown["band"]])
    axis.bar([0], [shown["bar"]])
    axis.scatter([0], [shown["point"]])
    axis.vlines([0], [0], [shown["interval"]])
    axis.set_xlabel(shown["label"])
    axis.set_title(shown["title"])
    axis.figure.suptitle(shown["note"])
    axis.set_yticks([0.0], [shown["tick"]])
    axis.text(0, 0, shown["text"])


def figure(size=4.0, **changed):
    made = Figure(figsize=(size, size))
    panel(made.subplots(), **changed)
    return made


@pytest.mark.parametrize("what", ["line", "band", "bar", "point", "interval"])
def test_every_number_counts_to_six_digits(what):
    assert digest(figure(**{what: 1.0001})) != digest(figure())
    assert digest(figure(**{what: np.nextafter(1.0, 2.0)})) == digest(figure())


@pytest.mark.parametrize("what", ["label", "title", "note", "tick", "text", "curve"])
def test_every_word_counts(what):
    assert digest(figure(**{what: "another"})) != digest(figure())


def test_size_and_resolution_do_not_count():
    assert digest(figure(size=8.0)) == digest(figure())


def test_a_page_whose_picture_is_old_or_missing_is_out_of_date(tmp_path, monkeypatch, capsys):
    page, picture = tmp_path / "page.md", tmp_path / "picture.png"
    page.write_text("no section\n")

    def run(*arguments, **changed):
        monkeypatch.setattr("sys.argv", ["page.py", *arguments])
        return update_page(page, dict, "make it", "", lambda: {picture: figure(**changed)})

    assert (run("--check"), capsys.readouterr().err) == (1, "out of date: picture.png; run: make it\n")
    assert not picture.exists()
    assert run() == 0
    assert run("--check") == 0
    assert run("--check", line=2.0) == 1
    assert outdated({picture: figure()}) == []
    page.write_text("no section, changed\n")
    assert run("--check") == 0, "only sections are made"
    write_pictures({picture: figure(line=2.0)})
    assert (run("--check"), run("--check", line=2.0)) == (1, 0)
