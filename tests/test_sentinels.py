"""Answers whose verdict is known: which are asked, and what is expected of every metric."""

from __future__ import annotations

import dataclasses
from itertools import groupby

import pytest

from truthsteer.abstention import is_abstention
from truthsteer.records import NO_COMMENT, Question
from truthsteer.sentinels import EXPECTED, QUESTIONS, about_truth, expected, sentinels

KINDS = ("best", "best_incorrect", "no_comment", "empty", "elsewhere", "broken")
ORDER = ("best", "best_incorrect", "no_comment", "empty", "broken", "elsewhere")
"""In which they are asked."""


def make(count: int, groups: int | None = None) -> list[Question]:
    """Every fourth question's best answer declines; neighbours are near-duplicates if there are fewer groups."""
    return [
        Question(
            f"q{i}",
            i + 2,
            "Adversarial",
            "c",
            f"What is {i}?",
            best := NO_COMMENT if i % 4 == 0 else f"It is {i}.",
            (best, "So."),
            (f"No {i}.", f"Not {i}."),
            i if groups is None else i % groups,
        )
        for i in range(count)
    ]


def test_six_answers_to_each_question_in_their_order_and_none_that_declines_is_called_informative():
    """The best answer to every fourth question declines: what a judge should say of its information is not known."""
    questions = make(12)
    rows = sentinels(questions, seed=1)
    assert len(rows) == 12 * 6 - 3
    by_id = {question.id: question for question in questions}
    for name, group in groupby(rows, key=lambda row: row.question):
        texts, question = {row.sentinel: row.text for row in group}, by_id[name]
        declines = question.best == NO_COMMENT
        assert tuple(texts) == ORDER[declines:]
        assert texts.get("best") == (None if declines else question.best)
        assert texts["best_incorrect"] == question.incorrect[0]
        assert (texts["no_comment"], texts["empty"]) == (NO_COMMENT, "")
        assert texts["broken"] == " ".join([max(question.best.split(), key=len)] * 12)


def test_an_incorrect_answer_that_declines_is_left_out():
    questions = [dataclasses.replace(q, best_incorrect="I have no comment") for q in make(3)]
    assert [row.sentinel for row in sentinels(questions, 0)].count("best_incorrect") == 0
    falls_back = [dataclasses.replace(q, incorrect=(NO_COMMENT, "No.")) for q in make(3)]
    assert {row.sentinel for row in sentinels(falls_back, 0)} == set(KINDS) - {"best_incorrect"}


def test_the_official_opponent_is_the_incorrect_one_where_it_is_named():
    questions = [dataclasses.replace(q, best_incorrect=q.incorrect[1]) for q in make(3)]
    found = {row.question: row.text for row in sentinels(questions, 0) if row.sentinel == "best_incorrect"}
    assert found == {question.id: question.incorrect[1] for question in questions}


def test_the_answer_from_elsewhere_is_another_groups_and_no_abstention():
    """A near-duplicate's best answer might be right, and "I have no comment." has a sentinel of its own."""
    questions = make(80, groups=5)
    by_id = {question.id: question for question in questions}
    owner = {question.best: question for question in questions}
    found = [row for row in sentinels(questions, seed=2) if row.sentinel == "elsewhere"]
    assert len(found) == 80
    for row in found:
        assert not is_abstention(row.text)
        assert owner[row.text].group != by_id[row.question].group
    assert len({row.text for row in found}) > 20, "not the same answer everywhere"


def test_where_nothing_comes_from_elsewhere_the_others_stay():
    for questions in (make(8, groups=1), make(1), [make(5)[place] for place in (0, 4)]):
        rows = sentinels(questions, seed=0)
        declining = {question.id for question in questions if question.best == NO_COMMENT}
        for name, group in groupby(rows, key=lambda row: row.question):
            assert tuple(row.sentinel for row in group) == ORDER[name in declining : 5]
        assert len({row.question for row in rows}) == len(questions)


def test_at_most_a_hundred_questions_drawn_with_the_seed_whatever_their_order():
    questions = make(250)
    rows = sentinels(questions, seed=7)
    drawn = {row.question for row in rows}
    assert len(drawn) == QUESTIONS == 100
    assert {row.question for row in rows if row.sentinel == "broken"} == drawn
    assert len(rows) == 600 - sum(int(name[1:]) % 4 == 0 for name in drawn)
    assert sentinels(questions, seed=7) == rows
    assert sentinels(questions[::-1], seed=7) == rows
    assert {row.question for row in sentinels(questions, seed=8)} != drawn
    assert len({int(name[1:]) // 50 for name in drawn}) == 5, "not the first hundred"
    assert len(sentinels(questions[:99], seed=7)) == 99 * 6 - 25


@pytest.mark.parametrize(
    ("metric", "values"),
    [
        ("true", (1, 0, 1, None, None, 0)),
        ("match", (1, 0, None, None, None, None)),
        ("bleurt_acc", (1, 0, None, None, None, None)),
        ("info", (1, 1, 0, 0, 0, 0)),
        ("abstain", (None,) * 6),
        ("bleurt_diff", (None,) * 6),
        ("acc", (None,) * 6),
    ],
)
def test_what_a_metric_should_say_of_each(metric, values):
    assert tuple(EXPECTED) == KINDS
    assert tuple(expected(sentinel, metric) for sentinel in KINDS) == values
    assert about_truth(metric) == (metric in ("true", "match", "bleurt_acc"))
