"""The language study's protocol and page as recorded."""

import sys

from studies.frontier.protocol import arms_table, targets_table
from studies.frontier.rows import Rows
from studies.language import page
from studies.language.protocol import ARMS, PLAN, PROTOCOL


def test_the_protocol_has_the_numbers_in_code():
    text = PROTOCOL.text.read_text(encoding="utf-8")
    assert arms_table(ARMS) in text
    design = PROTOCOL.with_targets(Rows(PROTOCOL.results / PROTOCOL.model / "reference"))
    assert targets_table(design) in text
    assert all(list(targets) == sorted(targets, reverse=True) for targets in design.targets.values())
    assert set(design.targets) == {(task, steps) for task, steps, _ in PLAN.cells()}
    assert {arm for _, _, arm in PLAN.cells()} == set(ARMS)


def test_the_recorded_rows_are_the_protocols():
    own, added = PROTOCOL.sha256(), PROTOCOL.added_sha256()
    runs = list(Rows(PROTOCOL.results / PROTOCOL.model).runs())
    assert runs
    for run, lines in runs:
        assert lines[0]["protocol"] == added.get(run.arm, own)[:12], run.key


def test_the_recorded_page_is_up_to_date(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["page.py", "--check"])
    assert page.main() == 0, capsys.readouterr().err
