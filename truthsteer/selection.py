"""Which layer and coefficient: decided on the tune split, never on the questions that are reported.

The cell with the highest MC1 wins; of cells within one standard error of it, the gentlest (smallest coefficient) is
taken, since stronger steering costs text quality that multiple choice does not see (the one-standard-error rule of
Breiman et al. 1984). Ties go to the higher mean margin, log p(best) - max log p(false).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from truthsteer.metrics import multiple_choice
from truthsteer.records import Choice


@dataclass(frozen=True)
class Cell:
    """Multiple choice at one layer and coefficient, on the tune split."""

    layer: int
    coefficient: float
    mc1: float
    margin: float
    """Mean over questions of log p(best) - max log p(false), in nats."""
    se: float
    """Standard error of mc1, one question one draw."""


def measure(layer: int, coefficient: float, choices: Sequence[Choice]) -> tuple[Cell, list[float]]:
    """A cell from the rows of its condition, which stand question by question, and the MC1 of each question."""
    hits, margins = [], []
    for _, own in groupby(choices, key=lambda choice: choice.question):
        rows = list(own)
        hits.append(multiple_choice(rows)["mc1"])
        margins.append(max(row.logprob for row in rows if row.best) - max(row.logprob for row in rows if not row.label))
    mean = sum(hits) / len(hits)
    return Cell(layer, coefficient, mean, sum(margins) / len(margins), (mean * (1 - mean) / len(hits)) ** 0.5), hits


def choose_cell(cells: Sequence[Cell]) -> Cell:
    """The cell to report, among those with a positive coefficient."""
    positive = [cell for cell in cells if cell.coefficient > 0]
    best = max(positive, key=lambda cell: (cell.mc1, cell.margin))
    near = [cell for cell in positive if cell.mc1 >= best.mc1 - best.se]
    return min(near, key=lambda cell: (cell.coefficient, -cell.mc1, -cell.margin))
