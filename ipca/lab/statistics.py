"""Statistics over seeds: intervals, exact paired tests, Holm's correction, means and paired differences."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Vector = NDArray[np.float64]
Scores = Mapping[Any, float] | ArrayLike
"""One number per run: ``{seed: number}``, or numbers in the order of the seeds."""

LEVEL = 0.05
"""Significance level of every test of a report; intervals have 95 % coverage."""
FEWEST = 3
"""Number of values from which an interval is given: that of two is little else than the two."""
_RESAMPLES = 9999
_EXACT = 15
"""Up to this number of pairs all ``2ⁿ`` signs are enumerated."""
_DRAWS = 99_999
"""Random sign vectors beyond that."""
_AT_ONCE = 10_000_000
"""Resampled numbers held in memory at a time."""
_ROUNDING = 1e-12
"""Relative to the values: smaller differences count as equal."""
_ALTERNATIVES = ("two-sided", "greater", "less")


class Interval(NamedTuple):
    """A confidence interval in the unit of the values; both ends are NaN if the values do not determine one."""

    low: float
    high: float


class PairedTest(NamedTuple):
    """Result of :func:`paired_test` on the differences ``d = a − b``.

    Attributes:
        mean: of ``d``, in the unit of the values.
        p: the probability of a mean at least as extreme if the sign of each difference were random.
        n: number of pairs.
        dz: the effect size ``mean(d) / std(d)``, the standard deviation with ``n − 1`` (Cohen's d_z; Lakens, Frontiers
            in Psychology 4, 2013). NaN for one pair and if all differences are 0; infinite if they are all equal.
    """

    mean: float
    p: float
    n: int
    dz: float


def bootstrap_interval(
    values: ArrayLike, *, statistic: Callable[..., Any] = np.mean, level: float = 0.95, seed: int = 0
) -> Interval:
    """Confidence interval of ``statistic(values)``: the bias-corrected accelerated bootstrap, 9,999 resamples.

    The method is Efron's BCa (Journal of the American Statistical Association 82, 1987), as implemented by
    ``scipy.stats.bootstrap``. The same values and seed give the same bits.

    It is too narrow for few runs: of normally distributed values about 72 % of such 95 % intervals contain the mean at
    n = 3, 84 % at n = 5, 91 % at n = 10, 93 % at n = 20 (bench/error_rates.py). Report ``n`` with it.

    Args:
        values: ``(n,)``, finite and independent, such as one score per seed.
        statistic: maps numbers to one number; if it takes ``axis``, it is called on many resamples at once.
        level: between 0 and 1.
        seed: of the resamples.

    Returns:
        The interval. Both ends are NaN for fewer than three values, whose interval would be little else than the values
        themselves; if all values are equal, since resampling shows no spread; and if the statistic does not depend on
        which value is left out, such as the median of 1, 2, 2, 2, 3, where BCa is undefined.

    Raises:
        ValueError: no values, more than one dimension, a value that is NaN or infinite, or an invalid ``level``.
    """
    numbers = _vector("values", values)
    _check_level(level)
    if len(numbers) < FEWEST or np.ptp(numbers) <= _ROUNDING * np.abs(numbers).max():
        return Interval(np.nan, np.nan)
    from scipy import stats  # takes a second to import

    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # reported as NaN
        found = stats.bootstrap(
            (numbers,),
            statistic,
            confidence_level=level,
            n_resamples=_RESAMPLES,
            batch=max(1, _AT_ONCE // len(numbers)),
            method="BCa",
            random_state=np.random.default_rng(seed),
        ).confidence_interval
    return Interval(float(found.low), float(found.high))


def paired_bootstrap(
    a: Scores, b: Scores, *, statistic: Callable[..., Any] = np.mean, level: float = 0.95, seed: int = 0
) -> Interval:
    """:func:`bootstrap_interval` of the differences ``a − b`` of runs with the same seed.

    Effects of the seed common to both arms cancel, so this is the interval for "a is better than b by …"; whether the
    two separate intervals of ``a`` and ``b`` overlap says nothing about it. Differences within rounding are 0.

    Args:
        a, b: ``{seed: number}`` with the same seeds, or two sequences in the same order of seeds.
        statistic, level, seed: as for :func:`bootstrap_interval`; the statistic is that of the differences.

    Raises:
        ValueError: as :func:`bootstrap_interval`, or an unpaired run.
    """
    d, rounding = _differences(a, b)
    return bootstrap_interval(np.where(np.abs(d) > rounding, d, 0.0), statistic=statistic, level=level, seed=seed)


def mean_interval(values: ArrayLike, *, level: float = 0.95) -> Interval:
    """Confidence interval of the mean that agrees with :func:`paired_test`: every ``μ`` that it does not reject.

    Flipping the signs of a set ``J`` of the ``d_i − μ`` gives no smaller a sum exactly if ``mean_J(d) ≤ μ``. So with
    ``k = ⌊(1 − level) / 2 · 2ⁿ⌋`` the ends are the k-th smallest and the k-th largest of the means of all ``2ⁿ − 1``
    subsets (Hartigan, Journal of the American Statistical Association 64, 1969); beyond n = 15 of drawn ones. It covers
    the center of any symmetric distribution with at least ``level``. Up to n = 5 the two-sided test at 5 % rejects
    nothing, ``k = 0``: the interval is Student's t, which assumes normality.

    >>> low, high = mean_interval([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    >>> round(low, 3), round(high, 3)
    (0.1, 0.6)

    Args:
        values: ``(n,)``, finite and independent, such as one difference per seed.
        level: between 0 and 1.

    Returns:
        The interval. Both ends are NaN for fewer than three values, and if all are equal.

    Raises:
        ValueError: as :func:`bootstrap_interval`.
    """
    d = _vector("values", values)
    _check_level(level)
    if len(d) < FEWEST or np.ptp(d) <= _ROUNDING * np.abs(d).max():
        return Interval(np.nan, np.nan)
    flipped = np.concatenate([(signs < 0).astype(np.float64) for signs in _signs(len(d))])
    sizes = flipped.sum(1)
    tail = (1 - level) / 2 * (len(sizes) + (len(d) > _EXACT))
    k = math.floor(tail + _ROUNDING)
    if k < 1:
        from scipy import stats

        low, high = stats.t.interval(level, len(d) - 1, d.mean(), stats.sem(d))
        return Interval(float(low), float(high))
    means = np.sort((flipped @ d)[sizes > 0] / sizes[sizes > 0])
    return Interval(float(means[k - 1]), float(means[-k]))


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, such as 0.95; got {level!r}.")


def paired_test(a: Scores, b: Scores, *, alternative: str = "two-sided") -> PairedTest:
    """Sign-flip permutation test of the mean difference ``a − b`` over runs with the same seed.

    If the arms were exchangeable within each seed, every ``d_i = a_i − b_i`` could equally be ``−d_i``. ``p`` is the
    share of the ``2ⁿ`` sign vectors whose mean is at least as large, ties included (two-sided: twice the smaller of
    both shares). Up to n = 15 all are enumerated and ``p`` is exact; beyond, 99,999 are drawn with a fixed seed. No
    normality is assumed (Fisher, The Design of Experiments, 1935).

    The smallest possible ``p`` is ``2⁻ⁿ``, two-sided ``2¹⁻ⁿ``: five pairs can never reach 0.05 two-sided.

    Args:
        a, b: ``{seed: number}`` with the same seeds, or two sequences in the same order of seeds.
        alternative: ``"two-sided"``, ``"greater"`` (``a`` above ``b``) or ``"less"``.

    Raises:
        ValueError: another ``alternative``, no pairs, an unpaired run, or a number that is not finite.
    """
    if alternative not in _ALTERNATIVES:
        raise ValueError(f"alternative must be one of {', '.join(_ALTERNATIVES)}; got {alternative!r}.")
    d, rounding = _differences(a, b)
    return PairedTest(float(d.mean()), _sign_flip_p(d, alternative, rounding), len(d), _effect(d, rounding))


def holm(pvalues: Sequence[float] | Vector) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given.

    With ``p₍₁₎ ≤ … ≤ p₍ₘ₎`` the adjusted values are ``max_{j ≤ i} min(1, (m − j + 1) p₍ⱼ₎)``. Rejecting those at or
    below a level bounds the probability of any false rejection among the ``m`` by that level, under any dependence of
    the tests (Holm, Scandinavian Journal of Statistics 6, 1979). An empty input gives an empty list.

    Raises:
        ValueError: a value is not a probability.
    """
    p = np.asarray(pvalues, dtype=np.float64)
    if p.ndim != 1 or not np.all((p >= 0) & (p <= 1)):
        raise ValueError(f"p-values must be a list of numbers from 0 to 1; got {pvalues!r}.")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(np.arange(len(p), 0, -1) * p[order]))
    return [float(value) for value in adjusted]


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` seeds and its 95 % bootstrap interval; None for fewer than three, or if all are equal."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Difference(Estimate):
    """A mean paired difference over the ``n`` seeds that both arms have.

    Attributes:
        p: of the exact sign-flip test.
        adjusted: ``p`` after Holm's correction by :func:`corrected`, if any.
        smallest: the ``p`` of ``n`` differences with equal signs; no test of ``n`` seeds gives less.
    """

    p: float
    smallest: float
    adjusted: float | None = None

    @property
    def shown(self) -> bool:
        """Whether the corrected test rejects "no difference"."""
        return (self.p if self.adjusted is None else self.adjusted) <= LEVEL


def estimate(values: Iterable[float]) -> Estimate | None:
    """The mean of ``values`` with its interval; None without values."""
    numbers = tuple(values)
    if not numbers:
        return None
    low, high = _cached_interval(numbers)
    return Estimate(mean(numbers), low, high, len(numbers))


def difference(a: Mapping[int, float], b: Mapping[int, float], alternative: str = "two-sided") -> Difference | None:
    """``a − b`` over the seeds of both, tested by :func:`paired_test`; None if they share no seed."""
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return None
    found = estimate(a[seed] - b[seed] for seed in seeds)
    assert found is not None
    smallest = min(1.0, 2.0**-found.n * (2 if alternative == "two-sided" else 1))
    p = paired_test([a[s] for s in seeds], [b[s] for s in seeds], alternative=alternative).p
    return Difference(found.mean, found.low, found.high, found.n, p, smallest)


def corrected(family: Mapping[str, Difference | None]) -> dict[str, Difference]:
    """The differences that exist, with Holm's correction over all of them."""
    tested = {name: found for name, found in family.items() if found is not None}
    adjusted = holm([found.p for found in tested.values()])
    return {name: replace(found, adjusted=float(p)) for (name, found), p in zip(tested.items(), adjusted, strict=True)}


@cache
def _cached_interval(values: tuple[float, ...]) -> tuple[float | None, float | None]:
    """None for an undefined interval; cached, as figures and tables need the same ones."""
    low, high = bootstrap_interval(values)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else (None, None)


def _effect(d: Vector, rounding: float) -> float:
    average = float(d.mean())
    if len(d) > 1 and np.ptp(d) > rounding:
        return average / float(d.std(ddof=1))
    return math.nan if len(d) == 1 or abs(average) <= rounding else math.copysign(math.inf, average)


def _sign_flip_p(d: Vector, alternative: str, rounding: float) -> float:
    """The p-value; sums are compared up to rounding, since scores are often multiples of 1/1000 and ties count."""
    observed, above, below, tried = float(d.sum()), 0, 0, 0
    for signs in _signs(len(d)):
        sums = signs @ d
        above += int((sums >= observed - len(d) * rounding).sum())
        below += int((sums <= observed + len(d) * rounding).sum())
        tried += len(sums)
    one_more = 0 if len(d) <= _EXACT else 1  # for random draws the observed signs count as one draw
    up, down = ((count + one_more) / (tried + one_more) for count in (above, below))
    return {"greater": up, "less": down, "two-sided": min(1.0, 2 * min(up, down))}[alternative]


def _signs(n: int) -> Iterator[Vector]:
    """Sign vectors ``(k, n)``: all ``2ⁿ`` rows at once for small ``n``, else random ones in chunks."""
    if n <= _EXACT:
        yield np.array(list(itertools.product((1.0, -1.0), repeat=n)), dtype=np.float64)
        return
    generator, left = np.random.default_rng(0), _DRAWS
    while left:
        rows = min(left, max(1, _AT_ONCE // n))
        yield generator.choice(np.array((1.0, -1.0)), (rows, n))
        left -= rows


def _differences(a: Scores, b: Scores) -> tuple[Vector, float]:
    """``a − b`` by seed, and the size up to which a difference counts as rounding."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        unpaired = sorted(map(str, a.keys() ^ b.keys()))
        if unpaired:
            raise ValueError(f"a and b must have the same seeds; unpaired: {', '.join(unpaired)}.")
        a, b = list(a.values()), [b[key] for key in a]
    elif isinstance(a, Mapping) or isinstance(b, Mapping):
        raise ValueError("pass both as {seed: number}, or both as numbers in the same order of seeds.")
    first, second = _vector("a", a), _vector("b", b)
    if len(first) != len(second):
        raise ValueError(f"a and b must have the same length; got {len(first)} and {len(second)}.")
    return first - second, _ROUNDING * float(np.maximum(np.abs(first), np.abs(second)).max())


def _vector(name: str, values: ArrayLike) -> Vector:
    """``values`` as a vector of finite numbers."""
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a list of numbers; got {values!r}.") from None
    if numbers.ndim != 1 or not numbers.size:
        raise ValueError(f"{name} must be a list of at least one number; got an array of shape {numbers.shape}.")
    if not np.isfinite(numbers).all():
        at = int(np.flatnonzero(~np.isfinite(numbers))[0])
        raise ValueError(f"{name}[{at}] is {numbers[at]}; leave failed runs out of both arms, and report them.")
    return numbers
