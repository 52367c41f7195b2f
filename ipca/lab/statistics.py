"""Few runs, honestly: bootstrap intervals, exact paired tests, Holm's correction."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Vector = NDArray[np.float64]
Scores = Mapping[Any, float] | ArrayLike
"""One number for each run: ``{seed: number}``, or numbers in the order of the seeds."""

_RESAMPLES = 9999
_EXACT = 15
"""Up to so many pairs all ``2ⁿ`` signs are tried."""
_DRAWS = 99_999
"""Random signs beyond that."""
_AT_ONCE = 10_000_000
"""Numbers of resamples held in memory at a time."""
_ROUNDING = 1e-12
"""Relative to the values: what differs by less is equal."""
_ALTERNATIVES = ("two-sided", "greater", "less")


class Interval(NamedTuple):
    """A confidence interval in the unit of the values; both ends are NaN where the values give none."""

    low: float
    high: float


class PairedTest(NamedTuple):
    """What :func:`paired_test` found of the differences ``d = a − b``.

    Attributes:
        mean: of ``d``, in the unit of the values.
        p: the probability of such a mean, or one further off, if the sign of each difference were a coin's.
        n: pairs.
        dz: the effect size ``mean(d) / std(d)``, the standard deviation with ``n − 1`` (Cohen's d_z; Lakens, Frontiers
            in Psychology 4, 2013). NaN for one pair and where all differences are 0; infinite where they are all alike.
    """

    mean: float
    p: float
    n: int
    dz: float


def bootstrap_interval(
    values: ArrayLike, *, statistic: Callable[..., Any] = np.mean, level: float = 0.95, seed: int = 0
) -> Interval:
    """Where ``statistic(values)`` may lie: the bias-corrected accelerated bootstrap, 9,999 resamples.

    The method is Efron's BCa (Journal of the American Statistical Association 82, 1987), as ``scipy.stats.bootstrap``
    computes it. The same values and seed give the same bits.

    It is too narrow for few runs: of normally distributed values about 72 % of such 95 % intervals hold the mean at
    n = 3, 84 % at n = 5, 91 % at n = 10, 93 % at n = 20 (bench/error_rates.py). State ``n`` beside it.

    Args:
        values: ``(n,)``, finite, independent of each other, such as one score for each seed.
        statistic: takes numbers, gives one; with an argument ``axis`` it is called on many resamples at once.
        level: between 0 and 1.
        seed: of the resamples.

    Returns:
        The interval. Both ends are NaN for a single value, which says nothing of a spread, where all values are equal,
        since resampling shows no spread either, and where the statistic stays the same whichever value is left out,
        such as the median of 1, 2, 2, 2, 3: BCa is undefined there.

    Raises:
        ValueError: no values, more than one dimension, a value that is NaN or infinite, or a bad ``level``.
    """
    numbers = _vector("values", values)
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, such as 0.95; got {level!r}.")
    if np.ptp(numbers) <= _ROUNDING * np.abs(numbers).max():
        return Interval(np.nan, np.nan)
    from scipy import stats  # takes a second to import

    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # NaN says it
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

    What the seeds do to both arms cancels, so that this is the interval for "a is better than b by …"; that two
    intervals of ``a`` and ``b`` overlap says nothing about it. Differences that are rounding of ``a`` and ``b`` are 0.

    Args:
        a, b: ``{seed: number}`` with the same seeds, or two sequences in the same order of seeds.
        statistic, level, seed: as for :func:`bootstrap_interval`; the statistic is that of the differences.

    Raises:
        ValueError: as :func:`bootstrap_interval`, or a run without its partner.
    """
    d, rounding = _differences(a, b)
    return bootstrap_interval(np.where(np.abs(d) > rounding, d, 0.0), statistic=statistic, level=level, seed=seed)


