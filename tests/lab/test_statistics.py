"""Intervals, exact tests and corrections, by hand and beside SciPy."""

import itertools
import math
from fractions import Fraction
from statistics import median

import numpy as np
import pytest
import scipy.stats

from ipca.lab.statistics import (
    Estimate,
    Interval,
    bootstrap_interval,
    corrected,
    difference,
    estimate,
    holm,
    mean_interval,
    paired_bootstrap,
    paired_test,
)

SCORES = (0.71, 0.78, 0.74, 0.8, 0.69, 0.77, 0.73)


def test_the_interval_is_scipys_bca_and_the_same_every_time():
    data, draws = (np.array(SCORES),), np.random.default_rng(3)
    expected = scipy.stats.bootstrap(data, np.mean, confidence_level=0.9, n_resamples=9999, random_state=draws)
    found = bootstrap_interval(SCORES, level=0.9, seed=3)
    assert found == tuple(expected.confidence_interval)
    assert found == bootstrap_interval(list(SCORES), level=0.9, seed=3)
    assert found != bootstrap_interval(SCORES, level=0.9, seed=4)
    assert found.low < np.mean(SCORES) < found.high


def test_a_higher_level_gives_a_wider_interval():
    inner, outer = bootstrap_interval(SCORES, level=0.5), bootstrap_interval(SCORES, level=0.99)
    assert outer.low < inner.low < inner.high < outer.high


def test_a_statistic_without_axis_is_called_on_one_resample_at_a_time():
    found = bootstrap_interval(SCORES, statistic=lambda x: median(x.tolist()))
    assert found == bootstrap_interval(SCORES, statistic=np.median)
    assert found.low in SCORES


def test_five_values_give_too_narrow_an_interval_as_documented():
    samples = np.random.default_rng(0).standard_normal((200, 5))
    held = [found.low <= 0 <= found.high for found in map(bootstrap_interval, samples)]
    assert 0.73 < np.mean(held) < 0.9  # 0.82 ± 3 standard errors


@pytest.mark.parametrize("values", [[0.5], [0.1, 0.9], [0.25] * 5, [0.1 + 0.2, 0.3, 0.3]])
def test_two_values_and_values_without_a_spread_give_no_interval(values):
    low, high = bootstrap_interval(values)
    assert math.isnan(low)
    assert math.isnan(high)


def test_a_statistic_that_no_single_value_moves_gives_no_interval():
    assert all(map(math.isnan, bootstrap_interval([1, 2, 2, 2, 3], statistic=np.median)))


@pytest.mark.parametrize(
    ("values", "options", "words"),
    [
        ([], {}, r"values must be a list of at least one number; got an array of shape \(0,\)"),
        ([[1.0, 2.0]], {}, r"got an array of shape \(1, 2\)"),
        ({0: 1.0}, {}, r"values must be a list of numbers; got \{0: 1\.0\}"),
        ([0.5, 0.6, math.nan], {}, r"values\[2\] is nan; leave failed runs out of both arms"),
        ([0.5, -math.inf], {}, r"values\[1\] is -inf"),
        ([0.5, 0.6], {"level": 95}, "level must be between 0 and 1, such as 0.95; got 95"),
    ],
)
def test_bad_values_are_refused(values, options, words):
    for interval in (bootstrap_interval, mean_interval):
        with pytest.raises(ValueError, match=words):
            interval(values, **options)


@pytest.mark.parametrize("n", [6, 7, 10])
def test_the_interval_holds_exactly_the_means_that_the_test_does_not_reject(n):
    values = np.random.default_rng(n).normal(0.3, 1, n)
    low, high = mean_interval(values)
    for mu in np.linspace(low - 0.5, high + 0.5, 60):
        assert (low <= mu <= high) == (paired_test(values - mu, np.zeros(n)).p > 0.05)


def test_five_values_get_students_interval_as_no_test_of_them_rejects():
    values = np.array(SCORES[:5])
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean_interval(values) == pytest.approx((expected.low, expected.high))
    # at 90 % it can: 1 of 32 sign vectors is less than 5 %
    assert mean_interval(values, level=0.9) == (min(values), max(values))


