"""Contexts and the continuations that share them, as trees: each distinct beginning is computed once per condition.

What all contexts begin with (a few-shot preset) is computed first and kept. The rest is laid out in rows of a few hundred
tokens, several contexts with all their continuations in each: a token that two texts of a row begin with alike stands there
once, and an attention mask lets every token see its own text's beginning and nothing else (as in tree attention, Miao et al.
2024, arXiv:2305.09781). So next to nothing is padded or computed twice. Many conditions fill one batch, the same rows each,
and share what is computed below the lowest layer that one of them steers.

A number that is not finite would reach its whole row, since what is masked is multiplied by zero: such rows are done again
with a row for each text. So is everything where the attention takes no mask of its own (flash_attention_2), which is slower.

Units depend only on the branches, the number of conditions, the token budget and the kind of attention, never on what was done
before nor on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from truthsteer.hooks import RowSteering
from truthsteer.memory import LARGEST
from truthsteer.model import LanguageModel, select_rows
from truthsteer.prompts import Branch

MIN_SHARED = 16
"""A common prefix shorter than this is cheaper to compute again than to copy."""

ROW = 256
"""Tokens of a row, where no text needs more: all of its tokens are compared with each other, though few see each other."""

OPEN = 64
"""So many rows are looked at for the one that a branch fits best."""

EVENER = 4
"""So many widths between the rows' mean length and the widest are tried for as few rows, of a length more alike."""


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
class Path:
    """Where a pass holds a context's last token and the continuation after it."""

    branch: int
    continuation: int
    places: tuple[int, ...]
    """Of the context's last token, then of the continuation's, in one condition's rows flattened."""


@dataclass(frozen=True)
class Pass:
    """One forward pass: the same rows under each condition, one block after the other."""

    conditions: tuple[int, ...]
    paths: tuple[Path, ...]
    """Of one block; those of a branch are not always in one pass."""
    block: int
    """Tokens of a block, pads included: the next condition's places begin so much later."""
    hidden: Tensor | None
    """[rows of all blocks, tokens, hidden] after the final norm; None where a capture ended the pass early."""


class _Row:
    """Texts as a tree: a node for each distinct beginning, parents first."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.paths: list[tuple[int, int, tuple[int, ...]]] = []
        """(branch, continuation, nodes of the context's last token and the continuation's)."""
        self._children: dict[tuple[int, int], int] = {}

    def shares(self, text: Sequence[int]) -> int:
        """How many of a text's first tokens are here."""
        node = -1
        for count, token in enumerate(text):
            child = self._children.get((node, token))
            if child is None:
                return count
            node = child
        return len(text)

    def add(self, piece: _Piece) -> None:
        context = self._grow(piece.context, -1)
        for index, continuation in piece.continuations:
            nodes = self._grow(continuation, context[-1])
            self.paths.append((piece.branch, index, (context[-1], *nodes)))

    def _grow(self, text: Sequence[int], node: int) -> list[int]:
        found = []
        for token in text:
            child = self._children.setdefault((node, token), len(self.tokens))
            if child == len(self.tokens):
                self.tokens.append(token)
                self.parents.append(node)
            node = child
            found.append(node)
        return found

    def layout(self, start: int) -> tuple[Tensor, Tensor]:
        """Each token's position, [tokens], when `start` tokens come before the row; which tokens it sees, [tokens, tokens]."""
        size = len(self.tokens)
        sees = np.eye(size, dtype=bool)
        depths: list[int] = []
        for node, parent in enumerate(self.parents):
            depths.append(depths[parent] + 1 if parent >= 0 else start)
            if parent >= 0:
                sees[node, :node] = sees[parent, :node]
        return torch.tensor(depths), torch.from_numpy(sees)


@dataclass(frozen=True)
class _Piece:
    """A branch, or a part of it that fits a row: its context without the common prefix, and continuations to feed."""

    branch: int
    context: tuple[int, ...]
    continuations: tuple[tuple[int, tuple[int, ...]], ...]
    size: int
    """Tokens, each distinct beginning once."""


