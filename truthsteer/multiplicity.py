"""p values corrected for how many were looked at. Knows families of numbers, not what they measure.

`holm` needs nothing but the p values and holds whatever their dependence. `max_t` has the data, so that cells that rise
and fall together, as those of one grid do, cost less than as many independent ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from truthsteer.stats import TOLERANCE, over_draws, sign_flips


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjusted p values, in the order given: below .05 means significant in a family at .05.

    None and NaN stay as they are and do not count in the family (Holm 1979, Scandinavian Journal of Statistics 6).
    """
    family = sorted((p, place) for place, p in enumerate(ps) if p is not None and not math.isnan(p))
    adjusted = list(ps)
    least = 0.0
    for rank, (p, place) in enumerate(family):
        least = max(least, min(1.0, (len(family) - rank) * p))
        adjusted[place] = least
    return adjusted


def max_t(differences: ArrayLike, clusters: ArrayLike, seed: int, resamples: int) -> NDArray[np.float64]:
    """Two-sided p of each cell's mean difference, corrected for the family of all cells.

    Signs of whole clusters are flipped at random, the same flips in every cell. A cell's statistic is its sum of
    differences over the root of the sum of its clusters' squared sums: the t statistic's numerator over its standard
    error under the null, which no flip changes, so that cells in which more questions differ do not dominate. Step-down
    (Westfall & Young 1993, algorithm 4.1 with flips for permutations): a cell is held against the largest statistic of
    those cells that are no more extreme than itself, (1 + as large) / (1 + resamples), and no p is below that of a more
    extreme cell.

    Args:
        differences: [cells, questions], of a condition minus the baseline; NaN where a question is not in a cell.
        clusters: [questions], equal for near-duplicates.
        seed: of the flips, which are those of `stats.compare` for as many clusters.
        resamples: number of flips.

    Returns:
        [cells], NaN for a cell without questions, 1 for one in which no question differs.
    """
    values = np.asarray(differences, float)
    known = np.isfinite(values)
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    count = int(index.max(initial=-1)) + 1
    adjusted = np.full(len(values), math.nan)
    cells = np.flatnonzero(known.any(axis=1))
    if not cells.size:
        return adjusted
    sums = np.stack([np.bincount(index, np.where(known[cell], values[cell], 0.0), count) for cell in cells], axis=1)
    spread = np.sqrt((sums**2).sum(axis=0))
    scaled = sums / np.where(spread > 0, spread, 1.0)  # [clusters, cells]
    observed = np.abs(scaled.sum(axis=0))
    order = np.argsort(observed, kind="stable")  # the least extreme first
    flipped = np.abs(over_draws(sign_flips(count, seed, resamples), scaled[:, order]))
    largest = np.maximum.accumulate(flipped, axis=1)  # [resamples, cells] of this cell and those less extreme
    reached = observed[order] - TOLERANCE * math.sqrt(count)
    ps = (1 + (largest >= reached).sum(axis=0)) / (1 + resamples)
    adjusted[cells[order]] = np.maximum.accumulate(ps[::-1])[::-1]
    return adjusted
