"""How a vector changes the residual stream: pure functions of tensors, one coefficient per row.

Every operator leaves `hidden` bitwise unchanged where the coefficient is 0, so that baseline rows can share a batch
with steered ones. Operators know nothing of layers, models or conditions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Operator(Protocol):
    """A frozen dataclass with this method is an operator, wherever it lives."""

    def apply(self, hidden: Tensor, vector: Tensor, coefficient: Tensor) -> Tensor:
        """The changed residual stream.

        Args:
            hidden: [batch, tokens, hidden], the output of a decoder layer.
            vector: [batch, 1, hidden], float32, in coefficient units: 1.0 times it is one unit of steering.
            coefficient: [batch, 1, 1], float32.
        """
        ...


@dataclass(frozen=True)
class Add:
    """h + c v at every position (contrastive activation addition, Rimsky et al. 2023, arXiv:2312.06681)."""

    def apply(self, hidden: Tensor, vector: Tensor, coefficient: Tensor) -> Tensor:
        return hidden + (coefficient * vector).to(hidden.dtype)
