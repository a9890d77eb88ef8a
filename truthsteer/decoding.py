"""Answers generated for many conditions in one batch, a coefficient per row.

What all contexts begin with (a few-shot preset) is computed once per condition. The rest is padded on the left with explicit
positions; a row that is finished leaves the batch. Stop strings are looked for
in the text, never in token suffixes, and are removed. Greedy by default; sampling draws from one generator per row, so
that a row's text does not depend on which batch it stood in beyond the arithmetic's rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from truthsteer.branching import common_prefix
from truthsteer.config import GenerationConfig
from truthsteer.errors import UserError
from truthsteer.halving import in_halves
from truthsteer.head import greedy
from truthsteer.hooks import Injection, RowSteering
from truthsteer.memory import BEGINNINGS
from truthsteer.model import LanguageModel, select_rows
from truthsteer.nonfinite import Blame
from truthsteer.operators import Add, Operator
from truthsteer.prompts import PLAIN, Prompts

COMPACT_AT = 0.75
"""Finished rows are taken out of the batch once fewer than this share is still running."""

FEWEST = 4
"""Requests per condition, for what their contexts begin with to be computed apart."""


@dataclass(frozen=True)
class Request:
    """One answer to generate."""

    context: tuple[int, ...]
    condition: int
    seed: int = 0
    name: str = ""
    """What is asked, for messages."""


@dataclass(frozen=True)
class Generated:
    """One generated answer: see `records.Completion`."""

    text: str
    tokens: int
    stop_reason: str


def batches(
    requests: Sequence[Request], batch_tokens: int, max_new_tokens: int, together: int | None = None
) -> list[list[int]]:
    """Indices of requests, longest contexts first, so that prompt plus answer slots stay within `batch_tokens`.

    With `together`, the first so many conditions come first, then the next so many, and no batch has both.
    """
    span = together or 1 + max((request.condition for request in requests), default=0)
    order = sorted(range(len(requests)), key=lambda i: (requests[i].condition // span, -len(requests[i].context), i))
    groups: list[list[int]] = []
    for index in order:
        first = requests[groups[-1][0]] if groups else None
        full = first is not None and (len(groups[-1]) + 1) * (len(first.context) + max_new_tokens) > batch_tokens
        if first is None or full or requests[index].condition // span != first.condition // span:
            groups.append([])
        groups[-1].append(index)
    return groups


class _Beginning:
    """What all contexts begin with, computed once for each of the conditions that are asked together."""

    def __init__(
        self, lm: LanguageModel, steering: RowSteering, tokens: tuple[int, ...], conditions: int, batch_tokens: int
    ) -> None:
        self.tokens = tokens
        self.together = max(1, int(BEGINNINGS * batch_tokens) // len(tokens)) if tokens else None
        """Conditions whose beginnings are held at once; None without a beginning."""
        self._lm, self._steering, self._conditions = lm, steering, conditions
        self._first, self._cache = -1, lm.new_cache()
        self._trunk: int | None = None

    def cache(self, rows: Tensor) -> DynamicCache:
        """A cache that holds it for each row, given the rows' conditions."""
        if self.together is None:
            return self._lm.new_cache()
        first = int(rows[0]) // self.together * self.together
        if first != self._first:
            own = range(first, min(first + self.together, self._conditions))
            self._trunk = self._steering.trunk_of(own)
            self._steering.assign(torch.tensor(own), self._trunk)
            blocks = 1 if self._trunk is not None else len(own)
            self._first, self._cache = -1, self._lm.new_cache()  # stale as long as memory may run out
            self._lm.forward(torch.tensor([self.tokens] * blocks, device=self._lm.device), cache=self._cache)
            self._first = first
        return select_rows(self._cache, rows - first, torch.zeros_like(rows), self._trunk)


