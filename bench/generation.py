"""Answers to every question under 8 conditions, against `generate`: one prompt at a time, and batched, a hook per condition.

    python bench/generation.py
    python bench/generation.py --preset qa
    python bench/generation.py --device cuda --size 4b --questions 200 --new 50 --peer-batch 200

Greedy. Random weights never end an answer by themselves, so a share of the vocabulary ends it (`--ends`): answers then have
all lengths, as real ones do. Both ways have the same ends. Times are per answer; `generate` alone answers fewer.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import material
import numpy as np
from side_by_side import Arrays, Measured, Side, main, parser, timed

COEFFICIENTS = (0.0, -1.0, -0.5, 0.25, 0.5, 1.0, 1.5, 2.0)
"""Of the 8 conditions; 0 is none."""


def vector(hidden: int) -> Any:
    import torch

    return torch.randn(hidden, generator=torch.Generator().manual_seed(7)) * 0.1


def ends(model: Any, share: float) -> list[int]:
    """Tokens that end an answer: <eos> and a random share of the others."""
    import torch

    drawn = torch.rand(model.config.vocab_size, generator=torch.Generator().manual_seed(5)) < share
    return [1, *drawn.nonzero()[:, 0].tolist()]


def prompts(options: argparse.Namespace, count: int) -> list[str]:
    text = material.preset(options.preset).text if getattr(options, "preset", None) else "Q: {question}\nA:"
    return [text.replace("{question}", question.text) for question in material.questions(options, count)]


def ours(options: argparse.Namespace) -> Measured:
    from truthsteer.config import GenerationConfig
    from truthsteer.decoding import Request, decode
    from truthsteer.hooks import Injection

    lm = material.language_model(options)
    lm.eos_ids = frozenset(ends(lm.model, options.ends))
    conditions = [Injection(lm.num_layers // 2, vector(lm.hidden_size), c) if c else None for c in COEFFICIENTS]
    asked = prompts(options, options.questions)
    with timed(options.device) as seconds:
        contexts = [tuple(ids) for ids in lm.tokenizer(asked).input_ids]
        requests = [Request(context, place) for place in range(len(conditions)) for context in contexts]
        made = decode(
            lm,
            requests,
            conditions,
            config=GenerationConfig(max_new_tokens=options.new),
            stop=(),
            batch_tokens=options.batch_tokens,
        )
        answers = {index: answer for _, group in made for index, answer in group}
    lengths = np.array([answers[index].tokens for index in range(len(requests))])
    texts = np.array([answers[index].text for index in range(len(requests))])
    shape = (len(conditions), len(asked))
    note = f"; {lengths.mean():.1f} tokens an answer"
    return Measured(seconds[0], len(requests), {"lengths": lengths.reshape(shape), "texts": texts.reshape(shape)}, note)


def peer(options: argparse.Namespace, batch: int, questions: int) -> Measured:
    """`generate` with one forward hook on the steered layer, a condition after the other."""
    import torch

    model, tokenizer = material.transformers_model(options), material.tokenizer(options)
    asked = prompts(options, options.questions)[:questions]
    stops = ends(model, options.ends)
    lengths, texts = [], []
    with torch.no_grad(), timed(options.device) as seconds:
        for coefficient in COEFFICIENTS:
            added = coefficient * vector(model.config.hidden_size).to(options.device)
            layer = model.model.layers[model.config.num_hidden_layers // 2]
            handle = layer.register_forward_hook(lambda _m, _i, output, added=added: output + added.to(output.dtype))
            order = sorted(range(len(asked)), key=lambda index: -len(asked[index]))
            found: dict[int, list[int]] = {}
            for first in range(0, len(order), batch):
                own = order[first : first + batch]
                ids = tokenizer([asked[index] for index in own], return_tensors="pt", padding=True).to(options.device)
                out = model.generate(
                    **ids, max_new_tokens=options.new, do_sample=False, eos_token_id=stops, pad_token_id=0
                )
                for index, row in zip(own, out[:, ids.input_ids.shape[1] :].tolist(), strict=True):
                    end = next((n + 1 for n, token in enumerate(row) if token in set(stops)), len(row))
                    found[index] = row[:end]
            handle.remove()
            lengths.append([len(found[index]) for index in range(len(asked))])
            texts.append([written(tokenizer, found[index], stops) for index in range(len(asked))])
    return Measured(
        seconds[0],
        len(asked) * len(COEFFICIENTS),
        {"lengths": np.array(lengths), "texts": np.array(texts)},
        f"; batch {batch}",
    )


def written(tokenizer: Any, ids: list[int], stops: list[int]) -> str:
    kept = ids[:-1] if ids and ids[-1] in set(stops) else ids
    return str(tokenizer.decode(kept, skip_special_tokens=True).strip())


def alone(options: argparse.Namespace) -> Measured:
    return peer(options, 1, options.peer_questions)


def one_hook(options: argparse.Namespace) -> Measured:
    return peer(options, options.peer_batch, options.questions)


def check(found: Mapping[str, Arrays]) -> list[str]:
    said = []
    for name in ("generate, one at a time", "generate, a hook each"):
        if name in found:
            theirs = found[name]["texts"]
            same = float((found["truthsteer"]["texts"][:, : theirs.shape[1]] == theirs).mean())
            assert same > 0.9, (name, same)
            said.append(f"{name}: {same:.1%} of {theirs.size} answers the same to the letter (ties fall with rounding)")
    return said


if __name__ == "__main__":
    typed = parser(__doc__)
    typed.add_argument("--questions", type=int, default=40)
    typed.add_argument("--peer-questions", type=int, default=3, help="of the peer that answers one at a time")
    typed.add_argument("--peer-batch", type=int, default=40, help="the best of 8, 20, 40 here")
    typed.add_argument("--new", type=int, default=32)
    typed.add_argument("--preset", help="such as qa, with six answered questions before each; none by default")
    typed.add_argument("--ends", type=float, default=0.03)
    typed.add_argument("--batch-tokens", type=int, default=8192)
    sides = {
        "truthsteer": Side(ours),
        "generate, one at a time": Side(alone, reach=10.0),
        "generate, a hook each": Side(one_hook, reach=1.5),
    }
    main(sides, check, typed.parse_args(), "answer")
