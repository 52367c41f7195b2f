"""The page of the paper's claims: which word each result gets, and that no result is lost in the short table."""

from dataclasses import replace

import pytest

from studies.continual.analysis import Analysis as Continual
from studies.continual.rows import Rows as Streams
from studies.frontier.analysis import Analysis
from studies.frontier.positions import shapes
from studies.overview import paper
from studies.overview.page import Source, answers, sources
from studies.overview.paper import (
    ACCURACY,
    CONTINUAL,
    EQUAL,
    HIGH,
    KEPT,
    ONE_RATE,
    ONE_STREAM,
    RATES,
    SHAPE,
    TUNED,
    results,
    sections,
)
from studies.window_position.reanalysis import EDGE, HOLDS, NOT_SHOWN, REVERSED
from studies.window_position.rows import Study
from studies.window_position.rules import Tables, by_source, read_tables
from tests.studies.frontier.test_frontier_analysis import SMALL, rows_of


def row(verdict, mean="0.1", p="0.02", smallest="0.002"):
    ends = {"low": "0.05", "high": "0.15"} if mean else {"low": "", "high": ""}
    return {"n": "10" if mean else "", "mean": mean, **ends, "p": p, "smallest": smallest, "verdict": verdict}


def found_in(tmp_path, claims=None, studies=()):
    tables = Tables({}, {}, {}, [], claims=claims or {})
    return results(tables, studies, Continual(Streams(tmp_path / "streams")))


def pairs_in(tmp_path, studies):
    return [each for each in found_in(tmp_path, studies=studies) if each.claim != RATES]


def test_the_words_of_the_window_study(tmp_path):
    claims = {
        ("equal target", "0.0", "M1"): row(EDGE),
        ("equal target", "1.0", "M1"): row(HOLDS),
        ("equal target", "lora", "M2-all"): row(NOT_SHOWN, p="0.0625", smallest="0.0625"),
        ("same rate", "1.0", "V1"): row(REVERSED, mean="-0.1"),
        ("accuracy", "lora", "M4"): row(EDGE, mean=""),
        ("equal early updates", "0.0", "M1"): row(HOLDS),
    }
    found = found_in(tmp_path, claims)
    assert [(each.claim, each.kind, each.verdict, bool(each.why)) for each in found] == [
        (EQUAL, "language", "no verdict", True),
        (EQUAL, "language", "holds", False),
        (EQUAL, "language", "not shown", True),
        (ONE_RATE, "vision", "reversed", False),
        (ACCURACY, "language", "no verdict", True),
    ], "matched updates are no claim of the paper"
    assert [each.figure for each in found] == [
        *["retained accuracy +0.100 [+0.050, +0.150]"] * 3,
        "retained accuracy −0.100 [+0.050, +0.150]",
        "–",
    ]


@pytest.mark.parametrize(
    ("factor", "verdict"), [({}, "holds"), ({"middle": 2.0}, "reversed"), ({"lora": 0.75}, "alike")]
)
def test_the_words_of_a_study_at_equal_success(tmp_path, factor, verdict):
    studies = [Source("model", Analysis(SMALL, rows_of(tmp_path / "a", **factor)), {}, "vision")]
    (found,) = [each for each in pairs_in(tmp_path, studies) if each.against == "plain LoRA"]
    assert (found.claim, found.kind, found.n, found.verdict) == (EQUAL, "vision", "5", verdict)
    assert found.model == "model (German manual pages, 60 steps)"
    assert found.figure.startswith("KL × ")


def test_alike_methods_are_alike_whichever_is_higher():
    found = results(Tables({}, {}, {}, []), (), Continual(Streams()))
    tasks = {each.against: each for each in found if each.claim == CONTINUAL}
    assert {each.verdict for each in tasks.values()} == {"alike"}
    assert tasks["OSF"].why == "within one point, though shown to be lower"
    kept = [each for each in found if each.claim == KEPT]
    assert {(each.verdict, each.why) for each in kept} == {("no verdict", "described only, at the rates above")}
    assert len(kept) == len(tasks)


@pytest.mark.parametrize(
    ("fixed", "at_one_rate", "verdict"),
    [("below", "below", "reversed"), ("below", "not shown", "not shown"), ("not shown", "not shown", "not shown")],
)
def test_a_test_fixed_beforehand_needs_its_comparison_at_one_rate(tmp_path, fixed, at_one_rate, verdict):
    tests = {"C6": row(fixed, mean="-0.1"), "S6": row(at_one_rate), "C11": row("above")}
    minilm, vit = results(Tables(tests, {}, {}, []), (), Continual(Streams(tmp_path)))
    assert (minilm.claim, minilm.model, minilm.verdict) == (TUNED, "MiniLM feed-forward", verdict)
    assert ("S6" in minilm.why) == (fixed != at_one_rate)
    assert (vit.kind, vit.verdict, vit.why) == ("vision", "holds", "C11, fixed beforehand, corrected")


def test_a_study_without_enough_seeds_has_no_verdict_and_says_why(tmp_path):
    studies = [Source("model", Analysis(SMALL, rows_of(tmp_path / "a", seeds=4)), {})]
    found = pairs_in(tmp_path, studies)
    assert {(each.verdict, each.why) for each in found} == {("no verdict", "collecting: 4 of 5 seeds")}


