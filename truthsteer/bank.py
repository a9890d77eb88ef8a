"""Vectors made from activations: the estimate, its spread over subsets of pairs, and the controls it is held against.

Pure numpy; knows no model. A coefficient of 1 adds `values` once: under the unit `residual_norm` a vector is scaled to
the mean residual norm at its layer, so that coefficients compare across layers, methods and models.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from truthsteer.activations import Activations
from truthsteer.config import BankConfig, CoefficientUnit
from truthsteer.errors import UserError
from truthsteer.methods import Method
from truthsteer.records import Question


@dataclass(frozen=True)
class SteeringVector:
    """A direction at a layer, in coefficient units.

    Attributes:
        values: [hidden] float32.
        layer: decoder layer whose output it changes.
        norm: L2 norm of the vector as it was estimated, before scaling.
    """

    values: np.ndarray
    layer: int
    norm: float

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.values.astype("<f4").tobytes()).hexdigest()


def estimate(
    activations: Activations,
    method: Method | None = None,
    *,
    layer: int,
    unit: CoefficientUnit = CoefficientUnit.residual_norm,
    members: np.ndarray | None = None,
) -> SteeringVector:
    """The vector of a method at a layer.

    Args:
        activations: what was read.
        method: mean difference by default.
        layer: which layer's activations; also where the vector goes.
        unit: what a coefficient of 1 means.
        members: indices of the pairs to use; all by default.

    Raises:
        UserError: the layer was not read, or the vector is zero or not finite.
    """
    from truthsteer.methods.mean_diff import MeanDiff

    method = method or MeanDiff()
    if not 0 <= layer < activations.num_layers:
        raise UserError(f"layer={layer} was not read. Type 0 to {activations.num_layers - 1}.")
    values = activations.readout(method.readout)[:, :, layer]  # [pairs, truth, hidden]
    if members is not None:
        values = values[members]
    raw = np.asarray(method.estimate(values[:, 0], values[:, 1]), np.float64)
    return _scaled(raw, layer, activations.residual_norm()[layer], unit)


def _scaled(raw: np.ndarray, layer: int, residual_norm: float, unit: CoefficientUnit) -> SteeringVector:
    norm = float(np.linalg.norm(raw))
    if not np.isfinite(norm) or norm <= 1e-9 * residual_norm:
        raise UserError(
            f"The vector at layer {layer} has norm {norm:.3g} in a residual stream of norm {residual_norm:.3g}: true and "
            "false answers look alike there. Try other steering.layers or another readout."
        )
    scale = residual_norm / norm if unit is CoefficientUnit.residual_norm else 1.0
    return SteeringVector((raw * scale).astype(np.float32), layer, norm)


def random_controls(vector: SteeringVector, count: int, *seed: int) -> list[SteeringVector]:
    """Random directions of the vector's length, orthogonal to it (a random direction is not, in a small space)."""
    generator = np.random.default_rng([*seed, vector.layer])
    draws = [generator.standard_normal(len(vector.values)) for _ in range(count)]
    return [_null(draw, vector) for draw in draws]


def _null(raw: np.ndarray, vector: SteeringVector) -> SteeringVector:
    """A direction without its part along the vector, scaled to the vector's length."""
    size = np.linalg.norm(vector.values)
    unit = vector.values.astype(np.float64) / size
    rest = raw - (raw @ unit) * unit
    return SteeringVector((rest / np.linalg.norm(rest) * size).astype(np.float32), vector.layer, vector.norm)


def shuffled_controls(
    activations: Activations,
    questions: Sequence[Question],
    method: Method,
    vector: SteeringVector,
    count: int,
    seed: int,
) -> list[SteeringVector]:
    """Vectors of the same method, data and length with the labels of half the questions swapped.

    Half of every near-duplicate group and category, so that no topic keeps its truth. Orthogonal to the vector, as the
    random ones are: swapped differences nearly cancel, and scaling what is left to the vector's length would blow up its
    chance overlap with the vector (a cosine of 0.3 on the organism) and steer a little.
    """
    picker = random.Random(f"{seed} {vector.layer}")
    values = activations.readout(method.readout)[:, :, vector.layer]
    controls = []
    for _ in range(count):
        rank = {group: picker.random() for group in sorted({question.group for question in questions})}
        order = sorted(questions, key=lambda question: (question.category, rank[question.group], picker.random()))
        start = picker.randrange(2)
        swapped = {question.id for index, question in enumerate(order) if index % 2 == start}
        flips = np.array([pair.question in swapped for pair in activations.pairs])
        mixed = np.where(flips[:, None, None], values[:, ::-1], values)
        controls.append(_null(np.asarray(method.estimate(mixed[:, 0], mixed[:, 1]), np.float64), vector))
    return controls


def spread(
    activations: Activations, method: Method, vector: SteeringVector, config: BankConfig, seed: int
) -> dict[str, Any]:
    """Vectors from random subsets of pairs: their cosines with the whole, and which pairs made each.

    Sizes are drawn between `min_pairs` and `max_pairs`, clamped to the pairs there are.
    """
    picker = random.Random(seed)
    total = len(activations.pairs)
    values = activations.readout(method.readout)[:, :, vector.layer]
    whole = vector.values / np.linalg.norm(vector.values)
    cosines, subsets = [], []
    for _ in range(config.subsets):
        size = picker.randint(min(config.min_pairs, total), min(config.max_pairs, total))
        members = sorted(picker.sample(range(total), size))
        raw = np.asarray(method.estimate(values[members, 0], values[members, 1]), np.float64)
        cosines.append(float(raw @ whole / np.linalg.norm(raw)))
        subsets.append([activations.pairs[index].id for index in members])
    return {
        "subsets": config.subsets,
        "mean_cosine": float(np.mean(cosines)) if cosines else None,
        "min_cosine": min(cosines) if cosines else None,
        "cosines": cosines,
        "subsets_pairs": subsets,
    }
