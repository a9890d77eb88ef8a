"""What a judge reads off a model about one aspect of an answer, and how the aspects make a verdict.

Knows no prompt: judges write those, and hand over token ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from truthsteer.files import canonical
from truthsteer.records import Verdict

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
    """log p(token | context) over the whole vocabulary, natural logarithm, in float32: each context read once.

    What contexts begin with alike (the instruction, and of the answers to one question all that stands before them) is
    computed once.

    Args:
        lm: the model.
        branches: contexts, each with continuations of one token.
        batch_tokens: key-value slots filled at once (a single context may exceed it).

    Returns:
        The log-probabilities of each branch's continuations; NaN where the model's numbers overflow, which no branch that
        begins otherwise feels.
    """
    import torch

    from truthsteer.branching import MIN_SHARED, Brancher, Unit, alike, shared
    from truthsteer.halving import in_halves
    from truthsteer.head import logprobs
    from truthsteer.hooks import RowSteering
    from truthsteer.operators import Add
    from truthsteer.prompts import Branch

    contexts = sorted({branch.context for branch in branches})
    if not contexts:
        return []
    base = shared(contexts[0], contexts[-1]) if len(contexts) > 1 else 0  # of all, as they are sorted
    rest = [context[base:] for context in contexts]
    groups = [(contexts[first:last], base + own) for first, last, own in alike(rest, MIN_SHARED)]
    shapes = [Branch(own[0][:same], tuple(context[same:] for context in own)) for own, same in groups]
    states: dict[tuple[int, ...], Any] = {}
    with torch.no_grad(), RowSteering(lm, [None], Add()) as none:
        brancher = Brancher(lm, shapes, none, 1, batch_tokens)

        def read(unit: Unit) -> list[None]:
            for step in brancher.walk(unit, whole=True):
                assert step.hidden is not None
                flat = step.hidden.reshape(-1, lm.hidden_size)
                for path in step.paths:
                    shape = shapes[path.branch]
                    states[shape.context + shape.continuations[path.continuation]] = flat[path.places[-1]].clone()
            return []

        for unit in brancher.units:
            in_halves(read, unit, Unit.halves)
    hidden = torch.stack([states[context] for context in contexts])  # [contexts, hidden]
    of = {context: place for place, context in enumerate(contexts)}
    places = [of[branch.context] for branch in branches for _ in branch.continuations]
    tokens = [token for branch in branches for (token,) in branch.continuations]
    found = iter(logprobs(lm, hidden, torch.tensor(places), torch.tensor(tokens)).tolist())
    return [tuple(next(found) for _ in branch.continuations) for branch in branches]
