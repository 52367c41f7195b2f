"""Frontiers, forgetting at an equal score and cross-fitted rates, by hand."""

import builtins
import csv
import math
import re

import pytest

from ipca.lab.compare import best_rate, draw_frontier, frontier, target_matched

NAN = math.nan


def test_the_frontier_is_what_nothing_beats_in_both():
    points = [(0.6, 0.9), (0.7, 0.7), (0.65, 0.6), (0.8, 0.5), (0.5, 0.9), (0.8, 0.4)]
    assert frontier(points) == [0, 1, 3]


def test_equal_points_are_all_on_the_frontier():
    assert frontier([(0.5, 0.5), (0.7, 0.3), (0.5, 0.5), (0.7, 0.3), (0.4, 0.5)]) == [0, 2, 1, 3]
    assert frontier([(0.5, 0.5)] * 3) == [0, 1, 2]


def test_points_that_are_not_finite_are_never_on_the_frontier():
    assert frontier([(NAN, 0.9), (0.5, 0.5), (0.9, NAN), (math.inf, 0.1)]) == [1]
    assert frontier([]) == []


@pytest.mark.parametrize("point", [(0.5,), (0.5, 0.6, 0.7), 0.5, ("a", "b")])
def test_what_is_no_point_is_refused(point):
    with pytest.raises(ValueError, match=f"a point must be .* two numbers; got {re.escape(repr(point))}"):
        frontier([(0.5, 0.5), point])


def test_methods_are_compared_at_the_score_that_all_reach():
    curves = {
        "middle": {0: [(0.6, 0.9), (0.8, 0.7), (0.7, 0.4)], 1: [(0.6, 0.8), (0.9, 0.5)]},
        "lora": {0: [(0.7, 0.85)], 1: [(0.75, 0.9), (0.5, 0.95)]},
    }
    found = target_matched(curves)
    assert found.target == 0.7  # LoRA's best with seed 0
    assert found.retained["middle"] == pytest.approx({0: 0.8, 1: 0.7})  # half of the way, a third of it
    assert found.retained["lora"] == pytest.approx({0: 0.85, 1: 0.91})


def test_a_score_that_was_never_reached_is_nan_and_one_below_all_takes_the_first_of_the_frontier():
    curves = {"middle": {0: [(0.6, 0.9), (0.8, 0.7)]}, "lora": {0: [(0.7, 0.8)]}}
    above, below = target_matched(curves, 0.75), target_matched(curves, 0.1)
    assert above.target == 0.75
    assert above.retained["middle"][0] == pytest.approx(0.75)
    assert math.isnan(above.retained["lora"][0])
    assert below.retained == {"middle": {0: 0.9}, "lora": {0: 0.8}}


def test_the_ends_of_the_frontier_are_reached_exactly():
    curves = {"middle": {0: [(0.6, 0.9), (0.8, 0.7), (0.8, 0.7)]}}
    assert target_matched(curves, 0.8).retained == {"middle": {0: 0.7}}
    assert target_matched(curves, 0.6).retained == {"middle": {0: 0.9}}


def test_a_seed_that_diverged_everywhere_is_nan_and_does_not_move_the_score():
    found = target_matched({"middle": {0: [(0.8, 0.7)], 1: [(NAN, NAN)]}, "lora": {0: [(0.7, 0.8)], 1: [(0.9, 0.9)]}})
    assert found.target == 0.7
    assert math.isnan(found.retained["middle"][1])
    assert found.retained["lora"] == {0: 0.8, 1: 0.9}


@pytest.mark.parametrize(
    ("curves", "target", "words"),
    [
        ({}, None, r"no finite points to compare; got the methods \(none\)"),
        (
            {"middle": {0: []}, "lora": {0: [(NAN, 1)]}},
            None,
            "no finite points to compare; got the methods middle, lora",
        ),
        ({"middle": {0: [(0.5, 0.5)]}}, NAN, "target must be a finite score; got nan"),
    ],
)
def test_nothing_to_compare_is_refused(curves, target, words):
    with pytest.raises(ValueError, match=words):
        target_matched(curves, target)


def grid(**scores):
    """``high=[…]``: the scores at a rate by seed."""
    rates = {"low": 1e-3, "high": 2e-3}
    return [
        {"lr": rates[name], "seed": seed, "target": score}
        for name, found in scores.items()
        for seed, score in enumerate(found)
    ]


def test_each_seed_gets_the_rate_that_was_best_for_the_others():
    rows = grid(low=[0.9, 0.5, 0.5], high=[0.6, 0.6, 0.6])
    # by all seeds low is best (0.633), and by seed 0 itself; without seed 0 high is (0.6 above 0.5)
    assert best_rate(rows) == {0: 2e-3, 1: 1e-3, 2: 1e-3}


