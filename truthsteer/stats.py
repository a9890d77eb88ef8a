"""Intervals and paired tests for questions that come in near-duplicate groups. Knows no models, no files.

The unit that is drawn at random is the group of near-duplicate questions (a *cluster*), since its members
rise and fall together. Every interval is a 95% interval, every p is two-sided. NaN means "no value": it is
left out, and `n` says how many were used. Nothing here needs scipy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Z = 1.959963984540054
"""97.5 % quantile of the normal distribution."""

RESAMPLES = 10_000

POWER = 2.8
"""Standard errors between no effect and one that is found with 80 % power at two-sided .05: 1.96 + 0.84."""

LEAST_DISCORDANT = 6
"""Yes/no outcomes: with fewer questions that differ, no split of them gives p < .05."""

_AT_ONCE = 1000
"""Resamples in floating point at one time: draws are kept as small integers."""

TOLERANCE = 1e-9
"""Two statistics this close, relative to the largest possible one, are ties: sums differ by rounding."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval; NaN where there is too little to say."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference:
    """A condition minus the baseline, question by question."""

    difference: float
    low: float
    high: float
    p: float
    """Sign-flip permutation of whole clusters, two-sided."""
    fixed: int
    """Questions that score higher than under the baseline."""
    broken: int
    """Questions that score lower."""
    n: int
    mcnemar_p: float | None
    """Exact McNemar test, which treats questions as independent; only for yes/no outcomes."""
    mde: float
    """Smallest true difference found with 80 % power at two-sided .05: 2.8 sqrt(deff x sum of d^2) / n, where the design
    effect deff (at least 1) is the cluster-robust variance of the mean difference over that of independent questions. For
    independent yes/no outcomes that is 2.8 sqrt(discordance / n) (Miller, arXiv 2411.00640). Where no question differs,
    the discordance is taken at the upper Wilson bound of a share never seen in as many clusters, and n is their number.
    For yes/no outcomes never less than 6 questions, the fewest that can give p < .05. NaN if there is one cluster, if that
    passes 1, or if nothing differs and values leave 0 to 1."""


def interval(values: ArrayLike, clusters: ArrayLike, binary: bool) -> Interval:
    """The mean of `values` with its 95% interval.

    Yes/no outcomes get Wilson's interval at the effective sample size n / deff, where the design effect deff (at least
    1) is the cluster-robust variance of the mean over the variance of independent questions. If all outcomes agree
    there is no variance to compare, and the number of clusters is the effective sample size. Other values get a
    t interval on the cluster-robust standard error with (clusters - 1) degrees of freedom (Miller, arXiv 2411.00640).

    Args:
        values: [n], NaN where missing.
        clusters: [n], equal for near-duplicates.
        binary: whether the values are yes/no outcomes.
    """
    used, index, sizes = _used(values, clusters)
    n = used.size
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(used.mean())
    count = sizes.size
    residuals = np.bincount(index, weights=used - mean)  # [clusters]
    robust = float((residuals**2).sum()) / n**2 * (count / (count - 1) if count > 1 else math.nan)
    if binary:
        independent = mean * (1 - mean) / (n - 1) if n > 1 else 0.0
        deff = robust / independent if independent > 0 and count > 1 else n / count
        low, high = wilson(mean, n / max(deff, 1.0))
        return Interval(mean, low, high, n)
    half = t_quantile(count - 1) * math.sqrt(robust) if count > 1 else math.nan
    return Interval(mean, mean - half, mean + half, n)


