"""The studies side by side: what is shown of each pair, and in which words."""

from dataclasses import replace

import pytest

from studies.frontier.analysis import Analysis
from studies.overview import page, readme
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
    assert (first.verdict, first.is_decided) == ("moves the model less at all three targets", True)
    assert (second.verdict, second.is_decided) == ("collecting: 4 of 5 seeds", False)
    text = sections(found)["ratios"]
    cell = "German manual pages, 60 steps"
    told = f"large, {cell} – moves the model less at all three targets. small, {cell} – no verdict."
    assert f"- **Middle window against plain LoRA.** {told}" in text
    assert "| middle window / plain LoRA | large, German manual pages, 60 steps | 5 | 0.75" in text
    assert "frozen" not in text, "no rows, no line"


def test_a_pair_that_the_protocol_claims_nothing_about_has_no_verdict(tmp_path):
    design = replace(SMALL, families=())
    (found,) = answers([Source("model", Analysis(design, rows_of(tmp_path)), {})])[LORA]
    assert (found.verdict, found.is_decided) == ("described only", False)
    assert "model, German manual pages, 60 steps – described only." in sections({LORA: [found]})["ratios"]
    first, middle, last = found.targets
    assert found.n == replace(found, targets=(first, middle, replace(last, ratio=None))).n == "5", "of the middle one"
    assert replace(found, targets=(first, replace(middle, ratio=None), last)).n == "0"


def test_verdicts_that_differ_between_targets_are_all_named(tmp_path):
    (found,) = answers([source(tmp_path)])[LORA]
    mixed = replace(found, targets=(replace(found.targets[0], adjusted=0.5), *found.targets[1:]))
    assert mixed.verdict == "easiest target: not shown; middle and hardest target: moves the model less"


def test_a_target_without_a_verdict_does_not_hide_the_others(tmp_path):
    (found,) = answers([source(tmp_path)])[LORA]
    last = replace(found.targets[2], obstacle="not reached at the chosen rates (4 of 5 seeds)")
    partly = replace(found, targets=(*found.targets[:2], last))
    assert partly.is_decided
    said = "easiest and middle target: moves the model less"
    assert partly.verdict == f"{said}; hardest target: not reached at the chosen rates (4 of 5 seeds)"
    none = replace(found, targets=tuple(replace(c, obstacle="collecting") for c in found.targets))
    assert (none.is_decided, none.verdict) == (False, "collecting")


def test_what_the_ratio_would_be_under_other_choices(tmp_path):
    found = answers([source(tmp_path / "a"), source(tmp_path / "b", "small", seeds=4)])
    (sure, open_) = found[LORA]
    table = [line.strip("| ").split(" | ") for line in page.choices({LORA: [sure, open_]}).splitlines()]
    head, _, first, second = table[:4]
    assert head[2:] == ["as compared", "stopped", "other kept texts", "first rates", "hardest target"]
    assert first[2] == page.ratio_text(sure.targets[1].ratio)
    analysis = Analysis(SMALL, rows_of(tmp_path / "again"))
    at_first = analysis.at_first_rates("german", 60, 1, "middle", "lora")
    assert at_first.value == pytest.approx(0.75, rel=0.1), "the first rates here are the best"
    hardest = analysis.compare("german", 60, 2, "middle", "lora", at=2).ratio
    assert first[5:] == [page.ratio_text(at_first), page.ratio_text(hardest)]
    assert first[3] == page.ratio_text(analysis.compare("german", 60, 1, "middle", "lora", training=True).ratio)
    assert "–" not in second[5:], "what an open comparison has so far under other choices is shown, too"
    texts = [part.rpartition(" [")[0].rpartition(" ")[0] for part in first[4].split("; ")]
    assert texts == [SMALL.title(name) for name in SMALL.kept[1:]]


def test_the_hardest_target_has_rates_of_its_own(tmp_path):
    """LoRA's best rate at the middle target does not reach the hardest; its next one does."""
    rows = rows_of(tmp_path)
    analysis = Analysis(SMALL, rows)
    usual = analysis.compare("german", 60, 2, "middle", "lora", at=2).ratio
    rate = analysis.rates("german", 60, "lora")[0]
    scores = analysis.scores

    def lacking(task, steps, arm, place, *rest, **options):
        found = scores(task, steps, arm, place, *rest, **options)
        if (arm, place) == ("lora", 2):
            found = {**found, rate: dict.fromkeys(found[rate])}
        return found

    analysis.scores = lacking
    at_middle, at_hardest = (analysis.compare("german", 60, 2, "middle", "lora", at=at) for at in (1, 2))
    assert (at_middle.ratio, at_middle.obstacle) == (None, "not reached at the chosen rates (0 of 5 seeds)")
    assert at_hardest.ratio.n == 5
    assert at_hardest.ratio.value < usual.value, "LoRA's other rates diverge by 20 % more"


def test_every_arm_of_a_question_is_in_a_study_and_what_it_is_compared_with_in_all():
    studies = page.sources()
    arms = [{name for name in QUESTION_ARMS if s.names.get(name, name) in s.analysis.design.arms} for s in studies]
    assert set.union(*arms) == QUESTION_ARMS
    assert all({"lora", "principal", "minor"} <= there for there in arms)


def test_the_chart_has_a_panel_for_each_question_with_rows(tmp_path):
    found = answers([source(tmp_path / "a")])
    assert list(found) == list(QUESTIONS)[:3]
    (figure,) = page.draw(found).values()
    assert [axis.get_title().replace("\n", " ") for axis in figure.axes] == list(QUESTIONS)[:3]
    assert page.draw({}) == {}
    assert sections(answers([])) == {"ratios": "Not run.", "choices": "Not run."}


def test_the_readme_has_the_ratios_with_a_word_for_each_pair(tmp_path):
    found = answers([source(tmp_path / "a", "large"), source(tmp_path / "b", "small", seeds=4)])
    head, _, first, second = readme.table(found).splitlines()
    assert head.endswith("| plain LoRA | principal window | minor window |")
    assert first.startswith("| large, German manual pages, 60 steps | **less**: 0.75, ")
    assert second.startswith("| small, German manual pages, 60 steps | no verdict yet: 0.75, ")
    assert "(n = 4) |" in second


def test_a_word_of_the_readme_is_that_of_the_targets_with_a_verdict(tmp_path):
    (found,) = answers([source(tmp_path)])[LORA]
    easiest, middle, hardest = found.targets
    unknown = replace(hardest, ratio=None, obstacle="not reached at the chosen rates (0 of 5 seeds)")
    assert readme.word(replace(found, targets=(easiest, middle, unknown))) == "**less**"
    mixed = replace(found, targets=(replace(easiest, adjusted=0.5), middle, hardest))
    assert readme.word(mixed) == "depends on the target"
    same = replace(found, targets=tuple(replace(c, adjusted=0.5) for c in found.targets))
    assert readme.word(same) == "no difference shown"
    none = replace(found, targets=tuple(replace(c, obstacle="collecting") for c in found.targets))
    assert readme.word(none) == "no verdict yet"
