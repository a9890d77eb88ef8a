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
from truthsteer.head import logprobs
from truthsteer.hooks import Injection, RowSteering
from truthsteer.model import LanguageModel
from truthsteer.nonfinite import Blame, shown
from truthsteer.operators import Add, Operator
from truthsteer.prompts import Branch


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
                yield number, _score_unit(reading, branches, questions, brancher, unit)


def _score_unit(
    reading: Blame, branches: Sequence[Branch], questions: Sequence[str], brancher: Brancher, unit: Unit
) -> list[Score]:
    totals: dict[tuple[int, int, int], float] = {}
    for step in brancher.walk(unit, whole=False):
        assert step.hidden is not None
        for key, value in _logprobs(reading.lm, branches, step, step.hidden):
            if not math.isfinite(value):
                condition, branch, continuation = key
                asked = questions[branch] if questions else ""
                raise _not_finite(reading, branches[branch], asked, continuation, condition)
            totals[key] = totals.get(key, 0.0) + value
    return [Score(*key, value) for key, value in sorted(totals.items())]


def _not_finite(reading: Blame, branch: Branch, asked: str, continuation: int, condition: int) -> UserError:
    tokens = branch.continuations[continuation]
    whose = reading.whose(asked or reading.text(branch.context), condition)
    fault = f"The log-probability of {shown(reading.text(tokens))} to {whose} rests on logits that are not finite"
    return reading.error(fault, [*branch.context, *tokens], condition)


def _logprobs(
    lm: LanguageModel, branches: Sequence[Branch], step: Pass, hidden: Tensor
) -> list[tuple[tuple[int, int, int], float]]:
    """What a pass adds to each continuation: its first token's log-prob (context pass), or all the others'.

    NaN where any logit of a position is not finite.
    """
    keys, rows, places, targets = [], [], [], []
    for place, (row, length) in enumerate(zip(step.rows, step.lengths, strict=True)):
        branch = branches[row.branch]
        if row.continuation < 0:
            for index, continuation in enumerate(branch.continuations):
                keys.append((row.condition, row.branch, index))
                rows.append(place)
                places.append(length - 1)
                targets.append(continuation[0])
        else:
            for offset, token in enumerate(branch.continuations[row.continuation][1:]):
                keys.append((row.condition, row.branch, row.continuation))
                rows.append(place)
                places.append(offset)
                targets.append(token)
    # A context is read once for all its answers' first tokens: take each distinct position's logits once.
    where = torch.tensor([row * step.tokens.shape[1] + place for row, place in zip(rows, places, strict=True)])
    positions, inverse = where.unique(return_inverse=True)
    flat = hidden.reshape(-1, hidden.shape[-1])
    found = logprobs(lm, flat[positions.to(flat.device)], inverse, torch.tensor(targets))
    return list(zip(keys, found.tolist(), strict=True))
