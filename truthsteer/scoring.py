"""Log-probabilities of answers under many conditions at once.

The log-probability of an answer is the sum over its tokens of log p(token | context, earlier tokens), natural
logarithm, in float32 whatever the model's dtype, without length normalisation: the definition of TruthfulQA's MC
metrics (Lin et al. 2022, arXiv:2109.07958) and of lm-evaluation-harness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from truthsteer.branching import Brancher, Pass, Unit
from truthsteer.errors import UserError
from truthsteer.halving import in_halves
from truthsteer.head import logprobs
from truthsteer.hooks import Injection, RowSteering
from truthsteer.model import LanguageModel
from truthsteer.nonfinite import Blame, shown
from truthsteer.operators import Add, Operator
from truthsteer.prompts import Branch

HELD = 4096
"""So many positions are waited for before they are multiplied by the head."""

Key = tuple[int, int, int]
"""(condition, branch, continuation)."""


@dataclass(frozen=True)
class Score:
    """The log-probability of one continuation under one condition (indices into what was given)."""

    condition: int
    branch: int
    continuation: int
    logprob: float


def score(
    lm: LanguageModel,
    branches: Sequence[Branch],
    conditions: Sequence[Injection | None],
    operator: Operator | None = None,
    batch_tokens: int = 8192,
    skip: Callable[[int], bool] = lambda unit: False,
    advance: Callable[[int], None] = lambda done: None,
    share: bool = True,
    questions: Sequence[str] = (),
    names: Sequence[str] = (),
) -> Iterator[tuple[int, list[Score]]]:
    """Score every continuation of every branch under every condition, a unit of work at a time.

    Args:
        lm: the model.
        branches: contexts with their continuations.
        conditions: what each condition injects; None is the baseline.
        operator: how vectors are applied; addition by default.
        batch_tokens: key-value slots filled at once.
        skip: units (by number) that need not be computed again.
        advance: called with the number of continuations just scored, or skipped, once for each condition.
        share: compute the layers below the lowest steered one once for all conditions of a batch.
        questions: what each branch asks, for messages.
        names: of the conditions, for messages.

    Yields:
        (unit number, its scores), leaving out skipped units.

    Raises:
        UserError: logits are not finite; names question, answer, condition and layer.
    """
    operator = operator or Add()
    with RowSteering(lm, conditions, operator) as steering:
        reading = Blame(lm, conditions, names, operator, steering)
        brancher = Brancher(lm, branches, steering, len(conditions), batch_tokens, share)
        for number, unit in enumerate(brancher.units):
            if not skip(number):
                scores = in_halves(
                    lambda part: _score_unit(reading, branches, questions, brancher, part), unit, Unit.halves
                )
                yield number, sorted(scores, key=lambda item: (item.condition, item.branch, item.continuation))
            advance(len(unit.conditions) * sum(len(branches[place].continuations) for place in unit.branches))


def _score_unit(
    reading: Blame, branches: Sequence[Branch], questions: Sequence[str], brancher: Brancher, unit: Unit
) -> list[Score]:
    lm = reading.lm
    keys: list[Key] = []
    states: list[Tensor] = []
    places: list[Tensor] = []
    targets: list[int] = []
    found: list[float] = []
    held = 0  # positions that wait for the head

    def settle() -> None:
        nonlocal held
        if held:
            waiting = torch.tensor(targets[len(found) :])
            found.extend(logprobs(lm, torch.cat(states), torch.cat(places), waiting).tolist())
        states.clear()
        places.clear()
        held = 0

    for step in brancher.walk(unit, whole=False):
        assert step.hidden is not None
        own, where, wanted = _wanted(branches, step)
        positions, inverse = torch.tensor(where).unique(return_inverse=True)  # answers share some: take each once
        flat = step.hidden.reshape(-1, lm.hidden_size)
        states.append(flat[positions.to(flat.device)])
        places.append(inverse + held)
        keys += own
        targets += wanted
        held += len(positions)
        if held >= HELD:  # many at once: the head's matrix, which is most of a small model, is then read least often
            settle()
    settle()
    totals: dict[Key, float] = {}
    for key, value in zip(keys, found, strict=True):
        if not math.isfinite(value):
            condition, branch, continuation = key
            asked = questions[branch] if questions else ""
            raise _not_finite(reading, branches[branch], asked, continuation, condition)
        totals[key] = totals.get(key, 0.0) + value
    return [Score(*key, value) for key, value in totals.items()]


def _not_finite(reading: Blame, branch: Branch, asked: str, continuation: int, condition: int) -> UserError:
    tokens = branch.continuations[continuation]
    whose = reading.whose(asked or reading.text(branch.context), condition)
    fault = f"The log-probability of {shown(reading.text(tokens))} to {whose} rests on logits that are not finite"
    return reading.error(fault, [*branch.context, *tokens], condition)


def _wanted(branches: Sequence[Branch], step: Pass) -> tuple[list[Key], list[int], list[int]]:
    """What a pass tells: of each log-probability whose it is, its place in the flattened batch, and its token.

    A context's last token tells the continuation's first, and so on.
    """
    keys: list[Key] = []
    where: list[int] = []
    targets: list[int] = []
    for block, condition in enumerate(step.conditions):
        for path in step.paths:
            tokens = branches[path.branch].continuations[path.continuation]
            keys += [(condition, path.branch, path.continuation)] * len(tokens)
            where += [block * step.block + place for place in path.places[: len(tokens)]]
            targets += tokens
    return keys, where, targets
