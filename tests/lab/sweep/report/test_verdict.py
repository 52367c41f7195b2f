"""The verdict: each rule on rows whose truth is known, with p-values counted by hand."""

import pytest

from ipca.lab.sweep.report.comparisons import views
from ipca.lab.sweep.report.data import read_sweep
from ipca.lab.sweep.report.findings import against_lora, controls, suggestion
from ipca.lab.sweep.report.verdict import Arms, judge
from ipca.lab.sweep.trial import COLUMNS
from tests.helpers.sweep_rows import Made, by_hand, write_rows

QUICK = {"windows": ("0.0", "0.25", "0.5", "1.0"), "methods": (), "lrs": (1e-3,), "comparisons": ("same",)}


def verdict(folder, **made):
    return judge(read_sweep(Made(**{**QUICK, **made}).write(folder)))


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ({}, "Forgetting is U-shaped at learning rate 0.001: the middle windows keep more than both ends."),
        ({"left": 0.0, "right": 0.0}, "No U-shape detected at learning rate 0.001."),
        (
            {"right": -0.05},
            "Only the left arm at learning rate 0.001: the principal end forgets more than the middle, the",
        ),
        ({"left": -0.05}, "Only the right arm at learning rate 0.001: the minor end forgets more than the middle, the"),
        (
            {"seeds": 2},
            "whether forgetting is U-shaped at learning rate 0.001 (n = 2; smallest possible p = 0.25; 5 seeds",
        ),
        (
            {"seeds": 1},
            "whether forgetting is U-shaped at learning rate 0.001 (n = 1; smallest possible p = 0.5; 5 seeds",
        ),
        (
            {"windows": ("0.5", "1.0")},
            "U-shaped at learning rate 0.001 cannot be determined: no window at the principal end",
        ),
        (
            {"windows": ("0.0", "1.0")},
            "U-shaped at learning rate 0.001 cannot be determined: no window between 0.25 and 0.75",
        ),
        (
            {"windows": ("0.5",)},
            "cannot be determined: no window at the principal end (below 0.25) and minor end (above 0.75)",
        ),
        ({"fails": {"1.0": 0}}, "cannot be determined: no seed succeeded both in the middle and at the minor end"),
        (
            {"drop": ("retained",)},
            "Whether forgetting is U-shaped cannot be determined: no finished run has a value of retained.",
        ),
        (
            {"fails": dict.fromkeys(QUICK["windows"], 0), "lrs": (1e-3, 1e-2)},
            "Whether forgetting is U-shaped cannot be determined: no finished run has a value of retained.",
        ),
        (
            {"fails": dict.fromkeys(QUICK["windows"], 1e-2), "lrs": (1e-4, 1e-3, 1e-2, 1e-1)},
            "Forgetting is U-shaped at learning rate 0.001: the middle windows keep more than both ends.",
        ),
        (
            {"fails": dict.fromkeys(QUICK["windows"], 1e-2), "lrs": (1e-4, 1e-3, 1e-2, 1e-1, 1)},
            "at learning rate 0.01 cannot be determined: no run at this rate, the middle one of the grid's 5: fixed "
            "before any result, has a value of retained. Runs at 0.0001 and 0.001 have.",
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:30],
)
def test_the_headline(made, says, tmp_path):
    assert says in verdict(tmp_path, **made).headline


def test_p_values_of_the_arms_are_those_of_counting_signs(tmp_path):
    """Ten differences of one sign: one choice of signs in 1,024 is as extreme, twice that after Holm."""
    found = verdict(tmp_path, seeds=10)
    tests = found.arms[0].tests
    assert [(tests[side].p, tests[side].adjusted) for side in ("left", "right")] == [(2**-10, 2**-9)] * 2
    assert "p = 0.002, n = 10" in found.basis[0]
    assert found.basis[-1].endswith("the larger unadjusted p counts: p < 0.001.")


def test_five_seeds_show_both_arms_but_not_one_alone(tmp_path):
    assert verdict(tmp_path / "u", seeds=5).headline.startswith("Forgetting is U-shaped")
    left = verdict(tmp_path / "left", seeds=5, right=-0.05)
    assert left.headline == "No U-shape detected at learning rate 0.001."
    assert left.basis[-1].startswith("With 5 seeds only both arms together can be shown, not a single one; 6 seeds")
    assert verdict(tmp_path / "six", seeds=6, right=-0.05).headline.startswith("Only the left arm")


