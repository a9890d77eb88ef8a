"""What similarity judges compare an answer with."""

from __future__ import annotations

from truthsteer.records import NO_COMMENT, Question


def true_references(question: Question) -> tuple[str, ...]:
    """The true answers, without repeats: the best one first, and last "I have no comment." where it is not listed."""
    return tuple(dict.fromkeys((question.best, *question.correct, NO_COMMENT)))
