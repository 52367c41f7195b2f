"""The whole report: one file that stands alone, from whatever a sweep left behind."""

import csv
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from ipca.lab.sweep import verdict, write_report
from tests.helpers.sweep_rows import Made, by_hand, write_rows

SMALL = {"windows": ("0.0", "0.5", "1.0"), "methods": ("lora", "haar"), "lrs": (1e-3, 2e-3), "seeds": 3}


class Page(HTMLParser):
    """Tags and attributes of a page; ``open`` holds what was not closed."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.words = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data.strip())


def pictures(text):
    return [f"<svg{part.split('</svg>')[0]}</svg>" for part in text.split("<svg")[1:]]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    made = Made(**SMALL, checkpoints=(5,), fails={"0.0": 2e-3}, labels={"target": "agreement, share of <new> & old"})
    folder = made.write(tmp_path_factory.mktemp("full"))
    return folder, write_report(folder).read_text(encoding="utf-8")


def test_the_page_stands_alone(full):
    _, text = full
    page = Page(text)
    assert page.open == []
    assert set(page.tags) & {"script", "link", "img", "iframe"} == set()
    outside = [value for name, value in page.attributes if name in ("href", "src", "xlink:href") and value[0] != "#"]
    assert outside == []
    assert "url(http" not in text
    assert "@import" not in text


def test_ids_are_unique_over_all_pictures(full):
    ids = [value for name, value in Page(full[1]).attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_every_picture_is_xml_with_words_for_who_cannot_see_it(full):
    drawn = [svg for svg in pictures(full[1]) if 'class="swatch"' not in svg]
    for svg in drawn:
        assert ElementTree.fromstring(svg).get("aria-label")
    titles = ("retained over the window", "target over the window", "drift over the window", "of the controls")
    titles += ("over the learning rate", "retained over target", "forgetting at an equal target")
    for title in titles:
        assert any(f'aria-label="{title}' in svg or title in svg.split(">")[0] for svg in drawn), title


def test_axes_say_what_they_show_with_its_unit_and_the_interval(full):
    text = full[1]
    assert "agreement, share of &lt;new&gt; &amp; old" in text
    assert "share of <new>" not in text
    assert "mean, 95 % interval over seeds" in text
    assert "learning rate (log scale)" in text
    assert "window position f = start / (d − rank)" in text


def test_the_tables_hold_every_method_rate_and_failure(full):
    words = Page(full[1]).words
    for said in ("plain LoRA", "haar", "window 0.0", "untrained model", "diverged, update is not finite"):
        assert said in words
    assert "0 of 3" in words  # seeds that ended well
    assert "Minus plain LoRA, at the same learning rate" in words
    assert "Minus window 0.5, at each method's best learning rate" in words
    assert "2.13.0+cpu" in full[1]


def test_means_in_the_table_are_those_of_the_rows(full):
    folder, text = full
    with (folder / "rows.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if (r["method"], r["comparison"], r["step"]) == ("haar", "same", "")]
    values = [float(row["retained"]) for row in rows if float(row["lr"]) == 2e-3]
    assert len(values) == 3
    assert any(word.startswith(f"{sum(values) / 3:.3f} [") for word in Page(text).words)


def test_the_page_and_the_command_line_say_the_same(full):
    folder, text = full
    said = " ".join(" ".join(Page(text).words).split())
    lines = [line.strip() for line in verdict(folder).splitlines()]
    assert len(lines) > 10
    assert all(line in said for line in lines)


def test_the_same_files_give_the_same_bytes(full, tmp_path):
    folder, text = full
    for name in ("rows.csv", "settings.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert write_report(tmp_path).read_bytes() == text.encode()


@pytest.mark.parametrize(
    ("made", "shown", "hidden"),
    [
        ({"seeds": 1}, "No suggestion from 1 seed", "best learning rate"),
        ({"lrs": (1e-3,)}, "Retention over the window", "Robustness to the learning rate"),
        ({"drop": ("retained",)}, "Target over the window", "Retention over the window"),
        ({"drop": ("target",)}, "Retention over the window", "Learning and forgetting"),
        ({"methods": ()}, "Both arms of the curve", "Controls"),
        ({"windows": ()}, "Robustness to the learning rate", "over the window&#39;s position"),
        ({"fails": dict.fromkeys(("0.0", "0.5", "1.0", "lora", "haar"), 0)}, "Failed runs", "Retention over"),
    ],
    ids=str,
)
def test_a_page_of_what_there_is(made, shown, hidden, tmp_path):
    text = write_report(Made(**{**SMALL, "comparisons": ("same",), "extra": (), **made}).write(tmp_path)).read_text()
    assert Page(text).open == []
    assert shown in text
    assert hidden not in text


def test_words_from_files_are_escaped(tmp_path):
    rows = [by_hand("0.5", 0, 0.5, 0.5), by_hand("0.5", 1, None, None, status="failed: <script>alert(1)</script>")]
    settings = {"reference": "0.5", "labels": {"retained": "$<b>"}, "device": "</style><script>"}
    text = write_report(write_rows(tmp_path, rows, settings)).read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "$&lt;b&gt;" in text


def test_a_damaged_table_leaves_the_old_report(tmp_path):
    folder = write_rows(tmp_path, [by_hand("0.5", 0, 0.5, 0.5)])
    before = write_report(folder).read_bytes()
    write_rows(tmp_path, [by_hand("0.5", 0, "x", 0.5)])
    with pytest.raises(ValueError, match="line 2: target is 'x'"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "rows.csv", "settings.json"]


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_without_a_package_the_error_says_how_to_install_it(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    folder = write_rows(tmp_path, [by_hand("0.5", 0, 0.5, 0.5)])
    with pytest.raises(ImportError, match=rf"the report needs {package}; run: pip install 'ipca-lora\[sweep\]'"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_a_users_own_style_changes_nothing(tmp_path):
    import matplotlib

    folder = write_rows(tmp_path, [by_hand("0.5", seed, 0.5, 0.5 + 0.1 * seed) for seed in range(3)])
    before = write_report(folder).read_bytes()
    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 30}):
        assert write_report(folder).read_bytes() == before
        assert matplotlib.rcParams["font.size"] == 30
