"""Contexts and the continuations that share them, each distinct prefix computed once per condition.

Three levels share keys and values: the prefix common to all contexts (a few-shot preset), the context of one question,
its continuations (answers). Contexts of one batch have equal length and continuations are padded on the right, so
no pad ever stands between real tokens: exact with sliding windows too. Many conditions fill one batch, a row each, and
share what is computed below the lowest layer that one of them steers.

Batches depend only on the branches, the number of conditions and the token budget, never on what was done before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from transformers import DynamicCache

from truthsteer.hooks import RowSteering
from truthsteer.model import LanguageModel, select_rows
from truthsteer.prompts import Branch

MIN_SHARED = 16
"""A common prefix shorter than this is cheaper to compute again than to copy."""


@dataclass(frozen=True)
class Unit:
    """A batch of work: some branches under some conditions (indices of both)."""

    conditions: tuple[int, ...]
    branches: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One row of a forward pass."""

    condition: int
    branch: int
    continuation: int
    """Index within the branch; -1 for the context itself."""


@dataclass(frozen=True)
class Pass:
    """One forward pass over some rows."""

    rows: tuple[Row, ...]
    tokens: Tensor
    """[rows fed, tokens]: ids fed in this pass, right-padded; one block of rows where conditions share their trunk."""
    lengths: tuple[int, ...]
    """Real tokens of each row in this pass."""
    hidden: Tensor | None
    """[rows, tokens, hidden] after the final norm; None where a capture ended the pass early."""


class Brancher:
    """Walks branches under conditions, unit by unit.

    Args:
        lm: the model.
        branches: contexts with their continuations.
        steering: entered by the caller; its conditions are the ones that units index.
        conditions: how many conditions there are.
        batch_tokens: at most this many key-value slots are filled in one pass (a single row of each condition may exceed it).
        share: compute the layers below the lowest steered one once for all conditions of a unit.
    """

    def __init__(
        self,
        lm: LanguageModel,
        branches: Sequence[Branch],
        steering: RowSteering,
        conditions: int,
        batch_tokens: int,
        share: bool = True,
    ) -> None:
        self._share = share
        self._lm = lm
        self._branches = branches
        self._steering = steering
        self._budget = batch_tokens
        self._prefix = common_prefix([branch.context[:-1] for branch in branches])
        self._prefix_cache: tuple[tuple[int, ...], DynamicCache] | None = None
        self.units = self._plan(conditions)
        self.tokens = 0
        """Token positions computed so far, pads included."""

    def _plan(self, conditions: int) -> list[Unit]:
        order = sorted(range(len(self._branches)), key=lambda index: (len(self._branches[index].context), index))
        longest = len(self._branches[order[-1]].context)
        width = max(1, min(conditions, self._budget // longest))
        units = []
        for first in range(0, conditions, width):
            chunk = tuple(range(first, min(first + width, conditions)))
            for length, group in groupby(order, key=lambda index: len(self._branches[index].context)):
                members = list(group)
                size = max(1, self._budget // (length * len(chunk)))
                units += [Unit(chunk, tuple(members[i : i + size])) for i in range(0, len(members), size)]
        return units

    def walk(self, unit: Unit, whole: bool) -> Iterator[Pass]:
        """The passes of a unit: first its contexts, then their continuations.

        Args:
            unit: one of `units`.
            whole: feed every token of the continuations; otherwise all but the last, which nothing follows.
        """
        lm, conditions = self._lm, torch.tensor(unit.conditions)
        trunk = self._steering.trunk_of(unit.conditions) if self._share else None
        copies, blocks = len(unit.conditions), 1 if trunk is not None else len(unit.conditions)
        members = torch.arange(len(unit.branches))
        contexts = [self._branches[branch].context for branch in unit.branches]
        cache, start = self._start(unit, trunk)
        tokens = torch.tensor([context[start:] for context in contexts], device=lm.device).repeat(blocks, 1)
        self._steering.assign(conditions.repeat_interleave(len(members)), trunk)
        rows = tuple(Row(c, b, -1) for c in unit.conditions for b in unit.branches)
        yield self._pass(rows, tokens, (tokens.shape[1],) * len(rows), cache, start)

        context = start + tokens.shape[1]
        below = [
            (place, index, continuation if whole else continuation[:-1])
            for place, branch in enumerate(unit.branches)
            for index, continuation in enumerate(self._branches[branch].continuations)
            if whole or len(continuation) > 1
        ]
        below.sort(key=lambda item: len(item[2]))
        while below:
            count = max(1, self._budget // (copies * (context + len(below[-1][2]))))
            batch, below = below[-count:], below[:-count]
            place = torch.tensor([place for place, _, _ in batch])
            every = torch.cat([place + block * len(members) for block in range(copies)])
            padded, _ = lm.pad([fed for _, _, fed in batch])
            self._steering.assign(conditions.repeat_interleave(len(batch)), trunk)
            own = select_rows(cache, every, place, trunk)
            lengths = tuple(len(fed) for _, _, fed in batch) * copies
            rows = tuple(Row(c, unit.branches[place], index) for c in unit.conditions for place, index, _ in batch)
            yield self._pass(rows, padded.repeat(blocks, 1), lengths, own, context)

    def _pass(
        self, rows: tuple[Row, ...], tokens: Tensor, lengths: tuple[int, ...], cache: DynamicCache, start: int
    ) -> Pass:
        self.tokens += tokens.numel()
        return Pass(rows, tokens, lengths, self._lm.forward(tokens, cache=cache, start=start))

    def _start(self, unit: Unit, trunk: int | None) -> tuple[DynamicCache, int]:
        """A cache for the unit's rows that already holds the common prefix, and that prefix's length."""
        if not self._prefix:
            return self._lm.new_cache(), 0
        if self._prefix_cache is None or self._prefix_cache[0] != unit.conditions:
            cache = self._lm.new_cache()
            self._steering.assign(torch.tensor(unit.conditions), trunk)
            blocks = 1 if trunk is not None else len(unit.conditions)
            tokens = torch.tensor([self._prefix] * blocks, device=self._lm.device)
            self.tokens += tokens.numel()
            self._lm.forward(tokens, cache=cache)
            self._prefix_cache = (unit.conditions, cache)
        repeats = len(unit.branches)
        every = torch.arange(len(unit.conditions)).repeat_interleave(repeats)
        once = torch.zeros(repeats, dtype=torch.long)
        return select_rows(self._prefix_cache[1], every, once, trunk), len(self._prefix)


def common_prefix(contexts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all contexts begin with, if it is long enough to be worth keeping."""
    first, last = min(contexts), max(contexts)  # any difference shows between the extremes
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length] if length >= MIN_SHARED else ()