def test_the_interval_of_many_values_is_about_students():
    values = np.random.default_rng(0).normal(0, 1, 40)
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean_interval(values) == pytest.approx((expected.low, expected.high), abs=0.05)
    assert mean_interval(values) == mean_interval(values)


@pytest.mark.parametrize("values", [[0.1, 0.9], [0.25] * 7])
def test_the_mean_of_two_or_of_equal_values_has_no_interval(values):
    assert all(map(math.isnan, mean_interval(values)))


def test_paired_values_are_compared_by_their_differences():
    b = np.array(SCORES)
    a = b + np.array([0.1, 0.2, 0.1, 0.15, 0.3, 0.1, 0.2])
    found = paired_bootstrap(a, b, seed=1)
    assert found == bootstrap_interval(a - b, seed=1)
    assert found.low > 0
    assert isinstance(found, Interval)
    unpaired = bootstrap_interval(a), bootstrap_interval(b)
    assert found.high - found.low < sum(high - low for low, high in unpaired)


def test_arms_that_differ_by_rounding_alone_have_no_interval_of_differences():
    a, b = [0.1 + 0.2, 0.3, 0.7 + 0.1], [0.3, 0.1 * 3, 0.8]
    assert a != b
    assert all(map(math.isnan, paired_bootstrap(a, b)))


def test_pairs_may_be_given_by_seed_in_any_order():
    a, b = {0: 0.5, 1: 0.6, 7: 0.9}, {7: 0.4, 0: 0.45, 1: 0.5}
    assert paired_test(a, b) == paired_test([0.5, 0.6, 0.9], [0.45, 0.5, 0.4])
    assert paired_bootstrap(a, b) == paired_bootstrap([0.5, 0.6, 0.9], [0.45, 0.5, 0.4])


def test_three_differences_by_hand():
    found = paired_test([4.0, 5.0, 9.0], [3.0, 3.0, 10.0])  # 1, 2, −1: of 8 sums 3 are ≥ 2
    assert found.mean == pytest.approx(2 / 3)
    assert found.n == 3
    assert found.dz == pytest.approx(2 / 3 / math.sqrt(7 / 3))
    assert found.p == 2 * 3 / 8
    assert paired_test([4.0, 5.0, 9.0], [3.0, 3.0, 10.0], alternative="greater").p == 3 / 8
    assert paired_test([4.0, 5.0, 9.0], [3.0, 3.0, 10.0], alternative="less").p == 7 / 8


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
@pytest.mark.parametrize("n", [2, 5, 9])
def test_p_is_scipys_where_no_sums_tie(n, alternative):
    rng = np.random.default_rng(n)
    a, b = rng.standard_normal((2, n)) + np.array([[0.7], [0.0]])
    expected = scipy.stats.permutation_test(
        (a - b,), np.mean, permutation_type="samples", alternative=alternative, n_resamples=2**n
    )
    assert paired_test(a, b, alternative=alternative).p == pytest.approx(expected.pvalue, abs=1e-12)


def test_sums_that_tie_in_exact_arithmetic_count_as_ties():
    rng = np.random.default_rng(0)
    for _ in range(50):
        n = int(rng.integers(2, 8))
        right, base = rng.integers(-6, 7, n), rng.integers(300, 900, n)  # right answers of 1000
        sums = [
            sum(s * int(k) for s, k in zip(signs, right, strict=True)) for signs in itertools.product((1, -1), repeat=n)
        ]
        shares = [
            Fraction(sum(way), 2**n) for way in ([x >= right.sum() for x in sums], [x <= right.sum() for x in sums])
        ]
        assert paired_test((base + right) / 1000, base / 1000).p == float(min(1, 2 * min(shares)))


def test_the_smallest_p_is_that_of_the_number_of_pairs():
    for n in (1, 2, 5, 15):
        ones, zeros = np.linspace(1, 2, n), np.zeros(n)
        assert paired_test(ones, zeros).p == min(1, 2.0 ** (1 - n))
        assert paired_test(ones, zeros, alternative="greater").p == 2.0**-n
        assert paired_test(ones, zeros, alternative="less").p == 1


