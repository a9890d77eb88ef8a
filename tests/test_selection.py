"""The tune split's choice: best MC1, then the gentlest within one standard error."""

from __future__ import annotations

import pytest

from truthsteer.records import Choice
from truthsteer.selection import Cell, choose_cell, measure


def cell(layer: int, coefficient: float, mc1: float, margin: float = 0.0, se: float = 0.05) -> Cell:
    return Cell(layer, coefficient, mc1, margin, se)


def test_the_gentlest_cell_within_a_standard_error_wins():
    cells = [cell(1, 0.2, 0.60), cell(1, 0.4, 0.77), cell(2, 0.4, 0.76), cell(1, 0.8, 0.80), cell(1, 1.2, 0.3)]
    assert choose_cell(cells) == cells[1]


def test_a_clear_winner_wins_whatever_its_strength():
    cells = [cell(1, 0.2, 0.60), cell(1, 0.4, 0.70), cell(2, 0.8, 0.90)]
    assert choose_cell(cells) == cells[2]


def test_negative_coefficients_are_never_chosen_and_margins_break_ties():
    cells = [cell(1, -0.4, 0.9), cell(1, 0.4, 0.5, margin=1.0), cell(2, 0.4, 0.5, margin=2.0)]
    assert choose_cell(cells) == cells[2]


def test_a_cell_is_measured_question_by_question():
    rows = [
        Choice("a", "t", True, True, -1.0, 1),
        Choice("a", "u", True, False, -0.1, 1),
        Choice("a", "f", False, False, -3.0, 1),
        Choice("b", "t", True, True, -4.0, 1),
        Choice("b", "f", False, False, -3.0, 1),
        Choice("b", "g", False, False, -9.0, 1),
    ]
    found, hits = measure(2, 0.5, rows)
    assert hits == [1.0, 0.0]
    assert (found.layer, found.coefficient, found.mc1) == (2, 0.5, 0.5)
    assert found.margin == pytest.approx((2.0 - 1.0) / 2)
    assert found.se == pytest.approx((0.25 / 2) ** 0.5)
    other_true = [Choice("c", "t", True, True, -4.0, 1), Choice("c", "u", True, False, -1.0, 1)]
    rows += [*other_true, Choice("c", "f", False, False, -3.0, 1)]
    found, hits = measure(2, 0.5, rows)
    assert hits == [1.0, 0.0, 0.0], "MC1, in the questions' order: that of c goes to another true answer"
    assert found.mc1 == pytest.approx(1 / 3)


def test_the_standard_error_is_that_of_the_best_cell_by_margin():
    cells = [cell(1, 0.2, 0.70), cell(1, 0.4, 0.80, margin=1.0, se=0.2), cell(2, 0.4, 0.80, margin=2.0, se=0.05)]
    assert choose_cell(cells) == cells[2]
