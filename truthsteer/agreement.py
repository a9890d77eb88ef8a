"""How far two yes/no ratings of the same answers agree, and how well a score or probability ranks and states the truth.

The first rating is the truth where there is one (a human label), else just another judge's. The unit that is drawn at
random is the cluster of near-duplicate questions, as in `stats`: a table of counts per cluster is all that a resample
needs. NaN is "no verdict": such pairs are left out and counted. What cannot be computed (one class only, nobody to
compare) is NaN and never an error. Knows no judges and no files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from truthsteer.stats import RESAMPLES, bootstrap_draws, over_draws, wilson

BINS = 10
"""For calibration, of equal width from 0 to 1; each holds its lower end, the last one both."""

_AT_ONCE = 2**21
"""Weights held at one time while the area under the curve is resampled."""

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
"""From counts [..., columns] to one value each [...]; NaN where there is none."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval: percentiles over resampled clusters."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Agreement:
    """Two yes/no ratings of the same answers.

    Where every pair agrees (or none does) no resample differs from another. The interval then is Wilson's for the share
    that agrees, at as many cases as there are clusters, and what it means for kappa and AC1 at the observed chance
    agreement. A recall of 0 or 1 has Wilson's interval at as many cases as clusters with that class.
    """

    n: int
    """Pairs in which both ratings are there."""
    undecided: int
    """Pairs in which one is missing."""
    agreement: Estimate
    """Share of pairs that are equal."""
    kappa: Estimate
    """Cohen 1960: agreement beyond what independent raters with the same shares would reach. Near 0 if one class is
    rare, however large the agreement; NaN if both raters know one class only."""
    ac1: Estimate
    """Gwet 2008 (British Journal of Mathematical and Statistical Psychology 61): beyond chance 2 q (1 - q), with q the
    mean share of yes; stays near the agreement where one class is rare."""
    recall_yes: Estimate
    """Share of the first rating's yes that the second calls yes: sensitivity."""
    recall_no: Estimate
    """Share of the first rating's no that the second calls no: specificity."""


def agreement(
    first: ArrayLike, second: ArrayLike, clusters: ArrayLike, seed: int, resamples: int = RESAMPLES
) -> Agreement:
    """Agreement of two ratings.

    Args:
        first: [n] 1 yes, 0 no, NaN missing; the truth, where one of the two is.
        second: [n], the same of the other rater.
        clusters: [n], equal for near-duplicates.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Raises:
        ValueError: a rating is neither 0, 1 nor NaN.
    """
    table, undecided = confusion(first, second, clusters)
    drawn = Resampled.of(table, seed, resamples)
    a, b, c, d = drawn.total
    same = float(_agreement(drawn.total))
    estimates = [drawn.estimate(statistic) for statistic in (_agreement, _kappa, _ac1)]
    if same in (0.0, 1.0):
        ends = np.array(wilson(same, len(table)))
        chances = (np.zeros(()), _kappa_chance(drawn.total), _ac1_chance(drawn.total))
        estimates = [
            Estimate(found.value, *(float(np.maximum(-1.0, end)) for end in _beyond(ends, chance)))
            for found, chance in zip(estimates, chances, strict=True)
        ]
    recalls = [drawn.share(0, (0, 1)), drawn.share(3, (2, 3))]
    return Agreement(int(a + b + c + d), undecided, *estimates, *recalls)


def confusion(first: ArrayLike, second: ArrayLike, clusters: ArrayLike) -> tuple[Array, int]:
    """Per cluster the pairs (yes, yes), (yes, no), (no, yes), (no, no) [clusters, 4]; and how many are undecided."""
    one, two = np.asarray(first, float), np.asarray(second, float)
    used = ~(np.isnan(one) | np.isnan(two))
    for ratings in (one, two):
        if not np.isin(ratings[used], (0.0, 1.0)).all():
            raise ValueError("A rating is neither 0 nor 1; a score must be turned into yes or no first.")
    cells = (2 * (1 - one[used]) + (1 - two[used])).astype(int)
    _, index = np.unique(np.asarray(clusters)[used], return_inverse=True)
    count = int(index.max(initial=-1)) + 1
    table = np.bincount(4 * index + cells, minlength=4 * count).reshape(count, 4).astype(float)
    return table, int((~used).sum())


