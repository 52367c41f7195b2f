"""The report as files for a paper: figures, tables, rows; one sweep, or several side by side."""

import csv
import errno
import os
import re
import sys
from xml.etree import ElementTree

import pytest

from ipca.lab import sweep
from ipca.lab.sweep.report.export import latex, markdown
from ipca.lab.sweep.report.tables import Table, side_by_side
from tests.helpers.sweep_rows import Made, write_rows

SMALL = {"windows": ("0.0", "1.0"), "methods": ("lora",), "lrs": (1e-3,), "comparisons": ("same",), "extra": ()}
ONE = {**SMALL, "windows": ("0.5",)}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two sweeps, of three seeds and of two, and what was written of both."""
    root = tmp_path_factory.mktemp("pair")
    folders = [Made(**SMALL, seeds=3).write(root / "a"), Made(**SMALL, seeds=2, fails={"lora": 0}).write(root / "b")]
    return folders, root / "paper", sweep.export_report(folders, root / "paper", labels=["SST-2", "R&T"])


def test_every_figure_and_table_is_a_file_in_every_format(pair):
    _, out, names = pair
    assert {path.name for path in out.iterdir()} == {"figures", "tables", "report.html", "rows.csv"}
    assert {path.name for path in (out / "figures").iterdir()} == {
        f"{name}.{ending}" for name in names["figures"] for ending in ("png", "svg", "pdf")
    }
    assert {path.name for path in (out / "tables").iterdir()} == {
        f"{name}.{ending}" for name in names["tables"] for ending in ("tex", "md")
    }
    assert {"retained-same", "target-same", "frontier", "equal-target"} <= set(names["figures"])
    assert {"arms", "minus-lora-same", "means-same", "failed", "frontier"} <= set(names["tables"])
    assert (out / "figures" / "retained-same.png").read_bytes().startswith(b"\x89PNG")
    pdf = (out / "figures" / "retained-same.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert b"/Type3" not in pdf  # journals refuse these fonts
    drawn = ElementTree.parse(out / "figures" / "retained-same.svg").getroot()
    words = "".join(drawn.itertext())
    assert all(label in words for label in ("SST-2", "R&T", "plain LoRA", "window position f"))
    assert words.count("mean, 95 % interval over seeds") == words.count("mean over seeds") == 1  # of three, and of two


def test_the_page_holds_the_sweeps_side_by_side(pair):
    text = (pair[1] / "report.html").read_text(encoding="utf-8")
    assert "<title>Window sweep: SST-2, R&amp;T</title>" in text
    assert text.count('<header class="verdict">') == 2
    captions = re.findall(r"<figcaption><b>(.*?)</b>", text)
    assert captions[:2] == ["SST-2: At the same learning rate", "R&amp;T: At the same learning rate"]
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))


def test_the_tables_hold_the_numbers_of_each_sweep_in_its_columns(pair):
    folders, out, _ = pair
    lines = (out / "tables" / "means-same.md").read_text().splitlines()
    header = [cell.strip() for cell in lines[2].strip("|").split("|")]
    row = next(line for line in lines if line.startswith("| window 1.0 | 0.001 |"))
    cells = dict(zip(header, (cell.strip() for cell in row.strip("|").split("|")), strict=True))
    for label, folder in zip(("SST-2", "R&T"), folders, strict=True):
        rows = sweep.frame(folder).query("method == '1.0'")
        assert cells[f"{label}: seeds"] == str(len(rows))
        assert cells[f"{label}: target"].startswith(f"{rows.target.mean():.3f}")
    assert "[" in cells["SST-2: target"]
    assert "[" not in cells["R&T: target"]  # two seeds have no interval
    text = (out / "tables" / "means-same.tex").read_text()
    assert r"\multicolumn{5}{c}{SST-2} & \multicolumn{5}{c}{R\&T} \\" in text
    assert r"\cmidrule(lr){3-7} \cmidrule(lr){8-12}" in text
    failed = (out / "tables" / "failed.md").read_text()
    assert failed.count("| R&T | plain LoRA |") == 2
    assert "| SST-2 |" not in failed


def test_the_rows_are_those_of_the_sweeps_with_their_labels(pair):
    folders, out, _ = pair
    with (out / "rows.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    expected = []
    for label, folder in zip(("SST-2", "R&T"), folders, strict=True):
        with (folder / "rows.csv").open(newline="") as file:
            expected += [{"sweep": label, **row} for row in csv.DictReader(file)]
    assert found == expected
    assert sweep.frame(out).groupby("sweep").size().to_dict() == {"SST-2": 10, "R&T": 7}


def test_a_report_is_written_again_and_other_files_are_not_replaced_unasked(pair, tmp_path):
    folder = Made(**ONE, seeds=1).write(tmp_path / "a")
    sweep.export_report([folder], tmp_path / "out", formats=["svg"])
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    assert {name.rpartition(".")[2] for name in first} == {"svg", "tex", "md", "csv", "html"}
    sweep.export_report(folder, tmp_path / "out", formats=["svg"])
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")} == first
    assert (tmp_path / "out" / "rows.csv").read_bytes() == (folder / "rows.csv").read_bytes()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(
        FileExistsError, match=r"out holds thesis\.tex, which is not of an earlier report; choose a new"
    ):
        sweep.export_report([folder], tmp_path / "out")
    with pytest.raises(FileExistsError):  # the sweep's own folder
        sweep.export_report([folder], folder)


OTHERS = ("figures/diagram.pdf", "figures/sub/plot.png", "tables/mine.tex", "tables/means.csv", "main.tex", "rows.csv")


@pytest.mark.parametrize("name", OTHERS)
def test_a_paper_that_holds_no_report_is_not_taken_for_one(name, tmp_path):
    folder, out = Made(**ONE, seeds=1).write(tmp_path / "a"), tmp_path / "paper"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("precious")
    with pytest.raises(
        FileExistsError, match=r"which is not of an earlier report; choose a new folder\. overwrite=True"
    ):
        sweep.export_report(folder, out)
    assert [path.read_text() for path in out.rglob("*") if path.is_file()] == ["precious"]


@pytest.mark.parametrize("earlier", [False, True])
def test_other_files_stay_beside_a_report(earlier, tmp_path):
    folder, out = Made(**ONE, seeds=1).write(tmp_path / "a"), tmp_path / "paper"
    if earlier:
        sweep.export_report(folder, out, formats=["pdf"])
    there = [out / name for name in OTHERS if name != "rows.csv"]
    for path in there:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("precious")
    with pytest.raises(FileExistsError, match="which is not of an earlier report"):
        sweep.export_report(folder, out, formats=["svg"])
    names = sweep.export_report(folder, out, formats=["svg"], overwrite=True)
    assert all(path.read_text() == "precious" for path in there)
    assert {path.name for path in (out / "figures").iterdir()} == {
        *(f"{name}.svg" for name in names["figures"]),
        "diagram.pdf",
        "sub",
    }


def test_figures_of_an_earlier_report_in_another_format_go(tmp_path):
    folder, out = Made(**ONE, seeds=1).write(tmp_path / "a"), tmp_path / "paper"
    sweep.export_report(folder, out, formats=["pdf"])
    sweep.export_report(folder, out, formats=["svg"])
    assert {path.suffix for path in (out / "figures").iterdir()} == {".svg"}


def test_a_report_that_is_not_ours_is_refused(tmp_path):
    folder, out = Made(**ONE, seeds=1).write(tmp_path / "a"), tmp_path / "paper"
    out.mkdir()
    (out / "report.html").write_text("<html><title>Quarterly report</title>")
    with pytest.raises(FileExistsError, match=r"holds report\.html, which is not of an earlier report"):
        sweep.export_report(folder, out)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_place_of_a_folder_is_refused(overwrite, tmp_path):
    folder, out = Made(**ONE, seeds=1).write(tmp_path / "a"), tmp_path / "paper"
    out.mkdir()
    (out / "tables").write_text("precious")
    with pytest.raises(NotADirectoryError, match="tables is a file; a report needs a folder there"):
        sweep.export_report(folder, out, overwrite=overwrite)
    assert [path.name for path in out.iterdir()] == ["tables"]


def test_where_a_file_cannot_be_replaced_all_files_are_as_before(tmp_path, monkeypatch):
    folder, out = Made(**ONE, seeds=1).write(tmp_path / "a"), tmp_path / "paper"
    sweep.export_report(folder, out, formats=["svg"])
    (out / "tables").joinpath("mine.tex").write_text("precious")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    replace = os.replace

    def fails(source, target):
        if os.fspath(target).endswith("report.html"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="No space left"):
        sweep.export_report(folder, out, formats=["pdf"], overwrite=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_an_unknown_format_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match=r"formats must be of png, svg, pdf; got eps\."):
        sweep.export_report([tmp_path], tmp_path / "out", formats=["eps"])
    with pytest.raises(ValueError, match="got none"):
        sweep.export_report([tmp_path], tmp_path / "out", formats=[])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"methods": ("lora", "haar")}, "their methods differ, only b has haar"),
        ({"windows": ("0.0",)}, r"their methods differ, only a has 1\.0"),
        ({"lrs": (2e-3,)}, r"their learning rates differ, only a has 0\.001; only b has 0\.002"),
        ({"comparisons": ("same", "sqrt-sigma")}, "their comparisons differ, only b has sqrt-sigma"),
        ({"extra": ("drift",)}, "their metrics differ, only b has drift"),
    ],
)
def test_sweeps_that_do_not_compare_are_refused_with_the_reason(change, says, tmp_path):
    folders = [Made(**SMALL, seeds=1).write(tmp_path / "a"), Made(**{**SMALL, **change}, seeds=1).write(tmp_path / "b")]
    with pytest.raises(ValueError, match=rf"the sweeps a and b cannot be put side by side: {says}\. Give"):
        sweep.export_report(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_rank_is_refused(tmp_path):
    rows = Made(**SMALL, seeds=1).rows()
    folders = [write_rows(tmp_path / str(rank), rows, {"reference": "0.5", "rank": rank}) for rank in (8, 16)]
    with pytest.raises(ValueError, match="their ranks differ, 8 in 8 and 16 in 16"):
        sweep.export_report(folders, tmp_path / "out")


@pytest.mark.parametrize("labels", [["a"], ["a", "a"], ["a", "b", "c"]])
def test_labels_are_one_for_each_and_distinct(labels, tmp_path):
    with pytest.raises(ValueError, match=r"labels must be one for each of the 2 sweeps, and distinct; got a"):
        sweep.export_report([tmp_path, tmp_path], tmp_path / "out", labels=labels)


def test_latex_escapes_what_it_would_read_as_commands():
    table = Table("t", "50 % of_all", "", ["a&b", "‖ΔW‖ / ‖W‖"], [["[x] #1 {y}", "−0.1 < 5 $"]])
    assert latex(table).splitlines() == [
        "% 50 % of_all.",
        r"% \usepackage{booktabs}",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"a\&b & $\|\Delta$W$\|$ / $\|$W$\|$ \\",
        r"\midrule",
        r"{[}x] \#1 \{y\} & $-$0.1 $<$ 5 \$ \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_markdown_escapes_bars():
    table = Table("t", "title", "note", ["a", "b"], [["x|y", "1"]])
    assert markdown(table) == "**title.** note\n\n| a | b |\n| --- | --- |\n| x\\|y | 1 |\n"


def test_rows_that_only_one_table_has_are_kept():
    one, other = Table("t", "t", "n", ["m", "v"], [["a", "1"]]), Table("t", "t", "n", ["m", "v"], [["b", "2"]])
    found = side_by_side({"A": one, "B": other})
    assert found.rows == [["a", "1", "–"], ["b", "–", "2"]]
    assert (found.header, found.groups) == (["m", "v", "v"], (("A", 1), ("B", 1)))


def test_a_frame_has_the_numbers_of_the_table_to_the_bit(tmp_path):
    pytest.importorskip("pandas")
    made = Made(**ONE, seeds=2, checkpoints=(5,))
    frame = sweep.frame(made.write(tmp_path))
    for (_, found), row in zip(frame.iterrows(), made.rows(), strict=True):
        assert found.method == row["method"]
        assert (found.target, found.retained) == (row["target"], row["retained"])
    assert frame.seed.tolist()[1:] == [0, 0, 1, 1] * 2
    assert frame.step.isna().tolist() == [True, *[False, True] * 4]
    assert set(frame.method) == {"base", "0.5", "lora"}


def test_without_pandas_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="a data frame needs pandas; run: pip install pandas"):
        sweep.frame(tmp_path)


def test_a_frame_of_a_folder_without_rows_is_refused(tmp_path):
    pytest.importorskip("pandas")
    with pytest.raises(FileNotFoundError, match=r"contains no rows\.csv; pass the folder that a sweep wrote"):
        sweep.frame(tmp_path)
