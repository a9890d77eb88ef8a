"""Contexts and the continuations that share them, each distinct prefix computed once per condition.

Four levels share keys and values: the prefix common to all contexts (a few-shot preset), the context of one question, what
several of its continuations (answers) begin with, and the rest of each. All are padded on the right, where a causal model
computes finite numbers that no real token sees: pads between two levels are masked, and positions count real tokens only.
Where pads would use up a sliding window, contexts of one batch have equal length instead. Many conditions fill one batch, a
row each, and share what is computed below the lowest layer that one of them steers.

Units depend only on the branches, the number of conditions and the token budget, never on what was done before nor on the
device; how a unit is cut into passes depends on the device too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from transformers import DynamicCache

from truthsteer.hooks import RowSteering
from truthsteer.model import LanguageModel, select_rows
from truthsteer.prompts import Branch

MIN_SHARED = 16
"""A common prefix shorter than this is cheaper to compute again than to copy."""

PASS_COST, PASS_COST_ON_GPU = {"cpu": 40}, 2048
"""What a pass costs beside its tokens, in tokens: reading the weights, starting kernels. On a GPU a guess."""

UNIT_COST = 250
"""The same of a unit, and the same on every device."""

MIN_STEM = 3
"""So many tokens that answers to one question begin with alike are computed once."""

STEM_PASSES = 8
"""Provided that this saves more, in a unit, than so many passes cost: it adds some."""


@dataclass(frozen=True)
class Unit:
    """A batch of work: some branches under some conditions (indices of both)."""

    conditions: tuple[int, ...]
    branches: tuple[int, ...]

    def halves(self) -> list[Unit]:
        """The same work in two parts, by branches or else by conditions; empty if it is one of each."""
        many = self.branches if len(self.branches) > 1 else self.conditions
        parts = (many[: len(many) // 2], many[len(many) // 2 :])
        if len(self.branches) > 1:
            return [Unit(self.conditions, part) for part in parts]
        return [Unit(part, self.branches) for part in parts] if len(self.conditions) > 1 else []


@dataclass(frozen=True)
class Row:
    """One row of a forward pass: a context, or tokens that some of its continuations share."""

    condition: int
    branch: int
    continuations: tuple[int, ...]
    """Indices within the branch; empty for the context itself."""
    start: int = 0
    """Tokens of those continuations that earlier passes held."""


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


@dataclass(frozen=True)
class _Node:
    """Tokens to feed after a context, or after another node."""

    place: int
    """Of the branch in its unit."""
    continuations: tuple[int, ...]
    start: int
    tokens: tuple[int, ...]
    tails: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """(continuation, tokens) of what follows."""
    row: int | None = None
    """Of the node before it, in the pass that held that."""

    @property
    def parent(self) -> int:
        return self.place if self.row is None else self.row


@dataclass(frozen=True)
class _Known:
    """What a pass has left: keys and values of its rows, and which slots are real."""

    cache: DynamicCache
    seen: Tensor
    """[rows of one condition, slots]."""


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
        self._overhead = PASS_COST.get(lm.device.type, PASS_COST_ON_GPU)
        self._stems = self._padded(2)
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
            overhead = UNIT_COST / len(chunk) if self._padded(1) else 0.0
            units += [Unit(chunk, tuple(order[i:j])) for i, j in batched(lengths, fits, overhead)]
        return units

    def _padded(self, levels: int) -> bool:
        """Whether pads between contexts and so many levels below leave every real token in sight of what it may see."""
        window = getattr(self._lm.text_config, "sliding_window", None)
        longest = max(len(branch.context) for branch in self._branches)
        below = max((len(tokens) for branch in self._branches for tokens in branch.continuations), default=0)
        return window is None or longest + levels * below <= window

    def walk(self, unit: Unit, whole: bool) -> Iterator[Pass]:
        """The passes of a unit: first its contexts, then their continuations.

        Args:
            unit: one of `units`.
            whole: feed every token of the continuations; otherwise all but the last, which nothing follows.
        """
        lm, conditions = self._lm, torch.tensor(unit.conditions)
        trunk = self._steering.trunk_of(unit.conditions) if self._share else None
        copies, blocks = len(unit.conditions), 1 if trunk is not None else len(unit.conditions)
        cache, start = self._start(unit, trunk)
        fed = [self._branches[branch].context[start:] for branch in unit.branches]
        tokens, real = lm.pad(fed)
        self._steering.assign(conditions.repeat_interleave(len(fed)), trunk)
        rows = tuple(Row(c, b, ()) for c in unit.conditions for b in unit.branches)
        yield self._pass(rows, tokens.repeat(blocks, 1), tuple(map(len, fed)) * copies, cache, start)

        seen = torch.cat([real.new_ones(len(real), start), real], 1)  # [branches, slots]
        yield from self._nodes(unit, trunk, self._below(unit, whole), _Known(cache, seen))

    def _below(self, unit: Unit, whole: bool) -> list[_Node]:
        """What follows the contexts: whole continuations, or what several of one context begin with, and then the rest."""
        single, stems, saved = [], [], 0
        for place, branch in enumerate(unit.branches):
            fed = sorted(
                (continuation if whole else continuation[:-1], index)
                for index, continuation in enumerate(self._branches[branch].continuations)
                if whole or len(continuation) > 1
            )
            single += [_Node(place, (index,), 0, tokens) for tokens, index in fed]
            for first, last, same in alike([tokens for tokens, _ in fed], MIN_STEM) if self._stems else ():
                own = fed[first:last]
                tails = tuple((index, tokens[same:]) for tokens, index in own if len(tokens) > same)
                stems.append(_Node(place, tuple(index for _, index in own), 0, own[0][0][:same], tails))
                saved += same * (len(own) - 1)
        return stems if saved * len(unit.conditions) > STEM_PASSES * self._overhead else single

    def _nodes(self, unit: Unit, trunk: int | None, nodes: list[_Node], known: _Known) -> Iterator[Pass]:
        """The passes of some nodes, whose parents' keys and values are known, and of what is below them."""
        conditions, lm = torch.tensor(unit.conditions), self._lm
        copies, blocks = len(unit.conditions), 1 if trunk is not None else len(unit.conditions)
        rows_known, slots = known.seen.shape
        for kind in (False, True):  # those that something is below stand together
            own = sorted((node for node in nodes if bool(node.tails) is kind), key=lambda node: -len(node.tokens))
            fits = [max(1, self._budget // (copies * (slots + len(node.tokens)))) for node in own]
            for first, last in batched([len(node.tokens) for node in own], fits, self._overhead / copies):
                batch = own[first:last]
                place = torch.tensor([node.parent for node in batch])
                every = torch.cat([place + block * rows_known for block in range(copies)])
                tokens, real = lm.pad([node.tokens for node in batch])
                before = known.seen[place.to(known.seen.device)]
                # What is padded on the right needs no mask now: nothing real sees it. What comes after it does.
                mask = None if bool(before.all()) else torch.cat([before, torch.ones_like(real)], 1).repeat(blocks, 1)
                self._steering.assign(conditions.repeat_interleave(len(batch)), trunk)
                cache = select_rows(known.cache, every, place, trunk)
                lengths = tuple(len(node.tokens) for node in batch) * copies
                rows = tuple(
                    Row(condition, unit.branches[node.place], node.continuations, node.start)
                    for condition in unit.conditions
                    for node in batch
                )
                yield self._pass(rows, tokens.repeat(blocks, 1), lengths, cache, slots, mask)
                below = [
                    _Node(node.place, (index,), node.start + len(node.tokens), tail, (), row)
                    for row, node in enumerate(batch)
                    for index, tail in node.tails
                ]
                if below:
                    yield from self._nodes(unit, trunk, below, _Known(cache, torch.cat([before, real], 1)))

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


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def alike(texts: Sequence[tuple[int, ...]], least: int) -> list[tuple[int, int, int]]:
    """Groups of sorted texts that begin alike beyond what all of them do.

    A group ends where the next text shares with it `least` tokens less than its members share.

    Args:
        texts: sorted.
        least: tokens that members of a group share at least.

    Returns:
        (first, last + 1, tokens shared) of each group, in order; of a text that stands alone, all its tokens.
    """
    steps = [shared(a, b) for a, b in pairwise(texts)]
    groups, first = [], 0
    while first < len(texts):
        last, own = first + 1, len(texts[first])
        while last < len(texts):
            step = steps[last - 1]
            grows = last - first > 1 and step > own - least
            begins = last - first == 1 and (last == len(steps) or step > steps[last] - least)
            if step < least or not (grows or begins):
                break
            last, own = last + 1, min(own, step)
        groups.append((first, last, own))
        first = last
    return groups


def common_prefix(contexts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all contexts begin with, if it is long enough to be worth keeping."""
    first, last = min(contexts), max(contexts)  # any difference shows between the extremes
    length = shared(first, last)
    return first[:length] if length >= MIN_SHARED else ()
