"""The analysis of a study on made-up rows whose answer is known, and the sections of its page."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from studies.frontier import page
from studies.frontier.analysis import Analysis, Ratio, corrected, spread
from studies.frontier.curve import along_scale, along_training
from studies.frontier.design import Run, Wave, best_rate, grid
from studies.frontier.figures import draw
from studies.frontier.rows import Rows
from studies.language.protocol import ARMS, MAIN, PLAN, PROTOCOL
from studies.plots import outdated, write_pictures
from studies.position_grid import protocol as position_grid

TARGETS = (4.4, 4.2, 4.1)
SMALL = replace(
    PLAN,
    tasks=("german",),
    waves=(Wave(60, MAIN, tuple(range(5)), True), Wave(60, MAIN, tuple(range(5)), False)),
    targets={("german", 60): TARGETS},
)
BASE, GAIN = 5.0, 1.2
KL = {"middle": 0.3, "lora": 0.4, "principal": 0.6, "minor": 0.6}
"""KL at λ = 1; at equal λ all arms have the same cross-entropy."""


def made_up(run, kl, gain=GAIN, finer=(), jitter=0.0):
    """Cross-entropy ``BASE − gain (2λ − λ²)`` and divergence ``kl λ²``, over λ and over the share of steps."""

    def at(share):
        size = kl * math.exp(jitter) * share**2
        kept = {f"kl_{name}": size * factor for name, factor in (("samples", 1), ("prose", 2), ("other", 3))}
        rise = {f"ce_{name}": 3.0 + size for name in ("samples", "prose", "other")}
        return {"status": "ok", "update": share, "ce_new": BASE - gain * (2 * share - share**2), **kept, **rise}

    known = {"task": run.task, "steps": run.steps, "arm": run.arm, "rate": run.rate, "seed": run.seed}
    environment = {"python": "3", "torch": "2", "ipca": "0", "device": "made up", "threads": 1, "cores": 2}
    lines = [{**known, "step": 0, "scale": 0.0, **at(0.0), "environment": environment}]
    lines += [{**known, "step": run.steps * k // 4, "scale": 1.0, **at(k / 4)} for k in (1, 2, 3)]
    return lines + [{**known, "step": run.steps, "scale": s, **at(s)} for s in sorted({*SMALL.scales, *finer})]


def rows_of(folder, seeds=5, jitter=0.02, **changes):
    """Rows of the main arms at their first three rates; the center is the best one."""
    rows = Rows(folder)
    for arm in MAIN:
        for place, rate in enumerate(sorted(grid(ARMS[arm].rate, {}))):
            for seed in range(seeds):
                run = Run("german", 60, arm, rate, seed)
                kl = KL[arm] * (1.0 if place == 1 else 1.2) * changes.get(arm, 1.0)
                noise = jitter * ((seed * 7 + len(arm) * 3) % 5 - 2)
                finer = SMALL.finer if SMALL.is_checked(run) else ()
                items = {name: torch.full((8, 11), kl) for name in ("ce_new", "ce_samples", "kl_samples")}
                rows.put(run, made_up(run, kl, finer=finer, jitter=noise), items)
    return rows


def comparison(analysis, other, place=1):
    return next(c for c in analysis.comparisons() if (c.other, c.place) == (other, place))


@pytest.mark.parametrize("along", [lambda lines: along_scale(lines, "kl_samples", SMALL.scales), None])
def test_divergence_at_a_target(along):
    run = Run("german", 60, "middle", 1e-3, 0)
    curve = (along or (lambda lines: along_training(lines, "kl_samples")))(made_up(run, 0.3))
    share = 1 - math.sqrt(1 - (BASE - 4.2) / GAIN)  # where BASE − GAIN (2λ − λ²) is 4.2
    assert curve.when(4.2) == pytest.approx(0.3 * share**2, rel=0.02)
    assert curve.when(BASE - GAIN - 0.01) is None
    assert curve.lowest == pytest.approx(BASE - GAIN)


def test_the_root_of_a_divergence_is_closer_between_the_base_and_the_first_point():
    run = Run("german", 60, "middle", 1e-3, 0)
    lines, target = made_up(run, 0.3), BASE - GAIN * (2 * 0.1 - 0.1**2)
    plain, root = (along_scale(lines, "kl_samples", SMALL.scales, root=root).when(target) for root in (False, True))
    assert abs(plain / 0.003 - 1) > 0.2
    assert root == pytest.approx(0.003, rel=0.05)


def test_a_target_that_is_only_reached_below_the_full_scale():
    """The cross-entropy may rise again toward λ = 1; the smallest λ counts."""
    run = Run("german", 60, "middle", 1e-3, 0)
    lines = made_up(run, 0.3)
    lines[-1]["ce_new"] = 4.6
    curve = along_scale(lines, "kl_samples", SMALL.scales)
    assert curve.when(4.0) < 0.3 * 0.75**2


def test_a_diverged_run_has_no_curve():
    lines = made_up(Run("german", 60, "middle", 1e-3, 0), 0.3)
    lines[-1]["status"] = "diverged"
    assert along_scale(lines, "kl_samples", SMALL.scales) is None


def test_ratio_against_scipy():
    from scipy import stats

    pairs = [(1.0, 2.0), (1.1, 2.0), (0.9, 2.1), (1.0, 1.8)]
    logs = [math.log(a / b) for a, b in pairs]
    found = Ratio.of(pairs)
    known = stats.ttest_1samp(logs, 0.0)
    interval = known.confidence_interval(0.95)
    assert found.p == pytest.approx(known.pvalue)
    assert (found.low, found.high) == pytest.approx((math.exp(interval.low), math.exp(interval.high)))
    assert Ratio.of(pairs[:1]).low is None
    assert math.isnan(Ratio.of(pairs[:1]).p)
    assert Ratio.of([(1.0, 2.0)] * 3).low is None, "no spread, no interval"


def test_the_middle_window_moves_the_model_less(tmp_path):
    analysis = Analysis(SMALL, rows_of(tmp_path))
    for other in ("lora", "principal", "minor"):
        for place in range(3):
            found = comparison(analysis, other, place)
            assert found.ratio.value == pytest.approx(KL["middle"] / KL[other], rel=0.03)
            assert found.ratio.low < KL["middle"] / KL[other] < found.ratio.high
            assert (found.verdict, found.ratio.n) == ("lower", 5)
    assert analysis.tuned("german", 60, "middle", 1).keys() == set(range(5))
    text = "\n".join(page.sentences(analysis, analysis.comparisons()))
    assert "against plain LoRA – lower at all three targets. Ratios 0.7" in text


@pytest.mark.slow
def test_the_opposite_and_equivalence(tmp_path):
    assert comparison(Analysis(SMALL, rows_of(tmp_path / "a", lora=0.5)), "lora").verdict == "higher"
    even = Analysis(SMALL, rows_of(tmp_path / "b", lora=0.75))
    assert comparison(even, "lora").verdict == "equivalent"
    wide = Analysis(SMALL, rows_of(tmp_path / "c", jitter=0.2, lora=0.75))
    assert comparison(wide, "lora").verdict == "not shown"


def test_no_verdict_below_five_seeds(tmp_path):
    analysis = Analysis(SMALL, rows_of(tmp_path, seeds=4))
    found = comparison(analysis, "lora")
    assert found.verdict == "collecting: 4 of 5 seeds"
    assert found.ratio.n == 4
    assert math.isnan(found.adjusted)
    text = "\n".join(page.sections(analysis, PROTOCOL.results).values())
    assert "no verdict (collecting: 4 of 5 seeds)" in text
    assert "– lower" not in text


def test_no_verdict_while_a_rate_lacks_seeds_or_the_best_is_an_edge(tmp_path):
    rows = rows_of(tmp_path)
    (tmp_path / "runs" / "german-60-lora-1e-03-seed4.jsonl").unlink()
    assert comparison(Analysis(SMALL, rows), "lora").verdict == "collecting: plain LoRA at 0.001"
    for seed in range(5):
        run = Run("german", 60, "lora", 1e-2, seed)
        rows.put(run, made_up(run, 0.1), {})
    lacking = comparison(Analysis(SMALL, Rows(tmp_path)), "lora")
    assert lacking.verdict == "collecting: plain LoRA at 0.001, 0.03", "the grid has grown"


def test_every_arm_that_lacks_rates_is_named(tmp_path):
    rows = rows_of(tmp_path)
    for name in ("lora-1e-03", "middle-3e-03"):
        (tmp_path / "runs" / f"german-60-{name}-seed4.jsonl").unlink()
    said = "collecting: middle window at 0.003; plain LoRA at 0.001"
    assert comparison(Analysis(SMALL, rows), "lora").verdict == said


def test_a_rate_that_is_best_for_one_seed_is_an_edge_too(tmp_path):
    """The center is best on all seeds; without seed 0, with which the lowest rate is poor, that one is."""
    rows = rows_of(tmp_path, jitter=0.0)
    for seed in range(5):
        run = Run("german", 60, "lora", 1e-3, seed)
        rows.put(run, made_up(run, 0.9 if seed == 0 else 0.39), {})
    analysis = Analysis(SMALL, rows)
    assert best_rate(analysis.scores("german", 60, "lora", 1)) == 3e-3
    assert comparison(analysis, "lora").verdict == "plain LoRA is best at the edge of its rates, 0.001"


def test_stopped_runs_have_the_rates_that_are_best_for_stopping(tmp_path):
    """Training at one more rate costs nothing until the target, and much along λ."""
    rows = rows_of(tmp_path, jitter=0.0)
    for seed in range(5):
        run = Run("german", 60, "lora", 1e-2, seed)
        lines = made_up(run, 0.45)
        for line in lines:
            if line["scale"] == 1.0:  # along training
                line["kl_samples"] *= 0.1 if line["step"] < 60 else 1.0
        rows.put(run, lines, {})
    analysis = Analysis(SMALL, rows)
    assert set(analysis.rates("german", 60, "lora").values()) == {3e-3}
    assert set(analysis.rates("german", 60, "lora", training=True).values()) == {1e-2}
    along, stopped = (
        analysis.compare("german", 60, 0, "middle", "lora", training=t).ratio.value for t in (False, True)
    )
    assert along == pytest.approx(0.75, rel=0.01)
    assert stopped > 2
    row = next(line for line in page.training_table(analysis).splitlines() if "plain LoRA" in line)
    assert "| 0.001 / 0.01 |" in row
    assert page.AT_EDGE in row, "LoRA's is the highest that was tried"
    assert analysis.stops_at_edge("german", 60, "middle", "lora")
    assert not analysis.stops_at_edge("german", 60, "middle", "minor")
    other = next(line for line in page.training_table(analysis).splitlines() if "minor window" in line)
    assert page.AT_EDGE not in other


def test_stops_before_the_first_checkpoint_are_marked(tmp_path):
    easy = replace(SMALL, targets={("german", 60): (4.8, 4.6, 4.1)})  # at a quarter of the steps it is 4.475
    found = Analysis(easy, rows_of(tmp_path))
    assert [found.is_early("german", 60, place, "middle", "lora") for place in range(3)] == [True, True, False]
    marked = [page.EARLY in page.stopped_text(found, "german", 60, place, "middle", "lora") for place in range(3)]
    assert marked == [True, True, False]


def test_the_whole_family_counts_where_the_protocol_says_so(tmp_path):
    analysis = Analysis(SMALL, rows_of(tmp_path, jitter=0.05))
    first, second, *rest = analysis.comparisons()
    family = [first, second, *(replace(c, obstacle="collecting") for c in rest)]
    ready, whole = corrected(family), corrected(family, whole=True)
    low, high = sorted((first, second), key=lambda c: c.ratio.p)
    for found, m in ((ready, 2), (whole, len(family))):
        by_other = {c.other: c.adjusted for c in found[:2]}
        assert by_other[low.other] == pytest.approx(m * low.ratio.p)
        assert by_other[high.other] == pytest.approx(max(m * low.ratio.p, (m - 1) * high.ratio.p))
        assert all(math.isnan(c.adjusted) for c in found[2:])
    assert not SMALL.whole_family
    assert position_grid.PLAN.whole_family


def test_a_rate_that_misses_the_target_is_listed_and_the_claim_about_rates_is_answered(tmp_path):
    rows = rows_of(tmp_path, jitter=0.0)
    for seed in range(5):
        run = Run("german", 60, "middle", 3e-3, seed)
        rows.put(run, made_up(run, 0.9, gain=GAIN if seed else 0.5), {})
    analysis = Analysis(SMALL, rows)
    row = next(line for line in page.rates_table(analysis).splitlines() if "| middle window |" in line)
    assert "| 0.0003, 0.001 | 0.003 (4 of 5) | 1.20 |" in row
    (said,) = page.rate_sentences(analysis)
    assert '"high rates do no harm along λ" – not refuted.' in said
    assert "1.20, plain LoRA's 1.20" in said
    for seed in range(5):
        run = Run("german", 60, "middle", 3e-3, seed)
        rows.put(run, made_up(run, 0.9), {})
    (said,) = page.rate_sentences(Analysis(SMALL, Rows(tmp_path)))
    assert "– refuted. Highest over lowest KL among the rates" in said


def test_an_edge_at_the_usual_choice_of_rate_is_marked(tmp_path):
    rows = rows_of(tmp_path / "all")
    found = Analysis(SMALL, rows)
    assert found.one_standard_error("german", 60, "lora") == (1e-3, "edge"), "all rates learn alike here"
    for rate, seed in itertools.product((1e-3, 1e-2), range(5)):
        run = Run("german", 60, "lora", rate, seed)
        rows.put(run, made_up(run, 0.4, gain=1.0), {})
    assert Analysis(SMALL, Rows(tmp_path / "all")).one_standard_error("german", 60, "lora") == (3e-3, "")
    only = Rows(tmp_path / "one")
    run = Run("german", 60, "lora", 3e-3, 0)
    only.put(run, made_up(run, 0.4), {})
    assert Analysis(SMALL, only).one_standard_error("german", 60, "lora") == (3e-3, "only rate")
    assert "| 0.003 (only rate) |" in page.tuned_table(Analysis(SMALL, only))


def test_no_verdict_where_the_target_is_not_reached(tmp_path):
    rows = rows_of(tmp_path)
    run = Run("german", 60, "lora", 3e-3, 0)
    rows.put(run, made_up(run, 0.1, gain=0.85), {})
    assert comparison(Analysis(SMALL, rows), "lora", 2).verdict == "not reached at the chosen rates (4 of 5 seeds)"
    assert comparison(Analysis(SMALL, rows), "lora", 0).obstacle == ""


def test_the_rate_is_chosen_on_the_other_seeds(tmp_path):
    """One seed's luck with another rate does not choose that rate for this seed."""
    rows = rows_of(tmp_path, jitter=0.0)
    run = Run("german", 60, "lora", 1e-2, 0)
    rows.put(run, made_up(run, 0.05), {})
    chosen = Analysis(SMALL, rows).rates("german", 60, "lora")
    assert chosen[0] == 3e-3
    assert set(list(chosen.values())[1:]) == {1e-2}, "the mean of the others with seed 0 is lower there"


