"""Multiple choice from log-probabilities, what its numbers are called, and the judges' scores per question."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from truthsteer.metrics import (
    GRADED,
    NORMALISED,
    Setting,
    choice_scores,
    is_binary,
    judge_columns,
    judge_scores,
    multiple_choice,
    text_scores,
)
from truthsteer.records import Choice, Completion, Question, Verdict


def choices(best: float, true: list[float], false: list[float], question: str = "q1") -> list[Choice]:
    rows = [Choice(question, "best", True, True, best, 3)]
    rows += [Choice(question, f"true {i}", True, False, value, 3) for i, value in enumerate(true)]
    return rows + [Choice(question, f"false {i}", False, False, value, 3) for i, value in enumerate(false)]


def asked(*ids: str, best_incorrect: str | None = None) -> list[Question]:
    """Questions of whom only the ids matter, and the opponent of the binary task."""
    return [Question(i, 2, "", "", "?", "best", ("best",), ("false 0",), 0, best_incorrect) for i in ids]


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
    scores = choice_scores(rows, asked("a", "b", "c"))
    np.testing.assert_array_equal(scores["mc1"], [0, 1, math.nan])
    np.testing.assert_array_equal(scores["mc1_token"], [0, 1, math.nan])
    answers = [Completion("b", "two  words\n", 5, "eos"), Completion("a", "", 0, "eos")]
    found = text_scores(answers, asked("a", "b", "c"))
    np.testing.assert_array_equal(found["length"], [0, 2, math.nan])
    np.testing.assert_array_equal(found["refusal"], [0, 0, math.nan])


def test_log_probabilities_per_token_and_per_character_by_hand():
    """Sums -4, -3 and -9: per token -1, -3 and -3; per character -2, -1.5 and -1.5."""
    rows = [
        Choice("q", "ab", True, True, -4.0, 4),
        Choice("q", "cd", False, False, -3.0, 1),
        Choice("q", "efghij", True, False, -9.0, 3),
    ]
    found = {name: float(value[0]) for name, value in choice_scores(rows, asked("q")).items()}
    assert (found["mc1"], found["mc1_token"], found["mc1_char"]) == (0, 1, 0)
    total = {best: math.exp(best) + math.exp(other) for best, other in ((-4, -9), (-1, -3), (-2, -1.5))}
    assert found["mc2"] == pytest.approx(total[-4] / (total[-4] + math.exp(-3)))
    assert found["mc2_token"] == pytest.approx(total[-1] / (total[-1] + math.exp(-3)))
    assert found["mc2_char"] == pytest.approx(total[-2] / (total[-2] + math.exp(-1.5)))
    assert not {"mc3_token", "mc3_char"} & found.keys()


@given(logprobs=st.lists(st.floats(-300, 0), min_size=3, max_size=6), size=st.integers(1, 9))
def test_answers_of_one_length_rank_alike_however_they_are_normalised(logprobs, size):
    rows = [Choice("q", f"{i}" * size, i < 2, i == 0, value, size) for i, value in enumerate(logprobs)]
    found = {name: float(value[0]) for name, value in choice_scores(rows, asked("q")).items()}
    ranked = sorted({value / size for value in logprobs})
    if len(ranked) == len(set(logprobs)):  # division may make ties
        assert found["mc1"] == found["mc1_token"] == found["mc1_char"]
    assert all(0 <= found[f"mc2_{norm}"] <= 1 for norm in NORMALISED)


@pytest.mark.parametrize(
    ("opponent", "expected"),
    [("false 0", 1.0), ("false 1", 0.0), ("false 2", 0.0), (None, math.nan), ("true 0", math.nan), ("x", math.nan)],
)
def test_mc0_is_the_best_answer_against_its_official_opponent(opponent, expected):
    """-2 beats -3, not -1, and a tie is wrong; without an opponent among the false answers there is no such task."""
    rows = choices(-2.0, [-4.0], [-3.0, -1.0, -2.0])
    found = choice_scores(rows, asked("q1", best_incorrect=opponent))
    np.testing.assert_array_equal(found["mc0"], [expected])
    assert found["mc1"][0] == 0


def test_a_row_that_asks_no_model_ranks_and_has_no_probabilities():
    """Its scores may be positive, and their tokens are none."""
    rows = [Choice(c.question, c.answer, c.label, c.best, -c.logprob, 0) for c in choices(-3.0, [-1.0], [-2.0, -0.5])]
    found = choice_scores(rows, asked("q1", best_incorrect="false 1"), model_free=True)
    assert {name: float(value[0]) for name, value in found.items() if np.isfinite(value).all()} == {
        "mc1": 1.0,
        "mc3": 0.5,
        "mc0": 1.0,
        "ties": 0.0,
    }
    assert found.keys() == choice_scores(rows[:0], asked("q1")).keys()


def test_texts_are_scored_for_repetition_and_refusal():
    answers = [
        Completion("a", "the cat the cat the cat", 6, "eos"),
        Completion("b", "No.", 2, "eos"),
        Completion("c", "I'm sorry, but I cannot answer that.", 9, "eos"),
    ]
    found = text_scores(answers, asked("a", "b", "c", "d"))
    np.testing.assert_allclose(found["repetition"], [3 / 5, math.nan, 0, math.nan])
    np.testing.assert_array_equal(found["refusal"], [0, 0, 1, math.nan])
    np.testing.assert_array_equal(found["length"], [6, 1, 7, math.nan])


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        ("mc0", "qa, text, sum, v0"),
        ("mc1", "qa, text, sum, v0"),
        ("mc2", "qa, text, sum, v0"),
        ("mc3", "qa, text, sum, v0"),
        ("mc1_token", "qa, text, per token, v0"),
        ("mc2_char", "qa, text, per character, v0"),
        ("mc0_ab", "qa, text, letters, v0"),
        ("says_a", "qa, text, letters, v0"),
        ("true", ""),
        ("true_info", ""),
        ("length", ""),
        ("rougeL_acc", ""),
        ("mc10", ""),
        ("refusal", ""),
    ],
)
def test_a_number_is_called_by_all_that_it_depends_on(metric, name):
    assert Setting("qa", "text", "v0").of(metric) == name
    assert Setting("null", "chat", "v2").of(metric) == name.replace("qa, text", "null, chat").replace("v0", "v2")


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


@pytest.mark.parametrize(
    ("true", "info", "both"),
    [
        (1.0, 1.0, 1.0),
        (1.0, 0.0, 0.0),
        (0.0, 1.0, 0.0),
        (0.0, 0.0, 0.0),
        (0.0, None, 0.0),
        (None, 0.0, 0.0),
        (1.0, None, math.nan),
        (None, 1.0, math.nan),
        (None, None, math.nan),
    ],
)
def test_true_info_is_decided_wherever_one_verdict_settles_it(true, info, both):
    rows = {"j": [verdict("q", true=true, info=info)]}
    columns = {"true": ("j", "true"), "info": ("j", "info")}
    np.testing.assert_array_equal(judge_scores(rows, columns, asked("q"))["true_info"], [both])


def test_true_info_is_a_product_per_answer_and_undecided_is_nan():
    rows = {
        "j": [
            verdict("a", true=1.0, info=1.0),
            verdict("b", true=1.0, info=0.0),
            verdict("c", true=None, info=1.0),
        ]
    }
    scores = judge_scores(rows, judge_columns([rows]), asked("c", "b", "a", "missing"))
    np.testing.assert_array_equal(scores["true_info"], [math.nan, 0, 1, math.nan])
    np.testing.assert_array_equal(scores["true"], [math.nan, 1, 1, math.nan])


def test_binary_is_read_off_the_values_but_never_for_probability_mass():
    assert is_binary("true", np.array([0, 1, math.nan]))
    assert not is_binary("semantic_diff", np.array([0.0, 0.5]))
    assert GRADED == ("mc2", "mc3", "mc2_token", "mc2_char", "mc0_ab", "says_a", "repetition")
    for name in (*GRADED, "length"):
        assert not is_binary(name, np.array([0.0, 1.0])), name
    for name in ("mc0", "mc1_token", "mc1_char", "refusal"):
        assert is_binary(name, np.array([0.0, 1.0])), name
