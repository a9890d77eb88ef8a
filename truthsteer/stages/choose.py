"""choose: the log-probability of every answer of the test questions, under every condition of a fold.

Where the data names a best incorrect answer (its 2025 version), also the binary task with letters.
"""

from __future__ import annotations

from truthsteer import baselines
from truthsteer.conditions import choices_keys, per_prompt, score_choices, vectors_of
from truthsteer.config import PromptConfig, Stage
from truthsteer.letters import letters_keys, score_letters
from truthsteer.records import MODEL_FREE, Condition, Question, Splits
from truthsteer.store import Artifact
from truthsteer.workspace import Workspace


def run(ws: Workspace, split: Splits, bank: Artifact, conditions: list[Condition]) -> list[Artifact]:
    """One artifact of `Choice` rows per condition, in their order."""
    vectors, description = vectors_of(bank), ws.label("choose: answers", split)

    def make(prompt: PromptConfig, own: list[Condition]) -> list[Artifact]:
        if not ws.runs(Stage.choose):
            return [ws.store.need(key, "choose") for key in choices_keys(ws, split.test, prompt, own)]
        return score_choices(ws, split.test, prompt, own, vectors, description)

    return baselines.beside(
        conditions,
        lambda asked: per_prompt(ws, split, asked, make),
        lambda item: baselines.choices(ws, split, item),
    )


def letters(ws: Workspace, split: Splits, bank: Artifact, conditions: list[Condition]) -> dict[str, Artifact]:
    """Condition -> artifact of `Letters` rows, of those that ask a model; empty if no question has the task."""
    questions: tuple[Question, ...] = tuple(question for question in split.test if question.best_incorrect is not None)
    if not questions:
        return {}
    vectors, description = vectors_of(bank), ws.label("choose: A or B", split)

    def make(prompt: PromptConfig, own: list[Condition]) -> list[Artifact]:
        if not ws.runs(Stage.choose):
            return [ws.store.need(key, "choose") for key in letters_keys(ws, questions, prompt, own)]
        return score_letters(ws, questions, prompt, own, vectors, description)

    asked = [item for item in conditions if item.kind not in MODEL_FREE]
    return dict(zip([item.name for item in asked], per_prompt(ws, split, asked, make), strict=True))
