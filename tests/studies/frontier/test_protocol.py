"""Protocols: targets, hashes, and arms that are added when rows exist already."""

from dataclasses import replace

import pytest

from studies.frontier.design import Arm, Wave
from studies.frontier.protocol import Addition
from studies.frontier.rows import Rows
from studies.frontier.run import check
from studies.language.protocol import PLAN, PROTOCOL
from tests.helpers.frontier_study import DESIGN, study
from tests.studies.frontier.test_frontier_analysis import made_up


def test_targets_are_shares_of_the_reference_runs_improvement(tmp_path):
    rows = Rows(tmp_path)
    for run in PROTOCOL.reference[:-1]:
        rows.put(run, made_up(run, 0.4), {})
    assert PROTOCOL.with_targets(rows) is None
    last = PROTOCOL.reference[-1]
    rows.put(last, made_up(last, 0.4, gain=1.0), {})
    targets = PROTOCOL.with_targets(rows).targets
    assert targets["german", 60] == (4.4, 4.16, 3.98)
    assert targets[last.task, last.steps] == (4.5, 4.3, 4.15)


def test_the_hash_sees_text_and_numbers_but_no_list_of_changes(tmp_path):
    before, text = PROTOCOL.sha256(), PROTOCOL.text.read_text(encoding="utf-8")
    changed = replace(PROTOCOL, text=tmp_path / "PROTOCOL.md")
    changed.text.write_text(text + "\n- A change.\n", encoding="utf-8")
    assert changed.sha256() == before
    changed.text.write_text("Another question.\n" + text, encoding="utf-8")
    assert changed.sha256() != before
    arms = {**PLAN.arms, "full": replace(PLAN.arms["full"], rate=1e-2)}
    for changes in ({"arms": arms}, {"batch": 5}, {"autocast": False}, {"root": True}, {"metric": "kl_other"}):
        assert replace(PROTOCOL, plan=replace(PLAN, **changes)).sha256() != before
    assert replace(PROTOCOL, digits=3).sha256() != before


@pytest.fixture
def extended(tmp_path):
    """The language study's protocol with an arm more, whose text is ``addition.md``."""
    text = tmp_path / "addition.md"
    text.write_text("What a window at .1 does.\n", encoding="utf-8")
    wave = Wave(8, ("0.1",), (0, 1), True)
    added = Addition(text, {"0.1": Arm("window at .1", "0.1", 1e-3)}, (wave,), ((("0.1", "lora"),),))
    return replace(PROTOCOL, additions=(added,))


def test_an_addition_has_a_hash_of_its_own(extended):
    assert extended.sha256() == PROTOCOL.sha256()
    assert replace(PROTOCOL, additions=()).sha256() == PROTOCOL.sha256()
    before = extended.added_sha256()
    assert set(before) == {"0.1"}
    assert before["0.1"] != extended.sha256()
    extended.additions[0].text.write_text("Something else.\n", encoding="utf-8")
    assert extended.added_sha256() != before
    plan = extended.extended()
    assert ("german", 8, "0.1") in plan.cells()
    assert plan.families == (*PLAN.families, (("0.1", "lora"),))


def test_rows_of_an_added_arm_are_tied_to_the_addition(extended, tmp_path):
    """They stand beside the rows that exist already, and neither depends on the other's text."""
    added = extended.additions[0]
    design = replace(DESIGN, arms=extended.extended().arms, waves=(*DESIGN.waves, *added.waves))
    found = replace(study(tmp_path / "work", design), added={"0.1": "addition"})
    rows = Rows(tmp_path / "rows")
    for run in list(design.order(dict.fromkeys(design.cells(), (0.001,)))):
        lines = made_up(run, 0.3)
        hashes = {**found.hashes_of(run), "protocol": "addition" if run.arm == "0.1" else "p"}
        rows.put(run, [{**line, **hashes} for line in lines], {})
    check(found, rows)
    with pytest.raises(ValueError, match=r"another protocol, such as cpp-8-0\.1"):
        check(replace(found, added={"0.1": "other"}), rows)
    with pytest.raises(ValueError, match=r"cpp-8-0\.1-1e-03-seed0, which no protocol here asks for"):
        check(study(tmp_path / "work"), rows)
