import pytest

from studies.window_position import rules

U = ("C1", "C2", "C3", "C4")


def tables(tests=None, summary=None, ranks=None, curve=None):
    """Tables by hand: verdicts by claim, rows of the summary, ρ of M1, and ``{experiment: ends of its curve}``."""
    numbers = {"mean": "0.1", "low": "0.05", "high": "0.15", "adjusted": "0.01"}
    made = {claim: {"verdict": verdict, **numbers} for claim, verdict in (tests or {}).items()}
    windows = [
        {"experiment": name, "layer": "a", "window": window, "sensitivity": str(value)}
        for name, ends in (curve or {}).items()
        for window, value in zip(("0.0", "0.5", "1.0"), (ends[0], 1, ends[1]), strict=True)
    ]
    return rules.Tables(made, summary or {}, ranks or {}, windows)


@pytest.mark.parametrize(
    ("verdicts", "said"),
    [
        (("holds",) * 4, "It stands on M: C1 to C4 hold"),
        (("holds", "holds", "not shown", "not shown"), "A left arm only"),
        (("not shown",) * 4, "the position of the window does not matter here"),
        (("holds", "holds", "holds", "not shown"), "It does not stand: C1, C2 and C3 hold, C4 not shown."),
        (("holds", "not shown", "not shown", "not shown"), "It does not stand: C1 holds, C2, C3 and C4 not shown."),
        (("holds", "holds", "the opposite holds", "not shown"), "A left arm only"),
        (("holds", "holds", "holds", "not run"), "Not tested: C4 (not run)."),
    ],
)
def test_the_rule_of_the_u(verdicts, said):
    assert said in rules.shape(tables(dict(zip(U, verdicts, strict=True))))


@pytest.mark.parametrize(
    ("c5", "c6", "c11", "said"),
    [
        ("not shown", "above", "not shown", "on M1 the middle window retains more, each at its best rate (+0.100"),
        ("not shown", "not shown", "above", "on V1 the middle window retains more"),
        (
            "above",
            "above",
            "not run",
            "and C5 does not favor LoRA; on V1 nothing was tested. Not tested: C11 (not run).",
        ),
        ("not run", "above", "not shown", "which without C5 in its favor is no claim"),
        ("not shown", "not shown", "not shown", "on M1 neither is shown to retain more"),
    ],
)
def test_the_rule_of_lora(c5, c6, c11, said):
    made = tables({"C5": c5, "C6": c6, "C11": c11, "S6": c6, "S11": c11})
    text = rules.better_than_lora(made)
    assert said.casefold() in text.casefold()
    assert text.startswith("**Better than LoRA?**")
    assert rules.sentences(made)[0].startswith("**The U.**")


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        ("C5", "the target of plain LoRA is higher"),
        ("C6", "on M1 plain LoRA retains more"),
        ("C11", "on V1 plain LoRA retains more"),
    ],
)
def test_where_lora_is_better_that_is_the_headline(claim, said):
    same = {"S6": "below" if claim == "C6" else "above", "S11": "below"}
    made = tables({"C5": "not shown", "C6": "above", "C11": "not shown"} | same | {claim: "below"})
    first = rules.sentences(made)[0]
    assert first.startswith(f"**Plain LoRA is better on {'V1' if claim == 'C11' else 'M1'}:**")
    assert said.casefold() in first.casefold()
    if claim == "C5":
        assert "is no claim" in first


@pytest.mark.parametrize("verdict", ["above", "below"])
@pytest.mark.parametrize("same", ["not shown", "not run", "the other"])
def test_best_rates_alone_make_no_claim(verdict, same):
    other = {"above": "below", "below": "above"}[verdict] if same == "the other" else same
    made = tables({"C5": "not shown", "C6": verdict, "C11": "not shown", "S6": other})
    assert "not alike at the same rate: no claim" in rules.better_than_lora(made)
    assert rules.where_lora_is_better(made) == []


