"""Activations of true and false answers at the middle layer, against the way of the system that users come from.

    python bench/extraction_one_layer.py
    python bench/extraction_one_layer.py --device cuda --size 4b

The earlier way: true answers, then false ones, whole texts in batches of 8, padded, through all layers and the head, every
layer's hidden states kept, those of the last token at the middle layer used.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import material
import numpy as np
from side_by_side import Arrays, Measured, Side, cosine, main, parser, timed

PER_QUESTION = 2
"""As in a default run."""


def pairs(options: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """The questions, and their pairs: as many as asked for."""
    from truthsteer.pairs import make_pairs

    chosen: list[Any] = []
    for question in material.questions(options, options.pairs):
        if len(make_pairs([*chosen, question], PER_QUESTION)) <= options.pairs:
            chosen.append(question)
    return chosen, make_pairs(chosen, PER_QUESTION)


def ours(options: argparse.Namespace) -> Measured:
    from truthsteer.extraction import extract

    lm = material.language_model(options)
    asked, _ = pairs(options)
    layer = lm.num_layers // 2
    extract(lm, asked[:4], depth=layer + 1)
    with timed(options.device) as seconds:
        found = extract(lm, asked, depth=layer + 1, pairs_per_question=PER_QUESTION, batch_tokens=options.batch_tokens)
    last = found.answer_last[:, :, layer]
    return Measured(seconds[0], len(found.pairs), {"last": last, "vector": (last[:, 0] - last[:, 1]).mean(0)})


def earlier(options: argparse.Namespace) -> Measured:
    import torch

    model, tokenizer = material.transformers_model(options), material.tokenizer(options)
    asked, made = pairs(options)
    names = {question.id: question.text for question in asked}
    layer = model.config.num_hidden_layers // 2

    def read(texts: list[str]) -> torch.Tensor:
        found = []
        for first in range(0, len(texts), 8):
            batch = tokenizer(texts[first : first + 8], return_tensors="pt", padding=True).to(options.device)
            states = model(**batch, output_hidden_states=True).hidden_states[layer + 1]
            found.append(states[:, -1].float().cpu())
        return torch.cat(found)

    with torch.no_grad():
        read(["Q: Who?\nA: He."])
        with timed(options.device) as seconds:
            true = read([f"Q: {names[pair.question]}\nA: {pair.true}" for pair in made])
            false = read([f"Q: {names[pair.question]}\nA: {pair.false}" for pair in made])
            vector = (true - false).mean(0)
    return Measured(seconds[0], len(made), {"last": torch.stack([true, false], 1).numpy(), "vector": vector.numpy()})


def check(found: Mapping[str, Arrays]) -> list[str]:
    a, b = found["truthsteer"], found["earlier way"]
    each, whole = float(cosine(a["last"], b["last"]).min()), float(cosine(a["vector"], b["vector"]))
    assert min(each, whole) > 0.9999 or a["last"].dtype != np.float32, (each, whole)
    return [f"cosine of every pair of activations at least {each:.6f}, of the vectors {whole:.6f}"]


if __name__ == "__main__":
    typed = parser(__doc__)
    typed.add_argument("--pairs", type=int, default=100)
    typed.add_argument("--batch-tokens", type=int, default=8192)
    sides = {"truthsteer": Side(ours), "earlier way": Side(earlier, reach=8.0)}
    main(sides, check, typed.parse_args(), "pair")