def test_verdicts_that_differ_between_targets_are_all_given(tmp_path):
    analysis = Analysis(SMALL, rows_of(tmp_path / "a"))
    kept = analysis.obstacle

    def obstacle(task, steps, arms, seeds, reached):
        return kept(task, steps, arms, seeds, reached) or ("not reached" if "minor" in arms else "")

    analysis.obstacle = obstacle
    found = {each.against: each for each in found_in(tmp_path, studies=[Source("model", analysis, {})])}
    assert (found["the last (minor)"].verdict, found["the last (minor)"].why) == ("no verdict", "not reached")
    pair = answers([Source("model", analysis, {})])["middle window against plain LoRA"][0]
    targets = (replace(pair.targets[0], adjusted=0.5), *pair.targets[1:])
    word, why = paper._verdict(replace(pair, targets=targets))
    said = "easiest target: not shown; middle and hardest target: moves the model less"
    assert (word, why) == ("depends on the target", said)
    out_of_reach = (*pair.targets[:2], replace(pair.targets[2], obstacle="not reached"))
    word, why = paper._verdict(replace(pair, targets=out_of_reach))
    said = "easiest and middle target: moves the model less; hardest target: not reached"
    assert (word, why) == ("holds where reached", said)


def test_a_pair_without_a_claim_in_its_protocol_is_only_described(tmp_path):
    analysis = Analysis(replace(SMALL, families=()), rows_of(tmp_path / "a"))
    found = pairs_in(tmp_path, [Source("model", analysis, {})])
    assert {(each.verdict, each.why) for each in found} == {("no verdict", "described only")}


def test_every_result_at_hand_is_in_both_tables_under_its_word():
    found = results(read_tables(Study()), sources(), Continual(Streams()))
    claims = {EQUAL, SHAPE, TUNED, ONE_RATE, HIGH, RATES, ACCURACY, CONTINUAL, ONE_STREAM, KEPT}
    assert {each.claim for each in found} == claims
    text = sections(found)
    for each in found:
        assert (
            f"| {each.claim} | {each.against} | {each.model} | {each.n} | {each.figure} | {each.verdict}"
            in (text["results"])
        )
        (line,) = [line for line in text["short"].splitlines() if line.startswith(f"| {each.claim} | {each.against} |")]
        cell = line.split(" | ")[2 if each.kind == "language" else 3]
        (group,) = [part for part in cell.split("**")[1:] if part == each.verdict]
        assert each.model in cell.split(f"**{group}**: ")[1].split(";")[0]


def test_nothing_collected():
    assert sections([]) == {"short": "Not run.", "results": "Not run."}
    assert paper.PAGE.exists()


def test_on_the_sources_that_were_not_learned_no_arm_of_minilm_lost_more_than_is_said():
    tables = read_tables(Study())
    lost = [
        base["others"] - means["others"]
        for method, lr, means, base in by_source(tables)
        if lr == tables.rates["M1", method]["one_se"]
    ]
    assert len(lost) == 8
    said = f"none of the eight arms that were measured by source lost more than {max(lost):.3f} at its lowest rate"
    assert said in paper.PAGE.read_text(encoding="utf-8")


def test_a_shape_that_the_protocol_refutes_is_refuted():
    """The rows of the position grid: the easier targets of one task have verdicts, those of the other have none yet."""
    grid = next(study for study in sources() if study.model == "MGM")
    (found,) = (each for each in paper._of_shapes([grid]) if "gut communities, 60" in each.model)
    assert (found.claim, found.against, found.n) == (SHAPE, "both ends", "10")
    assert found.verdict == "refuted where reached"
    assert "no U" in found.why
    assert found.verdict in paper._ORDER
    assert list(paper._of_shapes([study for study in sources() if study.model != "MGM"])) == []


def test_a_shape_that_differs_between_targets_is_in_the_short_table(monkeypatch):
    grid = next(study for study in sources() if study.model == "MGM")
    easiest, middle, hardest = shapes(grid.analysis)[:3]
    sides = {"left": replace(middle.left, adjusted=0.5, ratio=replace(middle.left.ratio, narrow=None))}
    sides["right"] = replace(middle.right, adjusted=0.5, ratio=replace(middle.right.ratio, narrow=None))
    monkeypatch.setattr(paper, "shapes", lambda analysis: [easiest, replace(middle, **sides), hardest])
    (found,) = paper._of_shapes([grid])
    assert found.verdict == "depends on the target"
    assert "**depends on the target**: MGM" in paper.short([found])


def test_the_claim_about_rates_is_that_of_the_study(tmp_path):
    (found,) = paper._of_rates([Source("model", Analysis(SMALL, rows_of(tmp_path, jitter=0.0)), {})])
    assert (found.claim, found.against, found.n) == (RATES, "plain LoRA", "5")
    assert (found.verdict, found.why) == ("not refuted", "")
    assert found.figure == "highest / lowest KL 1.20, plain LoRA's 1.20"
    few = Source("model", Analysis(SMALL, rows_of(tmp_path / "few", seeds=4)), {})
    assert [each.verdict for each in paper._of_rates([few])] == ["no verdict"]
    silent = Analysis(replace(SMALL, claims_rates=False), few.analysis.rows)
    assert list(paper._of_rates([Source("model", silent, {})])) == []
