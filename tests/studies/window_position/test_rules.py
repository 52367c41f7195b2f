from dataclasses import replace

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
        (("holds",) * 4, "the U stands on M (C1 to C4 hold), at one rate"),
        (("holds", "holds", "not shown", "not shown"), "a left arm only"),
        (("not shown",) * 4, "the position of the window does not matter on M"),
        (("holds", "holds", "holds", "not shown"), "the U does not stand: C1, C2 and C3 hold, C4 not shown."),
        (("holds", "not shown", "not shown", "not shown"), "does not stand: C1 holds, C2, C3 and C4 not shown."),
        (("holds", "holds", "the opposite holds", "not shown"), "a left arm only"),
        (("holds", "holds", "holds", "not run"), "the U was not tested: C4 (not run)."),
    ],
)
def test_the_rule_of_the_u(verdicts, said):
    assert said in rules.as_fixed(tables(dict(zip(U, verdicts, strict=True))))


def claim(verdict, *, mean="0.1", p="0.01", n="10"):
    smallest = str(2.0 ** (1 - int(n)))
    return {"mean": mean, "low": "0.05", "high": "0.15", "p": p, "n": n, "smallest": smallest, "verdict": verdict}


def with_claims(found, summary=None):
    """``{(claim, against, place): row}``, each row with its place."""
    made = tables(summary=summary or {})
    rows = {key: {**row, "place": key[2], "test": ""} for key, row in found.items()}
    return rules.Tables(made.tests, made.summary, made.ranks, made.mechanism, claims=rows)


@pytest.mark.parametrize(
    ("verdicts", "headline"),
    [
        ({}, "**Better than LoRA?** Not run."),
        ({"M1": "not shown", "V1": "edge"}, "**No difference to plain LoRA is shown at equal target.**"),
        ({"M1": "holds", "V1": "not shown"}, "**The middle window retains more at equal target, in places.**"),
        ({"M1": "reversed", "V1": "not shown"}, "**Plain LoRA retains more at equal target, in places.**"),
        (
            {"M1": "reversed", "V1": "holds"},
            "**The middle window and plain LoRA each retain more somewhere",
        ),
    ],
)
def test_the_headline_is_that_of_equal_target(verdicts, headline):
    found = {("equal target", "lora", place): claim(verdict) for place, verdict in verdicts.items()}
    found["same rate", "lora", "M2-all"] = claim("reversed")
    text = rules.against_lora(with_claims(found if verdicts else {}))
    assert text.startswith(headline)
    if verdicts:
        assert "The opposite on M2-all (+0.100 [+0.050, +0.150])" in text


def test_a_claim_names_where_it_holds_and_where_not_and_its_floor():
    found = {
        ("same rate", "1.0", "M1"): claim("holds"),
        ("same rate", "1.0", "V1"): claim("reversed"),
        ("same rate", "1.0", "M5"): claim("not shown", p="0.2"),
        ("equal target", "1.0", "V1"): claim("edge"),
    }
    text = rules.right_arm(with_claims(found))
    assert "at one rate? Holds on M1; the opposite on V1; not shown on M5." in text
    assert text.endswith("At equal target? An edge, no verdict, on V1.")
    five = {("same rate", "lora", "M2-all"): claim("not shown", p="0.0625", n="5")}
    assert "Not shown on M2-all (+0.100 [+0.050, +0.150], p at its floor)" in rules.against_lora(with_claims(five))


def test_a_verdict_at_equal_target_is_shown_with_both_comparisons():
    made = with_claims({("equal target", "0.0", "M1"): claim("holds"), ("equal target", "0.0", "V1"): claim("edge")})
    rates = {"rates_first": "4", "rates_second": "6"}
    equal = {
        (place, "0.5", "0.0", level): {**claim("holds", mean=mean), "edge": edge, **rates}
        for place in ("M1", "V1")
        for level, mean, edge in (("each seed", "0.1", ""), ("all seeds", "0.06", "0.5 0.0"))
    }
    text = rules.left_arm(replace(made, equal=equal))
    assert text.endswith(
        "At equal target? Holds on M1; an edge, no verdict, on V1. On M1, with 4 rates of the middle and 6 of the "
        "other, that is +0.100 [+0.050, +0.150], p 0.010 at each seed's target; at that of all seeds +0.060 [+0.050, "
        "+0.150], p 0.010, middle and principal at an edge."
    )