def test_grids_grow_where_an_end_is_best():
    assert grid(1e-3, {}) == (1e-3, 3e-4, 3e-3)
    found = {3e-4: {0: 0.3, 1: 0.3}, 1e-3: {0: 0.2, 1: 0.2}, 3e-3: {0: 0.1, 1: 0.1}}
    assert grid(1e-3, found) == (1e-3, 3e-4, 3e-3, 1e-2)
    assert grid(1e-3, {**found, 1e-2: {0: 0.05}}) == (1e-3, 3e-4, 3e-3, 1e-2), "one seed decides nothing"
    assert grid(1e-3, {**found, 1e-2: {0: 0.05, 1: 0.2}}) == (1e-3, 3e-4, 3e-3, 1e-2)
    assert grid(1e-3, {**found, 1e-2: {0: 0.05, 1: 0.05}}) == (1e-3, 3e-4, 3e-3, 1e-2, 3e-2)
    low = {3e-4: {0: 0.1, 1: 0.1}, 1e-3: {0: 0.2, 1: 0.2}, 3e-3: {0: 0.3, 1: 0.3}}
    assert grid(1e-3, low) == (1e-3, 3e-4, 3e-3, 1e-4)
    nothing = {key: {0: None, 1: None} for key in (0.0003, 0.001, 0.003)}
    assert len(grid(1e-3, nothing)) >= 4, "no rate reaches the target: higher or lower ones are tried"


