"""Every baseline is its source on a small case, and the committed table has a row for each check."""

import pytest

pytest.importorskip("peft")

from bench.baseline_checks import PATH, checks
from bench.rows import read_rows
from ipca.lab.baselines import BASELINES

CHECKS = list(checks())


@pytest.mark.parametrize("check", CHECKS, ids=[f"{c.baseline}-{c.source[:40]}-{c.compared[:20]}" for c in CHECKS])
def test_it_is_its_source(check):
    assert check.difference() <= check.tolerance


def test_every_baseline_has_a_check_of_its_own_and_one_of_its_scaling():
    for method in BASELINES:
        named = [check.baseline for check in CHECKS if f"`{method}`" in check.baseline]
        assert 1 <= sum("scaled" in name for name in named) < len(named), method


def test_the_committed_rows_are_these_checks_and_hold():
    rows = read_rows(PATH)
    assert [(row["baseline"], row["compared"], row["tolerance"]) for row in rows] == [
        (check.baseline, check.compared, f"{check.tolerance:g}") for check in CHECKS
    ]
    assert all(float(row["difference"]) <= float(row["tolerance"]) for row in rows)
