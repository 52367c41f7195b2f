"""docs/choosing-a-window.md: its figures are those of the study's files."""

import csv
import re
from pathlib import Path
from statistics import fmean

from studies.continual.analysis import Analysis
from studies.continual.design import CENTERS
from studies.continual.rows import Rows
from studies.frontier.analysis import Analysis as FrontierAnalysis
from studies.frontier.page import checks
from studies.frontier.positions import profile, shapes
from studies.frontier.rows import Rows as Frontier
from studies.language import protocol as language
from studies.position_grid import protocol as position_grid

ROOT = Path(__file__).resolve().parents[1]
TEXT = " ".join((ROOT / "docs" / "choosing-a-window.md").read_text(encoding="utf-8").split())


def rows(name):
    path = ROOT / "studies" / "window_position" / "results" / f"{name}.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def mean(experiment, method, rate, metric):
    wanted = {"experiment": experiment, "method": method, "comparison": "same", "lr": rate, "metric": metric}
    (row,) = [row for row in rows("summary") if all(row[key] == value for key, value in wanted.items())]
    return float(row["mean"])


def test_the_streams_are_those_of_the_continual_study():
    study = Analysis(Rows())
    found = {method: {m: study.mean_of(method, m)[0] for m in ("acc", "retained_after")} for method in CENTERS}
    accuracies = [each["acc"] for each in found.values()]
    assert f"fresh middle windows (all: {min(accuracies):.3f} to {max(accuracies):.3f})" in TEXT
    assert {each.verdict for each in study.compared()} == {"alike"}
    low, high = ([study.at_rate(method, rate, "retained_after") for method in CENTERS] for rate in (3e-5, 1e-4))
    lost = [before - after for before, after in zip(low, high, strict=True)]
    assert f"between 3e-5 and 1e-4 each method lost {min(lost):.3f} to {max(lost):.3f} of it" in TEXT
    between = f"it goes from {min(low):.3f} to {max(low):.3f} at 3e-5 and from {min(high):.3f} to {max(high):.3f} at"
    assert between in TEXT


def test_the_guide_to_continual_learning_says_what_the_claims_say_at_one_rate():
    found = {row["against"]: row["verdict"] for row in rows("claims") if row["claim"] == "continual"}
    alike = dict.fromkeys(("milora", "lora-fresh", "osf"), "not shown")
    assert found == {"pissa": "holds", "o-lora": "reversed", **alike}
    guide = " ".join((ROOT / "docs" / "continual.md").read_text(encoding="utf-8").split())
    assert (
        "fresh middle windows end above fresh principal ones; no difference to fresh minor windows, fresh LoRA" in guide
    )
    assert "or OSF is shown; O-LoRA ends higher." in guide


def test_no_difference_to_lora_is_shown_at_equal_target():
    found = {row["verdict"] for row in rows("claims") if (row["claim"], row["against"]) == ("equal target", "lora")}
    assert found <= {"not shown", "edge"}


def test_the_means_are_those_of_the_summary():
    runs = [row for name in ("M1", "M1-low") for row in rows(name) if row["method"] == "0.0"]
    kept, learned = (
        [fmean(float(row[metric]) for row in runs if row["lr"] == rate) for rate in ("0.002", "0.00025")]
        for metric in ("retained", "target")
    )
    assert f"layers it retained {kept[0]:.3f} at 2e-3 and {kept[1]:.3f} at 2.5e-4" in TEXT
    assert f"it learned more, too ({learned[0]:.3f} and {learned[1]:.3f})" in TEXT
    others = [f"retained_{name}" for name in ("tweet", "Amazon", "NYT")]
    before = [row for row in rows("M1-low") if row["method"] == "base"]
    after = fmean(mean("M1-low", "0.0", "0.00025", metric) for metric in others)
    assert f"did not learn ({after:.3f}, untrained {fmean(float(before[0][metric]) for metric in others):.3f})" in TEXT
    kept, learned = (
        [mean("M1", "0.5", rate, metric) for rate in ("0.0005", "0.004")] for metric in ("retained", "target")
    )
    assert f"retained accuracy fell from {kept[0]:.3f} to {kept[1]:.3f} on MiniLM" in TEXT
    assert f"its accuracy on the new task from {learned[0]:.3f} to {learned[1]:.3f}" in TEXT
    pairs = (("M2-query-value", "0.002"), ("M2-all", "0.001"))
    drift, target = ([mean(name, "0.5", rate, metric) for name, rate in pairs] for metric in ("drift", "target"))
    assert f"drift {drift[0]:.2f} and {drift[1]:.2f}, at an accuracy on the new task of {target[0]:.2f} in both" in TEXT
    assert f"{target[1]:.2f}" == f"{target[0]:.2f}"


