"""What the tune split showed and what was chosen from it, pooled over folds, from the banks' own records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def selection(banks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Method -> the tune split's grid, averaged over folds, and what each fold chose from its own."""
    found: dict[str, Any] = {}
    for method in dict.fromkeys(method for bank in banks for method in bank["methods"]):
        items = [(bank["fold"], bank["methods"][method]) for bank in banks if method in bank["methods"]]
        cells: dict[tuple[int, float], list[float]] = {}
        adjusted: dict[tuple[int, float], list[float]] = {}
        for cell in (cell for _, item in items for cell in item["grid"]):
            where = (int(cell["layer"]), float(cell["coefficient"]))
            cells.setdefault(where, []).extend([cell["mc1"]] if cell["mc1"] is not None else [])
            adjusted.setdefault(where, []).append(cell["p_adjusted"])
        layers = sorted({layer for layer, _ in cells})
        coefficients = sorted({coefficient for _, coefficient in cells})
        found[method] = {
            "layers": layers,
            "coefficients": coefficients,
            "mc1": [[_mean(cells.get((layer, value), [])) for value in coefficients] for layer in layers],
            "p_adjusted": [
                [max(adjusted[layer, value]) if (layer, value) in adjusted else None for value in coefficients]
                for layer in layers
            ],
            "envelope": _envelope([item["envelope"] for _, item in items]),
            "style": _style(items),
            "baseline": _mean([item["baseline"]["mc1"] for _, item in items]),
            "chosen": [_chosen(fold, item) for fold, item in items],
        }
    return found


def _envelope(folds: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Per size of coefficient, the range of the random directions' MC1, in the fold that has them (the first)."""
    found = []
    for parts in zip(*filter(None, folds), strict=True):
        draws = np.mean([part["mc1"] for part in parts], axis=0)
        low, high = draws.min(), draws.max()
        found.append({"coefficient": parts[0]["coefficient"], "low": low, "high": high, "draws": len(draws)})
    return found


def _style(items: Sequence[tuple[int, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Per fold and style: its cosine with the vector, or why there is none, and the answers that it was made from."""
    return [{"fold": fold, "style": name, **found} for fold, item in items for name, found in item["style"].items()]


def _chosen(fold: int, item: Mapping[str, Any]) -> dict[str, Any]:
    """What one fold chose, and how the tune split scored there and without steering."""
    where = {"layer": item["chosen"]["layer"], "coefficient": item["chosen"]["coefficient"]}
    cell: Mapping[str, Any] = next((cell for cell in item["grid"] if where.items() <= cell.items()), {})
    return {
        "fold": fold,
        **where,
        "n": item.get("n"),
        "baseline_mc1": item["baseline"]["mc1"],
        "mc1": cell.get("mc1"),
        "baseline_margin": item["baseline"]["margin"],
        "margin": cell.get("margin"),
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