@dataclass(frozen=True)
class Resampled:
    """Counts of all clusters together, and of every resample of clusters."""

    table: Array
    """[clusters, columns]"""
    total: Array
    """[columns]"""
    drawn: Array
    """[resamples, columns]"""

    @classmethod
    def of(cls, table: Array, seed: int, resamples: int) -> Resampled:
        """Resample the rows of a table of counts [clusters, columns]; fewer than two clusters make no resamples."""
        count = len(table)
        empty = np.empty((0, table.shape[1]))
        drawn = over_draws(bootstrap_draws(count, seed, resamples), table) if count > 1 else empty
        return cls(table, table.sum(axis=0), drawn)

    def estimate(self, statistic: Statistic) -> Estimate:
        """A statistic and the percentiles of its resamples, those left out in which it does not exist."""
        value, samples = float(statistic(self.total)), statistic(self.drawn)
        return Estimate(value, *_percentiles(value, samples))

    def share(self, hit: int, cases: tuple[int, ...]) -> Estimate:
        """Column `hit` over the sum of the columns `cases`; Wilson's interval where that is 0 or 1."""
        found = self.estimate(lambda counts: _ratio(counts[..., hit], counts[..., list(cases)].sum(axis=-1)))
        if found.value not in (0.0, 1.0):
            return found
        having = int((self.table[:, list(cases)].sum(axis=1) > 0).sum())
        return Estimate(found.value, *wilson(found.value, having))


def _percentiles(value: float, samples: Array) -> tuple[float, float]:
    finite = samples[np.isfinite(samples)]
    if math.isnan(value) or not finite.size:
        return math.nan, math.nan
    low, high = np.percentile(finite, (2.5, 97.5))
    return float(low), float(high)


def _ratio(part: Array, whole: Array) -> Array:
    """NaN where `whole` is 0."""
    part, whole = np.broadcast_arrays(part, whole)
    return np.divide(part, whole, out=np.full(whole.shape, math.nan), where=whole > 0)


def _agreement(counts: Array) -> Array:
    return _ratio(counts[..., 0] + counts[..., 3], counts.sum(axis=-1))


def _beyond(same: Array, chance: Array) -> Array:
    """Agreement beyond chance; NaN where chance alone makes raters agree always."""
    possible = 1 - chance
    return 1 - _ratio(1 - same, np.where(possible > 1e-12, possible, 0.0))


def _kappa_chance(counts: Array) -> Array:
    total = counts.sum(axis=-1)
    one = _ratio(counts[..., 0] + counts[..., 1], total)
    two = _ratio(counts[..., 0] + counts[..., 2], total)
    return one * two + (1 - one) * (1 - two)


def _ac1_chance(counts: Array) -> Array:
    yes = _ratio(counts[..., 0] + (counts[..., 1] + counts[..., 2]) / 2, counts.sum(axis=-1))
    return 2 * yes * (1 - yes)


def _kappa(counts: Array) -> Array:
    return _beyond(_agreement(counts), _kappa_chance(counts))


