"""Rows without steering: another prompt, answered questions first, and what abstaining, brevity or wording would score.

The last three ask no model. Their multiple-choice "log-probabilities" are scores (minus the length, a classifier's
log-odds), so that MC1 and MC3 mean what they mean elsewhere and MC2 means nothing. The classifier of `surface` never sees a
question, nor any answer of a test question: it is fitted on the other roles of the fold, which are all that the vector has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from truthsteer.conditions import choices_of
from truthsteer.config import FEW_SHOT, BaselinesConfig, Stage
from truthsteer.records import (
    MODEL_FREE,
    NO_COMMENT,
    Choice,
    Completion,
    Condition,
    ConditionKind,
    Question,
    Splits,
)
from truthsteer.store import Artifact, Key, write_rows
from truthsteer.workspace import Workspace, questions_digest

VERSION = 1


def conditions(config: BaselinesConfig, split: Splits) -> list[Condition]:
    """Every row of a fold without steering but the baseline itself; few-shot examples come from its train questions."""
    return [
        Condition(name, kind, split.fold, prompt=prompt)
        for name, (kind, prompt) in _rows(config).items()
        if kind is not ConditionKind.FEW_SHOT or split.train
    ]


def names(config: BaselinesConfig) -> list[str]:
    """What the rows are called, for the plan."""
    return list(_rows(config))


def _rows(config: BaselinesConfig) -> dict[str, tuple[ConditionKind, str]]:
    """Name -> (kind, prompt)."""
    rows = {f"prompt {name}": (ConditionKind.PROMPT, name) for name in sorted(config.prompts)}
    if config.few_shot:
        rows["few-shot"] = (ConditionKind.FEW_SHOT, FEW_SHOT)
    free = {
        "always abstain": (ConditionKind.ABSTAIN, config.abstain),
        "shortest answer": (ConditionKind.SHORTEST, config.shortest),
        "wording alone": (ConditionKind.SURFACE, config.surface),
    }
    return rows | {name: (kind, "") for name, (kind, wanted) in free.items() if wanted}


def beside(
    conditions: Sequence[Condition],
    asked: Callable[[list[Condition]], list[Artifact]],
    free: Callable[[Condition], Artifact],
) -> list[Artifact]:
    """One artifact per condition, in their order: of those that ask a model, all at once, and of the others, singly."""
    artifacts = iter(asked([condition for condition in conditions if condition.kind not in MODEL_FREE]))
    return [free(item) if item.kind in MODEL_FREE else next(artifacts) for item in conditions]


def choices(ws: Workspace, split: Splits, condition: Condition) -> Artifact:
    """The `Choice` rows of a condition that asks no model; none for `abstain`."""
    return _made(ws, Stage.choose, "choices", split, condition, lambda: _choices(split, condition.kind))


def completions(ws: Workspace, split: Splits, condition: Condition) -> Artifact:
    """The `Completion` rows of a condition that asks no model; only `abstain` has any."""
    abstains = condition.kind is ConditionKind.ABSTAIN
    rows = [Completion(question.id, NO_COMMENT, 0, "fixed") for question in split.test] if abstains else []
    return _made(ws, Stage.generate, "completions", split, condition, lambda: rows)


def _made(
    ws: Workspace, stage: Stage, kind: str, split: Splits, condition: Condition, rows: Callable[[], list[Any]]
) -> Artifact:
    key = Key.of(
        kind,
        VERSION,
        model_free=condition.kind.value,
        questions=questions_digest(split.test),
        fitted_on=questions_digest(fitted_on(split)) if condition.kind is ConditionKind.SURFACE else None,
    )
    if not ws.runs(stage):
        return ws.store.need(key, stage.value)

    def write(folder: Path) -> None:
        write_rows(folder, rows())

    return ws.store.make(key, write)


def fitted_on(split: Splits) -> tuple[Question, ...]:
    """The questions that the classifier may see: all of the fold but the test questions, on equal terms with the vector."""
    return (*split.steer, *split.train, *split.tune)


def _choices(split: Splits, kind: ConditionKind) -> list[Choice]:
    from truthsteer.surface import SurfaceModel, shortest

    if kind is ConditionKind.ABSTAIN:
        return []
    score = shortest if kind is ConditionKind.SHORTEST else SurfaceModel.fit(fitted_on(split)).score
    rows = []
    for question in split.test:
        scores = score(question)
        rows += choices_of(question, [scores[answer] for answer, _ in question.choices], [0] * len(question.choices))
    return rows
