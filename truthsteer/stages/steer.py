"""steer: vectors, their controls, and the one layer and coefficient to report, chosen on the tune split.

The bank that it publishes (bank.json, vectors.safetensors) lists every condition of the run. Nothing in it has seen a
test question.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from truthsteer import bank
from truthsteer.activations import Activations
from truthsteer.bank import SteeringVector
from truthsteer.component import content
from truthsteer.conditions import score_conditions
from truthsteer.config import Stage, to_plain
from truthsteer.records import Choice, Condition, ConditionKind, Splits, to_json
from truthsteer.selection import Cell, choose_cell, measure
from truthsteer.store import Artifact, Key, write_json
from truthsteer.workspace import Workspace, questions_digest

VERSION = 1
PROOF_QUESTIONS = 4
BASELINE = "baseline"


def run(ws: Workspace, split: Splits, activations: Artifact) -> Artifact:
    """The bank of one fold.

    Raises:
        UserError: no vector can be estimated, or the steering proof fails.
    """
    config = ws.config
    steering = to_plain(config.steering)
    for name in ("max_dropped", "max_length"):  # they only decide errors
        steering.pop(name)
    key = Key.of(
        "bank",
        VERSION,
        activations=activations.key,
        model=ws.model_inputs,
        prompt=ws.prompt_inputs,
        steer=questions_digest(split.steer),
        strata=[[question.category, question.group] for question in split.steer],
        tune=questions_digest(split.tune),
        fold=split.fold,
        layers=ws.layers,
        steering=steering,
        method={name: content(config.method[name], method) for name, method in ws.methods.items()},
        operator=content(config.operator, ws.operator),
        seed=config.seed,
    )
    if not ws.runs(Stage.steer):
        return ws.store.need(key, "steer")
    return ws.store.make(key, lambda folder: _make(ws, split, Activations.load(activations.path), folder))


def _make(ws: Workspace, split: Splits, activations: Activations, folder: Path) -> None:
    own = activations.of(split.steer)
    norms = own.residual_norm()
    vectors: dict[str, SteeringVector] = {}
    conditions = [Condition(BASELINE, ConditionKind.BASELINE, split.fold)]
    methods: dict[str, Any] = {}
    proofs: list[Any] = []
    for name, method in ws.methods.items():
        grid = {
            layer: bank.estimate(own, method, layer=layer, unit=ws.config.steering.coefficient_unit)
            for layer in ws.layers
        }
        proofs += _proofs(ws, split, grid)
        baseline, cells = _tune(ws, split, name, grid)
        chosen = choose_cell(cells)
        vector = grid[chosen.layer]
        mine = {name: vector} | _controls(ws, split, name, method, own, vector)
        vectors |= mine
        conditions += _conditions(ws, split.fold, name, chosen, mine)
        methods[name] = {
            "norms": [item.norm for item in grid.values()],
            "chosen": {"layer": chosen.layer, "coefficient": chosen.coefficient},
            "baseline": {"mc1": baseline.mc1, "margin": baseline.margin},
            "n": len(split.tune),
            "grid": [asdict(cell) for cell in cells],
            "spread": bank.spread(own, method, vector, ws.config.steering.bank, ws.config.seed + split.fold),
            "cosines": {label: _cosine(vector, item) for label, item in mine.items() if label != name},
        }
    arrays = {name: vector.values for name, vector in vectors.items()}
    save_file(arrays, folder / "vectors.safetensors")
    write_json(
        folder / "bank.json",
        {
            "fold": split.fold,
            "layers": ws.layers,
            "residual_norm": norms.tolist(),
            "pairs": {
                "used": len(own.pairs),
                "abstentions_skipped": len(split.steer)
                - len({p.question for p in own.pairs} | {d.question for d in own.dropped}),
                "dropped": [to_json(item) for item in own.dropped],
            },
            "methods": methods,
            "proof": _worst(proofs),
            "conditions": [to_json(condition) for condition in conditions],
        },
    )


def _tune(ws: Workspace, split: Splits, method: str, grid: Mapping[int, SteeringVector]) -> tuple[Cell, list[Cell]]:
    """The baseline and every layer and coefficient, on the tune split."""
    baseline = Condition(BASELINE, ConditionKind.BASELINE, split.fold)
    tried = [
        Condition(
            f"{method} {c:+g} at {layer}",
            ConditionKind.STEERED,
            split.fold,
            method,
            layer,
            c,
            str(layer),
            vector.sha256,
        )
        for layer, vector in grid.items()
        for c in ws.config.steering.coefficients
    ]
    arrays = {str(layer): vector.values for layer, vector in grid.items()}
    artifacts = score_conditions(ws, split.tune, [baseline, *tried], lambda: arrays, ws.label("steer: tune", split))
    cells = [
        measure(-1 if condition.layer is None else condition.layer, condition.coefficient, artifact.rows(Choice))
        for condition, artifact in zip([baseline, *tried], artifacts, strict=True)
    ]
    return cells[0], cells[1:]


def _controls(
    ws: Workspace, split: Splits, name: str, method: Any, activations: Activations, vector: SteeringVector
) -> dict[str, SteeringVector]:
    controls, seed = ws.config.steering.controls, ws.config.seed
    drawn = bank.random_controls(vector, controls.random, seed)
    shuffled = bank.shuffled_controls(activations, split.steer, method, vector, controls.shuffled, seed)
    return {f"{name} random_{index}": item for index, item in enumerate(drawn, 1)} | {
        f"{name} shuffled_{index}": item for index, item in enumerate(shuffled, 1)
    }


def _conditions(
    ws: Workspace, fold: int, method: str, chosen: Cell, vectors: Mapping[str, SteeringVector]
) -> list[Condition]:
    """The rows of one method: chosen, sign flip and controls at the chosen coefficient, then the dose response."""

    def row(label: str, kind: ConditionKind, coefficient: float, vector: str = method) -> Condition:
        return Condition(label, kind, fold, method, chosen.layer, coefficient, vector, vectors[vector].sha256)

    rows = [row(f"{method} chosen", ConditionKind.CHOSEN, chosen.coefficient)]
    if ws.config.steering.controls.sign_flip:
        rows.append(row(f"{method} sign_flip", ConditionKind.SIGN_FLIP, -chosen.coefficient))
    for label in vectors:
        if label != method:
            kind = ConditionKind.RANDOM if "random_" in label else ConditionKind.SHUFFLED
            rows.append(row(label, kind, chosen.coefficient, label))
    rows += [row(f"{method} {c:+g}", ConditionKind.STEERED, c) for c in ws.config.steering.coefficients]
    return rows


def _cosine(a: SteeringVector, b: SteeringVector) -> float:
    return float(a.values @ b.values / (np.linalg.norm(a.values) * np.linalg.norm(b.values)))


def _proofs(ws: Workspace, split: Splits, grid: Mapping[int, SteeringVector]) -> list[Any]:
    """The steering proof at every layer tried, at the largest coefficient, on tune questions of different length."""
    from torch import from_numpy

    from truthsteer.hooks import Injection
    from truthsteer.proof import prove

    by_length = sorted(split.tune, key=lambda question: (len(question.text), question.id))
    step = max(1, len(by_length) // PROOF_QUESTIONS)
    asked = by_length[::step][:PROOF_QUESTIONS]
    branches = ws.prompts.branches([q.text for q in asked], [[q.best, q.incorrect[0]] for q in asked])
    largest = max(ws.config.steering.coefficients)
    return [
        prove(
            ws.model,
            branches,
            Injection(layer, from_numpy(vector.values), largest),
            ws.operator,
            ws.config.batch_tokens,
        )
        for layer, vector in grid.items()
    ]


def _worst(proofs: list[Any]) -> dict[str, Any]:
    from truthsteer.proof import worst

    return worst(proofs)
