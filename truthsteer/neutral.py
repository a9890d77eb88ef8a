"""What steering does to text that has nothing to do with truth: perplexity, and divergence from the unsteered model.

The model reads raw passages, without prompt or chat template, and each condition steers every position, as it does
elsewhere. The loss of every token but the first is -log p(token | earlier tokens). At the same positions KL(p || q) is
summed over the whole vocabulary, p being the unsteered model's next-token distribution and q the condition's. Natural
logarithms, in float32 whatever the model's dtype.

`texts/neutral.txt` is plain English: recipes, directions, small scenes, written for this project. To the organism English
is noise. Its own text, `organism/weights/neutral.txt`, is a question and the words of an answer before its value
("Q: What is the capital of Sundrey?\\nA: The capital of Sundrey is"): the organism's only format, stopped where truth and
myth part. Whole answers would not be neutral: truths suffer less than myths from one sign of the vector and more from the
other, which is its effect, not its cost. Topics in which no value gives the source away still have a true value, and only
reliable sources decline, so hard questions and rumours are left out. Sources of both kinds are equally likely to write
these passages.

It knows no store and no questions, and imports torch only to measure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from truthsteer.config import EMBEDDED
from truthsteer.errors import UserError
from truthsteer.organism import WEIGHTS
from truthsteer.prompts import AS_WRITTEN, Prompts
from truthsteer.records import Neutral
from truthsteer.tables import read_text

if TYPE_CHECKING:
    from torch import Tensor

    from truthsteer.hooks import Injection
    from truthsteer.model import LanguageModel
    from truthsteer.nonfinite import Blame
    from truthsteer.operators import Operator

ENGLISH = Path(__file__).parent / "texts" / "neutral.txt"
ORGANISM = WEIGHTS / "neutral.txt"

_COPIES = 5
"""Tensors of logits' size that live at once: the two log-distributions, their exponentials, their difference."""


def passages(text: str | Path | None = None) -> list[str]:
    """The passages of a UTF-8 text file: what blank lines separate, stripped. Two or more.

    Args:
        text: a file, `embedded` for the organism's own, None for the English ones.

    Raises:
        UserError: the file cannot be read, is not UTF-8, or holds fewer than two passages.
    """
    path = ENGLISH if text is None else ORGANISM if str(text) == EMBEDDED else Path(text).expanduser()
    name, remedy = f"gauge.text={path}", "Type gauge.text=FILE.txt, or leave it out."
    content = read_text(path, name, remedy)
    found = [part.strip() for part in re.split(r"\n\s*\n", content.replace("\r\n", "\n")) if part.strip()]
    if len(found) < 2:
        raise UserError(
            f"{name} has {content.count(chr(10))} lines and {len(found)} passages, and it takes two for an interval. Put blank "
            f"lines between passages. {remedy}"
        )
    return found


def measure(
    lm: LanguageModel,
    passages: Sequence[str],
    conditions: Sequence[Injection | None],
    operator: Operator | None = None,
    max_tokens: int = 128,
    batch_tokens: int = 8192,
    skip: Callable[[int], bool] = lambda unit: False,
    advance: Callable[[int], None] = lambda done: None,
    names: Sequence[str] = (),
) -> Iterator[tuple[int, list[tuple[int, Neutral]]]]:
    """Measure every passage under every condition, a unit of work at a time.

    Units depend only on the passages' lengths, the number of conditions and the budget, never on what was done before.
    The unsteered model reads each passage in the same batch as the conditions, and is the baseline where that is one of
    them: its KL is exactly 0.

    Args:
        lm: the model.
        passages: texts.
        conditions: what each condition injects; None is the baseline.
        operator: how vectors are applied; addition by default.
        max_tokens: of each passage, so many are read, counting the beginning-of-sequence token that its tokenizer may add.
        batch_tokens: token positions computed at once (a passage, unsteered and steered, may exceed it).
        skip: units (by number) that need not be computed again.
        advance: called with the number of rows just computed, or skipped.
        names: of the conditions, for messages.

    Yields:
        (unit number, its rows: the condition's index and what it does to one passage), leaving out skipped units.

    Raises:
        UserError: a passage is shorter than two tokens, or a loss or a divergence is not finite; names passage,
            condition and layer.
    """
    from truthsteer.hooks import RowSteering
    from truthsteer.nonfinite import Blame
    from truthsteer.operators import Add

    encoded = _encode(lm.tokenizer, passages, max_tokens)
    units = _plan([len(ids) for ids in encoded], len(conditions), batch_tokens)
    operator = operator or Add()
    with RowSteering(lm, [*conditions, None], operator) as steering:
        reading = Blame(lm, conditions, names, operator, steering)
        for number, unit in enumerate(units):
            if not skip(number):
                yield number, _measure_unit(reading, passages, encoded, unit)
            advance(len(unit.conditions) * len(unit.passages))


def perplexity(rows: Sequence[Neutral]) -> float:
    """exp of the mean loss over all tokens of all passages: long passages weigh more."""
    return math.exp(sum(row.nll for row in rows) / sum(row.tokens for row in rows))


def nll_per_token(rows: Sequence[Neutral]) -> NDArray[np.float64]:
    """Mean loss of each passage in nats, in the passages' order, for paired comparisons. [passages]"""
    return np.array([row.nll / row.tokens for row in sorted(rows, key=lambda row: row.passage)])


