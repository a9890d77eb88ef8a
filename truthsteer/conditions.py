"""Conditions as artifacts: which key a condition has, and its answers' log-probabilities.

A condition's artifact depends on what it does (vector's content, layer, coefficient, operator), not on its name or the
run that asked: the baseline is scored and generated once per model, dtype, prompt and questions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from truthsteer.component import content
from truthsteer.records import Choice, Condition, Question
from truthsteer.store import Artifact, JournalRow, Key
from truthsteer.workspace import Workspace, questions_digest

if TYPE_CHECKING:
    from truthsteer.hooks import Injection

CHOICES_VERSION = 1


def condition_inputs(ws: Workspace, condition: Condition) -> dict[str, Any] | None:
    """What a condition does, for keys; None for the baseline."""
    if condition.layer is None:
        return None
    return {
        "layer": condition.layer,
        "coefficient": condition.coefficient,
        "vector": condition.vector_sha256,
        "operator": content(ws.config.operator, ws.operator),
    }


def injections(conditions: Sequence[Condition], vectors: Mapping[str, np.ndarray]) -> list[Injection | None]:
    """What each condition adds, from the bank's vectors ([hidden] float32 each, in coefficient units)."""
    import torch

    from truthsteer.hooks import Injection

    return [
        None
        if condition.layer is None
        else Injection(condition.layer, torch.from_numpy(vectors[condition.vector].copy()), condition.coefficient)
        for condition in conditions
    ]


def choices_key(ws: Workspace, questions: tuple[Question, ...], condition: Condition) -> Key:
    return Key.of(
        "choices",
        CHOICES_VERSION,
        model=ws.model_inputs,
        prompt=ws.prompt_inputs,
        questions=questions_digest(questions),
        condition=condition_inputs(ws, condition),
    )


def score_conditions(
    ws: Workspace,
    questions: tuple[Question, ...],
    conditions: Sequence[Condition],
    vectors: Callable[[], Mapping[str, np.ndarray]],
    description: str,
) -> list[Artifact]:
    """The `Choice` rows of each condition, scoring together those that are not in the store.

    Args:
        ws: the workspace.
        questions: whose answers are scored.
        conditions: under what.
        vectors: gives the bank's vectors; called only if something must be scored.
        description: for the progress bar.

    Raises:
        UserError: a text is too long, or a log-probability is not finite.
    """
    keys = [choices_key(ws, questions, condition) for condition in conditions]
    by_digest = {key.digest: condition for key, condition in zip(keys, conditions, strict=True)}

    def compute(plan: Sequence[str], done: Callable[[int], bool]) -> Iterator[tuple[int, list[JournalRow]]]:
        from truthsteer.prompts import check_length
        from truthsteer.scoring import score

        lm, prompts = ws.model, ws.prompts
        labels = [dict(question.choices) for question in questions]
        answers = [list(own) for own in labels]
        branches = prompts.branches([question.text for question in questions], answers)
        check_length(
            branches, [question.text for question in questions], ws.config.steering.max_length, "steering.max_length"
        )
        ws.store.facts["merged_answers"] = prompts.merged
        first = [0]
        for own in answers:
            first.append(first[-1] + len(own))
        injected = injections([by_digest[digest] for digest in plan], vectors())
        with ws.progress(description, len(plan) * first[-1]) as advance:
            units = score(lm, branches, injected, ws.operator, ws.config.batch_tokens, done)
            for unit, scores in units:
                rows = []
                for item in scores:
                    question = questions[item.branch]
                    answer = answers[item.branch][item.continuation]
                    choice = Choice(
                        question.id,
                        answer,
                        labels[item.branch][answer],
                        answer == question.best,
                        item.logprob,
                        len(branches[item.branch].continuations[item.continuation]),
                    )
                    rows.append(JournalRow(plan[item.condition], first[item.branch] + item.continuation, choice))
                advance(len(rows))
                yield unit, rows

    return ws.store.make_rows(keys, {"batch_tokens": ws.config.batch_tokens}, compute)
