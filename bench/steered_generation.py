"""What steering costs while a model answers: the same batch steered by ours, against plain `generate`.

    python bench/steered_generation.py
    python bench/steered_generation.py --device cuda --size 4b

Every row has its own coefficient; answers have a fixed length. At most 1.03 times as long is the aim.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import material
import numpy as np
from generation import COEFFICIENTS, prompts, vector
from side_by_side import Arrays, Measured, Side, main, parser, timed


def run(options: argparse.Namespace, steered: bool) -> Measured:
    from truthsteer.config import GenerationConfig
    from truthsteer.decoding import Request, decode
    from truthsteer.hooks import Injection

    lm = material.language_model(options)
    lm.eos_ids = frozenset()
    layer = lm.num_layers // 2
    conditions = [Injection(layer, vector(lm.hidden_size), c if steered else 0.0) for c in COEFFICIENTS]
    contexts = [tuple(ids) for ids in lm.tokenizer(prompts(options, options.rows)).input_ids]
    requests = [Request(context, place % len(conditions)) for place, context in enumerate(contexts)]
    config = GenerationConfig(max_new_tokens=options.new)
    with timed(options.device) as seconds:
        answers = [a for _, group in decode(lm, requests, conditions, config=config, stop=()) for a in group]
    lengths = np.array([answer.tokens for _, answer in answers])
    return Measured(seconds[0], float(lengths.sum()), {"lengths": lengths})


def steered(options: argparse.Namespace) -> Measured:
    return run(options, True)


def unsteered(options: argparse.Namespace) -> Measured:
    return run(options, False)


def plain(options: argparse.Namespace) -> Measured:
    import torch

    model, tokenizer = material.transformers_model(options), material.tokenizer(options)
    ids = tokenizer(prompts(options, options.rows), return_tensors="pt", padding=True).to(options.device)
    with torch.no_grad(), timed(options.device) as seconds:
        out = model.generate(**ids, max_new_tokens=options.new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    made = out.shape[1] - ids.input_ids.shape[1]
    return Measured(seconds[0], float(made * len(out)), {"lengths": np.full(len(out), made)})


def check(found: Mapping[str, Arrays]) -> list[str]:
    lengths = {int(length) for arrays in found.values() for length in arrays["lengths"]}
    assert len(lengths) == 1, lengths
    return [f"every answer has {lengths.pop()} tokens"]


if __name__ == "__main__":
    typed = parser(__doc__)
    typed.add_argument("--rows", type=int, default=32)
    typed.add_argument("--new", type=int, default=32)
    sides = {
        "truthsteer, steered": Side(steered),
        "truthsteer, not steered": Side(unsteered, most=1.03),
        "generate": Side(plain, most=1.03),
    }
    main(sides, check, typed.parse_args(), "token")
