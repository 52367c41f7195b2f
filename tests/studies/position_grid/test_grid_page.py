"""The position-grid study's protocol, its page from made-up rows, and what is recorded."""

import sys
from dataclasses import replace

import torch

from studies.frontier import page as frontier_page
from studies.frontier.analysis import Analysis
from studies.frontier.design import Run, Wave, grid
from studies.frontier.figures import draw_positions
from studies.frontier.protocol import arms_table
from studies.frontier.rows import Rows
from studies.position_grid import page
from studies.position_grid.protocol import ARMS, PLAN, PROTOCOL, TEXT_MODELS
from tests.studies.frontier.test_frontier_analysis import TARGETS, made_up

WINDOWS = ("0.5", "lora", "0.0", "0.25", "0.75", "1.0")
KL = dict(zip(WINDOWS, (0.4, 0.5, 0.9, 0.6, 0.5, 0.7), strict=True))
SMALL = replace(
    PLAN,
    tasks=("twins",),
    waves=(Wave(60, WINDOWS, tuple(range(10)), True), Wave(60, WINDOWS, tuple(range(10)), False)),
    targets={("twins", 60): TARGETS},
    arms={name: ARMS[name] for name in WINDOWS},
)


def test_the_page_from_no_rows_and_from_rows(tmp_path):
    empty = Analysis(SMALL, Rows(tmp_path / "none"))
    assert draw_positions(empty, tmp_path) == {}
    assert set(page.sections(empty, PROTOCOL.results).values()) == {frontier_page.NOT_RUN, ""}
    rows = Rows(tmp_path / "rows")
    for arm in WINDOWS:
        for factor, rate in zip((1.2, 1.0, 1.3), sorted(grid(ARMS[arm].rate, {})), strict=True):
            for seed in range(10):
                run = Run("twins", 60, arm, rate, seed)
                noise = 0.02 * ((seed * 7 + len(arm) * 3) % 5 - 2)
                lines = made_up(run, KL[arm] * factor, jitter=noise, finer=SMALL.scales)
                rows.put(run, lines, {"kl_samples": torch.full((4, 7), KL[arm])})
    analysis = Analysis(SMALL, rows)
    (figure,) = draw_positions(analysis, tmp_path).values()
    (axis,) = figure.axes
    assert [*axis.lines[0].get_xdata()] == sorted(analysis.design.positions.values())
    made = page.sections(analysis, PROTOCOL.results)
    assert made["shape"] == "- gut communities, 60 steps: U."
    assert "| 0.25 | 3 | 1.50 [" in made["positions"]
    assert "not tuned" not in made["positions"]
    assert "lowest at 0.5; not shown to be higher: 0.5." in made["positions"]
    assert made["lines"].count("| U |") == 3
    assert "middle window against plain LoRA – lower at all three targets" in made["findings"]
    assert "full fine-tuning" not in "".join(made.values()), "no run of it"


def test_a_position_with_rates_that_lack_seeds_is_not_compared_as_if_it_were_tuned(tmp_path):
    rows = Rows(tmp_path / "rows")
    for arm in WINDOWS:
        rates = sorted(grid(ARMS[arm].rate, {}))
        for factor, rate in zip((1.2, 1.0, 1.3), rates, strict=True):
            for seed in range(10):
                if arm != "0.25" or rate == rates[1]:
                    run = Run("twins", 60, arm, rate, seed)
                    rows.put(run, made_up(run, KL[arm] * factor), {"kl_samples": torch.full((4, 7), KL[arm])})
    table = page.sections(Analysis(SMALL, rows), PROTOCOL.results)["positions"]
    assert "| 0.25 | 1, not tuned | 1.50" in table
    assert "| 0.75 | 3 | " in table
    assert "lowest at" not in table


def test_the_protocol_has_the_numbers_in_code():
    text = PROTOCOL.text.read_text(encoding="utf-8")
    assert arms_table(ARMS) in text
    assert {arm for _, _, arm in PLAN.cells()} == set(ARMS)
    assert f"There is no verdict with fewer than {PLAN.enough} seeds" in text
    assert f"rank {PLAN.rank}" in text
    assert len(PLAN.positions) == 11
    assert TEXT_MODELS.sha256() != PROTOCOL.sha256()
    assert {arm for _, _, arm in TEXT_MODELS.plan.cells()} == set(ARMS)


def test_the_recorded_rows_are_the_protocols():
    own, added = PROTOCOL.sha256(), PROTOCOL.added_sha256()
    for run, lines in Rows(PROTOCOL.results / PROTOCOL.model).runs():
        assert lines[0]["protocol"] == added.get(run.arm, own)[:12], run.key


def test_the_recorded_page_is_up_to_date(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["page.py", "--check"])
    assert page.main() == 0, capsys.readouterr().err
