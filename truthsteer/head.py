"""Log-probabilities of tokens from hidden states, the vocabulary taken part by part where that is faster.

A row of logits of a large vocabulary is a megabyte, and most of the time goes into writing and reading it again. On a CPU
each part stays in its cache: its largest logits and sums are kept, never the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from truthsteer.memory import LOGITS_AT_ONCE, LOGITS_IN_CACHE, PART
from truthsteer.model import LanguageModel


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
    step, part = _shape(lm, hidden)
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
    _, part = _shape(lm, hidden)
    parts = _parts(lm, part)
    highest, lowest = (torch.empty(len(parts), len(hidden), device=hidden.device) for _ in range(2))
    tokens = torch.empty(len(parts), len(hidden), dtype=torch.long, device=hidden.device)
    for number, words in enumerate(parts):
        logits = lm.logits(hidden, words)  # [positions, part]
        highest[number], tokens[number] = logits.max(-1)
        tokens[number] += words.start
        lowest[number] = logits.amin(-1)
    top, where = highest.max(0)
    return tokens.gather(0, where[None])[0], torch.isfinite(top) & (lowest.amin(0) > float("-inf"))


def _shape(lm: LanguageModel, hidden: Tensor) -> tuple[int, int]:
    """How many positions, and how many words of the vocabulary, are multiplied at once."""
    words = lm.text_config.vocab_size
    if hidden.device.type == "cpu" and lm.sliceable_head:
        part = min(PART, words)
        return max(1, LOGITS_IN_CACHE // part), part
    return max(1, LOGITS_AT_ONCE // words), words


def _parts(lm: LanguageModel, part: int) -> list[slice]:
    words = lm.text_config.vocab_size
    return [slice(begin, min(begin + part, words)) for begin in range(0, words, part)]


def _logprobs(lm: LanguageModel, hidden: Tensor, places: Tensor, tokens: Tensor, part: int) -> Tensor:
    parts = _parts(lm, part)
    # What is kept is allocated first: small tensors made between large ones would stand in the gaps that those leave, and the
    # next large one would need new memory, part after part.
    totals, lowest = (torch.empty(len(parts), len(hidden), device=hidden.device) for _ in range(2))
    picked = torch.empty(len(places), device=hidden.device)
    for number, words in enumerate(parts):
        logits = lm.logits(hidden, words)  # [positions, part]
        own = ((tokens >= words.start) & (tokens < words.stop)).nonzero()[:, 0]
        found = logits[places[own].to(logits.device), (tokens[own] - words.start).to(logits.device)]
        picked[own.to(picked.device)] = found.to(picked.device)
        totals[number] = logits.logsumexp(-1)
        lowest[number] = logits.amin(-1)
    total = totals.logsumexp(0)
    # A logit that is NaN or inf makes the sum so; one that is -inf leaves it finite.
    finite = torch.isfinite(total) & (lowest.amin(0) > float("-inf"))
    return picked - total.where(finite, float("nan"))[places.to(total.device)]
