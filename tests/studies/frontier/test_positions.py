"""The shape over positions on made-up rows whose answer is known."""

from dataclasses import replace

import pytest

from studies.frontier.analysis import Analysis
from studies.frontier.design import Arm, Run, Wave
from studies.frontier.positions import best_positions, profile, shapes
from studies.frontier.rows import Rows
from studies.language.protocol import PLAN
from tests.studies.frontier.test_frontier_analysis import TARGETS, made_up

POSITIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
ARMS = {f"{at}": Arm(f"window at {at}", f"{at}", 1e-3) for at in POSITIONS}
SEEDS = range(5)
DESIGN = replace(
    PLAN,
    tasks=("german",),
    waves=(Wave(60, tuple(ARMS), tuple(SEEDS), True), Wave(60, tuple(ARMS), tuple(SEEDS), False)),
    targets={("german", 60): TARGETS},
    arms=ARMS,
    main=("0.5",),
    families=(),
)


def analysis_of(folder, kl, seeds=SEEDS, jitter=0.02):
    """KL at λ = 1 by position; at equal λ all arms have the same cross-entropy, and the middle rate is best."""
    rows = Rows(folder)
    for number, at in enumerate(POSITIONS):
        for rate, factor in ((3e-4, 1.3), (1e-3, 1.0), (3e-3, 1.2)):
            for seed in seeds:
                run = Run("german", 60, f"{at}", rate, seed)
                noise = jitter * ((seed * 7 + number * 3) % 5 - 2)
                rows.put(run, made_up(run, kl[number] * factor, jitter=noise), {})
    return Analysis(DESIGN, rows)


def test_a_u_and_where_it_is_lowest(tmp_path):
    analysis = analysis_of(tmp_path, (0.8, 0.5, 0.4, 0.41, 0.6))
    ratios = {arm: ratio.value for arm, ratio in profile(analysis, "german", 60, 1).items()}
    assert ratios == pytest.approx({"0.0": 2.0, "0.25": 1.25, "0.5": 1.0, "0.75": 1.025, "1.0": 1.5}, rel=0.03)
    found = shapes(analysis)
    assert [(shape.verdict, shape.outcome) for shape in found] == [("U", "holds")] * 3
    unsure = replace(found[0], right=replace(found[0].right, adjusted=0.2))
    assert unsure.outcome == "not shown"
    assert found[1].left.ratio.value == pytest.approx((0.8 / 0.4) ** 1, rel=0.05)
    assert found[1].left.ratio.low > 1
    assert best_positions(analysis, "german", 60, 1) == ("0.5", ["0.5", "0.75"])


@pytest.mark.parametrize(
    ("kl", "verdict"),
    [
        ((0.4, 0.5, 0.8, 0.5, 0.4), "inverted U"),
        ((0.4, 0.4, 0.4, 0.5, 0.6), "no U: the left end is equivalent to the middle, the right end higher"),
        ((0.8, 0.6, 0.4, 0.3, 0.2), "no U: the left end is higher, the right end lower"),
    ],
)
def test_other_shapes(tmp_path, kl, verdict):
    found = shapes(analysis_of(tmp_path, kl, jitter=0.01))
    assert [(shape.verdict, shape.outcome) for shape in found] == [(verdict, "refuted")] * 3


def test_no_verdict_while_collecting(tmp_path):
    few = analysis_of(tmp_path / "few", (0.8, 0.5, 0.4, 0.5, 0.8), seeds=range(2))
    assert {(shape.verdict, shape.outcome) for shape in shapes(few)} == {("collecting: 2 of 5 seeds", "")}
    rows = Rows(tmp_path / "few")
    (rows.folder / "runs" / "german-60-0.25-1e-03-seed1.jsonl").unlink()
    assert shapes(Analysis(DESIGN, Rows(rows.folder)))[0].right.ratio.n == 2
    empty = Analysis(DESIGN, Rows(tmp_path / "none"))
    assert {shape.verdict for shape in shapes(empty)} == {"collecting: 0 of 5 seeds"}
    assert best_positions(empty, "german", 60, 1) is None
    assert profile(empty, "german", 60, 1) == {}


def test_a_length_without_all_positions_has_a_shape_of_its_own(tmp_path):
    analysis = analysis_of(tmp_path, (0.8, 0.5, 0.4, 0.5, 0.6))
    some = ("0.0", "0.5", "1.0")
    design = replace(DESIGN, waves=(Wave(60, some, tuple(SEEDS), True), Wave(60, some, tuple(SEEDS), False)))
    found = Analysis(design, analysis.rows)
    assert [shape.verdict for shape in shapes(found)] == ["U"] * 3
    assert list(profile(found, "german", 60, 1)) == list(some)
    assert best_positions(found, "german", 60, 1) == ("0.5", ["0.5"])