def test_of_equally_good_rates_the_lowest_is_taken():
    assert best_rate(grid(high=[0.3, 0.3, 0.3], low=[0.3, 0.3, 0.3])) == {0: 1e-3, 1: 1e-3, 2: 1e-3}
    assert best_rate(grid(low=[0.15, 0.15, 0.0], high=[0.1, 0.2, 0.0]))[2] == 1e-3  # 0.1 + 0.2 rounds up


def test_within_a_standard_error_of_the_best_rate_the_lowest_is_taken():
    low, high = [0.50, 0.52, 0.54, 0.56], [0.51, 0.53, 0.55, 0.57]
    assert set(best_rate(grid(low=low, high=high)).values()) == {2e-3}
    assert set(best_rate(grid(low=low, high=high), within_se=1).values()) == {1e-3}  # 0.01 below; SE 0.012
    assert set(best_rate(grid(low=low, high=high), within_se=0.5).values()) == {2e-3}
    assert set(best_rate(grid(low=[0.4, None, 0.4, 0.4], high=high), within_se=9).values()) == {1e-3, 2e-3}


def test_a_rate_at_which_another_seed_failed_comes_last():
    assert best_rate(grid(low=[0.5, 0.5, 0.5], high=[0.9, None, 0.9])) == {0: 1e-3, 1: 2e-3, 2: 1e-3}


def test_where_every_rate_failed_for_another_seed_there_is_none():
    found = best_rate(grid(low=[0.5, NAN], high=[0.9, None]))
    assert math.isnan(found[0])
    assert found[1] == 2e-3


def test_rows_may_be_the_text_of_a_file_and_the_metric_another():
    text = "lr,seed,target,retained\n0.001,0,0.5,0.9\n0.001,1,0.5,0.9\n0.002,0,0.6,0.1\n0.002,1,,\n"
    rows = list(csv.DictReader(text.splitlines()))
    assert best_rate(rows) == {"0": 1e-3, "1": 2e-3}
    assert best_rate(rows, metric="retained") == {"0": 1e-3, "1": 1e-3}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (grid(low=[0.5]), "needs at least two seeds; got 1"),
        ([], "needs at least two seeds; got 0"),
        (grid(low=[0.5, 0.6], high=[0.5]), "no run at lr 0.002 with seed 1; leave out the rate or the seed"),
        ([{"lr": "", "seed": "", "target": "0.5"}], "a row has no lr, such as that of the untrained model"),
        (
            grid(low=[0.5, 0.6]) * 2,
            "two rows at lr 0.001 with seed 0; pass one method, one comparison",
        ),
    ],
)
def test_what_is_no_grid_is_refused(rows, words):
    with pytest.raises(ValueError, match=words):
        best_rate(rows)


def test_a_standard_error_takes_three_seeds():
    with pytest.raises(ValueError, match="needs at least three seeds; got 2"):
        best_rate(grid(low=[0.5, 0.6]), within_se=1)
    with pytest.raises(ValueError, match="within_se must be a number of standard errors from 0, such as 1; got -1"):
        best_rate(grid(low=[0.5, 0.6, 0.7]), within_se=-1)


def test_a_row_without_the_metric_is_refused():
    with pytest.raises(KeyError, match="drift"):
        best_rate(grid(low=[0.5, 0.6]), metric="drift")


POINTS = {f"method {k}": [(0.5 + 0.01 * k, 0.9 - 0.01 * k), (0.6, 0.5), (NAN, 0.2)] for k in range(12)}


def test_the_picture_shows_every_finite_point_and_no_label_covers_another(tmp_path, drawn):
    draw_frontier(POINTS, tmp_path / "frontier.png", base=0.95, labels=("accuracy", "probe accuracy"))
    assert (tmp_path / "frontier.png").stat().st_size > 10_000
    (figure,) = drawn
    (axis,) = figure.axes
    marked = [line for line in axis.lines if line.get_marker() not in ("None", "")]
    assert [list(zip(*line.get_data(), strict=True)) for line in marked] == [p[:2] for p in POINTS.values()]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("accuracy", "probe accuracy")
    boxes = [text.get_window_extent() for text in figure.legends[0].get_texts()]
    assert len(boxes) == len(POINTS) + 2
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert not figure.legends[0].get_window_extent().overlaps(axis.get_window_extent())
    looks = {(line.get_color(), line.get_marker()) for line in marked}
    assert len(looks) == len(POINTS)


def test_the_ending_names_the_format(tmp_path):
    draw_frontier(POINTS, tmp_path / "frontier.svg")
    assert "<svg" in (tmp_path / "frontier.svg").read_text()
    with pytest.raises(ValueError, match="Format 'txt' is not supported"):
        draw_frontier(POINTS, tmp_path / "frontier.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["frontier.svg"]


def test_a_picture_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no finite points to draw; got the methods middle"):
        draw_frontier({"middle": [(NAN, NAN)]}, tmp_path / "frontier.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_message_says_how_to_install_it(tmp_path, monkeypatch):
    plain = builtins.__import__

    def missing(name, *args, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return plain(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install 'ipca-lora\[plot\]'"):
        draw_frontier(POINTS, tmp_path / "frontier.png")