def _beginning(lm: LanguageModel, requests: Sequence[Request], max_new_tokens: int) -> tuple[int, ...]:
    """What contexts begin with alike, where the pads that follow it are not seen in place of real tokens, and where it is
    worth a pass: conditions have several requests each."""
    longest = max((len(request.context) for request in requests), default=0)
    window = getattr(lm.text_config, "sliding_window", None)
    few = len(requests) < FEWEST * len({request.condition for request in requests})
    if not requests or few or not lm.only_attends or (window is not None and longest + max_new_tokens > window):
        return ()
    return common_prefix([request.context[:-1] for request in requests])


def decode(
    lm: LanguageModel,
    requests: Sequence[Request],
    conditions: Sequence[Injection | None],
    *,
    config: GenerationConfig,
    stop: Sequence[str],
    operator: Operator | None = None,
    batch_tokens: int = 8192,
    skip: Callable[[int], bool] = lambda unit: False,
    advance: Callable[[int], None] = lambda done: None,
    names: Sequence[str] = (),
) -> Iterator[tuple[int, list[tuple[int, Generated]]]]:
    """Generate every request, a batch at a time; `names` are the conditions', for messages. `advance` is called with the
    number of requests just done, or skipped.

    Yields:
        (batch number, [(request index, answer)]), leaving out skipped batches.

    Raises:
        UserError: logits are not finite; names what was asked, condition and layer.
    """
    operator = operator or Add()
    with RowSteering(lm, conditions, operator) as steering:
        reading = Blame(lm, conditions, names, operator, steering)
        shared = _beginning(lm, requests, config.max_new_tokens)
        beginning = _Beginning(lm, steering, shared, len(conditions), batch_tokens)
        groups = batches(requests, batch_tokens, config.max_new_tokens, beginning.together)
        for number, group in enumerate(groups):
            if not skip(number):
                done = in_halves(
                    lambda part: _decode_batch(
                        reading, beginning, [requests[index] for index in part], config, tuple(stop)
                    ),
                    group,
                    lambda part: [part[: len(part) // 2], part[len(part) // 2 :]] if len(part) > 1 else [],
                )
                yield number, list(zip(group, done, strict=True))
            advance(len(group))


@torch.no_grad()
def _decode_batch(
    reading: Blame, beginning: _Beginning, requests: list[Request], config: GenerationConfig, stop: tuple[str, ...]
) -> list[Generated]:
    lm, steering = reading.lm, reading.steering
    known = len(beginning.tokens)
    ids, mask = lm.pad([request.context[known:] for request in requests], left=True)
    padded = bool((mask == 0).any())
    mask = torch.cat([mask.new_ones(len(mask), known), mask], dim=1)
    conditions = torch.tensor([request.condition for request in requests])
    generators = [torch.Generator().manual_seed(request.seed) for request in requests]
    tokens: list[list[int]] = [[] for _ in requests]
    finished: dict[int, Generated] = {}
    running = list(range(len(requests)))  # the batch's rows, by request
    cache = beginning.cache(conditions)
    steering.assign(conditions)
    step_ids = ids
    for step in range(config.max_new_tokens):
        hidden = lm.forward(
            step_ids, cache=cache, mask=mask if padded else None, start=known + (ids.shape[1] + step - 1 if step else 0)
        )
        assert hidden is not None
        if config.temperature == 0:
            chosen, finite = greedy(lm, hidden[:, -1])
        else:
            logits = lm.logits(hidden[:, -1])
            finite = torch.isfinite(logits).all(-1)
        broken = [running[place] for place in (~finite).nonzero()[:, 0].tolist()]
        for row in broken:
            if row not in finished:
                raise _not_finite(reading, requests[row], tokens[row])
        if config.temperature != 0:
            chosen = _draw(logits, config, [generators[row] for row in running])
        for row, token in zip(running, chosen.tolist(), strict=True):
            if row not in finished:
                tokens[row].append(token)
        live = [row for row in running if row not in finished]
        for row, answer in _ended(lm, live, tokens, stop).items():
            finished[row] = answer
        live = [row for row in live if row not in finished]
        if not live:
            break
        step_ids = chosen[:, None].to(lm.device)
        if len(live) < COMPACT_AT * len(running):
            index = torch.tensor([place for place, row in enumerate(running) if row not in finished])
            cache = select_rows(cache, index)
            where = index.to(lm.device)
            step_ids, mask = step_ids[where], mask[where]
            running = live
            steering.assign(conditions[torch.tensor(running)])
        mask = torch.cat([mask, mask.new_ones(len(running), 1)], dim=1)
    for row in range(len(requests)):
        if row not in finished:
            finished[row] = Generated(_text(lm, tokens[row]).strip(), len(tokens[row]), "length")
    return [finished[row] for row in range(len(requests))]


def _not_finite(reading: Blame, request: Request, tokens: list[int]) -> UserError:
    whose = reading.whose(request.name or reading.text(request.context), request.condition)
    fault = f"The logits of {whose} are not finite at token {len(tokens) + 1} of the answer"
    return reading.error(fault, [*request.context, *tokens], request.condition)


def _ended(lm: LanguageModel, rows: list[int], tokens: list[list[int]], stop: tuple[str, ...]) -> dict[int, Generated]:
    """The rows that have just ended, with their answers: at an end-of-sequence token, or where a stop string begins."""
    ended = {}
    for row in rows:
        if tokens[row][-1] in lm.eos_ids:
            text = _cut(_text(lm, tokens[row][:-1]), stop)
            ended[row] = Generated(text.strip(), len(tokens[row]), "eos")
    open_rows = [row for row in rows if row not in ended]
    if stop and open_rows:
        texts = lm.tokenizer.batch_decode([tokens[row] for row in open_rows], skip_special_tokens=True)
        for row, text in zip(open_rows, texts, strict=True):
            if any(mark in text for mark in stop):
                ended[row] = Generated(_cut(text, stop).strip(), len(tokens[row]), "stop")
    return ended


def _cut(text: str, stop: tuple[str, ...]) -> str:
    return text[: min((text.find(mark) for mark in stop if mark in text), default=len(text))]


def _text(lm: LanguageModel, tokens: list[int]) -> str:
    return str(lm.tokenizer.decode(tokens, skip_special_tokens=True))


def _draw(logits: Tensor, config: GenerationConfig, generators: list[torch.Generator]) -> Tensor:
    """[rows] next tokens: of each row a draw from the nucleus of its distribution."""
    probabilities, order = (logits.cpu().double() / config.temperature).softmax(-1).sort(dim=-1, descending=True)
    cumulative = probabilities.cumsum(-1)
    outside = cumulative - probabilities >= config.top_p
    cumulative = probabilities.masked_fill(outside, 0.0).cumsum(-1)
    draws = torch.stack([torch.rand((), generator=generator, dtype=torch.float64) for generator in generators])
    places = torch.searchsorted(cumulative, (draws * cumulative[:, -1])[:, None]).clamp(max=logits.shape[-1] - 1)
    return order.gather(-1, places)[:, 0]


def generate(
    lm: LanguageModel,
    questions: Sequence[str],
    *,
    prompts: Prompts | None = None,
    max_new_tokens: int = 50,
    temperature: float = 0.0,
    seed: int = 0,
    batch_tokens: int = 8192,
) -> list[str]:
    """Answer questions, in a batch, under whatever steering is active. Returns the answers' texts in order."""
    prompts = prompts or Prompts(PLAIN, lm.tokenizer, lm.chat)
    requests = [
        Request(context, 0, seed + index, question)
        for index, (question, context) in enumerate(zip(questions, prompts.contexts(questions), strict=True))
    ]
    config = GenerationConfig(max_new_tokens=max_new_tokens, temperature=temperature)
    texts = [""] * len(requests)
    for _, done in decode(lm, requests, [None], config=config, stop=prompts.stop, batch_tokens=batch_tokens):
        for index, answer in done:
            texts[index] = answer.text
    return texts