def test_how_far_the_weights_moved_at_equal_early_updates_is_in_the_rows():
    page = " ".join((ROOT / "docs" / "results" / "window-position.md").read_text(encoding="utf-8").split())

    def ratio(name, method):
        runs = [row for row in rows(name) if row["lr"] == "0.002" and row["status"] == "ok"]
        middle, other = (
            [float(row["update"]) for row in runs if (row["method"], row["comparison"]) == key]
            for key in (("0.5", "same"), (method, "update"))
        )
        return f"{fmean(other) / fmean(middle):.2f}"

    lora, minor, principal = ([ratio(name, method) for name in ("V1", "M3")] for method in ("lora", "1.0", "0.0"))
    assert f"moved over the run {lora[0]} (V1) and {lora[1]} (M3) times as far as with the middle window" in page
    assert f"{minor[0]} and {minor[1]} times for the minor window, and {principal[0]} and {principal[1]} times" in page


def test_how_far_matched_windows_moved_is_in_the_rows():
    def ratios(name, lr, column):
        matched = [row for row in rows(name) if (row["comparison"], row["lr"]) == ("sqrt-sigma", lr)]
        minor, middle = (
            {row["seed"]: float(row[column]) for row in matched if row["method"] == method} for method in ("1.0", "0.5")
        )
        return fmean(minor[seed] / middle[seed] for seed in middle)

    lrs = ("0.001", "0.002", "0.004")
    first, last = ([f"{ratios('V1', lr, column):.1f}" for lr in lrs] for column in ("early_update", "update"))
    assert f"{first[0]}, {first[1]} and {first[2]} times as far as the middle one in ten steps" in TEXT
    assert f"and {last[0]}, {last[1]} and {last[2]} times in eighty" in TEXT
    assert f"in MiniLM at most {max(ratios('M3', lr, 'update') for lr in ('0.001', '0.002')):.1f} times" in TEXT


def test_the_best_rates_are_those_of_the_rows():
    def best(method, *names):
        found = [row for name in names for row in rows("summary") if row["experiment"] == name and row["lr"] != "best"]
        targets = [
            row for row in found if (row["method"], row["metric"], row["comparison"]) == (method, "target", "same")
        ]
        return max(targets, key=lambda row: float(row["mean"]))["lr"]

    places = (("M1", "M1-low"), ("M2-query-value",), ("V1", "V1-low", "V1-middle"))
    assert [best("0.0", *names) for names in places] == ["0.00025", "0.001", "0.001"]
    assert [best("0.5", *names) for names in places] == ["0.002"] * 3
    assert [best("0.5", "M2-all")] == ["0.001"]
    said = "principal and middle, were 2.5e-4 and 2e-3 in MiniLM's feed-forward layers, 1e-3 and 2e-3 in its query"
    assert said in TEXT


def ratios_on_mgm(arm, other):
    """The comparisons at the two easier targets that have verdicts, as the documents give them."""
    cell = ("twins", 60, arm, other)
    pair = [c for c in mgm().comparisons() if (c.task, c.steps, c.arm, c.other) == cell]
    assert [bool(c.obstacle) for c in pair] == [False, False, True]
    return [c.verdict for c in pair[:2]], " and ".join(f"{c.ratio.value:.2f}" for c in pair[:2])


