"""Activations of answer pairs as arrays: what a method sees. Pure numpy; knows no model.

A pair with a value that is not finite loses both members, and says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from truthsteer.errors import UserError
from truthsteer.pairs import Pair
from truthsteer.records import Question, from_json, to_json
from truthsteer.store import read_json, write_json


@dataclass(frozen=True)
class Dropped:
    """A pair that was lost, and why."""

    pair: str
    question: str
    reason: str


@dataclass(frozen=True)
class Activations:
    """What was read. Index 0 of the axis `truth` is the true answer, 1 the false one.

    Attributes:
        pairs: the pairs that stand in the arrays, in order.
        answer_mean: [pairs, truth, layers, hidden] float32, mean over the answer's tokens.
        answer_last: [pairs, truth, layers, hidden] float32, at the answer's last token.
        prompt_last: [pairs, layers, hidden] float32, at the last token before the answer.
        norms: [pairs, truth, layers] float32, mean over the answer's tokens of the residual stream's L2 norm.
        tokens: [pairs, truth] int64, tokens of each answer.
        dropped: pairs that were lost.
    """

    pairs: tuple[Pair, ...]
    answer_mean: np.ndarray
    answer_last: np.ndarray
    prompt_last: np.ndarray
    norms: np.ndarray
    tokens: np.ndarray
    dropped: tuple[Dropped, ...] = ()

    @property
    def num_layers(self) -> int:
        return int(self.norms.shape[2])

    def readout(self, name: str) -> np.ndarray:
        """[pairs, truth, layers, hidden] for `answer_mean` or `answer_last`.

        Raises:
            UserError: there is no such readout.
        """
        if name not in ("answer_mean", "answer_last"):
            raise UserError(f"readout={name} is not one of answer_mean, answer_last. Type one of them.")
        return np.asarray(getattr(self, name))

    def residual_norm(self) -> np.ndarray:
        """[layers] mean L2 norm of the residual stream over all answer tokens: the unit of coefficients."""
        weights = self.tokens[..., None].astype(np.float64)
        return np.asarray((self.norms * weights).sum((0, 1)) / weights.sum((0, 1)))

    def of(self, questions: Sequence[Question]) -> Activations:
        """Only the pairs of these questions."""
        ids = {question.id for question in questions}
        keep = np.array([pair.question in ids for pair in self.pairs], dtype=bool)
        return Activations(
            tuple(pair for pair in self.pairs if pair.question in ids),
            self.answer_mean[keep],
            self.answer_last[keep],
            self.prompt_last[keep],
            self.norms[keep],
            self.tokens[keep],
            tuple(item for item in self.dropped if item.question in ids),
        )

    def save(self, folder: Path) -> None:
        save_file(
            {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}, folder / "activations.safetensors"
        )
        write_json(
            folder / "pairs.json",
            {
                "pairs": [to_json(pair) for pair in self.pairs],
                "dropped": [to_json(item) for item in self.dropped],
            },
        )

    @classmethod
    def load(cls, folder: Path) -> Activations:
        arrays = load_file(folder / "activations.safetensors")
        records = read_json(folder / "pairs.json")
        return cls(
            tuple(from_json(Pair, item) for item in records["pairs"]),
            **{name: arrays[name] for name in _ARRAYS},
            dropped=tuple(from_json(Dropped, item) for item in records["dropped"]),
        )


_ARRAYS = ("answer_mean", "answer_last", "prompt_last", "norms", "tokens")


def drop_bad(activations: Activations, max_dropped: float) -> Activations:
    """Drop pairs with values that are not finite, both members.

    Raises:
        UserError: more than the share `max_dropped` is lost.
    """
    finite = np.isfinite(activations.answer_mean) & np.isfinite(
        activations.answer_last
    )  # [pairs, truth, layers, hidden]
    ok_layer = finite.all(-1).all(1) & np.isfinite(activations.prompt_last).all(-1)  # [pairs, layers]
    keep = ok_layer.all(-1)
    dropped = tuple(
        Dropped(pair.id, pair.question, f"not finite from layer {int(np.argmin(ok_layer[index]))} on")
        for index, pair in enumerate(activations.pairs)
        if not keep[index]
    )
    lost = len(dropped) / len(activations.pairs)
    if lost > max_dropped:
        raise UserError(
            f"{len(dropped)} of {len(activations.pairs)} pairs ({lost:.0%}) have activations that are not finite, the first "
            f"{dropped[0].reason}; steering.max_dropped={max_dropped:g} allows {max_dropped:.0%}. The numbers overflow: "
            "type dtype=bf16 or dtype=fp16 (float32 residual stream), not fp16_pure."
        )
    if not dropped:
        return activations
    return Activations(
        tuple(pair for pair, ok in zip(activations.pairs, keep, strict=True) if ok),
        activations.answer_mean[keep],
        activations.answer_last[keep],
        activations.prompt_last[keep],
        activations.norms[keep],
        activations.tokens[keep],
        dropped,
    )