def paired_test(a: Scores, b: Scores, *, alternative: str = "two-sided") -> PairedTest:
    """Whether ``a`` differs from ``b`` over runs with the same seed: the sign-flip permutation test of the mean.

    If the arms were exchangeable within each seed, every ``d_i = a_i − b_i`` could as well be ``−d_i``. ``p`` is the
    share of the ``2ⁿ`` choices of signs whose mean is at least as large, ties included (two-sided: twice the smaller
    of both shares). Up to n = 15 all are tried and ``p`` is exact; beyond, 99,999 are drawn with a fixed seed. No
    normality is assumed (Fisher, The Design of Experiments, 1935).

    The smallest possible ``p`` is ``2⁻ⁿ``, two-sided ``2¹⁻ⁿ``: five pairs can never reach 0.05 two-sided.

    Args:
        a, b: ``{seed: number}`` with the same seeds, or two sequences in the same order of seeds.
        alternative: ``"greater"`` asks whether ``a`` lies above ``b``, ``"less"`` whether below.

    Raises:
        ValueError: another ``alternative``, no pairs, a run without its partner, or a number that is not finite.
    """
    if alternative not in _ALTERNATIVES:
        raise ValueError(f"alternative must be one of {', '.join(_ALTERNATIVES)}; got {alternative!r}.")
    d, rounding = _differences(a, b)
    n, mean = len(d), float(d.mean())
    return PairedTest(mean, _sign_flip_p(d, alternative, rounding), n, _effect(d, rounding))


def holm(pvalues: Sequence[float] | Vector) -> list[float]:
    """Holm's step-down adjustment: reject what stays at or below the level, and false rejections stay as rare as it.

    With ``p₍₁₎ ≤ … ≤ p₍ₘ₎`` the adjusted values are ``max_{j ≤ i} min(1, (m − j + 1) p₍ⱼ₎)``, returned in the order
    given. It bounds the chance of any false rejection among the ``m`` whatever the tests' dependence (Holm,
    Scandinavian Journal of Statistics 6, 1979). No p-values give none.

    Raises:
        ValueError: something is no probability.
    """
    p = np.asarray(pvalues, dtype=np.float64)
    if p.ndim != 1 or not np.all((p >= 0) & (p <= 1)):
        raise ValueError(f"p-values must be a list of numbers from 0 to 1; got {pvalues!r}.")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(np.arange(len(p), 0, -1) * p[order]))
    return [float(value) for value in adjusted]


def _effect(d: Vector, rounding: float) -> float:
    mean = float(d.mean())
    if len(d) > 1 and np.ptp(d) > rounding:
        return mean / float(d.std(ddof=1))
    return math.nan if len(d) == 1 or abs(mean) <= rounding else math.copysign(math.inf, mean)


def _sign_flip_p(d: Vector, alternative: str, rounding: float) -> float:
    """Sums are compared up to rounding: scores are often multiples of 1/1000, whose sums tie, and ties count."""
    observed, above, below, tried = float(d.sum()), 0, 0, 0
    for signs in _signs(len(d)):
        sums = signs @ d
        above += int((sums >= observed - len(d) * rounding).sum())
        below += int((sums <= observed + len(d) * rounding).sum())
        tried += len(sums)
    one_more = 0 if len(d) <= _EXACT else 1  # drawn at random: the signs as they are count as a draw
    up, down = ((count + one_more) / (tried + one_more) for count in (above, below))
    return {"greater": up, "less": down, "two-sided": min(1.0, 2 * min(up, down))}[alternative]


def _signs(n: int) -> Iterator[Vector]:
    """Signs ``(k, n)``, each ``±1``: all ``2ⁿ`` rows at once for small ``n``, else random ones in parts."""
    if n <= _EXACT:
        yield np.array(list(itertools.product((1.0, -1.0), repeat=n)), dtype=np.float64)
        return
    generator, left = np.random.default_rng(0), _DRAWS
    while left:
        rows = min(left, max(1, _AT_ONCE // n))
        yield generator.choice(np.array((1.0, -1.0)), (rows, n))
        left -= rows


def _differences(a: Scores, b: Scores) -> tuple[Vector, float]:
    """``a − b`` seed by seed, and the size up to which a difference is rounding."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        alone = sorted(map(str, a.keys() ^ b.keys()))
        if alone:
            raise ValueError(f"pairs need the same seeds in both; without a partner: {', '.join(alone)}.")
        a, b = list(a.values()), [b[key] for key in a]
    elif isinstance(a, Mapping) or isinstance(b, Mapping):
        raise ValueError("give both as {seed: number}, or both as numbers in the same order of seeds.")
    first, second = _vector("a", a), _vector("b", b)
    if len(first) != len(second):
        raise ValueError(f"pairs need as many numbers in a as in b; got {len(first)} and {len(second)}.")
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
        raise ValueError(f"{name}[{at}] is {numbers[at]}; leave failed runs out in both arms, and report them.")
    return numbers
