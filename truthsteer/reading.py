"""One forward pass as numbers: the largest of every token at every point, and questions that are asked of it.

Points are named after what is computed there; residual adds are points, too. Everything is on the host. It knows token
positions, no texts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from truthsteer.numerics import FINITE_MAX, FP16_MAX
from truthsteer.points import GROUPS


@dataclass(frozen=True)
class Point:
    """Where something was read. The embedding is layer -1, the final norm the layer after the last."""

    layer: int
    name: str
    dtype: str
    device: str


@dataclass(frozen=True)
class Peak:
    """The largest finite number of a layer's residual stream at real tokens."""

    value: float
    row: int
    column: int
    channel: int


@dataclass(frozen=True)
class Spot:
    """A token (row and column of the batch) at a point."""

    index: int
    point: Point
    row: int
    column: int
    value: float
    """The largest |x| there; not finite where the numbers are not."""


@dataclass(frozen=True)
class Reading:
    """One forward pass.

    Attributes:
        points: in the order of computation.
        largest: [points, batch, tokens] float32, largest |x| of each token; NaN or infinite where one of its numbers is.
        real: [batch, tokens] bool, False at padding.
        peaks: of each layer's residual stream; a layer without a finite number has none.
        starts: [layers, batch, hidden] float32, each layer's output at the first real token.
        altered: layers whose input was not, bit for bit, what the layer before had put out.
        missing: names of points that were not passed through, with their layers unless it is all of them.
    """

    points: tuple[Point, ...]
    largest: Tensor
    real: Tensor
    peaks: dict[int, Peak]
    starts: Tensor
    altered: tuple[int, ...]
    missing: tuple[str, ...]

    @property
    def bad(self) -> Tensor:
        """[points, batch, tokens] whether a number is NaN, infinite, or too large for a float32 norm to square."""
        return self._passing(FINITE_MAX)

    def _passing(self, limit: float) -> Tensor:
        """[points, batch, tokens] where a number passes `limit` or is none; never at a bound, which is no measurement."""
        measured = torch.tensor([GROUPS[point.name] != "scores" for point in self.points])
        return ~(self.largest <= limit) & measured[:, None, None]

    def first(self, limit: float = FINITE_MAX, pads: bool = True) -> Spot | None:
        """The first point at which a token has a number that passes `limit` or is not finite; a real token if one has."""
        over = self._passing(limit)
        if not pads:
            over &= self.real
        hit = over.flatten(1).any(1)
        if not bool(hit.any()):
            return None
        index = int(hit.int().argmax())
        own = over[index] & self.real if bool((over[index] & self.real).any()) else over[index]
        row, column = divmod(int(own.flatten().int().argmax()), own.shape[1])
        return Spot(index, self.points[index], row, column, float(self.largest[index, row, column]))

    def layer(self, number: int) -> Reading:
        """The same reading with the points of one layer only."""
        own = torch.tensor([point.layer == number for point in self.points])
        return replace(
            self, points=tuple(point for point in self.points if point.layer == number), largest=self.largest[own]
        )

    def has(self, group: str) -> bool:
        """Whether a point of the group was read."""
        return any(GROUPS[point.name] == group for point in self.points)

    def of(self, group: str) -> tuple[float, Point | None]:
        """The largest finite number of a group of points at real tokens, and its point; (0, None) without any."""
        usable = torch.where(self.real & (self.largest <= FINITE_MAX), self.largest, -1.0).flatten(1).amax(1)
        mine = [index for index, point in enumerate(self.points) if GROUPS[point.name] == group and usable[index] >= 0]
        best = max(mine, key=lambda index: float(usable[index]), default=None)
        return (0.0, None) if best is None else (float(usable[best]), self.points[best])

    def offending(self) -> list[list[int]]:
        """Of each row, the real tokens (counted from its first) that overflow or would overflow in fp16 throughout.

        Where numbers are not finite: those at the row's first such point, before they spread. Else those whose residual
        stream passes 65504.
        """
        residual = torch.tensor([GROUPS[point.name] == "residual" for point in self.points])
        found = []
        for row, real in enumerate(self.real):
            bad = self.bad[:, row] & real
            hit = bad.any(1)
            own = bad[int(hit.int().argmax())] if bool(hit.any()) else ~(self.largest[residual, row] <= FP16_MAX).all(0)
            start = int(real.int().argmax())
            found.append([int(column) - start for column in (own & real).nonzero()[:, 0]])
        return found


def cause(spot: Spot) -> str:
    """What is wrong with the number at a spot that `Reading.first` found."""
    if spot.value != spot.value:
        return f"NaN, in {spot.point.dtype}"
    if spot.value == float("inf"):
        largest = f", whose largest number is {torch.finfo(getattr(torch, spot.point.dtype)).max:.4g}"
        return f"infinite, in {spot.point.dtype}{largest}"
    return f"|x| is {spot.value:.3g}, which a float32 norm cannot square"