def _ac1(counts: Array) -> Array:
    return _beyond(_agreement(counts), _ac1_chance(counts))


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Probability that a yes has a higher score than a no, a tie counting half; NaN if there is one class only.

    Pairs with a NaN are left out.
    """
    curve = _Curve.of(scores, labels, np.zeros(np.size(labels)))
    return float(curve.area(np.ones((1, 1)))[0])


def auc_estimate(
    scores: ArrayLike, labels: ArrayLike, clusters: ArrayLike, seed: int, resamples: int = RESAMPLES
) -> Estimate:
    """`auc` with its interval; a score that separates the classes has Wilson's, at as many cases as there are clusters
    with the rarer class.
    """
    curve = _Curve.of(scores, labels, clusters)
    count = int(curve.index.max(initial=-1)) + 1
    value = float(curve.area(np.ones((1, count)))[0])
    if value in (0.0, 1.0):
        return Estimate(value, *wilson(value, min(np.unique(curve.index[curve.yes == label]).size for label in (0, 1))))
    if math.isnan(value) or count < 2:
        return Estimate(value, math.nan, math.nan)
    draws = bootstrap_draws(count, seed, resamples)
    rows = max(1, _AT_ONCE // curve.index.size)
    parts = [curve.area(draws[first : first + rows].astype(float)) for first in range(0, resamples, rows)]
    return Estimate(value, *_percentiles(value, np.concatenate(parts)))


@dataclass(frozen=True)
class _Curve:
    """Labelled scores in ascending order, each array [n]."""

    index: NDArray[np.intp]
    """Cluster."""
    yes: Array
    """1 or 0."""
    first: NDArray[np.intp]
    """Place of the first score that is as high."""
    after: NDArray[np.intp]
    """Place behind the last score that is as high."""

    @classmethod
    def of(cls, scores: ArrayLike, labels: ArrayLike, clusters: ArrayLike) -> _Curve:
        score, label = np.asarray(scores, float), np.asarray(labels, float)
        known = np.isfinite(score) & np.isfinite(label)
        order = np.argsort(score[known], kind="stable")
        ranked = score[known][order]
        _, index = np.unique(np.asarray(clusters)[known], return_inverse=True)
        ends = (np.searchsorted(ranked, ranked, side) for side in ("left", "right"))
        return cls(index[order], (label[known][order] > 0.5).astype(float), *ends)

    def area(self, counts: Array) -> Array:
        """[rows] area under the curve where clusters count so many times [rows, clusters]."""
        weights = counts[:, self.index]
        no = np.zeros((len(weights), self.yes.size + 1))
        np.cumsum(weights * (1 - self.yes), axis=1, out=no[:, 1:])
        yes = weights * self.yes
        below = (no[:, self.first] + no[:, self.after]) / 2
        return _ratio((yes * below).sum(axis=1), yes.sum(axis=1) * no[:, -1])


def calibration(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Expected calibration error: mean over answers of |mean probability - share of yes| of their bin, in `BINS` bins
    of equal width (Guo et al., ICML 2017). Chance alone makes it larger than 0, more so with fewer answers.

    Args:
        probabilities: [n] stated probability of a yes, 0 to 1; pairs with a NaN are left out.
        labels: [n] 1 yes, 0 no.
    """
    return float(_ece(_by_bin(probabilities, labels, np.zeros(np.size(labels))).sum(axis=0)))


def calibration_estimate(
    probabilities: ArrayLike, labels: ArrayLike, clusters: ArrayLike, seed: int, resamples: int = RESAMPLES
) -> Estimate:
    """`calibration` with a basic bootstrap interval.

    Resamples repeat answers, which inflates the error once more by about as much as chance inflated the value itself;
    the basic interval [2 value - high, 2 value - low] turns that around. Its upper end can be trusted; the lower one is
    above 0 in four of ten perfectly calibrated judges.
    """
    found = Resampled.of(_by_bin(probabilities, labels, clusters), seed, resamples).estimate(_ece)
    low, high = (max(0.0, 2 * found.value - end) if math.isfinite(end) else end for end in (found.high, found.low))
    return Estimate(found.value, low, high)


def _by_bin(probabilities: ArrayLike, labels: ArrayLike, clusters: ArrayLike) -> Array:
    """Per cluster and bin the answers, the sum of their probabilities, and those labelled yes: [clusters, 3 * BINS]."""
    stated, label = np.asarray(probabilities, float), np.asarray(labels, float)
    known = np.isfinite(stated) & np.isfinite(label)
    place = np.minimum((stated[known] * BINS).astype(int), BINS - 1)
    _, index = np.unique(np.asarray(clusters)[known], return_inverse=True)
    count = int(index.max(initial=-1)) + 1
    parts = [
        np.bincount(BINS * index + place, weights, BINS * count).reshape(count, BINS)
        for weights in (np.ones(place.size), stated[known], label[known])
    ]
    return np.concatenate(parts, axis=1)


def _ece(counts: Array) -> Array:
    n, stated, yes = (counts[..., part * BINS : (part + 1) * BINS] for part in range(3))
    return _ratio(np.abs(stated - yes).sum(axis=-1), n.sum(axis=-1))


def rogan_gladen(share: ArrayLike, sensitivity: ArrayLike, specificity: ArrayLike) -> Array:
    """The share of yes that a rater with these recalls must have seen to call `share` yes, clipped to 0..1 (Rogan &
    Gladen 1978, American Journal of Epidemiology 107). NaN if the rater is no better than chance.
    """
    better = np.asarray(sensitivity, float) + np.asarray(specificity, float) - 1
    found = _ratio(np.asarray(share, float) + np.asarray(specificity, float) - 1, np.where(better > 1e-12, better, 0.0))
    return np.clip(found, 0.0, 1.0)