def test_an_inverted_curve_is_said_to_be_one(tmp_path):
    found = verdict(tmp_path, left=-0.1, right=-0.1)
    assert found.headline == "No U-shape detected at learning rate 0.001."
    assert found.basis[-1] == "The means are the other way round: the middle keeps less than both ends."


@pytest.mark.parametrize(
    ("lrs", "rate", "why"),
    [
        ((1e-3,), "0.001", "the only one of the grid"),
        ((1e-3, 2e-3), "0.001", "the lower one of the grid's 2: fixed before any result"),
        ((5e-4, 1e-3, 2e-3), "0.001", "the middle one of the grid's 3: fixed before any result"),
        ((5e-4, 1e-3, 2e-3, 4e-3), "0.001", "the lower middle one of the grid's 4: fixed before any result"),
    ],
)
def test_the_headline_states_its_rate_and_why(lrs, rate, why, tmp_path):
    found = verdict(tmp_path, lrs=lrs, seeds=5)
    assert found.headline.startswith(f"Forgetting is U-shaped at learning rate {rate}: ")
    assert f"At the same learning rate: every method at {rate}, {why}." in found.basis


def rates(folder, targets, base=0.1, seeds=3):
    """Windows whose target is that of ``targets`` at each rate, plus a noise of 0.01 over seeds."""
    rows = [{**dict.fromkeys(COLUMNS), "method": "base", "kind": "base", "status": "ok", "target": base}]
    for lr, target in targets.items():
        for window in ("0.0", "0.5", "1.0"):
            rows += [by_hand(window, seed, target + 0.01 * (seed - 1), 0.5, lr=lr) for seed in range(seeds)]
    return judge(read_sweep(write_rows(folder, rows)))


