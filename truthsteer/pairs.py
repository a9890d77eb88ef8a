"""Which true answer is set against which false one. Knows no tokens and no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from truthsteer.abstention import is_abstention
from truthsteer.records import Question


@dataclass(frozen=True)
class Pair:
    """A true and a false answer to the same question."""

    id: str
    question: str
    true: str
    false: str


def make_pairs(questions: Sequence[Question], per_question: int) -> list[Pair]:
    """Pairs of each question: the best answer with the first false one, then the others in order.

    Abstentions make no pairs, so that a truth vector is not a vector toward declining.
    """
    pairs = []
    for question in questions:
        true = [answer for answer in dict.fromkeys((question.best, *question.correct)) if not is_abstention(answer)]
        false = [answer for answer in question.incorrect if answer not in true and not is_abstention(answer)]
        for index, (yes, no) in enumerate(list(zip(true, false, strict=False))[:per_question]):
            pairs.append(Pair(f"{question.id}.{index}", question.id, yes, no))
    return pairs
