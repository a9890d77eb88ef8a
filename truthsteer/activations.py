"""Activations of answer pairs as arrays: what a method sees. Pure numpy; knows no model.

A pair with a value that is not finite loses both members, and says why; so does one that did not fit its length, which is
found before anything is read (`lengths`), and is no fault of the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from truthsteer.errors import UserError
from truthsteer.files import read_json, write_json
from truthsteer.pairs import Pair
from truthsteer.records import Question, from_json, to_json


class Loss(StrEnum):
    """What a pair was lost to."""

    TOO_LONG = "too_long"
    EQUAL = "equal"
    NOT_FINITE = "not_finite"


@dataclass(frozen=True)
class Dropped:
    """A pair that was lost, and why."""

    pair: str
    question: str
    reason: str
    kind: Loss


@dataclass(frozen=True)
class Truncated:
    """A text whose activations were read without its end."""

    pair: str
    question: str
    member: str
    """`true` or `false`."""
    tokens: int
    """Of the whole text, prompt and answer."""


@dataclass(frozen=True)
class Activations:
    """What was read. Index 0 of the axis `truth` is the true answer, 1 the false one.

    Attributes:
        pairs: the pairs that stand in the arrays, in order.
        answer_mean: [pairs, truth, layers, hidden] float32, mean over the answer's tokens.
        answer_last: [pairs, truth, layers, hidden] float32, at the answer's last token.
        prompt_last: [pairs, layers, hidden] float32, at the last token before the answer.
        norms: [pairs, truth, layers] float32, mean over the answer's tokens of the residual stream's L2 norm.
        tokens: [pairs, truth] int64, tokens of each answer that were read.
        dropped: pairs that were lost.
        truncated: texts of `pairs` that were read without their end.
    """

    pairs: tuple[Pair, ...]
    answer_mean: np.ndarray
    answer_last: np.ndarray
    prompt_last: np.ndarray
    norms: np.ndarray
    tokens: np.ndarray
    dropped: tuple[Dropped, ...] = ()
    truncated: tuple[Truncated, ...] = ()

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
        found = self._where(np.array([pair.question in ids for pair in self.pairs], dtype=bool))
        return replace(found, dropped=tuple(item for item in self.dropped if item.question in ids))

    def without(self, lost: Sequence[Dropped]) -> Activations:
        """Both members of these pairs dropped too."""
        gone = {item.pair for item in lost}
        found = self._where(np.array([pair.id not in gone for pair in self.pairs], dtype=bool))
        return replace(found, dropped=(*self.dropped, *lost))

    def losses(self) -> list[str]:
        """What was dropped or cut, a phrase for each kind, with its first example."""
        found = []
        for loss in Loss:
            own = [item for item in self.dropped if item.kind is loss]
            if own:
                found.append(
                    f"{len(own)} of {len(self.pairs) + len(self.dropped)} answer pairs dropped: {own[0].reason}"
                )
        if self.truncated:
            found.append(f"{len(self.truncated)} texts of {len(self.pairs)} answer pairs read without their end")
        return found

    def _where(self, keep: np.ndarray) -> Activations:
        """The pairs that `keep`, [pairs] bool, names; what is known of others is left as it is."""
        pairs = tuple(pair for pair, kept in zip(self.pairs, keep, strict=True) if kept)
        ids = {pair.id for pair in pairs}
        return Activations(
            pairs,
            **{name: getattr(self, name)[keep] for name in _ARRAYS},
            dropped=self.dropped,
            truncated=tuple(item for item in self.truncated if item.pair in ids),
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
                "truncated": [to_json(item) for item in self.truncated],
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
            truncated=tuple(from_json(Truncated, item) for item in records["truncated"]),
        )


_ARRAYS = ("answer_mean", "answer_last", "prompt_last", "norms", "tokens")


def drop_bad(activations: Activations, max_dropped: float) -> Activations:
    """Drop pairs with values that are not finite, both members.

    Raises:
        UserError: more than the share `max_dropped` of the pairs that were read is lost, or all of them.
    """
    finite = np.isfinite(activations.answer_mean) & np.isfinite(
        activations.answer_last
    )  # [pairs, truth, layers, hidden]
    ok_layer = finite.all(-1).all(1) & np.isfinite(activations.prompt_last).all(-1)  # [pairs, layers]
    dropped = tuple(
        Dropped(pair.id, pair.question, f"not finite from layer {int(np.argmin(ok))} on", Loss.NOT_FINITE)
        for pair, ok in zip(activations.pairs, ok_layer, strict=True)
        if not ok.all()
    )
    lost = len(dropped) / len(activations.pairs)
    allowed = "none is left" if lost == 1 else f"steering.max_dropped={max_dropped:g} allows {max_dropped:.1%}"
    if lost > max_dropped or lost == 1:
        raise UserError(
            f"{len(dropped)} of {len(activations.pairs)} pairs ({lost:.1%}) have activations that are not finite, the first "
            f"{dropped[0].reason}; {allowed}. Type stages=[doctor] to see where, and which dtype holds them."
        )
    return activations.without(dropped) if dropped else activations


ROUNDING = 1e-5
"""So much of their norm may vectors differ by and still be the same in float32."""


def drop_equal(activations: Activations) -> Activations:
    """Drop pairs whose two answers have the same activations at every layer: their difference, if not 0, is only what float32
    rounds, and has no direction.

    Raises:
        UserError: none is left.
    """
    same = _same(activations.answer_mean) | _same(activations.answer_last)  # [pairs]
    dropped = tuple(
        Dropped(pair.id, pair.question, "both answers have the same activations", Loss.EQUAL)
        for pair, equal in zip(activations.pairs, same, strict=True)
        if equal
    )
    if len(dropped) == len(activations.pairs):
        raise UserError(
            f"In all {len(dropped)} answer pairs, the true answer and the false one have the same activations at every layer: "
            "there is no direction between them. Type a larger steering.max_length, or stages=[doctor] to see why."
        )
    return activations.without(dropped) if dropped else activations


def _same(values: np.ndarray) -> np.ndarray:
    """[pairs]: whether both members of [pairs, 2, layers, hidden] are alike in every layer."""
    apart, size = (np.linalg.norm(each, axis=-1) for each in (values[:, 0] - values[:, 1], values[:, 0]))
    return np.asarray((apart <= ROUNDING * size).all(-1))
