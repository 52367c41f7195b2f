import json
import math
import shutil

import pytest

from ipca.lab.statistics import mean_interval, paired_test
from studies.window_position import findings, reanalysis, rules
from studies.window_position import tables as study_tables
from studies.window_position.rows import LORA, MIDDLE, MINOR, PRINCIPAL, Study
from tests.helpers import made_up_study as study_made
from tests.helpers import sweep_rows


def sweep_of(tmp_path, points, name="M1"):
    """A sweep of ``{method: {rate: [(target, retained) of each seed]}}``."""
    rows = [
        sweep_rows.by_hand(method, seed, target, retained, lr=lr, drift=0.1)
        for method, rates in points.items()
        for lr, pairs in rates.items()
        for seed, (target, retained) in enumerate(pairs)
    ]
    folder = sweep_rows.write_rows(tmp_path / "made", rows, {"reference": "0.5", "fixed": {}})
    for source, ending in (("rows.csv", "csv"), ("settings.json", "json")):
        (folder / source).rename(tmp_path / f"{name}.{ending}")
    return Study(tmp_path).wider(name)


def flat(target, retained, seeds=10):
    """The same for every seed, but for a little of its own."""
    return [(target + 0.001 * (seed % 3), retained + 0.001 * (seed % 4)) for seed in range(seeds)]


def test_a_best_rate_at_the_end_of_a_grid_is_an_edge(tmp_path):
    points = {
        MIDDLE: {1e-3: flat(0.80, 0.9), 2e-3: flat(0.85, 0.8), 4e-3: flat(0.82, 0.7)},
        PRINCIPAL: {1e-3: flat(0.85, 0.6), 2e-3: flat(0.80, 0.5), 4e-3: flat(0.70, 0.4)},
        MINOR: {1e-3: flat(0.70, 0.95), 2e-3: flat(0.80, 0.9), 4e-3: flat(0.84, 0.85)},
    }
    found = {row["method"]: row for row in reanalysis.chosen_rates("M1", sweep_of(tmp_path, points))}
    assert {method: row["edge"] for method, row in found.items()} == {
        MIDDLE: "",
        PRINCIPAL: "best one_se",
        MINOR: "best",
    }
    assert (found[MIDDLE]["best"], found[MIDDLE]["one_se"]) == (2e-3, 2e-3)
    assert found[PRINCIPAL]["difference"] == pytest.approx(0.6 - 0.8)
    claims = {row["against"]: row for row in _claims(tmp_path) if row["claim"] == "accuracy"}
    assert claims[PRINCIPAL]["verdict"] == claims[MINOR]["verdict"] == reanalysis.EDGE
    assert claims[PRINCIPAL]["p"] is None


def _claims(folder):
    study = Study(folder)
    tests = [{"claim": f"C{k}", "verdict": "not run"} for k in range(1, 15)]
    return list(reanalysis.claims_by_place(study, list(reanalysis.equal_targets(study)), tests))


def test_a_lower_rate_on_a_plateau_is_taken_by_the_rule_of_one_standard_error(tmp_path):
    noisy = [(0.80 + 0.01 * seed, 0.9) for seed in range(5)]
    higher = [(0.805 + 0.01 * seed, 0.8) for seed in range(5)]
    (row,) = reanalysis.chosen_rates("M1", sweep_of(tmp_path, {MIDDLE: {1e-3: noisy, 2e-3: higher}}))
    assert (row["best"], row["one_se"]) == (2e-3, 1e-3)
    assert row["edge"] == "best one_se"


def test_equal_target_compares_along_the_frontier_and_names_edges(tmp_path):
    points = {
        MIDDLE: {1e-3: flat(0.70, 0.9), 2e-3: flat(0.80, 0.8)},
        LORA: {1e-3: flat(0.60, 0.9), 2e-3: flat(0.80, 0.7)},
        PRINCIPAL: {1e-3: flat(0.85, 0.5), 2e-3: flat(0.86, 0.4)},
    }
    sweep = sweep_of(tmp_path, points)
    common, own = reanalysis.equal_target("M1", sweep, LORA)
    assert (common["target"], own["target"]) == (pytest.approx(0.80), pytest.approx(0.8009))
    assert own["edge"] == common["edge"] == ""
    assert own["mean"] == pytest.approx(0.1)
    assert common["mean"] == pytest.approx(0.1, abs=0.002)
    assert (own["n"], own["smallest"]) == (10, 2**-9)
    common, own = reanalysis.equal_target("M1", sweep, PRINCIPAL)
    assert own["edge"] == common["edge"] == PRINCIPAL  # its lowest rate learns more than the middle ever does
    by_method = {row["against"]: row["verdict"] for row in _claims(tmp_path) if row["claim"] == "equal target"}
    assert by_method == {LORA: reanalysis.NOT_SHOWN, PRINCIPAL: reanalysis.EDGE} | {
        LORA: reanalysis.verdict(reanalysis.equal_target("M1", sweep, LORA)[1])
    }


def test_an_edge_of_the_better_arm_does_not_take_its_verdict(tmp_path):
    points = {
        MIDDLE: {1e-3: flat(0.85, 0.9), 2e-3: flat(0.86, 0.8)},
        LORA: {1e-3: flat(0.60, 0.8), 2e-3: flat(0.80, 0.7)},
    }
    own = reanalysis.equal_target("M1", sweep_of(tmp_path, points), LORA)[1]
    assert own["edge"] == MIDDLE
    (row,) = (row for row in _claims(tmp_path) if row["claim"] == "equal target")
    assert row["verdict"] == reanalysis.HOLDS


