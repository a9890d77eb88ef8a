"""The chosen condition held against every other row, question by question: what the table's differences to the baseline
do not say. Two rows may each differ from the baseline, or not, and still not differ from each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from truthsteer import stats
from truthsteer.evidence import WITHHELD_ABOVE, Design
from truthsteer.metrics import Scores
from truthsteer.multiplicity import holm
from truthsteer.records import ConditionKind
from truthsteer.results import Results

METRICS = ("true", "true_info", "mc1")

RIVALS = tuple(
    kind
    for kind in ConditionKind
    if kind not in (ConditionKind.BASELINE, ConditionKind.CHOSEN, ConditionKind.STEERED, ConditionKind.SIGN_FLIP)
)
"""Controls, and rows without steering."""


def against_the_chosen(
    results: Results, scores: Sequence[Scores], names: Sequence[str], design: Design
) -> dict[str, list[dict[str, Any]]]:
    """Method -> one dict per rival: its name, kind, and per metric the chosen row minus it, with interval, p and mde.

    `p_adjusted` is Holm's over all rivals of a metric.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for chosen, own in zip(results.rows, scores, strict=True):
        if chosen.kind is not ConditionKind.CHOSEN:
            continue
        rows: list[dict[str, Any]] = []
        for rival, other in zip(results.rows, scores, strict=True):
            if rival.kind in RIVALS and rival.method in ("", chosen.method):
                used = [name for name in METRICS if name in names and name in own and name in other]
                differences = stats.compare_all(
                    {name: own[name] for name in used},
                    {name: other[name] for name in used},
                    design.clusters,
                    design.seed,
                )
                answered = int((np.isfinite(own["length"]) & np.isfinite(other["length"])).sum())
                least = {name: 1 if name == "mc1" else (1 - WITHHELD_ABOVE) * answered for name in used}
                cells: dict[str, dict[str, Any]] = {
                    name: asdict(item) for name, item in differences.items() if item.n and item.n >= least[name]
                }
                if cells:
                    rows.append({"name": rival.name, "kind": str(rival.kind), "metrics": cells})
        for name in METRICS:
            family = [row["metrics"][name] for row in rows if name in row["metrics"]]
            for cell, p in zip(family, holm([cell["p"] for cell in family]), strict=True):
                cell["p_adjusted"] = p
        found[chosen.method] = rows
    return found