class Brancher:
    """Walks branches under conditions, unit by unit.

    Args:
        lm: the model.
        branches: contexts with their continuations.
        steering: entered by the caller; its conditions are the ones that units index.
        conditions: how many conditions there are.
        batch_tokens: at most this many key-value slots are filled in one pass (a single text of each condition may exceed it).
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
        self._prefix = common_prefix([branch.context[:-1] for branch in branches]) if lm.only_attends else ()
        self._prefix_cache: tuple[tuple[int, ...], DynamicCache] | None = None
        self.units = self._plan(conditions)

    def _plan(self, conditions: int) -> list[Unit]:
        every = range(len(self._branches))
        width = min(conditions, max(1, self._budget // (len(self._prefix) + self._widest(every, conditions))))
        width = -(-conditions // -(-conditions // width))  # as many in each
        rows = self._rows(every, width, whole=True)
        fits = self._rows_at_once(rows, width)
        together = [rows[first : first + fits] for first in range(0, len(rows), fits)]
        owned: set[int] = set()  # branches that an earlier unit has
        units = []
        for group in together:
            own = tuple(dict.fromkeys(path[0] for row in group for path in row.paths if path[0] not in owned))
            owned.update(own)
            if own:
                units.append(own)
        return [
            Unit(tuple(range(first, min(first + width, conditions))), own)
            for first in range(0, conditions, width)
            for own in units
        ]

    def walk(self, unit: Unit, whole: bool, state: Callable[[], Tensor] | None = None) -> Iterator[Pass]:
        """The passes of a unit.

        Args:
            unit: one of `units`, or a part of one.
            whole: feed every token of the continuations; otherwise all but the last, which nothing follows.
            state: gives the highest hidden states, [rows, tokens, hidden], of a pass that was ended early.
        """
        copies = len(unit.conditions)
        rows = self._rows(unit.branches, copies, whole)
        fits = self._rows_at_once(rows, copies)
        for first in range(0, len(rows), fits):
            own = rows[first : first + fits]
            step = self._pass(unit.conditions, own)
            bad: list[int] = []
            if self._lm.any_mask:
                reached = step.hidden if state is None else state()
                assert reached is not None
                bad = _not_finite(own, reached)
                width = step.block // len(own)
                step = replace(step, paths=tuple(p for p in step.paths if p.places[0] // width not in bad))
                del reached
            if step.paths:
                yield step
            del step
            alone = sorted(_alone([own[place] for place in bad]), key=lambda row: -len(row.tokens))
            for place in range(0, len(alone), fits):
                yield self._pass(unit.conditions, alone[place : place + fits], masked=False)

    def _widest(self, branches: Sequence[int], copies: int) -> int:
        return max(piece.size for piece in self._pieces(branches, copies, whole=True))

    def _pieces(self, branches: Sequence[int], copies: int, whole: bool) -> list[_Piece]:
        most = self._budget // copies - len(self._prefix) if self._lm.any_mask else 0
        found = []
        for branch in branches:
            context = self._branches[branch].context[len(self._prefix) :]
            fed = sorted(
                (tokens if whole else tokens[:-1], index)
                for index, tokens in enumerate(self._branches[branch].continuations)
            )
            own: list[tuple[int, tuple[int, ...]]] = []
            room = min(len(context) + LARGEST, most)
            size = len(context)
            before: tuple[int, ...] = ()
            for tokens, index in fed:
                new = len(tokens) - shared(tokens, before)
                if own and size + new > room:
                    found.append(_Piece(branch, context, tuple(own), size))
                    own, size, new = [], len(context), len(tokens)
                own.append((index, tokens))
                size, before = size + new, tokens
            found.append(_Piece(branch, context, tuple(own), size))
        return found

    def _rows(self, branches: Sequence[int], copies: int, whole: bool) -> list[_Row]:
        """Rows of the branches: the largest first, each where it leaves least room, with what begins like it if it can."""
        pieces = sorted(self._pieces(branches, copies, whole), key=lambda piece: (-piece.size, piece.branch))
        if not self._lm.any_mask:
            return [_packed([piece], 0)[0] for piece in pieces]
        width = max(pieces[0].size, min(ROW, self._budget // copies - len(self._prefix)))
        rows = _packed(pieces, width)
        # Few rows are made as full as each other: what the last one lacks is pads.
        for part in range(1, EVENER + 1) if len(rows) <= OPEN else ():
            mean = sum(len(row.tokens) for row in rows) / len(rows)
            narrower = _packed(pieces, max(pieces[0].size, int(mean + (width - mean) * part / (EVENER + 1)) + 1))
            if len(narrower) <= len(rows):
                return narrower
        return rows

    def _rows_at_once(self, rows: Sequence[_Row], copies: int) -> int:
        longest = max(len(row.tokens) for row in rows)
        return max(1, self._budget // (copies * (len(self._prefix) + longest)))

    def _pass(self, conditions: tuple[int, ...], rows: Sequence[_Row], masked: bool = True) -> Pass:
        lm, start = self._lm, len(self._prefix)
        trunk = self._steering.trunk_of(conditions) if self._share else None
        blocks = 1 if trunk is not None else len(conditions)
        cache = self._start(conditions, len(rows), trunk)
        tokens, _ = lm.pad([row.tokens for row in rows])
        width = tokens.shape[1]
        positions = sees = None
        if masked and lm.any_mask:
            positions = torch.zeros(len(rows), width, dtype=torch.long)
            sees = torch.eye(width, start + width, dtype=torch.bool).roll(start, 1).repeat(len(rows), 1, 1)
            sees[:, :, :start] = True
            for place, row in enumerate(rows):
                size = len(row.tokens)
                positions[place, :size], sees[place, :size, start : start + size] = row.layout(start)
            positions = positions.repeat(blocks, 1).to(tokens.device)
            sees = sees.repeat(blocks, 1, 1).to(tokens.device)
        self._steering.assign(torch.tensor(conditions).repeat_interleave(len(rows)), trunk)
        hidden = lm.forward(tokens.repeat(blocks, 1), cache=cache, mask=sees, start=start, positions=positions)
        paths = tuple(
            Path(branch, index, tuple(place * width + node for node in nodes))
            for place, row in enumerate(rows)
            for branch, index, nodes in row.paths
        )
        return Pass(conditions, paths, len(rows) * width, hidden)

    def _start(self, conditions: tuple[int, ...], rows: int, trunk: int | None) -> DynamicCache | None:
        """A cache of so many rows per condition that holds the common prefix; None without one."""
        if not self._prefix:
            return None
        if self._prefix_cache is None or self._prefix_cache[0] != conditions:
            cache = DynamicCache()  # of all layers alike: windows are in the masks
            self._steering.assign(torch.tensor(conditions), trunk)
            blocks = 1 if trunk is not None else len(conditions)
            tokens = torch.tensor([self._prefix] * blocks, device=self._lm.device)
            self._lm.forward(tokens, cache=cache)
            self._prefix_cache = (conditions, cache)
        every = torch.arange(len(conditions)).repeat_interleave(rows)
        return select_rows(self._prefix_cache[1], every, torch.zeros(rows, dtype=torch.long), trunk)


def _packed(pieces: Sequence[_Piece], width: int) -> list[_Row]:
    """Rows of at most `width` tokens, or of one piece: each piece where it adds least, and then where it leaves least room."""
    rows: list[_Row] = []
    for piece in pieces:
        best: _Row | None = None
        least = (0, 0)
        for row in rows[-OPEN:]:
            free = width - len(row.tokens)
            if free + len(piece.context) >= piece.size:
                new = piece.size - row.shares(piece.context)
                if new <= free and (best is None or (new, free) < least):
                    best, least = row, (new, free)
        if best is None:
            best = _Row()
            rows.append(best)
        best.add(piece)
    return rows


def _not_finite(rows: Sequence[_Row], state: Tensor) -> list[int]:
    """Rows of which a real token's numbers are not, under any condition; state: [rows of all blocks, tokens, hidden]."""
    lengths = torch.tensor([len(row.tokens) for row in rows], device=state.device)
    pads = torch.arange(state.shape[1], device=state.device)[None] >= lengths[:, None]  # [rows, tokens]
    finite = torch.isfinite(state).all(-1).reshape(-1, *pads.shape) | pads  # [conditions, rows, tokens]
    return (~finite.all(-1).all(0)).nonzero()[:, 0].tolist()


def _alone(rows: Sequence[_Row]) -> list[_Row]:
    """A row for each text of some rows."""
    found = []
    for row in rows:
        for branch, index, nodes in row.paths:
            context, node = [], nodes[0]
            while node >= 0:
                context.append(row.tokens[node])
                node = row.parents[node]
            own = _Row()
            fed = tuple(row.tokens[node] for node in nodes[1:])
            own.add(_Piece(branch, tuple(reversed(context)), ((index, fed),), 0))
            found.append(own)
    return found


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
