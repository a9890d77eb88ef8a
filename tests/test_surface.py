"""What wording alone gives away: a planted cue is found, questions and labels are not seen, and the published table."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from conftest import TRUTHFULQA, make_questions

from truthsteer import data
from truthsteer.config import DataConfig
from truthsteer.errors import UserError
from truthsteer.metrics import multiple_choice
from truthsteer.records import Choice, Question
from truthsteer.surface import SurfaceModel, matched, shortest
from truthsteer.wording import has_negation


def made_up(count: int, cue: str, seed: int = 0) -> list[Question]:
    """Questions whose true answers alone hold the word `cue`, between words drawn at random."""
    generator = np.random.default_rng(seed)

    def answer(*extra: str) -> str:
        drawn = [f"w{generator.integers(40)}" for _ in range(5)]
        return " ".join([drawn[0], *extra, *drawn[1:]]).capitalize() + "."

    return [
        Question(
            f"q{seed}.{i}",
            i + 2,
            "Adversarial",
            "c",
            f"What about {i}?",
            best := answer(cue),
            (best, answer(cue)),
            tuple(answer("plain") for _ in range(3)),
            i,
        )
        for i in range(count)
    ]


def share(questions, scores, metric: str = "mc1") -> float:
    """The mean over the questions, by way of the records that the table is made of."""
    rows = [
        [Choice(q.id, answer, label, answer == q.best, scores[q.id][answer], 0) for answer, label in q.choices]
        for q in questions
    ]
    return float(np.mean([multiple_choice(row)[metric] for row in rows]))


@pytest.fixture(scope="module")
def real() -> data.QuestionSet:
    if not TRUTHFULQA.exists():
        pytest.skip(f"TruthfulQA.csv is not at {TRUTHFULQA}")
    return data.load(DataConfig(name="real", path=str(TRUTHFULQA)), seed=0)


@pytest.fixture(scope="module")
def crossed(real) -> dict[str, dict[str, float]]:
    """Scores of every question by a model fitted on other folds."""
    config = DataConfig(name="real", path=str(TRUTHFULQA), folds=5)
    scores = {}
    for fold in data.split(real, config, seed=0):
        model = SurfaceModel.fit([*fold.steer, *fold.train, *fold.tune])
        scores |= {question.id: model.score(question) for question in fold.test}
    return scores


@pytest.mark.parametrize("cue", ["mostly", "not", "zebra", "一"])
def test_a_word_that_only_true_answers_hold_is_found_in_new_questions(cue):
    model = SurfaceModel.fit(made_up(60, cue))
    asked = made_up(40, cue, seed=1)
    scores = {question.id: model.score(question) for question in asked}
    assert share(asked, scores) > 0.9
    assert share(asked, scores, "mc3") > 0.9


def test_without_a_cue_there_is_nothing_to_find():
    asked = made_up(200, "plain", seed=1)
    model = SurfaceModel.fit(made_up(60, "plain"))
    assert 0.12 < share(asked, {question.id: model.score(question) for question in asked}) < 0.4


def strange_words(generator: np.random.Generator, count: int) -> list[str]:
    """Words of five letters that hardly ever recur."""
    return ["".join(generator.choice(list("abcdefghijklmnopqrstuvwxyz"), 5)) for _ in range(count)]


def test_being_the_odd_one_out_is_a_cue_of_its_own():
    """Every answer has five new words of five letters: only the overlap with the other answers tells."""
    generator = np.random.default_rng(0)

    def question(i: int) -> Question:
        common = strange_words(generator, 4)
        false = tuple(" ".join([*common, *strange_words(generator, 1)]) + "." for _ in range(3))
        best = " ".join(strange_words(generator, 5)) + "."
        return Question(f"q{i}", i + 2, "Adversarial", "c", "What?", best, (best,), false, i)

    model = SurfaceModel.fit([question(i) for i in range(40)])
    asked = [question(i) for i in range(40)]
    assert share(asked, {item.id: model.score(item) for item in asked}) > 0.9


def test_being_longer_than_the_others_is_a_cue_whatever_the_length():
    generator = np.random.default_rng(0)

    def question(i: int) -> Question:
        size = int(generator.integers(4, 60))
        best, *false = (" ".join(strange_words(generator, size + extra)) + "." for extra in (2, 0, 0, 0))
        return Question(f"q{i}", i + 2, "Adversarial", "c", "What?", best, (best,), tuple(false), i)

    model = SurfaceModel.fit([question(i) for i in range(60)])
    asked = [question(i) for i in range(60)]
    assert share(asked, {item.id: model.score(item) for item in asked}) > 0.9


def test_an_answer_on_both_sides_is_listed_once():
    model = SurfaceModel.fit(made_up(40, "mostly"))
    question = made_up(1, "mostly", seed=1)[0]
    twice = replace(question, correct=(*question.correct, question.incorrect[0]))
    assert model.score(twice) == model.score(question)


def test_neither_question_nor_labels_are_seen_when_answers_are_scored(questions):
    model = SurfaceModel.fit(made_up(40, "mostly"))
    for question in questions:
        scores = model.score(question)
        assert list(scores) == [answer for answer, _ in question.choices]
        assert model.score(replace(question, id="x", text="?", category="other", kind="k", group=99)) == scores
        turned = replace(question, best=question.incorrect[0], correct=question.incorrect, incorrect=question.correct)
        assert model.score(turned) == scores


def test_the_questions_text_is_not_fitted_on_either():
    asked = made_up(40, "mostly")
    renamed = [replace(question, text="Mostly?", category="x", kind="y", group=3) for question in asked]
    one, other = SurfaceModel.fit(asked), SurfaceModel.fit(renamed)
    assert [one.score(question) for question in asked] == [other.score(question) for question in asked]
    assert set(one.terms) <= {
        term for question in asked for answer, _ in question.choices for term in terms_of(answer.lower())
    }


def terms_of(answer: str) -> set[str]:
    tokens = ["^", *answer.rstrip(".").split()]
    return {*tokens, *map(" ".join, pairwise(tokens))}


def test_fitting_twice_gives_the_same_scores():
    asked = made_up(30, "mostly")
    assert SurfaceModel.fit(asked).score(asked[3]) == SurfaceModel.fit(asked).score(asked[3])


def test_answers_alike_in_wording_tie_exactly_and_odd_ones_do_not_crash():
    model = SurfaceModel.fit(make_questions())
    question = make_questions()[0]
    false = ("Zo ka.", "Zu ki.", "。", "...", "ไม่รู้ 不知道", "1,000")
    scores = model.score(replace(question, incorrect=false))
    assert scores["Zo ka."] == scores["Zu ki."]
    assert all(np.isfinite(list(scores.values())))
    lone = replace(question, correct=(question.best,), incorrect=())
    assert np.isfinite(model.score(lone)[question.best])


def test_no_questions_are_an_error_that_says_what_to_type():
    with pytest.raises(UserError, match=r"baselines\.surface=false"):
        SurfaceModel.fit([])


def test_the_shortest_answer_is_chosen_by_characters(questions):
    scores = shortest(questions[0])
    assert scores["No."] == -3
    assert max(scores, key=scores.get) == "No."
    assert list(scores) == [answer for answer, _ in questions[0].choices]


def test_matched_questions_are_those_where_the_rule_is_wrong_or_tied():
    question = Question("a", 2, "Adversarial", "c", "What?", "Best.", ("Best.", "Also."), ("One.", "Two."))
    rows = {
        "right": {"Best.": 2.0, "Also.": 9.0, "One.": 1.0, "Two.": 0.0},
        "tied": {"Best.": 1.0, "Also.": 9.0, "One.": 1.0, "Two.": 0.0},
        "wrong": {"Best.": 1.0, "Also.": 9.0, "One.": 0.0, "Two.": 3.0},
    }
    asked = [replace(question, id=name) for name in rows]
    assert matched(asked, rows) == {"tied", "wrong"}
    with pytest.raises(KeyError):
        matched([question], rows)


def split_ties(questions, rule) -> float:
    """MC1 of a rule that draws among its highest-scoring answers."""
    shares = []
    for question in questions:
        false = [rule(answer) for answer in question.incorrect]
        top = max(rule(question.best), *false)
        shares.append((rule(question.best) == top) / (false.count(top) + 1))
    return float(np.mean(shares))


def test_the_published_rules_on_truthfulqa(real):
    """By the table of the surface forms of the 817 questions; chance is .226."""
    asked = real.questions
    assert split_ties(asked, lambda answer: 0) == pytest.approx(0.226, abs=0.001)
    assert split_ties(asked, lambda answer: -len(answer)) == pytest.approx(0.192, abs=0.002)
    assert split_ties(asked, len) == pytest.approx(0.382, abs=0.002)
    assert split_ties(asked, has_negation) == pytest.approx(0.510, abs=0.005)
    assert np.mean([has_negation(question.best) for question in asked]) == pytest.approx(0.46, abs=0.01)
    assert np.mean([has_negation(a) for q in asked for a in q.incorrect]) == pytest.approx(0.098, abs=0.002)
    assert share(asked, {question.id: shortest(question) for question in asked}) == pytest.approx(0.1775, abs=0.001)


def test_wording_alone_is_far_above_chance_on_truthfulqa(real, crossed):
    mc1 = share(real.questions, crossed)
    assert 0.70 < mc1 < 0.76
    assert 0.67 < share(real.questions, crossed, "mc3") < 0.74
    left = matched(real.questions, crossed)
    assert len(left) == round((1 - mc1) * len(real.questions))
    assert share([question for question in real.questions if question.id in left], crossed) == 0.0


def test_a_model_scored_on_its_own_questions_would_claim_more(real, crossed):
    """Why the caller must pass other questions than those it scores."""
    model = SurfaceModel.fit(real.questions)
    own = {question.id: model.score(question) for question in real.questions}
    assert share(real.questions, own) > share(real.questions, crossed) + 0.15