def _used(values: ArrayLike, clusters: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """The finite values [n], the cluster index of each [n], and the cluster sizes [clusters]."""
    array = np.asarray(values, float)
    used = np.isfinite(array)
    _, index, sizes = np.unique(np.asarray(clusters)[used], return_inverse=True, return_counts=True)
    return array[used], index, sizes.astype(float)


def wilson(share: float, n: float) -> tuple[float, float]:
    """Wilson's score interval for a share observed in `n` (possibly fractional) independent cases."""
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


@lru_cache(maxsize=4096)
def t_quantile(df: int) -> float:
    """97.5 % quantile of Student's t with a whole number of degrees of freedom, by bisection of its exact
    CDF.
    """
    low, high = Z, 12.8
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_inside(middle, df) < 0.95 else (low, middle)
    return high


def _t_inside(t: float, df: int) -> float:
    """P(|T| < t), by the finite sum that holds for whole degrees of freedom (Abramowitz & Stegun 26.7.3,
    26.7.4).
    """
    angle = math.atan(t / math.sqrt(df))
    cosine = math.cos(angle)
    odd = df % 2
    steps = np.arange(2 + odd, df - 1, 2)
    terms = np.cumprod(np.concatenate([[cosine if odd else 1.0], (steps - 1) / steps * cosine**2]))
    series = math.sin(angle) * float(terms.sum())
    if not odd:
        return series
    return 2 / math.pi * (angle + (series if df > 1 else 0.0))


def compare(
    values: ArrayLike, baseline: ArrayLike, clusters: ArrayLike, seed: int, resamples: int = RESAMPLES
) -> Difference:
    """`values` minus `baseline` over the questions that have both: see `compare_all`."""
    return compare_all({"": values}, {"": baseline}, clusters, seed, resamples)[""]


def compare_all(
    values: Mapping[str, ArrayLike],
    baseline: Mapping[str, ArrayLike],
    clusters: ArrayLike,
    seed: int,
    resamples: int = RESAMPLES,
) -> dict[str, Difference]:
    """Paired comparison of every metric in `values` with the same metric in `baseline`.

    The interval is the percentile interval of a bootstrap that draws whole clusters; the p value comes from
    flipping the signs of whole clusters at random, (1 + as extreme) / (1 + resamples). Both use the same
    draws for everything that has the same clusters and seed, so that conditions stay comparable. Where
    every yes/no difference is the same, the bootstrap would have no width; the upper Wilson bound of a
    share never seen in that many clusters stands in.

    Args:
        values: metric -> [n], NaN where missing.
        baseline: metric -> [n].
        clusters: [n], equal for near-duplicates.
        seed: of the draws.
        resamples: of the bootstrap and of the permutation test each.
    """
    clusters = np.asarray(clusters)
    pairs = {name: (np.asarray(value, float), np.asarray(baseline[name], float)) for name, value in values.items()}
    by_mask: dict[bytes, list[str]] = {}
    for name, (value, base) in pairs.items():
        both = np.isfinite(value) & np.isfinite(base)
        by_mask.setdefault(both.tobytes(), []).append(name)
    found: dict[str, Difference] = {}
    for mask, names in by_mask.items():
        used = np.frombuffer(mask, dtype=bool)
        columns = [(pairs[name][0][used], pairs[name][1][used]) for name in names]
        differences = _compare(columns, clusters[used], seed, resamples)
        found.update(zip(names, differences, strict=True))
    return {name: found[name] for name in pairs}


def _compare(
    columns: list[tuple[NDArray[np.float64], NDArray[np.float64]]],
    clusters: NDArray[np.generic],
    seed: int,
    resamples: int,
) -> list[Difference]:
    """Metrics that have values for the same questions, in one matrix product each for bootstrap and
    permutation.
    """
    n = clusters.size
    if n == 0:
        nan = math.nan
        return [Difference(nan, nan, nan, nan, 0, 0, 0, None, nan) for _ in columns]
    _, index = np.unique(clusters, return_inverse=True)
    count = int(index.max()) + 1
    sums = np.stack([np.bincount(index, a - b) for a, b in columns], axis=1).astype(float)  # [clusters, metrics]
    sizes = np.bincount(index).astype(float)
    drawn = over_draws(bootstrap_draws(count, seed, resamples), np.column_stack([sums, sizes]))
    means = drawn[:, :-1] / drawn[:, -1:]  # [resamples, metrics]
    lows, highs = np.percentile(means, (2.5, 97.5), axis=0)
    flipped = np.abs(over_draws(sign_flips(count, seed, resamples), sums))
    reached = np.abs(sums.sum(axis=0)) - TOLERANCE * np.abs(sums).sum(axis=0)
    ps = (1 + (flipped >= reached).sum(axis=0)) / (1 + resamples)
    unseen = wilson(0.0, count)[1]
    results = []
    for place, (value, base) in enumerate(columns):
        difference = value - base
        mean = float(difference.mean())
        fixed, broken = int((difference > 0).sum()), int((difference < 0).sum())
        binary = bool(np.isin(value, (0, 1)).all() and np.isin(base, (0, 1)).all())
        low, high = (float(lows[place]), float(highs[place])) if count > 1 else (math.nan, math.nan)
        if binary and bool((difference == difference[0]).all()):
            low, high = max(-1.0, mean - unseen), min(1.0, mean + unseen)
        p = float(ps[place]) if fixed or broken else 1.0
        exact = mcnemar(fixed, broken) if binary else None
        mde = _mde(value, base, index)
        results.append(Difference(mean, low, high, p, fixed, broken, n, exact, mde))
    return results


def _mde(value: NDArray[np.float64], base: NDArray[np.float64], index: NDArray[np.intp]) -> float:
    """See `Difference.mde`."""
    difference, count = value - base, int(index.max()) + 1
    n = difference.size
    if count < 2:
        return math.nan
    binary = bool(np.isin(value, (0, 1)).all() and np.isin(base, (0, 1)).all())
    if difference.any():
        residuals = difference - difference.mean()
        spread = float((residuals**2).sum())
        design = float((np.bincount(index, residuals) ** 2).sum()) / spread if spread > 0 else 1.0
        found = POWER * math.sqrt(max(1.0, design) * float((difference**2).sum())) / n
    elif bool(((value >= 0) & (value <= 1)).all()):
        found = detectable(wilson(0.0, count)[1], count)
    else:
        return math.nan
    if binary:
        found = max(found, LEAST_DISCORDANT / n)
        return found if found <= 1 else math.nan
    return found


def over_draws(draws: NDArray[np.integer], sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """`draws` [resamples, clusters] times `sums` [clusters, columns], in float64, few resamples at a time."""
    parts = range(0, len(draws), _AT_ONCE)
    return np.concatenate([draws[first : first + _AT_ONCE].astype(np.float64) @ sums for first in parts])


@lru_cache(maxsize=8)
def bootstrap_draws(count: int, seed: int, resamples: int) -> NDArray[np.uint16]:
    """How often each of `count` clusters is drawn, per resample: [resamples, clusters], read only.

    The last eight are kept, as those of `sign_flips` are: 20 MB for both at 10,000 resamples of 700 clusters, so that
    near-duplicates, categories, and the clusters left by a few missing values are each drawn once.
    """
    random = np.random.default_rng([seed, 0])
    parts = []
    for first in range(0, resamples, _AT_ONCE):
        rows = min(_AT_ONCE, resamples - first)
        picks = random.integers(0, count, size=(rows, count))
        picks += np.arange(rows)[:, None] * count
        parts.append(np.bincount(picks.ravel(), minlength=rows * count).reshape(rows, count).astype(np.uint16))
    counts = np.concatenate(parts)
    counts.flags.writeable = False
    return counts


@lru_cache(maxsize=8)
def sign_flips(count: int, seed: int, resamples: int) -> NDArray[np.int8]:
    """The sign, 1 or -1, of each of `count` clusters, per resample: [resamples, clusters], read only."""
    random = np.random.default_rng([seed, 1])
    signs = random.integers(0, 2, size=(resamples, count), dtype=np.int8) * np.int8(2) - np.int8(1)
    signs.flags.writeable = False
    return signs


def mcnemar(fixed: int, broken: int) -> float:
    """Exact two-sided McNemar test: how often a fair coin splits `fixed + broken` tosses at least this
    unevenly.
    """
    n = fixed + broken
    tail = sum(math.comb(n, k) for k in range(min(fixed, broken) + 1))
    return min(1.0, 2 * tail / 2**n)


def detectable(discordance: float, n: float) -> float:
    """Smallest paired difference of shares found with 80 % power, if a share `discordance` of questions
    changes.
    """
    return POWER * math.sqrt(discordance / n) if n > 0 else math.nan
