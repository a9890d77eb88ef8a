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

from truthsteer import bank, baselines, style
from truthsteer.activations import Activations, Loss
from truthsteer.bank import SteeringVector
from truthsteer.component import content
from truthsteer.conditions import choices_keys, score_choices
from truthsteer.config import PromptConfig, Stage, to_plain
from truthsteer.files import write_json
from truthsteer.metrics import multiple_choice
from truthsteer.multiplicity import max_t
from truthsteer.prompts import Branch
from truthsteer.records import ALL_STYLE, Choice, Condition, ConditionKind, Hit, Splits, to_json
from truthsteer.selection import Cell, choose_cell, measure
from truthsteer.store import Artifact, Key
from truthsteer.workspace import Workspace, questions_digest

VERSION = 3
ENVELOPE_VERSION = 1
PROOF_QUESTIONS = 4
FOLD_STEP = 1_000_003
"""Between the seeds of two folds, so that each draws control directions of its own."""
RESAMPLES = 2000
"""Sign flips for the adjusted p of a cell."""
BASELINE = "baseline"


def run(ws: Workspace, split: Splits, activations: Artifact) -> Artifact:
    """The bank of one fold.

    Raises:
        UserError: no vector can be estimated, or the steering proof fails.
    """
    config = ws.config
    steering = to_plain(config.steering)
    for name in ("max_dropped", "max_length", "too_long"):  # they decide errors, or are in the activations' key
        steering.pop(name)
    key = Key.of(
        "bank",
        VERSION,
        activations=activations.key,
        model=ws.model_inputs,
        prompt=ws.prompt_inputs(),
        steer=questions_digest(split.steer),
        strata=[[question.category, question.group] for question in split.steer],
        tune=questions_digest(split.tune),
        tune_groups=[question.group for question in split.tune],
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
    _check_lengths(ws, split)
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
        baseline, cells, adjusted = _tune(ws, split, name, grid)
        chosen = choose_cell(cells)
        vector = grid[chosen.layer]
        styles = style.style_directions(own, chosen.layer, method.readout) if ws.config.steering.controls.style else {}
        controls = _controls(ws, split, name, method, own, vector, styles)
        all_style = not any(kind is ConditionKind.PROJECTED for kind, _ in controls.values())
        mine = {name: vector} | {label: item for label, (_, item) in controls.items()}
        vectors |= mine
        conditions += _conditions(ws, split.fold, name, chosen, vector, controls)
        methods[name] = {
            "norms": [item.norm for item in grid.values()],
            "chosen": {"layer": chosen.layer, "coefficient": chosen.coefficient},
            "baseline": {"mc1": baseline.mc1, "margin": baseline.margin},
            "n": len(split.tune),
            "grid": [asdict(cell) | {"p_adjusted": p} for cell, p in zip(cells, adjusted, strict=True)],
            "envelope": _envelope(ws, split, name, vector),
            "style": {
                label: {
                    "with": item.with_,
                    "without": item.without,
                    "reason": ALL_STYLE if all_style and item.values is not None else item.reason,
                    "cosine": None if item.values is None else _cosine(vector.values, item.values),
                }
                for label, item in styles.items()
            },
            "spread": bank.spread(own, method, vector, ws.config.steering.bank, ws.config.seed + split.fold),
            "cosines": {label: _cosine(vector.values, item.values) for label, (_, item) in controls.items()},
        }
    arrays = {name: vector.values for name, vector in vectors.items()}
    save_file(arrays, folder / "vectors.safetensors")
    write_json(
        folder / "bank.json",
        {
            "fold": split.fold,
            "layers": ws.layers,
            "residual_norm": norms.tolist(),
            "pairs": _pairs(own, split),
            "methods": methods,
            "proof": _worst(proofs),
            "conditions": [to_json(condition) for condition in conditions],
        },
    )


def _pairs(own: Activations, split: Splits) -> dict[str, Any]:
    """How many pairs the vectors rest on, and what became of the others."""
    return {
        "used": len(own.pairs),
        "truncated": len(own.truncated),
        "abstentions_skipped": len(split.steer)
        - len({pair.question for pair in own.pairs} | {item.question for item in own.dropped}),
        "lost": {kind.value: sum(item.kind is kind for item in own.dropped) for kind in Loss},
        "dropped": [to_json(item) for item in own.dropped],
    }


def _check_lengths(ws: Workspace, split: Splits) -> None:
    """Raise now, and not when the steered rows are done, if what is asked later does not fit into its prompt."""
    from truthsteer.lengths import check_generated, check_scored

    lm, steering = ws.model, ws.config.steering

    def check(prompt: PromptConfig, texts: list[str], answers: list[list[str]], *or_else: str) -> list[Branch]:
        branches = ws.prompts(prompt).branches(texts, answers)
        check_scored(lm, branches, texts, steering, *or_else)
        return branches

    def check_both(prompt: PromptConfig, *or_else: str) -> None:
        branches = check(prompt, asked, answers, *or_else)
        contexts = [branch.context for branch in branches]
        check_generated(lm, contexts, asked, steering, ws.config.generation.max_new_tokens, *or_else)

    asked = [question.text for question in split.test]
    answers = [[answer for answer, _ in question.choices] for question in split.test]
    for condition in baselines.conditions(ws.config.baselines, split):
        if condition.prompt:
            few = condition.kind is ConditionKind.FEW_SHOT
            drop = "baselines.few_shot=0" if few else f"'~prompt@baselines.prompts.{condition.prompt}'"
            check_both(ws.prompt(condition.prompt, split), f"{drop} to leave out the row '{condition.name}'")
    items, _ = ws.capability
    if items:
        texts, choices = [item.text for item in items], [list(item.choices) for item in items]
        check(ws.prompt(), texts, choices, "gauge.capability=FILE.csv with shorter questions")
    check_both(ws.prompt())


def _tune(
    ws: Workspace, split: Splits, method: str, grid: Mapping[int, SteeringVector]
) -> tuple[Cell, list[Cell], list[float]]:
    """The baseline and every layer and coefficient, on the tune split; each cell's p, adjusted for their number."""
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
    scored = score_choices(
        ws, split.tune, ws.prompt(), [baseline, *tried], lambda: arrays, ws.label("steer: tune", split)
    )
    measured = [
        measure(-1 if condition.layer is None else condition.layer, condition.coefficient, artifact.rows(Choice))
        for condition, artifact in zip([baseline, *tried], scored, strict=True)
    ]
    cells = [cell for cell, _ in measured]
    right = np.array([hits for _, hits in measured])  # [1 + cells, questions]
    groups = np.array([question.group for question in split.tune])
    adjusted = max_t(right[1:] - right[0], groups, ws.config.seed, RESAMPLES)
    return cells[0], cells[1:], [float(p) for p in adjusted]


def _envelope(ws: Workspace, split: Splits, method: str, vector: SteeringVector) -> list[dict[str, Any]]:
    """MC1 on the tune split of random directions at the chosen layer, for every size of coefficient that was tried.

    A random direction and its opposite are equally random, so that coefficients of either sign share their draws. Only in
    the first fold: others cost as much again and would say the same.
    """
    count, questions = ws.config.steering.controls.envelope if split.fold == 0 else 0, split.tune
    sizes = sorted({abs(value) for value in ws.config.steering.coefficients})
    drawn = {str(index): item for index, item in enumerate(bank.random_controls(vector, count, ws.config.seed, 1))}
    tried = [
        Condition(f"{method} envelope", ConditionKind.RANDOM, split.fold, method, vector.layer, size, name, item.sha256)
        for size in sizes
        for name, item in drawn.items()
    ]
    if not tried:
        return []
    prompt, description = ws.prompt(), ws.label("steer: random directions", split)
    keys = [
        Key.of("envelope", ENVELOPE_VERSION, choices=key.digest) for key in choices_keys(ws, questions, prompt, tried)
    ]
    arrays = {name: item.values for name, item in drawn.items()}

    def hit(choices: list[Choice]) -> list[Hit]:
        return [Hit(choices[0].question, multiple_choice(choices)["mc1"])]

    artifacts = score_choices(ws, questions, prompt, tried, lambda: arrays, description, keys, hit)
    found = [float(np.mean([row.mc1 for row in artifact.rows(Hit)])) for artifact in artifacts]
    return [
        {"coefficient": size, "mc1": found[place * count : (place + 1) * count]} for place, size in enumerate(sizes)
    ]


Controls = Mapping[str, tuple[ConditionKind, SteeringVector]]


def _controls(
    ws: Workspace,
    split: Splits,
    name: str,
    method: Any,
    activations: Activations,
    vector: SteeringVector,
    styles: Mapping[str, style.StyleDirection],
) -> Controls:
    """Random directions, shuffled labels, directions of style, and the vector without them: all as long as the vector."""
    config, seed = ws.config.steering.controls, ws.config.seed + FOLD_STEP * split.fold
    drawn = bank.random_controls(vector, config.random, seed)
    shuffled = bank.shuffled_controls(activations, split.steer, method, vector, config.shuffled, seed)
    found = {f"{name} random_{i}": (ConditionKind.RANDOM, item) for i, item in enumerate(drawn, 1)}
    found |= {f"{name} shuffled_{i}": (ConditionKind.SHUFFLED, item) for i, item in enumerate(shuffled, 1)}
    usable = {label: item for label, item in styles.items() if item.values is not None}
    found |= {
        f"{name} style_{label}": (ConditionKind.STYLE, style.as_control(item, vector)) for label, item in usable.items()
    }
    if usable:
        rest = style.project_out(vector, list(usable.values()))
        if rest is not None:
            found[f"{name} without_{'+'.join(usable)}"] = (ConditionKind.PROJECTED, rest)
    return found


def _conditions(
    ws: Workspace, fold: int, method: str, chosen: Cell, vector: SteeringVector, controls: Controls
) -> list[Condition]:
    """The rows of one method: chosen, sign flip and controls at the chosen coefficient, then the dose response."""
    vectors = {method: vector} | {label: item for label, (_, item) in controls.items()}

    def row(label: str, kind: ConditionKind, coefficient: float, name: str = method) -> Condition:
        return Condition(label, kind, fold, method, chosen.layer, coefficient, name, vectors[name].sha256)

    rows = [row(f"{method} chosen", ConditionKind.CHOSEN, chosen.coefficient)]
    if ws.config.steering.controls.sign_flip:
        rows.append(row(f"{method} sign_flip", ConditionKind.SIGN_FLIP, -chosen.coefficient))
    rows += [row(label, kind, chosen.coefficient, label) for label, (kind, _) in controls.items()]
    rows += [row(f"{method} {c:+g}", ConditionKind.STEERED, c) for c in ws.config.steering.coefficients]
    return rows


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def _proofs(ws: Workspace, split: Splits, grid: Mapping[int, SteeringVector]) -> list[Any]:
    """The steering proof at every layer tried, at the largest coefficient, on tune questions of different length."""
    from torch import from_numpy

    from truthsteer.hooks import Injection
    from truthsteer.proof import prove

    by_length = sorted(split.tune, key=lambda question: (len(question.text), question.id))
    step = max(1, len(by_length) // PROOF_QUESTIONS)
    asked = by_length[::step][:PROOF_QUESTIONS]
    branches = ws.prompts().branches([q.text for q in asked], [[q.best, q.incorrect[0]] for q in asked])
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