def test_the_test_and_its_interval_agree():
    first, second = {0: 0.5, 1: 0.6, 2: 0.8, 3: 0.7, 4: 0.9, 5: 0.65}, dict.fromkeys(range(6), 0.5)
    found = reanalysis.tested(first, second)
    differences = [first[seed] - 0.5 for seed in first]
    assert found["p"] == paired_test(differences, [0.0] * 6).p
    assert (found["low"], found["high"]) == mean_interval(differences)
    assert reanalysis.tested({0: math.nan}, {0: 0.5}) == dict.fromkeys(found)


def test_wider_grids_count_for_the_new_rules_and_for_no_fixed_test(tmp_path):
    folder = study_made.study(tmp_path, sweeps=("M1",), streams={}, curves={})
    findings.write(Study(folder))
    before = study_made.rows_of(folder, "tests"), study_made.rows_of(folder, "rates")
    wider = {"windows": ("0.0",), "methods": (), "lrs": (1e-4, 2.5e-4)}
    shared = {"comparisons": ("same",)}
    study_made.Truth(shared, {"M1-low": wider}, {}, {}).write(folder)
    findings.write(Study(folder))
    assert study_made.rows_of(folder, "tests") == before[0]
    rates = {row["method"]: row["rates"] for row in study_made.rows_of(folder, "rates")}
    assert rates[PRINCIPAL] == "0.0001 0.00025 0.0005 0.001 0.002 0.004"
    assert rates[MIDDLE] == "0.0005 0.001 0.002 0.004"
    for end in (".csv", ".json"):
        shutil.copyfile(folder / f"M1-low{end}", folder / f"M1-rates{end}")
    assert Study(folder).sweep("M1-rates").ends
    findings.write(Study(folder))
    assert {row["method"]: row["rates"] for row in study_made.rows_of(folder, "rates")} == rates
    for end in (".csv", ".json"):
        (folder / f"M1-rates{end}").unlink()
    study_made.change(folder, "M1-low", lambda row: (row["lr"], row["seed"]) != ("0.0001", "9"))
    assert reanalysis.rates_of(Study(folder).wider("M1"), PRINCIPAL)[0] == 2.5e-4  # the seeds of the other are not all
    partly = [row for row in reanalysis.equal_targets(Study(folder)) if row["experiment"] == "M1, wider"]
    assert {(row["first"], row["second"], row["rates_second"], row["n"]) for row in partly} == {("0.5", "0.0", 6, 9)}
    assert Study(folder).wider("M4", partly=True) is None


def test_methods_that_an_extension_adds_are_compared_on_the_seeds_they_have(tmp_path):
    folder = study_made.study(tmp_path, sweeps=("M1",), streams={}, curves={})
    extra = {"windows": ("0.5",), "methods": ("frozen-A",), "lrs": (1e-3, 2e-3), "seeds": 6}
    study_made.Truth({"comparisons": ("same",)}, {"M1-frozen": extra}, {}, {}).write(folder)
    wider = Study(folder).wider("M1")
    assert wider.seeds == tuple(range(10))
    middle = [run for run in wider.ends if (run.method, run.lr, run.comparison) == (MIDDLE, 1e-3, "same")]
    assert [run.seed for run in middle] == list(range(10)), "repeated runs do not count twice"
    rows = [row for row in reanalysis.equal_targets(Study(folder)) if row["first"] == "frozen-A"]
    assert {(row["second"], row["n"]) for row in rows} == {("lora", 6), ("0.5", 6)}
    study_made.change(folder, "M1-frozen", lambda row: (row["method"], row["seed"]) != ("frozen-A", "3"))
    assert {row["n"] for row in reanalysis.equal_targets(Study(folder)) if row["first"] == "frozen-A"} == {5}
    only = ("frozen-A", "0.001", "4")
    study_made.change(folder, "M1-frozen", lambda row: (row["method"], row["lr"], row["seed"]) != only)
    assert "frozen-A" not in Study(folder).wider("M1").methods, "rates with different seeds are no grid"


def test_rows_of_two_base_models_are_not_combined(tmp_path):
    folder = study_made.study(tmp_path, sweeps=("M1",), streams={}, curves={})
    wider = {"windows": ("0.0",), "methods": (), "lrs": (1e-4, 2.5e-4)}
    study_made.Truth({"comparisons": ("same",)}, {"M1-low": wider}, {}, {}).write(folder)
    path = folder / "M1-low.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "fixed": {**settings.get("fixed", {}), "model_sha256": "other"}}))
    with pytest.raises(ValueError, match=r"M1-low\.json and M1\.json are of different base models"):
        Study(folder).wider("M1")


def test_confirmatory_verdicts_stand_in_the_table_of_claims(whole):
    claims = {(row["claim"], row["against"], row["place"]): row for row in study_made.rows_of(whole, "claims")}
    tests = {row["claim"]: row for row in study_made.rows_of(whole, "tests")}
    assert claims["same rate", PRINCIPAL, "M1"]["test"] == "C2"
    assert tests["C10"]["verdict"] == "below"  # minor below middle
    assert claims["same rate", MINOR, "V1"]["verdict"] == "holds"
    assert float(claims["same rate", MINOR, "V1"]["mean"]) == pytest.approx(-float(tests["C10"]["mean"]))
    assert claims["continual", "lora-fresh", "V2"]["test"] == "C14"
    section = study_tables.claims_section(rules.read_tables(Study(whole)))
    assert "| retains more at the same rate, 0.002 | principal | **holds** (C2) " in section
    assert "M2-all, n = 5" in section
