"""Texts that are longer than they may be: which answer pairs are lost or cut, and which questions cannot be asked.

`steering.max_length` bounds the texts that activations are read from, and `steering.too_long` says what becomes of longer
ones. Only their ends are ever cut: a causal model gives the tokens that stay the same values as before. Answers that are
scored or generated are never cut, so that nothing but the model's own number of positions bounds them once pairs may be
dropped or cut. It knows token ids, and of a model only how many positions it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from truthsteer.activations import Dropped, Loss, Truncated
from truthsteer.config import SteeringConfig, TooLong
from truthsteer.errors import UserError
from truthsteer.pairs import Pair
from truthsteer.prompts import Branch, check_length, longer_than, whole_lengths

if TYPE_CHECKING:
    from truthsteer.model import LanguageModel

MEMBERS = ("true", "false")
OR_DROP = "a shorter prompt preset, or steering.too_long=drop to leave such pairs out"


@dataclass(frozen=True)
class Fitted:
    """The answer pairs that can be read.

    Attributes:
        branches: the questions that have a pair left; continuations are its first pair's true answer and its false one, then
            the next pair's.
        pairs: those pairs, in the order of the continuations.
        dropped: the pairs that cannot be read.
        truncated: the texts of `pairs` that lost their end.
    """

    branches: tuple[Branch, ...]
    pairs: tuple[Pair, ...]
    dropped: tuple[Dropped, ...]
    truncated: tuple[Truncated, ...]


def fit(
    pairs: Sequence[Pair], branches: Sequence[Branch], names: Sequence[str], max_length: int, too_long: TooLong
) -> Fitted:
    """What activations can be read from.

    Args:
        pairs: in the order of the continuations.
        branches: one per question; continuations come in pairs, the true answer first.
        names: the questions, for messages.
        max_length: longest context plus answer, in tokens.
        too_long: what becomes of longer ones.

    Raises:
        UserError: a text is too long and `too_long` is error, or no pair is left.
    """
    if too_long is TooLong.error:
        check_length(branches, names, max_length, "steering.max_length", OR_DROP)
    fitted: list[Branch] = []
    kept: list[Pair] = []
    dropped: list[Dropped] = []
    truncated: list[Truncated] = []
    waiting = iter(pairs)
    for branch in branches:
        room, left = max(0, max_length - len(branch.context)), []
        for place in range(0, len(branch.continuations), 2):
            pair, answers = next(waiting), branch.continuations[place : place + 2]
            lost = _loss(pair, branch.context, answers, max_length, too_long)
            if lost is not None:
                dropped.append(lost)
                continue
            kept.append(pair)
            left += [answer[:room] for answer in answers]
            truncated += [
                Truncated(pair.id, pair.question, member, len(branch.context) + len(answer))
                for member, answer in zip(MEMBERS, answers, strict=True)
                if len(answer) > room
            ]
        if left:
            fitted.append(Branch(branch.context, tuple(left)))
    if pairs and not kept:
        raise _nothing_left(dropped, branches, max_length, too_long)
    return Fitted(tuple(fitted), tuple(kept), tuple(dropped), tuple(truncated))


def _loss(
    pair: Pair,
    context: tuple[int, ...],
    answers: Sequence[tuple[int, ...]],
    max_length: int,
    too_long: TooLong,
) -> Dropped | None:
    """Why a pair is lost; None if it can be read, cut or whole."""
    lengths, limit = [len(context) + len(answer) for answer in answers], f"steering.max_length={max_length}"
    if max(lengths) <= max_length:
        return None
    room = max_length - len(context)
    if room <= 0:
        reason = f"its prompt has {len(context)} tokens and leaves no room for an answer; {limit}"
        return Dropped(pair.id, pair.question, reason, Loss.TOO_LONG)
    if too_long is TooLong.drop:
        member = MEMBERS[lengths.index(max(lengths))]
        reason = f"the {member} answer's text has {max(lengths)} tokens; {limit}"
        return Dropped(pair.id, pair.question, reason, Loss.TOO_LONG)
    if answers[0][:room] == answers[1][:room]:
        return Dropped(pair.id, pair.question, f"its answers are the same once cut; {limit}", Loss.EQUAL)
    return None


def _nothing_left(
    dropped: Sequence[Dropped], branches: Sequence[Branch], max_length: int, too_long: TooLong
) -> UserError:
    longest = max(len(branch.context) + len(answer) for branch in branches for answer in branch.continuations)
    cut = (
        " Or type steering.too_long=truncate, if the beginnings of answers will do." if too_long is TooLong.drop else ""
    )
    return UserError(
        f"steering.max_length={max_length} with steering.too_long={too_long.value} leaves none of {len(dropped)} answer "
        f"pairs; the first: {dropped[0].reason}. Type steering.max_length={longest}, or a shorter prompt preset.{cut}"
    )


def check_scored(
    lm: LanguageModel,
    branches: Sequence[Branch],
    names: Sequence[str],
    steering: SteeringConfig,
    or_else: str = "a shorter prompt preset",
) -> None:
    """Raise if an answer cannot be scored whole: for `steering.max_length`, or for the model where that may be passed.

    Args:
        lm: the model.
        branches: questions with the answers to be scored.
        names: the questions.
        steering: with `max_length` and `too_long`.
        or_else: what else to type.

    Raises:
        UserError: names the longest question, its length and what to type.
    """
    if steering.too_long is TooLong.error:
        check_length(branches, names, steering.max_length, "steering.max_length", or_else)
    else:
        _check_positions(lm, whole_lengths(branches), names, or_else)


def check_generated(
    lm: LanguageModel,
    contexts: Sequence[Sequence[int]],
    names: Sequence[str],
    steering: SteeringConfig,
    max_new_tokens: int,
    or_else: str = "a shorter prompt preset",
) -> None:
    """Raise if a generated answer might not fit into the model, where `steering.max_length` bounds no prompt.

    Raises:
        UserError: names the longest question, its length and what to type.
    """
    if steering.too_long is not TooLong.error:
        lengths = [len(context) + max_new_tokens for context in contexts]
        _check_positions(
            lm, lengths, names, f"a smaller generation.max_new_tokens (it is {max_new_tokens}), or {or_else}"
        )


def _check_positions(lm: LanguageModel, lengths: Sequence[int], names: Sequence[str], remedy: str) -> None:
    positions = getattr(lm.text_config, "max_position_embeddings", None)
    if positions is None:
        return
    if found := longer_than(lengths, names, positions, f"the model's {positions} positions (max_position_embeddings)"):
        raise UserError(
            f"{found[0]}. Whatever steering.too_long says, answers are not cut where they are scored or generated: type "
            f"{remedy}."
        )
