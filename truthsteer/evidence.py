"""A number with its evidence: interval, paired difference, what could have been detected, what correction leaves of p.

Works on scores per question ([questions], NaN where there is none) and gives plain dicts, the cells of the table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from truthsteer import metrics, stats
from truthsteer.metrics import Scores
from truthsteer.multiplicity import max_t

WARNED_ABOVE, WITHHELD_ABOVE = 0.01, 0.05
"""Shares of answers without a verdict: above the first the reader is warned, above the second the number is withheld."""


@dataclass(frozen=True)
class Design:
    """What is drawn at random."""

    clusters: NDArray[np.generic]
    """[questions] near-duplicate group of each."""
    categories: NDArray[np.generic]
    """[questions] category of each: the conservative unit."""
    seed: int


def unit(name: str, scores: Sequence[Scores]) -> str:
    """`fraction` (of questions, or of probability), `words`, or `score` on a judge's own scale."""
    if name == "length":
        return "words"
    return "fraction" if name in metrics.GRADED or binary(name, scores) else "score"


def binary(name: str, scores: Sequence[Scores]) -> bool:
    return metrics.is_binary(name, np.concatenate([row[name] for row in scores if name in row]))


def cells(
    scores: Sequence[Scores],
    names: Sequence[str],
    design: Design,
    judged: Sequence[Mapping[str, int]],
    families: Sequence[Sequence[int]],
) -> list[dict[str, dict[str, Any]]]:
    """Per condition, metric -> cell.

    Args:
        scores: of each condition, the baseline first.
        names: metrics.
        design: what is drawn.
        judged: per condition, metric -> how many answers its judge was given; only judged metrics.
        families: places of conditions whose p are corrected for each other, column by column (`p_adjusted`).
    """
    empty = np.full(design.clusters.size, math.nan)
    columns = {name: np.stack([row.get(name, empty) for row in scores]) for name in names}
    yes_no = {name: binary(name, scores) for name in names}
    shares = {name: name in metrics.GRADED or yes_no[name] for name in names}
    adjusted = {name: _adjusted(values, families, design) for name, values in columns.items()}
    table = []
    for place in range(len(scores)):
        own = {name: columns[name][place] for name in names}
        paired: dict[str, stats.Difference] = {}
        wide: dict[str, stats.Difference] = {}
        if place:
            base = {name: columns[name][0] for name in names}
            paired = stats.compare_all(own, base, design.clusters, design.seed)
            wide = stats.compare_all(own, base, design.categories, design.seed)
        row = {}
        for name in names:
            found = _interval(own[name], design.clusters, yes_no[name], shares[name])
            conservative = _interval(own[name], design.categories, yes_no[name], shares[name])
            cell = _cell(found, conservative, paired.get(name), wide.get(name))
            cell["p_adjusted"] = adjusted[name][place]
            decided = columns.get(decided_of(name), columns[name])[place]
            row[name] = cell | _bounds(decided, judged[place].get(name), yes_no[name])
        table.append(row)
    return table


def _interval(values: NDArray[np.float64], clusters: NDArray[np.generic], yes_no: bool, share: bool) -> stats.Interval:
    """The interval; a share's ends where shares end (a t interval knows no bounds)."""
    found = stats.interval(values, clusters, yes_no)
    return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0)) if share else found


def _cell(
    found: stats.Interval, conservative: stats.Interval, paired: stats.Difference | None, wide: stats.Difference | None
) -> dict[str, Any]:
    """One cell of the table; the baseline has no difference to itself."""
    difference = asdict(paired) if paired else {}
    return asdict(found) | {
        "category_low": conservative.low,
        "category_high": conservative.high,
        "difference": difference.get("difference"),
        "difference_low": difference.get("low"),
        "difference_high": difference.get("high"),
        "difference_category_low": wide.low if wide else None,
        "difference_category_high": wide.high if wide else None,
        **{key: difference.get(key) for key in ("p", "mcnemar_p", "fixed", "broken", "mde")},
        "compared": paired.n if paired else None,
    }


def _adjusted(values: NDArray[np.float64], families: Sequence[Sequence[int]], design: Design) -> list[float | None]:
    """[conditions] p of each, corrected for the family it belongs to; None for those of no family."""
    adjusted: list[float | None] = [None] * len(values)
    for family in families:
        used = [place for place in family if bool(np.isfinite(values[place] - values[0]).any())]
        if used:
            found = max_t(values[used] - values[0], design.clusters, design.seed, stats.RESAMPLES)
            for place, p in zip(used, found, strict=True):
                adjusted[place] = float(p)
    return adjusted


def decided_of(metric: str) -> str:
    """The metric that says which of this one's values were decided: `match` counts as 0 what `match_decided` leaves out."""
    return f"{metric.removesuffix('_lenient').removesuffix('_decided')}_decided"


def _bounds(values: NDArray[np.float64], asked: int | None, yes_no: bool) -> dict[str, Any]:
    """How many answers a judge left undecided, the mean if all of those were 0 or 1, and whether it is withheld."""
    if not asked:
        return {"asked": 0, "undecided": 0, "floor": None, "ceiling": None, "withheld": False}
    undecided = asked - int(np.isfinite(values).sum())
    total = float(np.nansum(values))
    return {
        "asked": asked,
        "undecided": undecided,
        "floor": total / asked if yes_no else None,
        "ceiling": (total + undecided) / asked if yes_no else None,
        "withheld": undecided > WITHHELD_ABOVE * asked,
    }
