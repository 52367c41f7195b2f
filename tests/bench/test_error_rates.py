"""How often our statistics err: the simulation, and that what we say of it is what it found."""

import pytest

from bench import error_rates as bench
from bench.rows import ROOT, read_rows
from ipca.lab.compare import target_matched
from ipca.lab.statistics import bootstrap_interval


def test_few_values_give_intervals_that_are_too_narrow():
    rows = [bench.coverage(n, 300) for n in (3, 20)]
    shares = [float(row["share"]) for row in rows]
    assert shares == pytest.approx([0.72, 0.93], abs=0.08)  # three standard errors
    assert float(rows[0]["error"]) == pytest.approx((shares[0] * (1 - shares[0]) / 300) ** 0.5, rel=0.02)


def test_methods_that_are_alike_differ_at_rates_chosen_by_target_and_seldom_at_equal_target():
    shares = {
        row["what"].removeprefix("called different: "): float(row["share"]) for row in bench.called_different(200)
    }
    assert shares["best rates"] > 0.4
    assert shares["best rates and same rate"] < 0.06
    assert 0.2 < shares["one standard error"] < shares["best rates"]
    assert max(shares["equal target of all seeds"], shares["equal target of each seed"]) < 0.12


def test_a_shifted_grid_makes_equal_methods_differ():
    alike, shifted = (float(row["share"]) for row in bench.shifted_grids(200))
    assert alike < 0.1
    assert shifted > 0.25


def test_intervals_that_agree_with_the_test_hold_the_mean():
    assert float(bench.coverage(5, 300, bench.mean_interval)["share"]) == pytest.approx(0.95, abs=0.04)


def test_the_table_is_the_same_every_time(tmp_path):
    for name in ("a.csv", "b.csv", "a.csv"):
        bench.measure(tmp_path / name, repeats=10)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert len(read_rows(tmp_path / "a.csv")) == 2 * len(bench.SIZES) + 6


def test_what_is_written_of_intervals_and_tests_is_what_was_found():
    rows = read_rows(bench.PATH)
    held = {int(row["n"]): f"{float(row['share']):.0%}".replace("%", " %") for row in rows if row["what"] == "coverage"}
    exact = [float(row["share"]) for row in rows if row["what"] == "coverage: inverted test"]
    assert min(exact) > 0.94
    page, study, analysis, protocol = (
        " ".join((ROOT / path).read_text().split())
        for path in (
            "ipca/lab/sweep/report/page.html",
            "docs/results/window-position.md",
            "docs/analysis.md",
            "studies/window_position/PROTOCOL.md",
        )
    )
    says = " ".join(bootstrap_interval.__doc__.split())
    assert f"about {held[3]} of such 95 % intervals contain the mean at n = 3, {held[5]} at n = 5" in says
    assert f"{held[10]} at n = 10, {held[20]} at n = 20" in says
    assert f"about {held[3]} contain the mean with 3 seeds, {held[5]} with 5, {held[10]} with 10" in page
    assert f"of five about {held[5]} hold the mean" in analysis
    shares = {row["what"].removeprefix("called different: "): 100 * float(row["share"]) for row in rows}
    tuned, both, one_se = (shares[name] for name in ("best rates", "best rates and same rate", "one standard error"))
    (equal,) = {f"{share:.0f} %" for name, share in shares.items() if name.startswith("equal target")}
    assert f"called different in {equal} of simulated cases by this comparison, in {tuned:.0f} % at best rates" in study
    alike, shifted = (100 * float(row["share"]) for row in rows if row["what"].startswith("shifted grids"))
    assert f"called different in {alike:.0f} % of cases, but in {shifted:.0f} % where one of them has three" in study
    assert f"the two differ in {shifted:.0f} %" in " ".join(target_matched.__doc__.split())
    assert f"in {one_se:.0f} % at the lowest rates within a standard error of the best" in study
    assert (
        f"different in {one_se:.0f} % of pairs at the rates of the one-standard-error rule, and in {equal}" in protocol
    )
    assert f"in {tuned:.0f} % of 10,000 pairs at best-tuned rates, and in {both:.1f} % where" in protocol
