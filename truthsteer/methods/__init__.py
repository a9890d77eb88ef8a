"""Methods estimate a vector from activations. One file each; a method from elsewhere works by its import path.

A method is a frozen dataclass with `readout` and `estimate`; it imports no torch.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Method(Protocol):
    """What the steer stage asks of a method."""

    @property
    def readout(self) -> str:
        """Which positions are averaged: `answer_mean` or `answer_last`."""
        ...

    def estimate(self, true: np.ndarray, false: np.ndarray) -> np.ndarray:
        """A vector, [hidden] float64, from the activations of true and false answers, each [pairs, hidden]."""
        ...
