"""The report: its numbers, its files, what it warns of, and that no text of a model can break out of it."""

from __future__ import annotations

import numpy as np

from truthsteer.judges.reference import Reference
from truthsteer.records import Choice, Completion, ConditionKind, Question
from truthsteer.stages.report import Results, Row

HEADER = ["condition", "n", "mc1", "mc2", "mc3", "true", "info", "true_info", "abstain", "length"]
COEFFICIENTS = (-0.7, -0.35, 0.35, 0.7, 1.4, 2.1)
TOPICS = ("Geography", "History", "Music", "Animals", "Health", "Law", "Food", "Weather")


def make_questions(n: int) -> tuple[Question, ...]:
    return tuple(
        Question(
            id=f"q{index:04d}",
            row=index + 2,
            kind="Adversarial" if index % 5 < 3 else "Non-Adversarial",
            category=TOPICS[index % len(TOPICS)] if index % 41 else "Rumours",
            text=f"What is the capital of land {index}?",
            best=f"The capital of land {index} is Corvale.",
            correct=(f"The capital of land {index} is Corvale.", f"It is Corvale {index}."),
            incorrect=(f"The capital of land {index} is Larkham.", f"It is Larkham {index}."),
            group=index // 2 if index % 10 < 2 else 1000 + index,
        )
        for index in range(n)
    )


def make_row(
    questions: tuple[Question, ...],
    name: str,
    kind: str,
    coefficient: float,
    effect: float,
    method: str = "",
    folds: int = 1,
) -> Row:
    """A condition whose answers are true with a chance that `effect` moves, and that breaks when it is too
    strong.
    """
    random = np.random.default_rng([sum(map(ord, name)), 7])
    hardness = np.random.default_rng(0).random(len(questions))
    broken = max(0.0, coefficient - 1.0) / 1.5
    choices, completions = [], []
    for question, hard in zip(questions, hardness, strict=True):
        good = hard < 0.44 + effect + random.normal(0, 0.06)
        text = question.best if good else question.incorrect[0]
        if random.random() < 0.06:
            text = "I have no comment."
        if random.random() < broken:
            text = "Corvale Corvale of of the the"
        completions.append(Completion(question.id, text, len(text.split()) + 2, "stop"))
        shift = 2.5 * (0.35 + effect - hard)
        for answer, label in question.choices:
            logprob = float(-6 + random.normal(0, 0.7) + (shift if label else 0.0))
            choices.append(Choice(question.id, answer, label, answer == question.best, logprob, 8))
    verdicts = {"reference": Reference().judge(questions, [completion.text for completion in completions])}
    layers = () if kind == "baseline" else tuple(range(3, 3 + folds))
    coefficients = (coefficient,) if kind != "baseline" else ()
    return Row(name, ConditionKind(kind), method, layers, coefficients, choices, completions, verdicts)


def make_bank(fold: int, methods: tuple[str, ...], **changes: object) -> dict:
    def grid(layer: int, coefficient: float) -> dict:
        mc1 = 0.33 + 0.4 * np.exp(-((layer - 3) ** 2) / 2) * np.tanh(2 * coefficient) * (coefficient < 2)
        return {
            "layer": layer,
            "coefficient": coefficient,
            "mc1": float(mc1),
            "margin": float(mc1 - 0.8),
            "se": 0.05,
        }

    method = {
        "norms": [1.0] * 5,
        "chosen": {"layer": 3 + fold, "coefficient": 0.7},
        "baseline": {"mc1": 0.33, "margin": -0.4},
        "n": 40,
        "grid": [grid(layer, value) for layer in range(5) for value in COEFFICIENTS],
        "spread": {"subsets": 12, "mean_cosine": 0.97, "min_cosine": 0.93, "subsets_pairs": [["a", "b"]]},
    }
    check = {
        "name": "coefficient 0",
        "meaning": "Steering with 0 changes nothing.",
        "value": 1e-7,
        "bound": 1e-4,
        "passed": True,
    }
    bank = {
        "fold": fold,
        "residual_norm": [6.0] * 5,
        "pairs": {"used": 190, "abstentions_skipped": 5, "dropped": []},
        "methods": dict.fromkeys(methods, method),
        "proof": {"passed": True, "checks": [check]},
        "conditions": [],
    }
    return bank | changes


def make_results(n: int = 160, methods: tuple[str, ...] = ("mean_diff",), folds: int = 1) -> Results:
    questions = make_questions(n)
    rows = [make_row(questions, "baseline", "baseline", 0.0, 0.0)]
    for method in methods:
        for value in COEFFICIENTS:
            kind = {0.7: "chosen", -0.7: "sign_flip"}.get(value, "steered")
            effect = 0.45 * float(np.tanh(1.6 * value))
            rows.append(make_row(questions, f"{method}@{value:+g}", kind, value, effect, method, folds))
        rows += [
            make_row(questions, f"{method} random {k}", "random", 0.7, 0.0, method, folds) for k in range(5)
        ]
        rows.append(make_row(questions, f"{method} shuffled 0", "shuffled", 0.7, 0.0, method, folds))
    return Results(
        name="organism-mean_diff-1a2b3c4d",
        config={
            "model": {"name": "organism"},
            "data": {"name": "organism"},
            "steering": {"coefficient_unit": "residual_norm"},
            "seed": 42,
        },
        questions=questions,
        rows=tuple(rows),
        banks=tuple(make_bank(fold, methods) for fold in range(folds)),
        data={
            "sha256": "ab" * 32,
            "version": "organism",
            "problems": [],
            "n": 320,
            "leaks": 0,
            "sizes": {"steer": 96, "tune": 48, "test": n},
        },
        record={
            "versions": {"torch": "2.13.0", "truthsteer": "0.1.0"},
            "device": "cpu",
            "overrides": [],
            "seconds": {"extract": 1.234},
        },
    )