def test_a_rate_that_misses_the_target_is_worse():
    assert best_rate({1e-3: {0: 0.1, 1: None}, 3e-3: {0: 0.3, 1: 0.3}}) == 3e-3
    assert best_rate({1e-3: {0: None}, 3e-3: {0: 0.3}}) == 3e-3


def test_an_equivalent_ratio_is_equivalent_also_where_it_is_shown_to_be_lower(tmp_path):
    found = comparison(Analysis(SMALL, rows_of(tmp_path, jitter=0.002, lora=0.75 / 0.95)), "lora")
    assert found.adjusted < 0.05
    assert (found.verdict, found.direction, found.words) == ("equivalent", "lower", "equivalent (lower)")


def test_words_by_target():
    assert page.by_target(["lower"] * 3) == "lower at all three targets"
    assert page.by_target(["lower", "x", "lower"]) == "easiest and hardest target: lower; middle target: x"


def test_spread_over_rates():
    assert spread({1e-3: {0: 0.1, 1: 0.3}, 3e-3: {0: 0.4, 1: 0.4}, 1e-2: {0: 0.1, 1: None}}) == pytest.approx(2.0)
    assert spread({1e-3: {0: 0.1}}) is None


def test_the_page_from_no_rows_some_rows_and_all_rows(tmp_path):
    empty = Analysis(SMALL, Rows(tmp_path / "none"))
    assert draw(empty, tmp_path) == {}
    assert set(page.sections(empty, PROTOCOL.results).values()) == {page.NOT_RUN, ""}
    for seeds in (1, 5):
        analysis = Analysis(SMALL, rows_of(tmp_path / str(seeds), seeds=seeds))
        assert [path.stem for path in draw(analysis, tmp_path)] == ["frontier", "rates"]
        made = page.sections(analysis, PROTOCOL.results)
        assert f"{4 * 3 * seeds} runs, 0 of them diverged" in made["progress"]
        assert "off by at most" in made["checks"]
        assert ("changes by 20% to 20% (4 arms; with 0 of them" in made["checks"]) == (seeds == 5), "tuned arms only"
        assert "made up" in made["progress"]
        assert page.NOT_RUN not in "".join(text for name, text in made.items() if name != "rates")
    assert "0.75" in made["comparisons"]
    assert "lower" in made["comparisons"]
    assert "1.20" in made["rates"], "the outer rates diverge by 20 % more"


def test_the_same_rows_draw_the_same_pictures(tmp_path):
    analysis = Analysis(SMALL, rows_of(tmp_path, seeds=2))
    for folder in ("a", "b"):
        write_pictures(draw(analysis, tmp_path / folder))
    first, second = (sorted((tmp_path / folder).glob("*.png")) for folder in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert len(first) == 2


def test_a_picture_that_shows_other_rows_is_found(tmp_path):
    folder = tmp_path / "pictures"
    fewer, more = (Analysis(SMALL, rows_of(tmp_path / str(seeds), seeds=seeds)) for seeds in (2, 3))
    assert [path.name for path in outdated(draw(fewer, folder))] == ["frontier.png", "rates.png"], "none is there"
    write_pictures(draw(fewer, folder))
    assert outdated(draw(fewer, folder)) == []
    assert [path.name for path in outdated(draw(more, folder))] == ["frontier.png", "rates.png"]