def on_the_other_text(arm):
    """The ratios to plain LoRA at the two easier targets of one task on the text of the other."""
    analysis = mgm()
    found = [analysis.compare("twins", 60, place, arm, "lora", "kl_other").ratio.value for place in (0, 1)]
    return f"{found[0]:.2f} and {found[1]:.2f}"


def mgm():
    """What the rows of the position grid say."""
    protocol = position_grid.PROTOCOL
    found = Frontier(protocol.results / protocol.model)
    return FrontierAnalysis(protocol.with_targets(Frontier(found.folder / "reference")), found)


def test_the_readme_says_of_mgm_what_the_rows_say():
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"on reversed ones the middle window's was {on_the_other_text('0.5')} times LoRA's" in readme
    (step,) = re.findall(r"gut communities, 60 steps, .* changes by (\d+)% to (\d+)%", checks(mgm()))
    assert f"one step of the grid of rates changes KL by {step[0]} to {step[1]} %" in readme
    (easiest, middle, hardest) = [each for each in shapes(mgm()) if each.left.task == "twins" and each.left.steps == 60]
    assert [each.outcome for each in (easiest, middle, hardest)] == ["refuted", "refuted", ""]
    places = [profile(mgm(), "twins", 60, place) for place in (0, 1)]
    assert {min(found, key=lambda arm, found=found: found[arm].value) for found in places} == {"0.875"}
    values = " and ".join(f"{found['0.875'].value:.2f}" for found in places)
    assert len(places[0]) == 11
    assert "MGM shows no U on gut communities: KL is lowest at 0.875 of the way to the minor end." in TEXT
    assert f"lowest at 0.875 of the way to the minor end, {values} times the middle's" in readme
    paper = (ROOT / "docs" / "results" / "paper.md").read_text(encoding="utf-8")
    assert f"one step of their grid only, which changes KL by {step[0]} to {step[1]} %" in " ".join(paper.split())


def test_what_is_said_of_smollm2_is_what_the_rows_say():
    found = Frontier(language.PROTOCOL.results / language.PROTOCOL.model)
    analysis = FrontierAnalysis(language.PROTOCOL.with_targets(Frontier(found.folder / "reference")), found)
    claims = analysis.comparisons()
    german = [c for c in claims if (c.task, c.steps, c.arm, c.other) == ("german", 60, "middle", "lora")]
    assert [(c.verdict, c.ratio.n) for c in german] == [("lower", 5)] * 3
    cells = {("german", 60, "middle", end) for end in ("principal", "minor")}
    ends = [c for c in claims if (c.task, c.steps, c.arm, c.other) in cells]
    assert [c.verdict for c in ends] == ["lower"] * 6
    assert {run.arm for run, _ in found.runs() if (run.task, run.steps) == ("german", 60)} == {
        "middle",
        "principal",
        "minor",
        "lora",
    }
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert "On SmolLM2-135M, German manual pages, both ends move the model more than the middle; positions" in readme
    said = "{:.2f}, {:.2f} and {:.2f}".format(*(c.ratio.value for c in german))
    assert f"its KL to the base was {said} times LoRA's |" in TEXT


def test_the_window_with_a_frozen_moves_mgm_less_and_nothing_is_shown_elsewhere():
    verdicts, ratios = ratios_on_mgm("frozen-A", "lora")
    assert verdicts == ["lower", "lower"]
    said = f"{ratios} times plain LoRA's (two of three targets), but {on_the_other_text('frozen-A')} times on the same"
    assert f"its KL to the base on the base's own samples was {said} sentences reversed" in TEXT
    elsewhere = [
        float(row["p"])
        for row in rows("equal-target")
        if (row["experiment"] in ("M1", "V1")) and (row["first"], row["second"]) == ("frozen-A", "lora")
    ]
    assert len(elsewhere) == 4
    assert min(elsewhere) > 0.05
