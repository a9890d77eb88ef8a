"""Log-probabilities of answers under many conditions at once.

The log-probability of an answer is the sum over its tokens of log p(token | context, earlier tokens), natural
logarithm, in float32 whatever the model's dtype, without length normalisation: the definition of TruthfulQA's MC
metrics (Lin et al. 2022, arXiv:2109.07958) and of lm-evaluation-harness.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from truthsteer.branching import Brancher, Pass, Unit
from truthsteer.errors import UserError
from truthsteer.hooks import Injection, RowSteering
from truthsteer.model import LanguageModel
from truthsteer.operators import Add, Operator
from truthsteer.prompts import Branch

LOGITS_AT_ONCE = 1 << 26
"""Logits held at once (256 MiB in float32)."""


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

    Yields:
        (unit number, its scores), leaving out skipped units.

    Raises:
        UserError: a log-probability is not finite.
    """
    with RowSteering(lm, conditions, operator or Add()) as steering:
        brancher = Brancher(lm, branches, steering, len(conditions), batch_tokens, share)
        for number, unit in enumerate(brancher.units):
            if not skip(number):
                yield number, _score_unit(lm, branches, brancher, unit)


def _score_unit(lm: LanguageModel, branches: Sequence[Branch], brancher: Brancher, unit: Unit) -> list[Score]:
    totals: dict[tuple[int, int, int], float] = {}
    for step in brancher.walk(unit, whole=False):
        assert step.hidden is not None
        for key, value in _logprobs(lm, branches, step, step.hidden):
            totals[key] = totals.get(key, 0.0) + value
    scores = [Score(*key, value) for key, value in sorted(totals.items())]
    for item in scores:
        if item.logprob != item.logprob or item.logprob in (float("inf"), float("-inf")):
            raise UserError(
                f"The log-probability of answer {item.continuation} of question {item.branch} under condition "
                f"{item.condition} is {item.logprob}. The model's numbers overflow: type dtype=bf16 or dtype=fp32, or "
                "smaller steering.coefficients."
            )
    return scores


def _logprobs(
    lm: LanguageModel, branches: Sequence[Branch], step: Pass, hidden: Tensor
) -> list[tuple[tuple[int, int, int], float]]:
    """What a pass adds to each continuation: its first token's log-prob (context pass), or all the others'."""
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
    values: list[float] = []
    vocabulary = lm.text_config.vocab_size
    chunk = max(1, LOGITS_AT_ONCE // vocabulary)
    # A context is read once for all its answers' first tokens: take each distinct position's logits once.
    where = torch.tensor([row * step.tokens.shape[1] + place for row, place in zip(rows, places, strict=True)])
    positions, inverse = where.unique(return_inverse=True)
    wanted = torch.tensor(targets)
    flat = hidden.reshape(-1, hidden.shape[-1])
    result = torch.empty(len(keys), dtype=torch.float64)
    for first in range(0, len(positions), chunk):
        part = positions[first : first + chunk]
        logprobs = lm.logits(flat[part.to(flat.device)]).log_softmax(-1)
        mine = ((inverse >= first) & (inverse < first + chunk)).nonzero()[:, 0]
        picked = logprobs[(inverse[mine] - first).to(logprobs.device), wanted[mine].to(logprobs.device)]
        result[mine] = picked.double().cpu()
    values = result.tolist()
    return list(zip(keys, values, strict=True))
