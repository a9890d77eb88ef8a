"""Conditions as artifacts: which key a condition has, and log-probabilities of answers under many of them at once.

A condition's artifact depends on what it does (vector's content, layer, coefficient, operator, prompt), not on its name
or the run that asked: the baseline is scored and generated once per model, dtype, prompt and questions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from safetensors.numpy import load_file

from truthsteer.component import content
from truthsteer.config import PromptConfig
from truthsteer.records import Choice, Condition, Question, Splits
from truthsteer.store import Artifact, JournalRow, Key
from truthsteer.workspace import Workspace, questions_digest

if TYPE_CHECKING:
    from truthsteer.hooks import Injection

T = TypeVar("T")

CHOICES_VERSION = 1

PLAN = 3
"""Of how `branching` divides work into units: raise it with that, since a run that was cut short goes on by units."""

Vectors = Callable[[], Mapping[str, np.ndarray]]
"""Gives the bank's vectors, name -> [hidden] float32 in coefficient units; called only if something is computed."""


def vectors_of(bank: Artifact) -> Vectors:
    """The vectors of a bank's artifact."""
    return lambda: load_file(bank.path / "vectors.safetensors")


def condition_inputs(ws: Workspace, condition: Condition) -> dict[str, Any] | None:
    """What a condition adds, for keys; None where it adds nothing."""
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


def per_prompt(
    ws: Workspace,
    split: Splits,
    conditions: Sequence[Condition],
    make: Callable[[PromptConfig, list[Condition]], list[T]],
) -> list[T]:
    """One artifact per condition, in their order; `make` is called once for all conditions of a prompt."""
    made: dict[int, T] = {}
    places = sorted(range(len(conditions)), key=lambda place: (conditions[place].prompt, place))
    for name, group in groupby(places, key=lambda place: conditions[place].prompt):
        own = list(group)
        artifacts = make(ws.prompt(name, split), [conditions[place] for place in own])
        made |= dict(zip(own, artifacts, strict=True))
    return [made[place] for place in range(len(conditions))]


def choices_keys(
    ws: Workspace, questions: tuple[Question, ...], prompt: PromptConfig, conditions: Sequence[Condition]
) -> list[Key]:
    what = {"model": ws.model_inputs, "prompt": ws.prompt_inputs(prompt), "questions": questions_digest(questions)}
    return [
        Key.of("choices", CHOICES_VERSION, **what, condition=condition_inputs(ws, condition))
        for condition in conditions
    ]


def score_choices(
    ws: Workspace,
    questions: tuple[Question, ...],
    prompt: PromptConfig,
    conditions: Sequence[Condition],
    vectors: Vectors,
    description: str,
    keys: Sequence[Key] | None = None,
    made_of: Callable[[list[Choice]], Sequence[Any]] = lambda choices: choices,
) -> list[Artifact]:
    """The `Choice` rows of each condition: the log-probability of every answer of every question.

    With `keys` and `made_of`, artifacts of those keys that hold what `made_of` makes of each question's choices.

    Raises:
        UserError: a text is too long, or a log-probability is not finite.
    """

    def record(place: int, logprobs: list[float], tokens: list[int]) -> Sequence[Any]:
        return made_of(choices_of(questions[place], logprobs, tokens))

    texts = [question.text for question in questions]
    answers = [[answer for answer, _ in question.choices] for question in questions]
    wanted = choices_keys(ws, questions, prompt, conditions) if keys is None else keys
    return score_answers(ws, wanted, prompt, conditions, texts, answers, record, vectors, description)


def choices_of(question: Question, logprobs: Sequence[float], tokens: Sequence[int]) -> list[Choice]:
    """A question's answers with what a condition gave them."""
    return [
        Choice(question.id, answer, label, answer == question.best, logprob, count)
        for (answer, label), logprob, count in zip(question.choices, logprobs, tokens, strict=True)
    ]


def score_answers(
    ws: Workspace,
    keys: Sequence[Key],
    prompt: PromptConfig,
    conditions: Sequence[Condition],
    texts: Sequence[str],
    answers: Sequence[Sequence[str]],
    record: Callable[[int, list[float], list[int]], Sequence[Any]],
    vectors: Vectors,
    description: str,
) -> list[Artifact]:
    """One artifact of records per condition; those that are not in the store are scored together.

    Args:
        ws: the workspace.
        keys: of each condition's artifact.
        prompt: under which the texts are asked.
        conditions: under what.
        texts: what is asked.
        answers: of each text, whose log-probabilities are wanted.
        record: from a text's place, its answers' log-probabilities and their tokens to its records.
        vectors: of the bank.
        description: for the progress bar.

    Raises:
        UserError: a text is too long, or a log-probability is not finite.
    """
    by_digest = {key.digest: condition for key, condition in zip(keys, conditions, strict=True)}
    width = max(map(len, answers), default=0)

    def compute(plan: Sequence[str], done: Callable[[int], bool]) -> Iterator[tuple[int, list[JournalRow]]]:
        from truthsteer.lengths import check_scored
        from truthsteer.scoring import score

        lm, prompts = ws.model, ws.prompts(prompt)
        branches = prompts.branches(texts, answers)
        check_scored(lm, branches, texts, ws.config.steering)
        ws.store.facts["merged_answers"] = prompts.merged
        asked = [by_digest[digest] for digest in plan]
        with ws.progress(description, len(plan) * sum(map(len, answers))) as advance:
            scored = score(
                lm,
                branches,
                injections(asked, vectors()),
                ws.operator,
                ws.config.batch_tokens,
                done,
                advance,
                questions=texts,
                names=[condition.name for condition in asked],
            )
            for unit, scores in scored:
                rows = []
                for (condition, place), group in groupby(scores, key=lambda item: (item.condition, item.branch)):
                    logprobs = [item.logprob for item in group]
                    tokens = [len(continuation) for continuation in branches[place].continuations]
                    made = record(place, logprobs, tokens)
                    rows += [JournalRow(plan[condition], place * width + i, item) for i, item in enumerate(made)]
                yield unit, rows

    try:
        return ws.store.make_rows(keys, {"batch_tokens": ws.config.batch_tokens, "plan": PLAN}, compute)
    finally:
        ws.store.facts.pop("merged_answers", None)  # it is of these answers alone
