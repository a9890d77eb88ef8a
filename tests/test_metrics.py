"""Multiple choice from log-probabilities, and the judges' scores per question."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from truthsteer.metrics import choice_scores, is_binary, judge_columns, judge_scores, lengths, multiple_choice
from truthsteer.records import Choice, Completion, Verdict


def choices(best: float, true: list[float], false: list[float], question: str = "q1") -> list[Choice]:
    rows = [Choice(question, "best", True, True, best, 3)]
    rows += [Choice(question, f"true {i}", True, False, value, 3) for i, value in enumerate(true)]
    return rows + [Choice(question, f"false {i}", False, False, value, 3) for i, value in enumerate(false)]


def test_the_three_metrics_by_hand():
    found = multiple_choice(choices(math.log(0.3), [math.log(0.1)], [math.log(0.2), math.log(0.05)]))
    assert found["mc1"] == 1
    assert found["mc2"] == pytest.approx(0.4 / 0.65)
    assert found["mc3"] == 0.5
    assert found["ties"] == 0


def test_a_tie_is_wrong_and_counted():
    found = multiple_choice(choices(-2.0, [-1.0], [-2.0, -3.0]))
    assert (found["mc1"], found["mc3"], found["ties"]) == (0, 0.5, 1)


def test_a_true_answer_above_the_best_does_not_help_mc1():
    assert multiple_choice(choices(-3.0, [-1.0], [-2.0]))["mc1"] == 0


def test_mc2_does_not_underflow():
    found = multiple_choice(choices(-5000.0, [-5001.0], [-5000.0]))
    assert found["mc2"] == pytest.approx((1 + math.exp(-1)) / (2 + math.exp(-1)))


def test_a_best_answer_that_is_also_listed_as_false_counts_as_false():
    rows = [Choice("q1", "both", False, True, -1.0, 2), Choice("q1", "true", True, False, -2.0, 2)]
    found = multiple_choice([*rows, Choice("q1", "false", False, False, -3.0, 2)])
    assert (found["mc1"], found["mc3"], found["ties"]) == (0, 0, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_names_its_question(bad):
    with pytest.raises(ValueError, match=r"question q7: .*'false 0'"):
        multiple_choice(choices(-1.0, [], [bad], question="q7"))


@pytest.mark.parametrize("rows", [choices(-1.0, [], []), choices(-1.0, [], [-2.0])[1:]])
def test_a_question_without_best_or_false_answer_is_refused(rows):
    with pytest.raises(ValueError, match="question q1: multiple choice needs"):
        multiple_choice(rows)


logprobs = st.lists(st.floats(-300, 0), min_size=1, max_size=6)


@given(best=st.floats(-300, 0), true=logprobs, false=logprobs, shift=st.floats(-1000, 0))
def test_metrics_are_shares_and_ignore_a_common_shift_and_the_order(best, true, false, shift):
    rows = choices(best, true, false)
    found = multiple_choice(rows)
    assert all(0 <= value <= 1 for value in found.values())
    assert found["mc1"] <= (found["mc3"] > 0)
    assert multiple_choice(rows[::-1]) == pytest.approx(found)
    shifted = [Choice(r.question, r.answer, r.label, r.best, r.logprob + shift, 3) for r in rows]
    assert multiple_choice(shifted)["mc2"] == pytest.approx(found["mc2"], abs=1e-9)


def test_scores_follow_the_questions_and_gaps_are_nan():
    rows = choices(-1.0, [], [-2.0], "b") + choices(-2.0, [], [-1.0], "a")
    scores = choice_scores(rows, ["a", "b", "c"])
    np.testing.assert_array_equal(scores["mc1"], [0, 1, math.nan])
    words = lengths([Completion("b", "two  words\n", 5, "eos"), Completion("a", "", 0, "eos")], ["a", "b", "c"])
    np.testing.assert_array_equal(words, [0, 2, math.nan])


def verdict(question: str, **scores: float | None) -> Verdict:
    return Verdict(question, "ok", dict(scores))


def test_the_first_judge_that_scores_truth_fills_the_table():
    row = {
        "semantic": [verdict("q", semantic_acc=1.0)],
        "llm": [verdict("q", true=1.0)],
        "reference": [verdict("q", true=0.0, info=1.0, abstain=0.0)],
    }
    columns = judge_columns([row, row])
    assert columns["true"] == ("llm", "true")
    assert columns["info"] == ("reference", "info")
    assert columns["abstain"] == ("reference", "abstain")
    assert columns["semantic_acc"] == ("semantic", "semantic_acc")
    assert columns["reference_true"] == ("reference", "true")
    assert len(columns) == 5


def test_info_comes_from_the_judge_of_truth_if_it_has_it():
    row = {"informative": [verdict("q", info=0.0)], "reference": [verdict("q", true=1.0, info=1.0)]}
    assert judge_columns([row])["info"] == ("reference", "info")
    assert judge_columns([row])["informative_info"] == ("informative", "info")


def test_true_info_is_a_product_per_answer_and_undecided_is_nan():
    rows = {
        "j": [
            verdict("a", true=1.0, info=1.0),
            verdict("b", true=1.0, info=0.0),
            verdict("c", true=None, info=1.0),
        ]
    }
    scores = judge_scores(rows, judge_columns([rows]), ["c", "b", "a", "missing"])
    np.testing.assert_array_equal(scores["true_info"], [math.nan, 0, 1, math.nan])
    np.testing.assert_array_equal(scores["true"], [math.nan, 1, 1, math.nan])


def test_binary_is_read_off_the_values_but_never_for_probability_mass():
    assert is_binary("true", np.array([0, 1, math.nan]))
    assert not is_binary("semantic_diff", np.array([0.0, 0.5]))
    assert not is_binary("mc2", np.array([0.0, 1.0]))