def test_a_condition_that_is_the_test_itself_supports_nothing():
    made = tables({"C6": "below", "C11": "below", "S6": "not shown", "S11": "below"})
    for name, row in made.tests.items():
        row.update({"first": "middle", "second": "plain LoRA", "where": f"{'V1' if name.endswith('11') else 'M1'}, x"})
        row.update({"dz": "1" if name.endswith("11") else name, "p": "0.01"})
    text = rules.as_fixed(made)
    assert "C6: middle below plain LoRA, which S6 does not support" in text
    assert "C11: middle below plain LoRA; S11 is the same comparison, as every seed picks 0.002" in text
    headline = "**Plain LoRA retained more on V1 (C11) by the test fixed beforehand, at best-tuned rates. Better than"
    assert rules.against_lora(made).startswith(headline), "not on M1, where S6 does not support it"
    made.tests["S11"]["dz"] = "2"
    assert "S11 is the same comparison" not in rules.as_fixed(made)
    assert "say: C6 middle below plain LoRA and C11 middle below plain LoRA" in rules.against_lora(made)


def test_streams_are_named_by_verdict():
    found = {
        ("continual", "pissa", "V2"): claim("holds"),
        ("continual", "lora-fresh", "V2"): claim("not shown"),
        ("continual", "osf", "V2"): claim("reversed", mean="-0.1"),
    }
    assert rules.continual(with_claims(found)).endswith(
        "fresh middle windows end above fresh principal +0.100 [+0.050, +0.150]; not clearly apart from fresh plain "
        "LoRA +0.100 [+0.050, +0.150]; below osf −0.100 [+0.050, +0.150]."
    )


def test_retention_by_source_sets_the_learned_domain_apart():
    made = tables()
    before = {"target": 0.5, "retained": 0.9, "retained_movie": 0.9, "retained_tweet": 0.8, "retained_NYT": 1.0}
    after = {"target": 0.8, "retained": 0.7, "retained_movie": 0.4, "retained_tweet": 0.9, "retained_NYT": 0.7}
    base = {("M1-middle", name): value for name, value in (before | {"refit": 0.9, "cka": 1.0}).items()}
    rows = {
        ("M1-middle", "0.5", "same", "0.0005", name): {"mean": str(value), "n": "5"}
        for name, value in (after | {"refit": 0.88, "cka": 0.5}).items()
    }
    fewer = {("M1-rates", *key[1:]): {"mean": "9", "n": "4"} for key in rows}
    more = {(*key[:3], "0.002", key[4]): row for key, row in rows.items()}
    rates = {("M1", "0.5"): {"one_se": "0.0005"}}
    made = rules.Tables({}, more | rows | fewer, {}, [], base=base, rates=rates)
    assert "best: middle (0.0005) −0.500, −0.100, −0.020. The other rates are" in rules.sources(made)
    assert [(method, lr, means["n"]) for method, lr, means, _ in rules.by_source(made)] == [
        ("0.5", "0.0005", 5),
        ("0.5", "0.002", 5),
    ]
    assert rules.sources(tables()).endswith("Not run.")


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
        ((0.4, 0.3, 0.5), (0.2, 0.15, 0.25), "No: at equal early updates a difference remains"),
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
    assert rules.magnitude(tables()) == "**Is it only the size of the steps?** Not run, or all diverged (M3)."
    second = {("equal early updates", "0.0", "V1"): claim("holds")}
    made = with_claims(second, effects((0.4, 0.3, 0.5), (0.2, 0.1, 0.3)))
    assert "On V1, n = 10, middle − principal in retained at equal early updates: holds (+0.100" in rules.magnitude(
        made
    )


def rho(value, low, high):
    return {("M1", "0.002"): {"mean": str(value), "low": str(low), "high": str(high), "n": "10"}}


PREDICTED = {"M1": (9, 2), "M2-query-value": (9, 0.5)}


@pytest.mark.parametrize(
    ("curve", "ranks", "said"),
    [
        (PREDICTED, rho(0.8, 0.6, 0.9), "It is not refuted."),
        (PREDICTED, rho(0.1, -0.2, 0.4), "Not shown, as the interval of ρ holds 0."),
        (PREDICTED, rho(-0.1, -0.2, 0.4), "It is refuted."),
        (PREDICTED | {"M1": (9, 0.9)}, rho(0.8, 0.6, 0.9), "It is refuted."),
        (PREDICTED | {"M2-query-value": (0.5, 0.5)}, rho(0.8, 0.6, 0.9), "there is no arm (predicted: principal only"),
        (PREDICTED | {"M2-query-value": (9, 2)}, rho(0.8, 0.6, 0.9), "one arm too many"),
        (PREDICTED, {}, "Not decided, as M1 was not run."),
        ({}, rho(0.8, 0.6, 0.9), "Not run."),
    ],
)
def test_the_rule_of_the_mechanism(curve, ranks, said):
    assert said in rules.mechanism(tables(ranks=ranks, curve=curve))