def test_many_pairs_are_drawn_the_same_every_time():
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal((2, 40)) + np.array([[0.3], [0.0]])
    found = paired_test(a, b)
    expected = scipy.stats.ttest_rel(a, b).pvalue  # the sign-flip test's limit for normal values
    assert found == paired_test(a, b)
    assert found.p == pytest.approx(expected, rel=0.1)
    assert paired_test(np.ones(16), np.zeros(16)).p >= 2 / 100_000  # drawn p-values are never 0


@pytest.mark.parametrize(
    ("a", "b", "p", "dz"),
    [
        ([0.5], [0.4], 1.0, math.nan),
        ([0.5, 0.6], [0.5, 0.6], 1.0, math.nan),
        ([0.5, 0.6, 0.7], [0.4, 0.5, 0.6], 0.25, math.inf),
        ([0.4, 0.5, 0.6], [0.5, 0.6, 0.7], 0.25, -math.inf),
    ],
)
def test_differences_without_a_spread(a, b, p, dz):
    found = paired_test(a, b)
    assert found.p == p
    assert found.dz == dz or (math.isnan(found.dz) and math.isnan(dz))


@pytest.mark.parametrize(
    ("a", "b", "options", "words"),
    [
        (
            [1, 2],
            [1, 2],
            {"alternative": "larger"},
            "alternative must be one of two-sided, greater, less; got 'larger'",
        ),
        ([], [], {}, "a must be a list of at least one number"),
        ([1, 2], [1], {}, "a and b must have the same length; got 2 and 1"),
        ([1.0, 2.0], [1.0, math.nan], {}, r"b\[1\] is nan"),
        ({0: 1.0, 1: 2.0, 4: 1.0}, {0: 1.0, 2: 2.0, 4: 1.0}, {}, "must have the same seeds; unpaired: 1, 2"),
        ({0: 1.0}, [1.0], {}, r"both as \{seed: number\}, or both as numbers"),
    ],
)
def test_bad_pairs_are_refused(a, b, options, words):
    with pytest.raises(ValueError, match=words):
        paired_test(a, b, **options)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.04]) == [0.04]
    assert holm([]) == []


def test_holm_gives_the_numbers_that_r_does():
    raw = [0.838541367553, 0.642193923795, 0.680845947633, 0.967833824309, 0.71626938238]
    raw += [0.177096952723, 5.23656777208e-05, 0.0202732688798, 0.00028140506198, 0.0149877310796]
    ours = holm(raw)  # of statsmodels' tests of multipletests, where they were made with R's multtest
    expected = [1, 1, 1, 1, 1, 1, 5.23656777208e-04, 0.1419128821586, 2.53264555782e-03, 0.1199018486368]
    assert ours == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("pvalues", [[0.5, 1.2], [-0.1], [math.nan], [[0.5]]])
def test_what_is_no_probability_is_refused(pvalues):
    with pytest.raises(ValueError, match="p-values must be a list of numbers from 0 to 1"):
        holm(pvalues)


def test_one_seed_and_two_have_a_mean_and_no_interval():
    assert estimate([0.25]) == Estimate(0.25, None, None, 1)
    assert estimate([0.25, 0.75]) == Estimate(0.5, None, None, 2)
    assert estimate([0.25, 0.75, 1.0]).low is not None
    assert estimate([]) is None


def test_differences_are_over_shared_seeds():
    found = difference({0: 1.0, 1: 2.0, 2: 9.0}, {1: 1.0, 0: 0.5, 5: 0.0})
    assert (found.mean, found.n, found.p, found.smallest) == (0.75, 2, 0.5, 0.5)
    assert difference({0: 1.0}, {1: 1.0}) is None


def test_the_correction_is_over_what_could_be_tested():
    a = {seed: 1.0 + 0.1 * seed for seed in range(4)}
    found = corrected({"x": difference(a, dict.fromkeys(a, 0.0), "greater"), "missing": None})
    assert {name: test.adjusted for name, test in found.items()} == {"x": 2**-4}
