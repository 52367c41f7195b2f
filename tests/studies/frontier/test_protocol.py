"""Protocols: targets, hashes, and arms that are added when rows exist already."""

from dataclasses import replace

import pytest

from studies.frontier.design import Arm, Run, Wave
from studies.frontier.protocol import Addition, Protocol
from studies.frontier.rows import Rows
from studies.frontier.run import Material, check, main
from studies.language.protocol import PLAN, PROTOCOL
from tests.helpers.frontier_study import DESIGN, model, study, texts
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


def test_a_change_of_the_analysis_is_in_effect_and_in_no_hash():
    before = replace(PROTOCOL, changed={})
    assert before.sha256() == PROTOCOL.sha256()
    assert before.added_sha256() == PROTOCOL.added_sha256()
    assert not before.extended().root
    assert PROTOCOL.extended().root
    design = PROTOCOL.with_targets(Rows(PROTOCOL.results / PROTOCOL.model / "reference"))
    assert design is not None
    assert design.root


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
    for run in (Run("cpp", 8, arm, 1e-3, 0) for arm in ("middle", "0.1")):
        lines = made_up(run, 0.3)
        hashes = {**found.hashes_of(run), "protocol": "addition" if run.arm == "0.1" else "p"}
        rows.put(run, [{**line, **hashes} for line in lines], {})
    check(found, rows)
    with pytest.raises(ValueError, match=r"another protocol, such as cpp-8-0\.1"):
        check(replace(found, added={"0.1": "other"}), rows)
    with pytest.raises(ValueError, match=r"cpp-8-0\.1-1e-03-seed0, which no protocol here asks for"):
        check(study(tmp_path / "work"), rows)


def test_a_study_from_its_command_line(tmp_path, capsys):
    """Samples are drawn once, then come the runs that fix the targets, then the protocol's; a call goes on."""
    drawn = []

    def load(folder, device):
        assert (folder, device) == (None, "cpu")

        def draw():
            drawn.append(texts()["german"].kept["samples"])
            return drawn[-1]

        def made(samples):
            return {name: replace(t, kept={**t.kept, "samples": samples}) for name, t in texts().items()}

        return Material("tiny", model(), draw, made)

    (tmp_path / "PROTOCOL.md").write_text("A question.\n", encoding="utf-8")
    plan = replace(DESIGN, targets={})
    reference = tuple(Run(task, 8, "lora", 3e-3, 1000) for task in plan.tasks)
    results = tmp_path / "results"
    protocol = Protocol(tmp_path / "PROTOCOL.md", plan, reference, (0.5, 0.7, 0.85), "tiny", results, 2.0)
    work = ["--work", str(tmp_path / "work")]
    main(protocol, load, None, [*work, "--how-far"])
    assert "the runs that fix the targets come first" in capsys.readouterr().out
    for made in (1, 2):
        main(protocol, load, None, [*work, "--limit", "1"])
        assert "1 runs made" in capsys.readouterr().out
        assert len(list(Rows(results / "tiny").runs())) == made
    assert len(drawn) == 1
    assert {run for run, _ in Rows(results / "tiny" / "reference").runs()} == set(reference)
    main(protocol, load, None, [*work, "--how-far"])
    assert "2 of 24 runs" in capsys.readouterr().out
    main(protocol, load, None, [*work, "--again", "1"])
    assert "largest deviation 0.00%" in capsys.readouterr().out
    protocol.text.write_text("Another question.\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="another protocol"):
        main(protocol, load, None, work)
