"""What the report's pictures and numbers are made with."""

import re

import pytest

from ipca.lab.baselines import BASELINES, CONTROLS
from ipca.lab.statistics import Difference, Estimate
from ipca.lab.sweep.report.data import read_sweep
from ipca.lab.sweep.report.drawing import limits, near, spread
from ipca.lab.sweep.report.frontier import best_spots, match_targets, matched_panels, spots
from ipca.lab.sweep.report.style import canvas, inline, legend, styles, variables
from ipca.lab.sweep.report.words import estimated, listed, number, p_value, signed
from tests.helpers.sweep_rows import Made

SMALL = {"windows": ("0.0", "0.5", "1.0"), "lrs": (1e-3, 2e-3), "seeds": 2, "comparisons": ("same",)}


@pytest.mark.parametrize(
    ("values", "gap", "places"),
    [
        ([0.0, 1.0], 0.5, [0.0, 1.0]),
        ([0.0, 0.1], 0.5, [-0.2, 0.3]),
        ([0.0, 0.0, 0.0], 1.0, [-1.0, 0.0, 1.0]),
        ([0.0, 1.2, 1.3], 1.0, [-0.1667, 0.8333, 1.8333]),  # the pair moves down onto the first
        ([], 1.0, []),
    ],
)
def test_labels_are_moved_apart(values, gap, places):
    assert spread(values, gap) == pytest.approx(places, abs=1e-4)


def test_limits_hold_all_values_with_room():
    assert limits([1.0, 2.0]) == pytest.approx((0.94, 2.06))
    assert limits([2.0, 2.0]) == pytest.approx((1.9, 2.1))
    assert limits([]) == (0.0, 1.0)


def test_an_untrained_model_far_off_is_left_out():
    assert near(0.5, [0.7, 0.8]) is None
    assert near(0.65, [0.7, 0.8]) == 0.65
    assert near(None, [0.7, 0.8]) is None


@pytest.mark.parametrize(
    ("value", "text"), [(0.8531, "0.853"), (0.00123, "0.0012"), (1234.5, "1234"), (0.0, "0.000"), (-2.0, "-2.000")]
)
def test_numbers(value, text):
    assert number(value) == text


def test_a_difference_has_signs_and_as_many_decimals_everywhere():
    assert estimated(Difference(0.0531, -0.0004, 0.0712, 5, 0.1, 0.1)) == "+0.053 [−0.000, +0.071]"
    assert estimated(Difference(0.00053, -0.0004, 0.00071, 5, 0.1, 0.1)) == "+0.00053 [−0.00040, +0.00071]"
    assert estimated(Estimate(0.5, None, None, 1)) == "0.500"
    assert signed(-0.25) == "−0.250"


def test_words():
    assert [p_value(0.03125), p_value(0.0004)] == ["p = 0.031", "p < 0.001"]
    assert [listed(["a"]), listed(["a", "b", "c"])] == ["a", "a, b and c"]


def test_every_method_has_a_look_of_its_own(tmp_path):
    methods = ("lora", "full", "auto", *BASELINES, *CONTROLS)
    sweep = read_sweep(Made(seeds=1, lrs=(1e-3,), comparisons=("same",), methods=methods).write(tmp_path))
    look = styles(sweep)
    assert set(look) == set(sweep.methods) >= set(methods)
    assert len({(style.color, style.mark) for style in look.values()}) == len(look)
    assert len({(style.dark, style.mark) for style in look.values()}) == len(look)


def test_a_method_looks_the_same_whatever_stands_beside_it(tmp_path):
    few = styles(read_sweep(Made(**{**SMALL, "methods": ("lora", "haar")}).write(tmp_path / "few")))
    many = styles(read_sweep(Made(seeds=1, lrs=(1e-3,), comparisons=("same",)).write(tmp_path / "many")))
    assert all(many[method] == style for method, style in few.items())


def test_an_inline_picture_has_ids_of_its_own_and_no_color_of_its_own():
    with canvas(2, 2) as (figure, axis):
        axis.plot([0, 1], [0, 1], "o--")
        axis.set_title("a < b & $c")
        svg = inline(figure, "one", 'say "a"')
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert ids
    assert all(found.startswith("one-") for found in ids)
    assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', svg)) <= set(ids)
    assert 'aria-label="say &quot;a&quot;"' in svg
    assert "a &lt; b &amp; $c" in svg
    assert "var(--c-1d1d22, #1d1d22)" in svg
    assert not re.search(r"(fill|stroke): #1d1d22", svg)


def test_both_themes_define_the_same_colors(tmp_path):
    look = styles(read_sweep(Made(**SMALL).write(tmp_path)))
    names = [re.findall(r"--c-[0-9a-f]{6}", variables(look, dark=dark)) for dark in (False, True)]
    assert names[0] == names[1]
    assert {f"--c-{style.color[1:]}" for style in look.values()} <= set(names[0])


def test_the_legend_names_methods_and_the_untrained_model(tmp_path):
    sweep = read_sweep(Made(**SMALL).write(tmp_path))
    words = [text for _, text in legend(["0.5", "lora", "haar"], styles(sweep), base=True)]
    assert words == ["window 0.5", "plain LoRA", "haar", "untrained model"]


def test_spots_are_means_over_seeds_and_count_failures(tmp_path):
    sweep = read_sweep(Made(**{**SMALL, "methods": ("lora",)}, fails={"lora": 2e-3}).write(tmp_path))
    found = {(spot.method, spot.lr): spot for spot in spots(sweep.ends)}
    assert ("lora", 2e-3) not in found
    values = sweep.values("0.5", "target", "same", 1e-3).values()
    assert found["0.5", 1e-3].target == pytest.approx(sum(values) / 2)
    assert (found["0.5", 1e-3].n, found["0.5", 1e-3].failed) == (2, 0)


def test_no_spot_lies_above_the_line(tmp_path):
    sweep = read_sweep(Made(**SMALL).write(tmp_path))
    best = best_spots(sweep)
    assert [spot.target for spot in best] == sorted(spot.target for spot in best)
    for spot in spots(sweep.ends):
        assert any(b.target >= spot.target and b.retained >= spot.retained for b in best)


def test_targets_are_matched_over_rates_and_checkpoints(tmp_path):
    sweep = read_sweep(Made(**SMALL, checkpoints=(5,)).write(tmp_path))
    found = match_targets(sweep)
    highest = {}
    for run in sweep.runs:
        key = run.method, run.seed
        highest[key] = max(highest.get(key, 0.0), run.metrics["target"])
    assert found.target == min(highest.values())
    assert set(found.retained) == set(sweep.methods)


def test_forgetting_needs_the_untrained_model(tmp_path):
    folder = Made(**SMALL).write(tmp_path)
    lines = (folder / "rows.csv").read_text().splitlines(keepends=True)
    (folder / "rows.csv").write_text("".join(line for line in lines if not line.startswith("base,")))
    sweep = read_sweep(folder)
    assert matched_panels(sweep, styles(sweep)) == []
