"""The binary task as letters: what is asked, in both orders, and what the answers are worth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from truthsteer.letters import LETTERS, asked
from truthsteer.metrics import letter_scores
from truthsteer.records import Letters, Question


def question(name: str) -> Question:
    return Question(name, 2, "", "", "What is it?", "A stone.", ("A stone.",), ("Air.", "Cheese."), 0, "Cheese.")


def scores(*rows: Letters, ids: tuple[str, ...] = ("q",)) -> tuple[list[float], list[float]]:
    found = letter_scores(rows, [question(name) for name in ids])
    assert set(found) == {"mc0_ab", "says_a"}
    return found["mc0_ab"].tolist(), found["says_a"].tolist()


def test_the_best_answer_stands_under_its_letter_and_the_official_opponent_under_the_other():
    assert LETTERS == ("A", "B")
    assert asked(question("q"), "A") == "What is it?\n(A) A stone.\n(B) Cheese.\nAnswer with A or B."
    assert asked(question("q"), "B") == "What is it?\n(A) Cheese.\n(B) A stone.\nAnswer with A or B."


@pytest.mark.parametrize(
    ("first", "second", "right", "says_a"),
    [
        ((-0.1, -2.0), (-2.0, -0.1), 1.0, 0.5),
        ((-2.0, -0.1), (-0.1, -2.0), 0.0, 0.5),
        ((-0.1, -2.0), (-0.1, -2.0), 0.5, 1.0),
        ((-2.0, -0.1), (-2.0, -0.1), 0.5, 0.0),
        ((-1.0, -1.0), (-1.0, -1.0), 0.0, 0.0),
        ((-1.0, -1.0), (-2.0, -0.1), 0.5, 0.0),
    ],
    ids=["right", "wrong", "always_A", "always_B", "ties", "one_tie"],
)
def test_both_orders_count_a_tie_is_wrong_and_a_favourite_letter_gets_one_half(first, second, right, says_a):
    """Log-probabilities of A and B, the best answer first under A, then under B."""
    rows = Letters("q", "A", *first), Letters("q", "B", *second)
    assert scores(*rows) == ([right], [says_a])
    assert scores(*rows[::-1]) == ([right], [says_a])


def test_scores_follow_the_questions_and_what_was_not_asked_is_nan():
    rows = [Letters("b", "A", -1.0, -2.0), Letters("b", "B", -2.0, -1.0), Letters("a", "A", -3.0, -1.0)]
    right, says_a = scores(*rows, ids=("a", "b", "c"))
    np.testing.assert_array_equal(right, [0.0, 1.0, math.nan])
    np.testing.assert_array_equal(says_a, [0.0, 0.5, math.nan])


def test_a_model_that_always_says_a_gets_exactly_one_half_over_any_questions():
    ids = tuple(f"q{i}" for i in range(31))
    rows = [Letters(name, best, -0.2, -1.7) for name in ids for best in LETTERS]
    right, says_a = scores(*rows, ids=ids)
    assert np.mean(right) == 0.5
    assert np.mean(says_a) == 1.0
