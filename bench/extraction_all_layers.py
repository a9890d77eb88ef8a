"""Activations of every layer and a vector of each, against steering-vectors and repeng.

    python bench/extraction_all_layers.py
    python bench/extraction_all_layers.py --device cuda --size 4b --peer-batch 32

All read the last token. steering-vectors takes the mean difference of pairs, repeng the first principal component of their
centred activations; ours are made of the same activations by the same formulas.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import material
import numpy as np
from extraction_one_layer import PER_QUESTION, pairs
from side_by_side import Arrays, Measured, Side, cosine, main, parser, timed


def ours(options: argparse.Namespace) -> Measured:
    from truthsteer.extraction import extract

    lm = material.language_model(options)
    asked, _ = pairs(options)
    extract(lm, asked[:4])
    with timed(options.device) as seconds:
        found = extract(lm, asked, pairs_per_question=PER_QUESTION, batch_tokens=options.batch_tokens)
        last = found.answer_last  # [pairs, truth, layers, hidden]
        mean = (last[:, 0] - last[:, 1]).mean(0)
        centred = last - last.mean(1, keepdims=True)
        component = np.stack([first_component(centred[:, :, layer]) for layer in range(lm.num_layers)])
    return Measured(seconds[0], len(found.pairs), {"mean": mean, "component": component})


def first_component(activations: np.ndarray) -> np.ndarray:
    """The first principal component of [..., hidden], from the products of rows: there are fewer rows than channels."""
    rows = activations.reshape(-1, activations.shape[-1]).astype(np.float64)
    rows = rows - rows.mean(0)
    _, vectors = np.linalg.eigh(rows @ rows.T)
    found = vectors[:, -1] @ rows
    return np.asarray(found / np.linalg.norm(found))


def texts(options: argparse.Namespace) -> list[tuple[str, str]]:
    asked, made = pairs(options)
    names = {question.id: question.text for question in asked}
    return [tuple(f"Q: {names[p.question]}\nA: {answer}" for answer in (p.true, p.false)) for p in made]  # type: ignore[misc]


def steering_vectors(options: argparse.Namespace) -> Measured:
    from steering_vectors import train_steering_vector

    model, tokenizer, made = material.transformers_model(options), material.tokenizer(options), texts(options)
    train_steering_vector(model, tokenizer, made[:2], batch_size=2, show_progress=False)
    with timed(options.device) as seconds:
        found = train_steering_vector(model, tokenizer, made, batch_size=options.peer_batch, show_progress=False)
    mean = np.stack(
        [found.layer_activations[layer].float().cpu().numpy() for layer in range(model.config.num_hidden_layers)]
    )
    return Measured(seconds[0], len(made), {"mean": mean})


def repeng(options: argparse.Namespace) -> Measured:
    np.float_ = np.float64  # type: ignore[attr-defined]  # repeng 0.4 asks for numpy 1
    from repeng import ControlModel, ControlVector, DatasetEntry

    model, tokenizer, made = material.transformers_model(options), material.tokenizer(options), texts(options)
    layers = range(1, model.config.num_hidden_layers)  # it leaves the first one out
    wrapped: Any = ControlModel(model, list(layers))
    entries = [DatasetEntry(positive=true, negative=false) for true, false in made]
    ControlVector.train(wrapped, tokenizer, entries[:2], method="pca_center")
    with timed(options.device) as seconds:
        found = ControlVector.train(wrapped, tokenizer, entries, method="pca_center", batch_size=options.peer_batch)
    return Measured(seconds[0], len(made), {"component": np.stack([found.directions[layer] for layer in layers])})


def check(found: Mapping[str, Arrays]) -> list[str]:
    said = []
    for name, what in (("steering-vectors", "mean"), ("repeng", "component")):
        if name in found:
            theirs = found[name][what]
            layers = slice(1, -1) if name == "repeng" else slice(None)  # its last one is read after the final norm
            found_here = found["truthsteer"][what][layers]
            least = float(np.abs(cosine(found_here, theirs[: len(found_here)])).min())
            assert least > 0.9999, (name, least)
            which = "every layer" if name != "repeng" else "every layer but the first and the last"
            said.append(f"{name}: |cosine| of the vectors at least {least:.6f} in {which}")
    return said


if __name__ == "__main__":
    typed = parser(__doc__)
    typed.add_argument("--pairs", type=int, default=100)
    typed.add_argument("--batch-tokens", type=int, default=8192)
    typed.add_argument("--peer-batch", type=int, default=8, help="of the peers; the best of 1, 8, 16, 32 here")
    sides = {
        "truthsteer": Side(ours),
        "steering-vectors": Side(steering_vectors, reach=6.0, needs="steering_vectors"),
        "repeng": Side(repeng, reach=6.0, needs="repeng"),
    }
    main(sides, check, typed.parse_args(), "pair")
