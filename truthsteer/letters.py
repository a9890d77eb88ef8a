"""The binary task of TruthfulQA's 2025 version put as letters: (A) or (B), each question in both orders.

It needs the column `Best Incorrect Answer`. The options stand below the question, inside the run's own prompt, and the
log-probabilities of "A" and "B" are compared; a model that always says A gets one half. The same pair by the answers' own
log-probabilities is `mc0`, which needs nothing but the choices.
"""

from __future__ import annotations

from collections.abc import Sequence

from truthsteer.conditions import Vectors, condition_inputs, score_answers
from truthsteer.config import PromptConfig
from truthsteer.records import Condition, Letters, Question
from truthsteer.store import Artifact, Key
from truthsteer.workspace import Workspace, questions_digest

VERSION = 1
LETTERS = ("A", "B")


def asked(question: Question, best: str) -> str:
    """The question with its two options, the best answer under the letter `best`."""
    options = (question.best, question.best_incorrect)
    first, second = options if best == LETTERS[0] else options[::-1]
    return f"{question.text}\n(A) {first}\n(B) {second}\nAnswer with A or B."


def letters_keys(
    ws: Workspace, questions: tuple[Question, ...], prompt: PromptConfig, conditions: Sequence[Condition]
) -> list[Key]:
    what = {
        "model": ws.model_inputs,
        "prompt": ws.prompt_inputs(prompt),
        "questions": questions_digest(questions),
        "incorrect": [question.best_incorrect for question in questions],
    }
    return [Key.of("letters", VERSION, **what, condition=condition_inputs(ws, condition)) for condition in conditions]


def score_letters(
    ws: Workspace,
    questions: tuple[Question, ...],
    prompt: PromptConfig,
    conditions: Sequence[Condition],
    vectors: Vectors,
    description: str,
) -> list[Artifact]:
    """The `Letters` rows of each condition, two per question: the best answer as A, then as B."""
    orders = [(question, best) for question in questions for best in LETTERS]

    def record(place: int, logprobs: list[float], _tokens: list[int]) -> list[Letters]:
        question, best = orders[place]
        return [Letters(question.id, best, *logprobs)]

    keys = letters_keys(ws, questions, prompt, conditions)
    texts = [asked(question, best) for question, best in orders]
    return score_answers(ws, keys, prompt, conditions, texts, [LETTERS] * len(texts), record, vectors, description)
