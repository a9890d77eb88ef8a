"""Log-probabilities of tokens from hidden states, the vocabulary taken part by part where that is faster.

A row of logits of a large vocabulary is a megabyte, and most of the time goes into writing and reading it again. On a CPU
each part stays in its cache: its largest logits and sums are kept, never the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from truthsteer.model import LanguageModel

LOGITS_AT_ONCE = 1 << 26
"""Logits held at once (256 MiB in float32)."""

PART, POSITIONS = 4096, 1024
"""On a CPU: words of the vocabulary, and positions, that are multiplied at once."""


@torch.no_grad()
def logprobs(lm: LanguageModel, hidden: Tensor, places: Tensor, tokens: Tensor) -> Tensor:
    """log p(token | position), natural logarithm: summed up in float32, given in float64 on the CPU.

    Args:
        lm: the model.
        hidden: [positions, hidden], after the final norm.
        places: [wanted] int64, of each the position.
        tokens: [wanted] int64.

    Returns:
        [wanted]; NaN where any logit of the position is not finite.
    """
    words, part = lm.text_config.vocab_size, _part(lm, hidden)
    step = POSITIONS if part < words else max(1, LOGITS_AT_ONCE // words)
    found = torch.empty(len(places), dtype=torch.float64)
    for first in range(0, len(hidden), step):
        mine = ((places >= first) & (places < first + step)).nonzero()[:, 0]
        own = _logprobs(lm, hidden[first : first + step], places[mine] - first, tokens[mine], part)
        found[mine] = own.cpu().double()  # on the CPU, since MPS has no float64
    return found


@torch.no_grad()
def greedy(lm: LanguageModel, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The most likely next token of each position, the first of several, and whether all of its logits are finite.

    Both [positions]; hidden: [positions, hidden], after the final norm.
    """
    words, part = lm.text_config.vocab_size, _part(lm, hidden)
    highest, tokens, lowest = [], [], []
    for begin in range(0, words, part):
        logits = lm.logits(hidden, slice(begin, min(begin + part, words)))  # [positions, part]
        top, place = logits.max(-1)
        highest.append(top)
        tokens.append(place + begin)
        lowest.append(logits.amin(-1))
    top, where = torch.stack(highest).max(0)
    chosen = torch.stack(tokens).gather(0, where[None])[0]
    return chosen, torch.isfinite(top) & (torch.stack(lowest).amin(0) > float("-inf"))


def _part(lm: LanguageModel, hidden: Tensor) -> int:
    """How many words of the vocabulary are multiplied at once."""
    return PART if hidden.device.type == "cpu" and lm.sliceable_head else lm.text_config.vocab_size


def _logprobs(lm: LanguageModel, hidden: Tensor, places: Tensor, tokens: Tensor, part: int) -> Tensor:
    words, picked, totals, lowest = lm.text_config.vocab_size, [], [], []
    order = []
    for begin in range(0, words, part):
        end = min(begin + part, words)
        logits = lm.logits(hidden, slice(begin, end))  # [positions, part]
        own = ((tokens >= begin) & (tokens < end)).nonzero()[:, 0]
        order.append(own)
        picked.append(logits[places[own].to(logits.device), (tokens[own] - begin).to(logits.device)])
        totals.append(logits.logsumexp(-1))
        lowest.append(logits.amin(-1))
    total = torch.stack(totals).logsumexp(0)
    # A logit that is NaN or inf makes the sum so; one that is -inf leaves it finite.
    finite = torch.isfinite(total) & (torch.stack(lowest).amin(0) > float("-inf"))
    total = total.where(finite, float("nan"))
    values = torch.empty_like(torch.cat(picked))
    values[torch.cat(order).to(values.device)] = torch.cat(picked)
    return values - total[places.to(total.device)]