def effects(same, update):
    """M3 rows of both metrics from ``(difference, low, high)``."""
    names = ("difference", "difference_low", "difference_high", "pairs")
    return {
        ("M3", "0.0", comparison, "0.002", metric): dict(zip(names, (*map(str, numbers), "5"), strict=True))
        for metric in ("drift", "retained")
        for comparison, numbers in (("same", same), ("update", update))
    }


@pytest.mark.parametrize(
    ("same", "update", "said"),
    [
        ((0.4, 0.3, 0.5), (0.02, -0.1, 0.1), "Yes: the place of the window acts through the size of the steps"),
        ((-0.4, -0.5, -0.3), (0.05, 0.0, 0.099), "it vanishes"),
        ((0.4, 0.3, 0.5), (0.2, 0.15, 0.25), "No, not only magnitude"),
        ((0.4, 0.3, 0.5), (0.05, -0.01, 0.101), "Undecided, the intervals are too wide"),
        ((0.4, -0.1, 0.5), (0.0, -0.01, 0.01), "Nothing to explain, no difference is seen"),
    ],
)
def test_the_rule_of_magnitude(same, update, said):
    assert said in rules.magnitude(tables(summary=effects(same, update)))


def test_magnitude_takes_both_metrics():
    mixed = effects((0.4, 0.3, 0.5), (0.02, -0.05, 0.05))
    mixed |= {key: row for key, row in effects((0.4, 0.3, 0.5), (0.2, 0.1, 0.3)).items() if key[-1] == "drift"}
    assert "Undecided, drift and retained do not say the same" in rules.magnitude(tables(summary=mixed))
    assert rules.magnitude(tables()) == "**Magnitude, not direction.** Not run, or all diverged (M3)."


def rho(value, low, high):
    return {("M1", "0.002"): {"mean": str(value), "low": str(low), "high": str(high), "n": "10"}}


PREDICTED = {"M1": (9, 2), "M2-query-value": (9, 0.5)}


@pytest.mark.parametrize(
    ("curve", "ranks", "said"),
    [
        (PREDICTED, rho(0.8, 0.6, 0.9), "It does not fail."),
        (PREDICTED, rho(0.1, -0.2, 0.4), "Not shown, as the interval of ρ holds 0."),
        (PREDICTED, rho(-0.1, -0.2, 0.4), "It fails."),
        (PREDICTED | {"M1": (9, 0.9)}, rho(0.8, 0.6, 0.9), "It fails."),
        (PREDICTED | {"M2-query-value": (0.5, 0.5)}, rho(0.8, 0.6, 0.9), "there is no arm (predicted: principal only"),
        (PREDICTED | {"M2-query-value": (9, 2)}, rho(0.8, 0.6, 0.9), "one arm too many"),
        (PREDICTED, {}, "Not decided, as M1 was not run."),
        ({}, rho(0.8, 0.6, 0.9), "Not run."),
    ],
)
def test_the_rule_of_the_mechanism(curve, ranks, said):
    assert said in rules.mechanism(tables(ranks=ranks, curve=curve))


def test_the_other_tests_and_the_best_stream_are_named():
    words = {"where": "V1, 2e-3", "statement": "retained: minor against middle", "first": "minor", "second": "middle"}
    made = tables({"C10": "above", "C12": "not run", "C1": "holds"})
    made.tests["C10"].update(words)
    accuracies = {"fresh": "0.8", "osf": "0.9", "lora": "0.7"}
    for method, mean in accuracies.items():
        made.summary["V2", method, "", "", "acc"] = {"mean": mean, "low": "", "high": ""}
    assert rules.others(made).splitlines() == [
        "**The other tests.**",
        "",
        "- C10, V1, 2e-3, retained: minor against middle: minor above middle "
        "(+0.100 [+0.050, +0.150], adjusted p 0.010).",
        "- Of all streams osf has the highest ACC, 0.900; fresh middle windows have 0.800.",
    ]
    assert rules.others(tables()).endswith("- Not run.")
