"""Mean difference: the mean over pairs of (activation of the true answer - activation of the false one).

Contrastive activation addition, Rimsky et al. 2023, arXiv:2312.06681; the direction that moved behaviour best in
Li et al. 2023 (arXiv:2306.03341, table 3). The readout is the mean over the answer's tokens: the last token of an
answer is a full stop, which says little of what it ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class MeanDiff:
    """v = mean_i (h_i^true - h_i^false)."""

    readout: str = "answer_mean"

    def estimate(self, true: np.ndarray, false: np.ndarray) -> np.ndarray:
        """[pairs, hidden] twice -> [hidden] float64; differences are taken pair by pair, so that a massive channel
        common to both cancels before anything is rounded."""
        return np.asarray((true.astype(np.float64) - false.astype(np.float64)).mean(0))
