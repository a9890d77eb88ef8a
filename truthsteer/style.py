"""Directions of style (negation, length, hedging), from the activations that a truth vector is made of. Pure numpy.

True answers negate more and run longer than false ones, so a truth vector may be a vector of style. A style's direction
is measured among true answers and among false ones apart and then averaged, so that truth cancels and style remains; it
is a control of the vector's length, and what `project_out` removes from the vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from truthsteer.activations import Activations
from truthsteer.bank import SteeringVector
from truthsteer.errors import UserError
from truthsteer.wording import has_hedge, has_negation, words

STYLES = ("negation", "length", "hedging")

MIN = 5
"""Answers with and without a style that a truth label needs, to be used."""

_DEPENDENT = 1e-3
"""Singular values below this share of the largest, of directions of length 1, add no direction of their own."""
_NOTHING = 1e-3
"""A vector of which less than this share is left is rounding error scaled up."""

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class StyleDirection:
    """The direction of one style at one layer, or why there is none.

    Attributes:
        values: [hidden] float64, activation with the style minus without it; None if it cannot be estimated.
        with_: answers that have the style, of both truth labels.
        without: answers that have not.
        reason: why there is no direction; empty where there is one.
    """

    values: NDArray[np.float64] | None
    with_: int
    without: int
    reason: str = ""


def style_directions(activations: Activations, layer: int, readout: str) -> dict[str, StyleDirection]:
    """The direction of each of `STYLES`: the mean activation of answers with the style minus that of answers without.

    The difference is taken within each truth label that has `MIN` answers of either sort, then averaged over those
    labels. Of length, answers with more words than the median of their label are set against those with fewer. Topics
    do not cancel: where only a few questions have answers of a style, its direction is partly theirs.

    Args:
        activations: what the truth vector is made of.
        layer: the layer of the truth vector.
        readout: `answer_mean` or `answer_last`.

    Raises:
        UserError: the layer or the readout was not read.
    """
    if not 0 <= layer < activations.num_layers:
        raise UserError(f"layer={layer} was not read. Type 0 to {activations.num_layers - 1}.")
    values = activations.readout(readout)[:, :, layer].astype(np.float64)  # [pairs, truth, hidden]
    texts = [(pair.true, pair.false) for pair in activations.pairs]
    sides = (_sides(texts, has_negation), _lengths(texts), _sides(texts, has_hedge))
    return {name: _direction(values, *own) for name, own in zip(STYLES, sides, strict=True)}


def _sides(texts: list[tuple[str, str]], has: Callable[[str], bool]) -> tuple[Flags, Flags]:
    """Which answers have a style and which have not: [pairs, truth] each."""
    flags = np.array([[has(text) for text in pair] for pair in texts], dtype=bool).reshape(-1, 2)
    return flags, ~flags


def _lengths(texts: list[tuple[str, str]]) -> tuple[Flags, Flags]:
    """Which answers have more words than the median of their truth label, and which fewer; those at it are neither."""
    counts = np.array([[len(words(text)) for text in pair] for pair in texts], dtype=np.float64).reshape(-1, 2)
    medians = np.median(counts, axis=0) if len(counts) else np.zeros(2)  # [truth]
    return counts > medians, counts < medians


def _direction(values: NDArray[np.float64], has: Flags, lacks: Flags) -> StyleDirection:
    n_has, n_lacks = has.sum(0), lacks.sum(0)  # [truth]
    usable = np.flatnonzero((n_has >= MIN) & (n_lacks >= MIN))
    totals = int(n_has.sum()), int(n_lacks.sum())
    if not usable.size:
        reason = (
            f"{n_has[0]} true and {n_has[1]} false answers have it, {n_lacks[0]} and {n_lacks[1]} have not; "
            f"{MIN} of either sort are needed among the true or among the false ones"
        )
        return StyleDirection(None, *totals, reason)
    differences = [values[has[:, k], k].mean(0) - values[lacks[:, k], k].mean(0) for k in usable]
    direction = np.mean(differences, axis=0)
    if np.linalg.norm(direction) <= 1e-9 * np.linalg.norm(values, axis=-1).mean():
        return StyleDirection(None, *totals, "answers with it and without it have the same activations")
    return StyleDirection(direction, *totals)


def as_control(direction: StyleDirection, vector: SteeringVector) -> SteeringVector:
    """The direction at the vector's layer and scaled to its length; its `norm` is that of the direction.

    Raises:
        UserError: the direction could not be estimated.
    """
    if direction.values is None:
        raise UserError(f"This style has no direction: {direction.reason}. Type steering.controls.style=false.")
    norm = float(np.linalg.norm(direction.values))
    return _resized(direction.values, norm, vector)


def project_out(vector: SteeringVector, directions: Iterable[StyleDirection]) -> SteeringVector | None:
    """The vector without its part in the span of the directions, scaled back to its length.

    Directions that could not be estimated, or that nearly depend on the others, remove nothing. Its `norm` is that of
    what is left of the vector as it was estimated, so that `norm` over the vector's `norm` is the share that was left. None
    if nothing is: then it is a vector of style, or both are of a channel that outweighs all others.
    """
    rows = [item.values / np.linalg.norm(item.values) for item in directions if item.values is not None]
    values = vector.values.astype(np.float64)
    rest = values
    if rows:
        _, singular, axes = np.linalg.svd(np.stack(rows), full_matrices=False)
        basis = axes[singular > _DEPENDENT * singular[0]]  # [span, hidden]
        rest = values - basis.T @ (basis @ values)
    share = float(np.linalg.norm(rest) / np.linalg.norm(values))
    return None if share < _NOTHING else _resized(rest, vector.norm * share, vector)


def _resized(raw: NDArray[np.float64], norm: float, vector: SteeringVector) -> SteeringVector:
    """`raw` at the vector's layer and length."""
    scale = np.linalg.norm(vector.values.astype(np.float64)) / np.linalg.norm(raw)
    return SteeringVector((raw * scale).astype(np.float32), vector.layer, norm)