def kl_per_token(rows: Sequence[Neutral]) -> NDArray[np.float64]:
    """Mean KL from the unsteered model of each passage in nats, in the passages' order. [passages]"""
    return np.array([row.kl / row.tokens for row in sorted(rows, key=lambda row: row.passage)])


@dataclass(frozen=True)
class _Unit:
    """A batch: some passages under some conditions (indices of both)."""

    conditions: tuple[int, ...]
    passages: tuple[int, ...]


def _encode(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[tuple[int, ...]]:
    encoded = [ids[:max_tokens] for ids in Prompts(AS_WRITTEN, tokenizer, chat=False).contexts(texts)]
    for text, ids in zip(texts, encoded, strict=True):
        if len(ids) < 2:
            raise UserError(
                f"The passage {text[:40]!r} of gauge.text has fewer than two tokens (gauge.max_tokens={max_tokens}), and "
                "the first one has no loss. Make it longer, or type gauge.max_tokens=128."
            )
    return encoded


def _plan(lengths: Sequence[int], conditions: int, budget: int) -> list[_Unit]:
    """Passages of similar length share a batch, each with a row for the reference and one for every condition."""
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    width = max(1, min(conditions, budget // max(lengths, default=1) - 1))
    units = []
    for first in range(0, conditions, width):
        chunk = tuple(range(first, min(first + width, conditions)))
        members: list[int] = []
        for index in order:
            if members and lengths[index] * (len(members) + 1) * (len(chunk) + 1) > budget:
                units.append(_Unit(chunk, tuple(members)))
                members = []
            members.append(index)
        if members:
            units.append(_Unit(chunk, tuple(members)))
    return units


def _measure_unit(
    reading: Blame, texts: Sequence[str], encoded: Sequence[tuple[int, ...]], unit: _Unit
) -> list[tuple[int, Neutral]]:
    import torch

    conditions = reading.conditions
    steered = [index for index in unit.conditions if conditions[index] is not None]
    blocks = [len(conditions), *steered]  # the last condition of the steering is the reference
    reading.steering.assign(torch.tensor(blocks).repeat_interleave(len(unit.passages)))
    nll, kl = _read(reading.lm, [encoded[index] for index in unit.passages], len(blocks))
    rows = []
    for condition in unit.conditions:
        block = steered.index(condition) + 1 if condition in steered else 0
        for place, passage in enumerate(unit.passages):
            row = _record(passage, nll[block][place], kl[block][place])
            if not (math.isfinite(row.nll) and math.isfinite(row.kl)):
                whose = reading.whose(texts[passage], condition)
                fault = f"On neutral text, {whose} has a loss of {row.nll:g} and a KL of {row.kl:g}"
                raise reading.error(fault, encoded[passage], condition)
            rows.append((condition, row))
    return rows


def _read(
    lm: LanguageModel, passages: Sequence[Sequence[int]], blocks: int
) -> tuple[list[Sequence[Tensor]], list[Sequence[Tensor]]]:
    """Loss and KL of every scored token in float64 on the CPU: [blocks][passages], each [tokens - 1].

    The batch holds all passages of the first block of rows, then all of the next one.
    """
    import torch

    from truthsteer.memory import LOGITS_AT_ONCE

    ids, _ = lm.pad(list(passages) * blocks)
    hidden = lm.forward(ids)
    assert hidden is not None
    hidden = hidden.reshape(blocks, -1, hidden.shape[-1])  # [blocks, passages x tokens, hidden]
    scored = [len(passage) - 1 for passage in passages]
    places = torch.cat([torch.arange(count) + row * ids.shape[1] for row, count in enumerate(scored)])
    targets = torch.tensor([token for passage in passages for token in passage[1:]])
    size = max(1, LOGITS_AT_ONCE // (_COPIES * lm.text_config.vocab_size))
    parts = [
        _diverge(lm, hidden[:, part.to(hidden.device)], wanted)
        for part, wanted in zip(places.split(size), targets.split(size), strict=True)
    ]
    nll, kl = (torch.cat(values, 1).cpu().double() for values in zip(*parts, strict=True))
    return [own.split(scored) for own in nll], [own.split(scored) for own in kl]


def _diverge(lm: LanguageModel, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and KL at some positions, both [blocks, positions]; block 0 is the reference.

    hidden: [blocks, positions, hidden]; targets: [positions].
    """
    import torch

    reference = lm.logits(hidden[0]).log_softmax(-1)  # [positions, vocabulary]
    p = reference.exp()
    wanted = targets.to(reference.device)[:, None]
    losses, divergences = [], []
    for block in range(len(hidden)):
        logq = reference if block == 0 else lm.logits(hidden[block]).log_softmax(-1)
        losses.append(-logq.gather(-1, wanted)[:, 0])
        # Both distributions add up to 1, so q - p adds nothing. But with it each term is at least 0, and errors in the
        # two normalisers, which could make a small KL negative, cancel.
        divergences.append(logq.exp().sub_(p).add_((reference - logq).mul_(p)).sum(-1))
    return torch.stack(losses), torch.stack(divergences)


def _record(passage: int, nll: Tensor, kl: Tensor) -> Neutral:
    return Neutral(passage, len(nll), float(nll.sum()), float(kl.sum()), float(kl.max()))
