"""How close extraction, scoring and generation come to what the machine can do at all.

    python bench/roofline.py
    python bench/roofline.py --device cuda --size 4b --questions 400 --batch-tokens 65536

Counts the tokens that no program can spare: the distinct beginnings of all sequences, each once. Their floating-point
operations and the bytes of weights that must be read, at the rates of matrix products and of copies measured in the same
process, give the least time; that over the measured time is what is reached. Pads, prefixes computed twice, kernels and
Python are what is lost.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import material
import torch
from extraction_one_layer import PER_QUESTION, pairs
from generation import prompts
from side_by_side import parser, timed

from truthsteer.branching import shared
from truthsteer.model import LanguageModel
from truthsteer.sizes import of_model

SIDE, SIDE_ON_GPU = 2048, 8192
"""Of the square matrices whose product is timed: as large as it takes for the rate to be the machine's."""

COPIED = 2**28
"""Bytes of the copy that is timed: more than any cache holds."""


@dataclass(frozen=True)
class Rates:
    """What the machine does in a second."""

    operations: float
    """Of a large matrix product in the model's number format; a multiplication and an addition are two."""
    bytes: float
    """Read and written by a copy."""


def rates(options: argparse.Namespace) -> Rates:
    """The best of several tries of each."""
    dtype = material.DTYPES[material.policy(options).weights]
    side = SIDE_ON_GPU if options.device.startswith("cuda") else SIDE
    a, b = (torch.randn(side, side, device=options.device).to(dtype) for _ in range(2))
    source = torch.ones(COPIED // 4, device=options.device)
    target = torch.empty_like(source)
    product = best(options, lambda: torch.mm(a, b))
    copy = best(options, lambda: target.copy_(source))
    return Rates(2 * side**3 / product, 2 * COPIED / copy)


def best(options: argparse.Namespace, work: object, tries: int = 10) -> float:
    """Seconds of the fastest try, after one that is not counted."""
    assert callable(work)
    work()
    found = []
    for _ in range(tries):
        with timed(options.device) as seconds:
            work()
        found.append(seconds[0])
    return min(found)


@dataclass(frozen=True)
class Need:
    """What must be computed, whoever does it."""

    tokens: int
    """Distinct beginnings: a token counts once for everything that begins alike."""
    seen: int
    """Sum over those of how many tokens each may see, itself included."""
    predicted: int
    """Distinct beginnings whose next token is asked for."""
    readings: int = 1
    """Times that the weights must be read: once, or once a step where a token must be known before the next."""


def needed(sequences: Iterable[tuple[int, ...]], predicted: int, window: int | None, readings: int = 1) -> Need:
    """Counts over the prefix tree of all sequences, as if all layers had the window: no layer sees less."""
    ordered = sorted(set(sequences))
    starts = [0, *(shared(a, b) for a, b in pairwise(ordered))]
    new = [(start, len(tokens)) for start, tokens in zip(starts, ordered, strict=True)]
    seen = sum(min(place + 1, window or place + 1) for start, end in new for place in range(start, end))
    return Need(sum(end - start for start, end in new), seen, predicted, readings)


def least_seconds(lm: LanguageModel, layers: int, need: Need, machine: Rates) -> float:
    """No program on this machine takes less: the longer of its operations and of reading its weights."""
    sizes = of_model(lm.model)
    operations = 2 * sizes.linear * layers * need.tokens
    operations += 4 * sizes.num_heads * sizes.head_dim * layers * need.seen
    operations += 2 * sizes.hidden_size * sizes.vocab_size * need.predicted
    head = sizes.hidden_size * sizes.vocab_size if need.predicted else 0
    read = (sizes.linear * layers + head) * need.readings * lm.model.dtype.itemsize
    return max(operations / machine.operations, read / machine.bytes)


@dataclass(frozen=True)
class Reached:
    """One kind of work, measured."""

    name: str
    layers: int
    need: Need
    seconds: float
    computed: int
    """Tokens fed to the model, pads included."""


def extraction(options: argparse.Namespace, lm: LanguageModel, depth: int) -> Reached:
    from truthsteer.extraction import extract, paired
    from truthsteer.prompts import PLAIN, Prompts

    asked, _ = pairs(options)
    given = Prompts(PLAIN, lm.tokenizer, lm.chat)
    _, _, branches = paired(asked, given, PER_QUESTION)
    sequences = [(*b.context, *tokens) for b in branches for tokens in b.continuations]
    extract(lm, asked[:4], depth=depth)
    with Counted(lm) as fed, timed(options.device) as seconds:
        extract(lm, asked, depth=depth, pairs_per_question=PER_QUESTION, batch_tokens=options.batch_tokens)
    need = needed(sequences, 0, lm.text_config.sliding_window)
    return Reached(f"extraction, {depth} layers, {len(sequences) // 2} pairs", depth, need, seconds[0], sum(fed))


def scoring(options: argparse.Namespace, lm: LanguageModel, preset: str) -> Reached:
    from truthsteer.prompts import Prompts
    from truthsteer.scoring import score

    asked = material.questions(options, options.questions)
    given = Prompts(material.preset(preset), lm.tokenizer, chat=False)
    branches = given.branches([q.text for q in asked], [[a for a, _ in q.choices] for q in asked])
    list(score(lm, branches[:2], [None]))
    with Counted(lm) as fed, timed(options.device) as seconds:
        for _ in score(lm, branches, [None], batch_tokens=options.batch_tokens):
            pass
    before = {(*b.context, *t[:place]) for b in branches for t in b.continuations for place in range(len(t))}
    sequences = [(*b.context, *tokens[:-1]) for b in branches for tokens in b.continuations]
    need = needed(sequences, len(before), lm.text_config.sliding_window)
    name = f"scoring, preset {preset}, {sum(len(b.continuations) for b in branches)} answers"
    return Reached(name, lm.num_layers, need, seconds[0], sum(fed))


def generation(options: argparse.Namespace, lm: LanguageModel) -> Reached:
    from truthsteer.config import GenerationConfig
    from truthsteer.decoding import Request, decode

    eos, lm.eos_ids = lm.eos_ids, frozenset()
    contexts = [tuple(ids) for ids in lm.tokenizer(prompts(options, options.rows)).input_ids]
    config = GenerationConfig(max_new_tokens=options.new)
    list(decode(lm, [Request(contexts[0], 0)], [None], config=config, stop=()))
    requests = [Request(context, 0) for context in contexts]
    with Counted(lm) as fed, timed(options.device) as seconds:
        for _ in decode(lm, requests, [None], config=config, stop=(), batch_tokens=options.batch_tokens):
            pass
    lm.eos_ids = eos
    made = [(*context, *([-place] * (options.new - 1))) for place, context in enumerate(contexts, 1)]
    need = needed(made, len(contexts) * options.new, lm.text_config.sliding_window, options.new)
    return Reached(f"generation, {len(contexts)} x {options.new} tokens", lm.num_layers, need, seconds[0], sum(fed))


class Counted:
    """A list of how many tokens each pass was fed, while the block runs."""

    def __init__(self, lm: LanguageModel) -> None:
        self._embedding = lm.model.get_input_embeddings()
        self.fed: list[int] = []

    def __enter__(self) -> Sequence[int]:
        self._handle = self._embedding.register_forward_pre_hook(lambda _, given: self.fed.append(given[0].numel()))
        return self.fed

    def __exit__(self, *error: object) -> None:
        self._handle.remove()


def main() -> None:
    typed = parser(__doc__)
    typed.add_argument("--pairs", type=int, default=100)
    typed.add_argument("--questions", type=int, default=100)
    typed.add_argument("--rows", type=int, default=64)
    typed.add_argument("--new", type=int, default=32)
    typed.add_argument("--batch-tokens", type=int, default=8192)
    options = typed.parse_args()
    options.dtype = options.dtype or ("fp32" if options.device == "cpu" else "bf16")
    torch.set_num_threads(options.threads)
    lm = material.language_model(options)
    print(f"Gemma 3 {options.size}, {options.dtype}, {options.device}, {options.threads} threads")
    print(f"{'work':48} {'seconds':>8} {'least':>7} {'reached':>8} {'tokens':>7} {'computed':>9}")
    works = [
        lambda: extraction(options, lm, lm.num_layers // 2 + 1),
        lambda: extraction(options, lm, lm.num_layers),
        lambda: scoring(options, lm, "qa"),
        lambda: scoring(options, lm, "plain"),
        lambda: generation(options, lm),
    ]
    for work in works:
        shares = []
        for _ in range(options.rounds):
            machine = rates(options)
            found = work()
            least = least_seconds(lm, found.layers, found.need, machine)
            shares.append((least / found.seconds, found, least, machine))
        share, found, least, machine = sorted(shares, key=lambda item: item[0])[(len(shares) - 1) // 2]
        print(
            f"{found.name:48} {found.seconds:8.2f} {least:7.2f} {share:8.0%} {found.need.tokens:7} "
            f"{found.computed / found.need.tokens:8.2f}x   ({machine.operations / 1e9:.0f} Gflop/s, "
            f"{machine.bytes / 1e9:.1f} GB/s)",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