@pytest.mark.parametrize(
    ("targets", "doubt"),
    [
        ({1e-3: 0.7}, None),
        ({1e-3: 0.11}, "nothing was learned at this rate"),  # within two standard errors, 0.0115
        ({1e-3: 0.05}, "nothing was learned at this rate"),
        ({1e-3: 0.115}, None),
        ({1e-3: 0.115, 1e-2: 0.7}, "next to nothing was learned at this rate (at 0.01 the target is 0.700)"),
        ({1e-3: 0.11, 1e-2: 0.7}, "nothing was learned at this rate (at 0.01 the target is 0.700)"),
        ({1e-3: 0.2, 1e-2: 0.7}, None),
        ({1e-4: 0.7, 1e-3: 0.0, 1e-2: 0.0}, "nothing was learned at this rate (at 0.0001 the target is 0.700)"),
    ],
)
def test_the_headline_says_where_nothing_was_learned(targets, doubt, tmp_path):
    found = rates(tmp_path, targets)
    _, _, said = found.headline.partition(" But ")
    assert said == ("" if doubt is None else f"{doubt}.")
    middle = sorted(targets)[(len(targets) - 1) // 2]
    said = f"Mean target of the windows there {targets[middle]:.3f}, of the untrained model 0.100."
    assert said in found.basis


def test_what_was_learned_is_said_where_an_arm_is_missing_too(tmp_path):
    rows = [{**dict.fromkeys(COLUMNS), "method": "base", "kind": "base", "status": "ok", "target": 0.1}]
    rows += [by_hand("0.5", seed, 0.1 + 0.001 * seed, 0.5) for seed in range(3)]
    found = judge(read_sweep(write_rows(tmp_path, rows)))
    assert found.headline.endswith("minor end (above 0.75) was swept. But nothing was learned at this rate.")
    assert found.basis[-1] == "Mean target of the windows there 0.101, of the untrained model 0.100."


def test_one_seed_has_learned_where_it_is_above_the_untrained_model(tmp_path):
    assert " But " not in rates(tmp_path / "a", {1e-3: 0.12}, seeds=1).headline
    assert rates(tmp_path / "b", {1e-3: 0.1}, seeds=1).headline.endswith(" But nothing was learned at this rate.")


@pytest.mark.parametrize(
    ("best", "says"), [(1e-4, "the lowest"), (1e-3, None), (1e-2, "the highest")], ids=["low", "inside", "high"]
)
def test_a_best_rate_at_the_edge_is_said_to_be_one(best, says, tmp_path):
    rows = [
        by_hand(method, seed, 0.9 if lr == best else 0.5, 0.5 + 0.1 * seed, lr=lr)
        for method in ("0.5", "lora")
        for lr in (1e-4, 1e-3, 1e-2)
        for seed in range(3)
    ]
    sweep = read_sweep(write_rows(tmp_path, rows))
    view = views(sweep)[-1]
    edges = {} if says is None else dict.fromkeys(("0.5", "lora"), says)
    assert (view.key, view.edges) == ("best", edges)
    said = "at the edge of the rates tried"
    assert (f"{said}, so that others may be better: window 0.5 ({says}) and plain LoRA ({says})" in view.note) is bool(
        says
    )
    for finding in (against_lora(sweep, views(sweep)), suggestion(sweep)):
        assert (said in " ".join(finding.details)) is bool(says)


def test_the_only_rate_is_said_to_be_one_and_a_tuned_one_has_the_edges_of_the_search(tmp_path):
    rows = [by_hand("0.5", seed, 0.5, 0.5) for seed in range(3)]
    assert (
        "It is the only rate that was tried: another may be better."
        in suggestion(read_sweep(write_rows(tmp_path / "one", rows))).details
    )
    tuned = [by_hand("0.5", seed, 0.9, 0.5, lr=3.95e-3, comparison="tuned") for seed in range(3)]
    sweep = read_sweep(write_rows(tmp_path / "tuned", rows + tuned))
    assert views(sweep)[-1].edges == {"0.5": "the highest"}  # of 1e-3 times 4
    assert any("at the edge of the rates tried" in line for line in suggestion(sweep).details)
    inside = [by_hand("0.5", seed, 0.9, 0.5, lr=2e-3, comparison="tuned") for seed in range(3)]
    assert views(read_sweep(write_rows(tmp_path / "inside", rows + inside)))[-1].edges == {}


def test_the_middle_is_the_mean_of_the_windows_between_and_pairs_are_seeds(tmp_path):
    rows = [by_hand(m, seed, 0.5, kept + seed) for m, kept in {"0.1": 0.5, "0.3": 0.8, "0.7": 0.6, "0.9": 0.4}.items()
            for seed in range(3)]  # fmt: skip
    rows.append(by_hand("0.3", 3, 0.5, 9.0))  # a seed that the others lack
    arms = Arms(views(read_sweep(write_rows(tmp_path, rows)))[0], "retained")
    assert arms.middle == ["0.3", "0.7"]
    assert arms.ends == {"left": "0.1", "right": "0.9"}
    assert (arms.tests["left"].mean, arms.tests["left"].n) == (pytest.approx(0.2), 3)
    assert arms.tests["right"].mean == pytest.approx(0.3)


def test_more_drift_counts_as_more_forgetting(tmp_path):
    found = {arms.metric: arms for arms in verdict(tmp_path, seeds=6).arms}
    assert found["drift"].verdict == "U"
    assert found["drift"].tests["left"].mean > 0


def test_other_comparisons_stand_beside_the_headline(tmp_path):
    found = verdict(tmp_path, comparisons=("same", "sqrt-sigma"), seeds=6)
    finding = found.findings[0]
    assert (finding.question, finding.answer) == ("Do the other comparisons agree?", "3 of 3 show the same.")
    assert "Drift: a U at the same learning rate and √σ-matched learning rates" in finding.details


def lora_answer(folder, rows):
    sweep = read_sweep(write_rows(folder, rows))
    return against_lora(sweep, views(sweep))


@pytest.mark.parametrize(
    ("target", "retained", "says"),
    [
        (0, 0.1, "Yes: it keeps more, and no difference in the target is shown."),
        (0.1, 0.1, "Yes: it keeps more and learns better."),
        (-0.1, 0.1, "It keeps more, but learns less: a trade-off."),
        (0, -0.1, "No: plain LoRA keeps more, and no difference in the target is shown."),
        (-0.1, -0.1, "No: plain LoRA keeps more and learns better."),
        (0.1, -0.1, "It learns more, but keeps less: a trade-off."),
        (-0.1, 0, "Not shown to keep more or less; plain LoRA learns the target better."),
        (0.1, 0, "Not shown to keep more or less; it learns the target better."),
        (0, 0, "No difference to plain LoRA is shown."),
    ],
)
def test_the_window_beside_plain_lora(target, retained, says, tmp_path):
    """A difference of 0 alternates in sign."""
    rows = []
    for seed in range(8):
        wobble = 0.01 * (-1) ** seed
        rows += [by_hand("lora", seed, 0.5, 0.5), by_hand("0.5", seed, 0.5 + target + wobble, 0.5 + retained + wobble)]
    assert lora_answer(tmp_path, rows).answer == says


def test_a_comparison_with_lora_that_no_result_could_decide_says_so(tmp_path):
    """Two-sided with six seeds: 2 / 64, twice after Holm, 0.0625; with seven half of it."""
    rows = [by_hand(method, seed, score, score) for method, score in (("0.5", 0.9), ("lora", 0.1)) for seed in range(6)]
    found = lora_answer(tmp_path, rows)
    assert found.answer == "Too few seeds to decide (n = 6; smallest possible p = 0.062; 7 seeds are needed)."


@pytest.mark.parametrize(("own", "says"), [(0.0, "It keeps more, but this is not shown at the"), (0.1, "Yes: it")])
def test_what_the_rates_do_is_not_the_window_s_doing(own, says, tmp_path):
    """Both keep less at the higher rate, where plain LoRA happens to learn best; ``own`` is what the window does."""
    rows = [
        by_hand(method, seed, 0.7 + 0.01 * (seed % 2) + (lr == best) * 0.001, 0.9 - 100 * lr + more, lr=lr)
        for method, best, more in (("0.5", 1e-3, own), ("lora", 2e-3, 0.0)) for lr in (1e-3, 2e-3) for seed in range(8)
    ]  # fmt: skip
    found = lora_answer(tmp_path, rows)
    assert found.answer.startswith(says)
    assert any(line.startswith("Retained at the same learning rate, every method at 0.001: ") for line in found.details)


@pytest.mark.parametrize("more", [0.3, -0.3])
def test_a_rate_at_which_every_run_failed_supports_no_claim(more, tmp_path):
    """The runs at the lowest rate differ by ``more``; the other rates, the middle one too, have diverged."""
    methods = ("0.0", "0.25", "0.5", "0.75", "1.0")
    fails = dict.fromkeys((*methods, "lora"), 1e-2)
    made = {"windows": methods, "methods": ("lora",), "lrs": (1e-3, 1e-2, 1e-1), "seeds": 8, "fails": fails}
    found = verdict(tmp_path, **made, lora=more)
    (about,) = [each for each in found.findings if each.question == "Is window 0.5 better than plain LoRA?"]
    who = "Plain LoRA" if more > 0 else "It"
    assert about.answer == f"{who} keeps more, but this is not shown at the same rate: the rates may be the cause."
    assert about.details[-1].startswith("At one rate: no run has a result at 0.01, the middle one of the grid's 3: ")
    assert found.headline.endswith("has a value of retained. Runs at 0.001 have.")


def test_a_best_rate_at_the_edge_of_the_grid_is_named(tmp_path):
    """Plain LoRA learns best at the highest rate, the window at the middle one."""
    best = {"lora": 4e-3, "0.5": 2e-3}
    rows = [
        by_hand(method, seed, 0.9 if lr == best[method] else 0.5 + 0.01 * seed, 0.5, lr=lr)
        for method in best for lr in (1e-3, 2e-3, 4e-3) for seed in range(3)
    ]  # fmt: skip
    details = lora_answer(tmp_path, rows).details
    assert "so that others may be better: plain LoRA (the highest). Two-sided" in " ".join(details)


def test_without_lora_or_reference_there_is_nothing_to_say_about_them(tmp_path):
    assert lora_answer(tmp_path / "a", [by_hand("0.5", 0, 0.5, 0.5)]) is None
    assert lora_answer(tmp_path / "b", [by_hand("lora", 0, 0.5, 0.5)]) is None


CONTROLLED = {"windows": ("0.0", "0.5", "1.0"), "methods": ("haar", "frozen-A", "matched-principal"), "lrs": (1e-3,)}


def test_controls_are_judged_one_by_one(tmp_path):
    sweep = read_sweep(Made(**CONTROLLED, comparisons=("same",), seeds=8).write(tmp_path))
    found = controls(sweep, views(sweep))[0]
    assert found.question == "Does window 0.5 keep more than its controls?"
    assert found.answer == "More than haar; no difference is shown to frozen-A and matched-principal."
    assert found.details[0].startswith("Minus haar, the reference's singular values on random directions: +0.0")
    assert found.details[-1].endswith("Two-sided p, Holm-adjusted over 3.")


@pytest.mark.parametrize(
    ("magnitude", "comparisons", "says"),
    [
        (True, ("same",), "Its singular values account for it, not their directions."),
        (False, ("same",), "Its directions account for it, not their singular values."),
        (
            True,
            ("same", "update"),
            "Its singular values account for it, not their directions. The size of its steps accounts for it: at equal "
            "early updates the difference is gone.",
        ),
    ],
)
def test_why_an_end_forgets(magnitude, comparisons, says, tmp_path):
    made = Made(**CONTROLLED, magnitude=magnitude, comparisons=comparisons, seeds=8, left=0.3, right=0.0)
    sweep = read_sweep(made.write(tmp_path))
    (found,) = controls(sweep, views(sweep))[1:]
    assert (found.question, found.answer) == ("Why does the principal end forget more than window 0.5?", says)


def test_an_end_that_lies_between_is_undecided(tmp_path):
    """Matched, half of the loss is left."""
    kept = {"0.5": 0.9, "0.0": 0.5, "matched-principal": 0.7}
    rows = [by_hand(m, seed, 0.5, value + 0.01 * (seed % 3)) for m, value in kept.items() for seed in range(6)]
    rows += [by_hand("0.0", 6, 0.5, 0.52), by_hand("0.5", 6, 0.5, 0.9), by_hand("matched-principal", 6, 0.5, 0.71)]
    sweep = read_sweep(write_rows(tmp_path, rows))
    assert controls(sweep, views(sweep))[1].answer == "Undecided: no single cause accounts for it."


@pytest.mark.parametrize(("seeds", "decided"), [(4, False), (5, True)])
def test_an_interval_of_few_seeds_accounts_for_nothing(seeds, decided, tmp_path):
    """The control kept as much as the reference, but most of its runs failed."""
    kept = {"0.5": 0.9, "0.0": 0.5}
    rows = [by_hand(m, seed, 0.5, value + 0.01 * (seed % 3)) for m, value in kept.items() for seed in range(8)]
    rows += [by_hand("matched-principal", seed, 0.5, 0.9 + 0.001 * seed) for seed in range(seeds)]
    sweep = read_sweep(write_rows(tmp_path, rows))
    assert controls(sweep, views(sweep))[1].answer.startswith("Its singular values" if decided else "Undecided")


def test_the_suggestion_keeps_most_among_those_that_learn_as_well(tmp_path):
    """Best target 0.80 with standard error 0.1 / √3 = 0.058: 0.75 is as good, 0.74 is not."""
    spread = (-0.1, 0.0, 0.1)
    scores = {"0.0": (0.80, 0.1), "0.5": (0.75, 0.3), "1.0": (0.74, 0.5), "haar": (0.80, 0.9)}
    rows = [by_hand(m, s, t + spread[s], r, lr_used=2e-3) for m, (t, r) in scores.items() for s in range(3)]
    found = suggestion(read_sweep(write_rows(tmp_path, rows)))
    assert found.answer == "Window 0.5, learning rate 0.002."
    assert found.details[0].endswith("target 0.750, retained 0.300, 3 seeds.")


def test_a_setting_that_failed_once_is_not_suggested(tmp_path):
    rows = [by_hand(m, seed, 0.5, kept) for m, kept in (("lora", 0.2), ("0.5", 0.9)) for seed in range(3)]
    rows[-1] = by_hand("0.5", 2, None, None, status="failed: diverged")
    assert suggestion(read_sweep(write_rows(tmp_path, rows))).answer == "Plain LoRA, learning rate 0.001."


def test_scaled_rates_are_suggested_with_how_to_scale(tmp_path):
    rows = [by_hand("0.5", seed, 0.5, 0.5, comparison="sqrt-sigma") for seed in range(3)]
    found = suggestion(read_sweep(write_rows(tmp_path, rows)))
    assert found.answer == (
        'Window 0.5, learning rate 0.001, divided by √σ in each layer (ipca.param_groups with match="sqrt-sigma").'
    )


def test_a_matched_rate_is_suggested_with_the_rate_of_the_rest(tmp_path):
    rows = [by_hand("0.0", seed, 0.5, 0.5, comparison="update", lr_used=4e-4) for seed in range(3)]
    found = suggestion(read_sweep(write_rows(tmp_path, rows)))
    assert found.answer == "Window 0.0, learning rate 0.0004, fully trained modules at 0.001."


def test_two_seeds_suggest_nothing(tmp_path):
    rows = [by_hand("0.5", seed, 0.5, 0.5) for seed in range(2)]
    assert suggestion(read_sweep(write_rows(tmp_path, rows))).answer == "No suggestion from 2 seeds; 3 are needed."


def test_failed_runs_are_counted(tmp_path):
    found = verdict(tmp_path, methods=("lora",), seeds=5, fails={"lora": 0}).findings[-1]
    assert found.answer == "No: 5 of 25 failed (plain LoRA)."


def test_the_text_is_the_headline_and_a_line_for_each_finding(tmp_path):
    text = str(verdict(tmp_path, seeds=6)).splitlines()
    assert text[0].startswith("Forgetting is U-shaped")
    assert any(line.startswith("Which window and rate to use? ") for line in text)
