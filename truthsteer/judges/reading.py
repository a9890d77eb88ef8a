"""What a judge reads off a model about one aspect of an answer, and how the aspects make a verdict.

Knows no prompt: judges write those, and hand over token ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from truthsteer.records import Verdict
from truthsteer.store import canonical

if TYPE_CHECKING:
    from truthsteer.model import LanguageModel
    from truthsteer.prompts import Branch

_DECIMALS = 6


@dataclass(frozen=True)
class Reading:
    """What was read about one aspect."""

    value: float | None
    """The score; None where it could not be decided."""
    probability: float | None
    """The judge's probability that the value is 1; None where it has none."""
    status: str
    """`ok`, or how the reading came about."""
    raw: Any = None
    """What the model itself produced, as plain JSON."""


def verdict(question: str, readings: Mapping[str, Reading]) -> Verdict:
    """The verdict on one answer.

    Args:
        question: the question's id.
        readings: aspect -> reading; the aspect names the score.

    Returns:
        Scores and probabilities by aspect. Its status is `ok` if all are, a status that all share stands alone, and
        otherwise each that is not `ok` is named with its aspect: `true order_conflict, info low_mass`.
    """
    statuses = {reading.status for reading in readings.values()}
    odd = [f"{aspect} {reading.status}" for aspect, reading in readings.items() if reading.status != "ok"]
    raw = {aspect: reading.raw for aspect, reading in readings.items() if reading.raw is not None}
    return Verdict(
        question,
        statuses.pop() if len(statuses) == 1 else ", ".join(odd),
        {aspect: reading.value for aspect, reading in readings.items()},
        {
            aspect: rounded(reading.probability)
            for aspect, reading in readings.items()
            if reading.probability is not None
        },
        canonical(raw) if raw else "",
    )


def rounded(probability: float) -> float:
    """Without the last digits, which depend on what shares a batch."""
    return round(probability, _DECIMALS)


def longest_prompt(lm: LanguageModel, max_length: int) -> int:
    """In tokens: what the config allows, and not more than the model was built for."""
    return min(max_length, getattr(lm.text_config, "max_position_embeddings", max_length))


def next_logprobs(lm: LanguageModel, branches: Sequence[Branch], batch_tokens: int) -> list[tuple[float, ...]]:
    """log p(token | context) over the whole vocabulary, natural logarithm, in float32: one forward pass per context.

    What all contexts begin with is computed once. They are padded on the right, where no real token sees it.

    Args:
        lm: the model.
        branches: contexts, each with the same number of continuations of one token.
        batch_tokens: key-value slots filled at once (a single context may exceed it).

    Returns:
        The log-probabilities of each branch's continuations; NaN where the model's numbers overflow, which no other
        branch feels.
    """
    import torch

    from truthsteer.branching import common_prefix
    from truthsteer.head import LOGITS_AT_ONCE
    from truthsteer.model import select_rows

    distinct = sorted(set(branches), key=lambda branch: (-len(branch.context), branch.context, branch.continuations))
    prefix = common_prefix([branch.context[:-1] for branch in distinct]) if len(distinct) > 1 else ()
    start, shared = None, len(prefix)
    if prefix:
        start = lm.new_cache()
        lm.forward(torch.tensor([prefix], device=lm.device), cache=start)
    found: dict[Branch, tuple[float, ...]] = {}
    most = max(1, LOGITS_AT_ONCE // lm.text_config.vocab_size)
    while len(found) < len(distinct):
        first = len(found)
        group = distinct[first : first + min(most, max(1, batch_tokens // len(distinct[first].context)))]
        cache = None if start is None else select_rows(start, torch.zeros(len(group), dtype=torch.long))
        ids, _ = lm.pad([branch.context[shared:] for branch in group])  # [batch, tokens]
        hidden = lm.forward(ids, cache=cache, start=shared)  # [batch, tokens, hidden]
        assert hidden is not None
        last = torch.tensor([len(branch.context) - shared - 1 for branch in group])
        logits = lm.logits(hidden[torch.arange(len(group)), last])  # [batch, vocabulary]
        tokens = torch.tensor([[token for (token,) in branch.continuations] for branch in group])
        logprobs = logits.log_softmax(-1).gather(1, tokens.to(logits.device)).tolist()  # [batch][continuations]
        found.update(zip(group, map(tuple, logprobs), strict=True))
    return [found[branch] for branch in branches]
