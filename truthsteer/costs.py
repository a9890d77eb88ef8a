"""What steering costs elsewhere, per condition: neutral text, capability questions, repetition and variety of answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from truthsteer import stats
from truthsteer.neutral import kl_per_token, nll_per_token, perplexity
from truthsteer.records import Capability
from truthsteer.results import Results, Row
from truthsteer.wording import distinct

T = TypeVar("T")


def side_effects(results: Results, seed: int) -> list[dict[str, Any]]:
    """One dict per condition, in their order.

    `perplexity` on neutral text; `perplexity_ratio`, the geometric mean over passages of the ratio to the baseline's, with
    interval and p; `kl` per token from the baseline, with an interval over passages; `kl_max` at a single token: all None
    where they were not measured. `distinct_1` and `distinct_2`, distinct n-grams over all of them. `capability` (summed
    log-probability) and `capability_char`, with intervals and paired differences, only where they were measured.
    """
    base = results.rows[0]
    return [_row(row, base, seed) for row in results.rows]


def _row(row: Row, base: Row, seed: int) -> dict[str, Any]:
    texts = [completion.text for completion in row.completions]
    return {
        "condition": row.name,
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        **_on_neutral_text(row, base, seed),
        **_capability(row, base, seed),
    }


def _on_neutral_text(row: Row, base: Row, seed: int) -> dict[str, Any]:
    folds, before = row.neutral, base.neutral
    if not folds:
        names = ("passages", "perplexity", "kl", "kl_low", "kl_high", "kl_max", "perplexity_ratio")
        return dict.fromkeys((*names, "perplexity_low", "perplexity_high", "perplexity_p", "perplexity_mde"))
    passages = np.array([item.passage for item in folds[0]])
    kl = stats.interval(np.mean([kl_per_token(fold) for fold in folds], axis=0), passages, binary=False)
    found = {
        "passages": len(passages),
        "perplexity": perplexity(_all(folds)),
        "kl": kl.mean,
        "kl_low": max(0.0, kl.low),
        "kl_high": kl.high,
        "kl_max": max(item.kl_max for item in _all(folds)),
    }
    own, other = (np.mean([nll_per_token(fold) for fold in part], axis=0) for part in (folds, before))
    change = stats.compare(own, other, passages, seed)
    return found | {
        "perplexity_ratio": math.exp(change.difference),
        "perplexity_low": math.exp(change.low),
        "perplexity_high": math.exp(change.high),
        "perplexity_p": change.p if row is not base else None,
        "perplexity_mde": math.exp(change.mde),
    }


def _all(folds: Sequence[Sequence[T]]) -> list[T]:
    return [item for fold in folds for item in fold]


def _capability(row: Row, base: Row, seed: int) -> dict[str, Any]:
    folds, before = row.capability, base.capability
    if not folds:
        return {}
    items = np.arange(len(folds[0]))
    found: dict[str, Any] = {}
    for name, field in (("capability", "correct"), ("capability_char", "correct_per_char")):
        own, other = (_per_item(part, field) for part in (folds, before))
        yes_no = bool(np.isin(own, (0.0, 1.0)).all())
        paired = asdict(stats.compare(own, other, items, seed)) if row is not base else {}
        difference = {"low": "difference_low", "high": "difference_high"}
        found[name] = asdict(stats.interval(own, items, yes_no)) | {
            difference.get(key, key): value for key, value in paired.items() if key != "n"
        }
    return found


def _per_item(folds: Sequence[Sequence[Capability]], field: str) -> NDArray[np.float64]:
    """[items] mean over folds."""
    return np.mean([[getattr(item, field) for item in fold] for fold in folds], axis=0)
