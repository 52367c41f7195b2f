"""The studies side by side: what is shown of each pair, and in which words."""

from dataclasses import replace

import pytest

from studies.frontier.analysis import Analysis
from studies.overview import page
from studies.overview.page import QUESTIONS, Source, answers, sections
from tests.studies.frontier.test_frontier_analysis import SMALL, rows_of

LORA = "middle window against plain LoRA"
QUESTION_ARMS = {name for pairs in QUESTIONS.values() for pair in pairs for name in pair}


def source(folder, model="model", **changes):
    return Source(model, Analysis(SMALL, rows_of(folder, **changes)), {})


def test_a_pair_with_its_verdict_and_one_without(tmp_path):
    studies = [source(tmp_path / "a", "large"), source(tmp_path / "b", "small", seeds=4)]
    found = answers(studies)
    first, second = found[LORA]
    assert (first.verdict, first.is_decided) == ("moves the model less", True)
    assert (second.verdict, second.is_decided) == ("collecting: 4 of 5 seeds", False)
    text = sections(found)["ratios"]
    cell = "German manual pages, 60 steps"
    told = f"large, {cell}: moves the model less. small, {cell}: no verdict."
    assert f"- **Middle window against plain LoRA.** {told}" in text
    assert "| middle window / plain LoRA | large, German manual pages, 60 steps | 5 | 0.75" in text
    assert "frozen" not in text, "no rows, no line"


def test_a_pair_that_the_protocol_claims_nothing_about_has_no_verdict(tmp_path):
    design = replace(SMALL, families=())
    (found,) = answers([Source("model", Analysis(design, rows_of(tmp_path)), {})])[LORA]
    assert (found.verdict, found.is_decided) == ("described only", False)
    assert "model, German manual pages, 60 steps: described only." in sections({LORA: [found]})["ratios"]
    fewer = replace(found, targets=(*found.targets[:2], replace(found.targets[2], ratio=None)))
    assert (found.n, fewer.n) == ("5", "0–5")
    assert found.targets[1].ratio.n == 5


def test_verdicts_that_differ_between_targets_are_all_named(tmp_path):
    (found,) = answers([source(tmp_path)])[LORA]
    mixed = replace(found, targets=(replace(found.targets[0], adjusted=0.5), *found.targets[1:]))
    assert mixed.verdict == "not shown at the easiest target; moves the model less at the middle and hardest target"


def test_a_target_without_a_verdict_does_not_hide_the_others(tmp_path):
    (found,) = answers([source(tmp_path)])[LORA]
    last = replace(found.targets[2], obstacle="not reached in enough seeds (4 of 5)")
    partly = replace(found, targets=(*found.targets[:2], last))
    assert partly.is_decided
    said = "moves the model less at the easiest and middle target"
    assert partly.verdict == f"{said}; not reached in enough seeds (4 of 5) at the hardest target"
    none = replace(found, targets=tuple(replace(c, obstacle="collecting") for c in found.targets))
    assert (none.is_decided, none.verdict) == (False, "collecting")


def test_what_one_rate_would_have_said_is_shown_beside_a_verdict_only(tmp_path):
    found = answers([source(tmp_path / "a"), source(tmp_path / "b", "small", seeds=4)])
    (sure, open_) = found[LORA]
    assert sure.first.value == pytest.approx(0.75, rel=0.1), "the first rates of these rows are the best"
    first, second = page.table({LORA: [sure, open_]}).splitlines()[2:]
    head = page.table({}).splitlines()[0].split(" | ")
    assert first.split(" | ")[head.index("first rates, middle target")] == page.ratio_text(sure.first)
    assert second.split(" | ")[head.index("first rates, middle target")] == "–"
    assert "One rate each decides nothing" in page.sections({LORA: [sure, open_]})["ratios"]
    assert "One rate each decides nothing" not in page.sections({LORA: [open_]})["ratios"]


def test_every_arm_of_a_question_is_in_a_study_and_what_it_is_compared_with_in_all():
    studies = page.sources()
    arms = [{name for name in QUESTION_ARMS if s.names.get(name, name) in s.analysis.design.arms} for s in studies]
    assert set.union(*arms) == QUESTION_ARMS
    assert all({"lora", "principal", "minor"} <= there for there in arms)


def test_the_chart_has_a_panel_for_each_question_with_rows(tmp_path):
    found = answers([source(tmp_path / "a")])
    assert list(found) == list(QUESTIONS)[:3]
    (figure,) = page.draw(found).values()
    assert [axis.get_title() for axis in figure.axes] == list(QUESTIONS)[:3]
    assert page.draw({}) == {}
    assert sections(answers([])) == {"ratios": "Not run."}
