"""docs/choosing-a-window.md: its figures are those of the study's files."""

import csv
from pathlib import Path
from statistics import fmean

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


def test_the_differences_are_those_of_the_tests():
    found = {row["claim"]: abs(float(row["mean"])) for row in rows("tests")}
    text = "principal window retained {C2:.2f} less than the middle one on MiniLM and {C9:.2f} less on the ViT (C2, C9)"
    assert text.format(**found) in TEXT
    text = "retained {C4:.2f} less than the middle one on MiniLM and {C10:.2f} more on the ViT (C4, C10)"
    assert text.format(**found) in TEXT
    assert "plain LoRA {C11:.2f} more than the middle one on the ViT".format(**found) in TEXT
    assert "was {C13:.2f} above that of fresh principal windows (C13)".format(**found) in TEXT
    assert {row["verdict"] for row in rows("tests") if row["claim"] in ("C2", "C4", "C9", "C13")} == {"holds"}


def test_the_targets_and_drifts_are_those_of_the_summary():
    low, high = ([mean("V1", method, rate, "target") for method in ("0.0", "0.5")] for rate in ("0.001", "0.004"))
    assert f"learned the most of all windows, {low[0]:.3f} beside {low[1]:.3f} of the middle one" in TEXT
    assert f"the least, {high[0]:.3f} beside {high[1]:.3f}" in TEXT
    few, all_linear = "M2-query-value", "M2-all"
    drift, target = (
        [mean(name, "0.5", "0.002", metric) for name in (few, all_linear)] for metric in ("drift", "target")
    )
    assert f"drifted by {drift[0]:.2f} in query and value layers and by {drift[1]:.2f} in all linear layers" in TEXT
    assert f"({target[0]:.2f} and {target[1]:.2f})" in TEXT


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
