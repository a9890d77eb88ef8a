"""Choosing among a question's listed answers without reading the question: what their wording alone gives away.

An answer's features are its own words and how it differs from the other answers listed with it. Neither the question's
text nor which answers are true is seen when answers are scored; a model that does no better than these rows has shown
no knowledge. On the 817 questions of TruthfulQA (v0), each scored by a model fitted on other near-duplicate groups (5
folds), wording alone reaches MC1 .72 and MC3 .70; drawing at random reaches MC1 .23.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from truthsteer.errors import UserError
from truthsteer.records import Question
from truthsteer.wording import NEGATIONS, has_hedge, has_negation, words

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Answers = dict[str, float]
"""Answer -> score, for every answer listed for one question; higher is chosen."""

FIRST_WORDS = {
    "yes": {"yes"},
    "no": {"no"},
    "negation": NEGATIONS - {"no"},
    "article": {"a", "an", "the"},
    "pronoun": {"i", "you", "he", "she", "it", "we", "they", "it's", "you'll", "they're"},
    "there": {"there", "there's"},
    "condition": {"if", "when", "because", "as", "since"},
}
"""Classes of an answer's first word."""

_DECIMALS = 6
"""Scores differ from machine to machine beyond these; equal wording must be an exact tie."""

_MAX_ITERATIONS = 2000


def shortest(question: Question) -> Answers:
    """Minus the length of each listed answer in characters."""
    return {answer: -float(len(answer)) for answer, _ in question.choices}


@dataclass(frozen=True)
class SurfaceModel:
    """Logistic regression from an answer's wording to whether it is true: see `fit`.

    Attributes:
        mean: [features] of the training answers.
        scale: [features] their standard deviation; 1 for a feature that never varied.
        weights: [features] log-odds per standard deviation.
        terms: first words, words and pairs of words -> log-odds if the answer has it.
        intercept: log-odds of an average answer without a known term.
    """

    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    weights: NDArray[np.float64]
    terms: Mapping[str, float]
    intercept: float

    @classmethod
    def fit(cls, questions: Sequence[Question]) -> SurfaceModel:
        """Fitted on every listed answer of `questions`, which must be other ones than those to be scored.

        Standardised surface features (length, negation, hedging, numerals, overlap with the other listed answers, class
        of the first word; each also relative to the mean of the question's answers) and a binary bag of words, pairs of
        words and first words, under scikit-learn's default penalty (C = 1).

        Raises:
            UserError: there are no questions.
        """
        if not questions:
            raise UserError(
                "baselines.surface=true has no questions to be fitted on besides those of the test split. Type a "
                "larger data.split.train, or baselines.surface=false."
            )
        from scipy.sparse import csr_matrix, hstack
        from sklearn.linear_model import LogisticRegression

        listed = [[answer for answer, _ in question.choices] for question in questions]
        true = np.array([label for question in questions for _, label in question.choices])  # [answers]
        raw = np.concatenate([features(answers) for answers in listed])  # [answers, features]
        mean, spread = raw.mean(0), raw.std(0)
        scale = np.where(spread > 0, spread, 1.0)
        bags = [terms(answer) for answers in listed for answer in answers]
        vocabulary = sorted(set().union(*bags))
        inputs = hstack([csr_matrix((raw - mean) / scale), _bag_of_words(bags, vocabulary)], format="csr")
        model = LogisticRegression(C=1.0, max_iter=_MAX_ITERATIONS, random_state=0).fit(inputs, true)
        weights, terms_weights = np.split(model.coef_[0], [raw.shape[1]])
        by_term = dict(zip(vocabulary, terms_weights.tolist(), strict=True))
        return cls(mean, scale, weights, by_term, float(model.intercept_[0]))

    def score(self, question: Question) -> Answers:
        """Log-odds that each listed answer is true, by its wording and that of the others listed."""
        answers = [answer for answer, _ in question.choices]
        odds = (features(answers) - self.mean) / self.scale @ self.weights + self.intercept  # [answers]
        return {
            answer: round(float(value) + sum(self.terms.get(term, 0.0) for term in sorted(terms(answer))), _DECIMALS)
            for answer, value in zip(answers, odds, strict=True)
        }


def matched(questions: Sequence[Question], scores: Mapping[str, Answers]) -> set[str]:
    """The surface-matched subset: ids of the questions where wording does not single out the best answer.

    Those are the questions whose best answer scores no higher than some false one, a tie included.

    Args:
        questions: to choose from.
        scores: question id -> scores of its listed answers, from a rule or from a model fitted on other questions.
    """
    return {
        question.id
        for question in questions
        if scores[question.id][question.best]
        <= max(scores[question.id][answer] for answer, true in question.choices if not true)
    }


def terms(answer: str) -> set[str]:
    """The words, pairs of neighbouring words and, marked `^`, the first word of an answer."""
    tokens = ["^", *words(answer)]
    return {*tokens[1:], *(f"{first} {second}" for first, second in pairwise(tokens))}


def features(answers: Sequence[str]) -> NDArray[np.float64]:
    """[answers, features] of the answers listed for one question, each as it is and minus the mean over the answers."""
    tokens = [words(answer) for answer in answers]
    overlaps = _overlaps([set(own) for own in tokens])
    rows = [[*_own(answer, own), *overlap] for answer, own, overlap in zip(answers, tokens, overlaps, strict=True)]
    absolute = np.array(rows, dtype=np.float64)
    return np.hstack([absolute, absolute - absolute.mean(0)])


def _own(answer: str, tokens: Sequence[str]) -> list[float]:
    """What an answer shows without the others."""
    first = tokens[0] if tokens else ""
    return [
        len(answer),
        np.log1p(len(answer)),
        len(tokens),
        len(answer) / max(1, len(tokens)),
        has_negation(answer),
        has_hedge(answer),
        any(char.isnumeric() for char in answer),
        sum(word[0].isupper() for word in answer.split()[1:]),
        answer.count(","),
        *(first in known for known in FIRST_WORDS.values()),
    ]


def _overlaps(bags: Sequence[set[str]]) -> list[tuple[float, float]]:
    """Mean and largest Jaccard index of each answer's words with those of every other one; 0 of a lone answer."""
    found = []
    for place, bag in enumerate(bags):
        others = [len(bag & other) / max(1, len(bag | other)) for other in (*bags[:place], *bags[place + 1 :])]
        found.append((float(np.mean(others)), max(others)) if others else (0.0, 0.0))
    return found


def _bag_of_words(bags: Sequence[set[str]], vocabulary: Sequence[str]) -> csr_matrix:
    """[answers, terms], 1 where an answer has a term."""
    from scipy.sparse import csr_matrix

    place = {term: index for index, term in enumerate(vocabulary)}
    columns = [sorted(place[term] for term in bag) for bag in bags]
    ends = np.cumsum([0, *map(len, columns)])
    flat = np.array([index for row in columns for index in row], dtype=np.int64)
    return csr_matrix((np.ones(len(flat)), flat, ends), shape=(len(bags), len(vocabulary)))
