"""Contexts and the continuations that share them, each distinct prefix computed once per condition.

Three levels share keys and values: the prefix common to all contexts (a few-shot preset), the context of one question,
its continuations (answers). All are padded on the right, where a causal model computes finite numbers that no real token
sees: between a context and its continuations pads are masked, and positions count real tokens only. Where pads would use
up a sliding window, contexts of one batch have equal length instead. Many conditions fill one batch, a row each, and share
what is computed below the lowest layer that one of them steers.

Batches depend only on the branches, the number of conditions and the token budget, never on what was done before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from truthsteer.hooks import RowSteering
from truthsteer.model import LanguageModel, select_rows
from truthsteer.prompts import Branch

MIN_SHARED = 16
"""A common prefix shorter than this is cheaper to compute again than to copy."""

PASS_COST, PASS_COST_ON_GPU = {"cpu": 40}, 2048
"""What a pass costs beside its tokens, in tokens: reading the weights, starting kernels."""

UNIT_COST = 96
"""The same of a unit, wherever it is computed: units are the same on every device."""


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
        order = sorted(range(len(self._branches)), key=lambda index: (-len(self._branches[index].context), index))
        longest = len(self._branches[order[0]].context)
        width = max(1, min(conditions, self._budget // longest))
        lengths = [len(self._branches[index].context) for index in order]
        units = []
        for first in range(0, conditions, width):
            chunk = tuple(range(first, min(first + width, conditions)))
            fits = [max(1, self._budget // (length * len(chunk))) for length in lengths]
            overhead = UNIT_COST / len(chunk) if self._padded() else 0.0
            units += [Unit(chunk, tuple(order[i:j])) for i, j in batched(lengths, fits, overhead)]
        return units

    def _padded(self) -> bool:
        """Whether pads between contexts and continuations leave every real token in sight of what it may see."""
        window = getattr(self._lm.text_config, "sliding_window", None)
        longest = max(len(branch.context) for branch in self._branches)
        return window is None or longest + max(map(_longest, self._branches)) <= window

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
        fed = [context[start:] for context in contexts]
        tokens, real = lm.pad(fed)
        padded = not bool(real.all())
        self._steering.assign(conditions.repeat_interleave(len(members)), trunk)
        rows = tuple(Row(c, b, -1) for c in unit.conditions for b in unit.branches)
        yield self._pass(rows, tokens.repeat(blocks, 1), tuple(map(len, fed)) * copies, cache, start)

        context = start + tokens.shape[1]
        seen = torch.cat([real.new_ones(len(real), start), real], 1)  # [branches, context]
        below = [
            (place, index, continuation if whole else continuation[:-1])
            for place, branch in enumerate(unit.branches)
            for index, continuation in enumerate(self._branches[branch].continuations)
            if whole or len(continuation) > 1
        ]
        below.sort(key=lambda item: -len(item[2]))
        fits = [max(1, self._budget // (copies * (context + len(fed)))) for _, _, fed in below]
        overhead = PASS_COST.get(lm.device.type, PASS_COST_ON_GPU)
        for first, last in batched([len(fed) for _, _, fed in below], fits, overhead / copies):
            batch = below[first:last]
            place = torch.tensor([place for place, _, _ in batch])
            every = torch.cat([place + block * len(members) for block in range(copies)])
            answers, _ = lm.pad([fed for _, _, fed in batch])
            where = place.to(seen.device)
            mask = torch.cat([seen[where], torch.ones_like(answers)], 1).repeat(blocks, 1) if padded else None
            self._steering.assign(conditions.repeat_interleave(len(batch)), trunk)
            own = select_rows(cache, every, place, trunk)
            lengths = tuple(len(fed) for _, _, fed in batch) * copies
            rows = tuple(Row(c, unit.branches[place], index) for c in unit.conditions for place, index, _ in batch)
            yield self._pass(rows, answers.repeat(blocks, 1), lengths, own, context, mask)

    def _pass(
        self,
        rows: tuple[Row, ...],
        tokens: Tensor,
        lengths: tuple[int, ...],
        cache: DynamicCache,
        start: int,
        mask: Tensor | None = None,
    ) -> Pass:
        self.tokens += tokens.numel()
        return Pass(rows, tokens, lengths, self._lm.forward(tokens, cache=cache, mask=mask, start=start))

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


def _longest(branch: Branch) -> int:
    return max(map(len, branch.continuations), default=0)


def batched(lengths: Sequence[int], fits: Sequence[int], overhead: float) -> list[tuple[int, int]]:
    """Cuts rows into batches so that pads and passes together cost least.

    Args:
        lengths: of the rows, the longest first.
        fits: how many rows as long as this one a batch may hold.
        overhead: what a pass costs beside its tokens, in tokens of one row.

    Returns:
        (first, last + 1) of each batch, in order.
    """
    edges = [i for i in range(len(lengths)) if i == 0 or lengths[i] != lengths[i - 1]] + [len(lengths)]
    cheapest, cuts = [0.0], [0]  # of the rows before each edge: cost, and where its last batches begin
    for end in range(1, len(edges)):
        costs = []
        for start in range(end):
            rows, longest = edges[end] - edges[start], lengths[edges[start]]
            passes = -(-rows // fits[edges[start]])
            costs.append(cheapest[start] + passes * overhead + rows * longest)
        cheapest.append(min(costs))
        cuts.append(costs.index(cheapest[-1]))
    spans, end = [], len(edges) - 1
    while end > 0:
        spans.append((edges[cuts[end]], edges[end]))
        end = cuts[end]
    return [
        (first, min(first + fits[start], stop))
        for start, stop in reversed(spans)
        for first in range(start, stop, fits[start])
    ]


def common_prefix(contexts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all contexts begin with, if it is long enough to be worth keeping."""
    first, last = min(contexts), max(contexts)  # any difference shows between the extremes
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length] if length >= MIN_SHARED else ()
