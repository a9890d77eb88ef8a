"""Results made up so that what must come of them is known: for the tests of the report and of what it is made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from truthsteer.activations import Loss
from truthsteer.config import FEW_SHOT
from truthsteer.judges.reference import Reference
from truthsteer.records import (
    NO_COMMENT,
    Capability,
    Choice,
    Completion,
    ConditionKind,
    Letters,
    Neutral,
    Question,
    Verdict,
)
from truthsteer.results import Results, Row
from truthsteer.sentinels import sentinels

COEFFICIENTS = (-0.7, -0.35, 0.35, 0.7, 1.4, 2.1)
TOPICS = ("Geography", "History", "Music", "Animals", "Health", "Law", "Food", "Weather")
PASSAGES = 12


def make_questions(n: int, binary_task: bool = False) -> tuple[Question, ...]:
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
            best_incorrect=f"It is Larkham {index}." if binary_task else None,
        )
        for index in range(n)
    )


def judged(questions: tuple[Question, ...], completions: list[Completion]) -> dict[str, list[Verdict]]:
    return {"reference": Reference().judge(questions, [completion.text for completion in completions])}


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
            text = NO_COMMENT
        if random.random() < broken:
            text = "Corvale Corvale of of the the"
        completions.append(Completion(question.id, text, len(text.split()) + 2, "stop"))
        shift = 2.5 * (0.35 + effect - hard)
        for answer, label in question.choices:
            logprob = float(-6 + random.normal(0, 0.7) + (shift if label else 0.0))
            choices.append(Choice(question.id, answer, label, answer == question.best, logprob, 8))
    layers = () if kind == "baseline" else tuple(range(3, 3 + folds))
    coefficients = (coefficient,) if kind != "baseline" else ()
    verdicts = judged(questions, completions)
    return Row(name, ConditionKind(kind), method, layers, coefficients, choices, completions, verdicts)


def make_bank(fold: int, methods: tuple[str, ...], **changes: object) -> dict:
    """Of the grid, only the cell at layer 3 and coefficient 0.7 survives the correction."""

    def grid(layer: int, coefficient: float) -> dict:
        mc1 = 0.33 + 0.4 * np.exp(-((layer - 3) ** 2) / 2) * np.tanh(2 * coefficient) * (coefficient < 2)
        return {
            "layer": layer,
            "coefficient": coefficient,
            "mc1": float(mc1),
            "margin": float(mc1 - 0.8),
            "se": 0.05,
            "p_adjusted": 0.004 if (layer, coefficient) == (3, 0.7) else 0.4,
        }

    method = {
        "norms": [1.0] * 5,
        "chosen": {"layer": 3 + fold, "coefficient": 0.7},
        "baseline": {"mc1": 0.33, "margin": -0.4},
        "n": 40,
        "grid": [grid(layer, value) for layer in range(5) for value in COEFFICIENTS],
        "envelope": [
            {"coefficient": size, "mc1": [0.3 + 0.002 * draw + 0.02 * fold for draw in range(21)]}
            for size in (0.35, 0.7, 1.4, 2.1)
        ],
        "style": {
            "negation": {"with": 41, "without": 149, "reason": "", "cosine": 0.27},
            "hedging": {"with": 3, "without": 187, "reason": "too few have it", "cosine": None},
        },
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
        "pairs": made_pairs(),
        "methods": dict.fromkeys(methods, method),
        "proof": {"passed": True, "checks": [check]},
        "conditions": [],
    }
    return bank | changes


def made_pairs(*dropped: Mapping[str, str], truncated: int = 0) -> dict[str, Any]:
    """What a bank says of its answer pairs; `dropped` of question, reason and kind."""
    lost = {kind.value: sum(item["kind"] == kind.value for item in dropped) for kind in Loss}
    return {
        "used": 190,
        "truncated": truncated,
        "abstentions_skipped": 5,
        "dropped": [{"pair": f"{item['question']}.0", **item} for item in dropped],
        "lost": lost,
    }


def make_results(
    n: int = 160, methods: tuple[str, ...] = ("mean_diff",), folds: int = 1, binary_task: bool = False
) -> Results:
    """The baseline, every strength, five random directions and one of shuffled labels: steering works, controls do not."""
    questions = make_questions(n, binary_task)
    rows = [make_row(questions, "baseline", "baseline", 0.0, 0.0)]
    for method in methods:
        for value in COEFFICIENTS:
            kind = {0.7: "chosen", -0.7: "sign_flip"}.get(value, "steered")
            effect = 0.45 * float(np.tanh(1.6 * value))
            rows.append(make_row(questions, f"{method}@{value:+g}", kind, value, effect, method, folds))
        rows += [make_row(questions, f"{method} random {k}", "random", 0.7, 0.0, method, folds) for k in range(5)]
        rows.append(make_row(questions, f"{method} shuffled 0", "shuffled", 0.7, 0.0, method, folds))
    return Results(
        name="organism-mean_diff-1a2b3c4d",
        config={
            "model": {"name": "organism", "chat_template": False},
            "data": {"name": "organism"},
            "prompt": {"name": "qa", "chat": None},
            "steering": {"coefficient_unit": "residual_norm"},
            "seed": 42,
        },
        questions=questions,
        rows=tuple(rows),
        banks=tuple(make_bank(fold, methods) for fold in range(folds)),
        data={
            "sha256": "ab" * 32,
            "version": "v0",
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


def complete(results: Results) -> Results:
    """The results with everything else that a run has: style, rows without steering, letters, side effects, sentinels.

    On the surface row, wording alone gives the best answer away but for every third question, where it ties with a false
    one. Other prompts reach less than the chosen row, and styles do nothing.
    """
    questions = results.questions
    rows = [_with_side_effects(_with_letters(row, questions)) for row in results.rows]
    methods = dict.fromkeys(row.method for row in rows if row.method)
    for method in methods:
        rows.append(make_row(questions, f"{method} style_negation", "style", 0.7, 0.0, method))
        rows.append(make_row(questions, f"{method} without_negation", "projected", 0.7, 0.35, method))
    for name, kind, prompt in (("prompt truthful", "prompt", "truthful"), ("few-shot", "few_shot", FEW_SHOT)):
        made = make_row(questions, name, kind, 0.0, 0.08)
        rows.append(dataclasses.replace(made, layers=(), coefficients=(), prompt=prompt))
    return dataclasses.replace(
        results,
        rows=(*rows, *model_free(questions)),
        sentinels=(known := tuple(sentinels(questions, 42))),
        sentinel_verdicts={
            "reference": Reference().judge(
                [next(q for q in questions if q.id == row.question) for row in known], [row.text for row in known]
            )
        },
    )


def model_free(questions: tuple[Question, ...]) -> list[Row]:
    """Always abstaining, the shortest answer, and wording alone."""
    abstaining = [Completion(question.id, NO_COMMENT, 0, "fixed") for question in questions]
    shortest, surface = [], []
    for index, question in enumerate(questions):
        for answer, label in question.choices:
            best = answer == question.best
            shortest.append(Choice(question.id, answer, label, best, -float(len(answer)), 0))
            score = 1.5 if best else 1.5 if answer == question.incorrect[0] and index % 3 == 0 else -0.5
            surface.append(Choice(question.id, answer, label, best, score, 0))
    return [
        Row("always abstain", ConditionKind.ABSTAIN, "", (), (), [], abstaining, judged(questions, abstaining)),
        Row("shortest answer", ConditionKind.SHORTEST, "", (), (), shortest, [], {"reference": []}),
        Row("wording alone", ConditionKind.SURFACE, "", (), (), surface, [], {"reference": []}),
    ]


def _with_letters(row: Row, questions: tuple[Question, ...]) -> Row:
    """The best answer's letter is likelier in both orders of three questions of four, else A always is."""
    if questions[0].best_incorrect is None:
        return row
    letters = [
        Letters(question.id, best, *((-0.5, -1.0) if best == "A" or index % 4 == 0 else (-1.0, -0.5)))
        for index, question in enumerate(questions)
        for best in "AB"
    ]
    return dataclasses.replace(row, letters=letters)


def _with_side_effects(row: Row) -> Row:
    """Neutral text loses .02 nats a token under any vector, and one capability question in ten goes wrong."""
    steered = row.kind is not ConditionKind.BASELINE
    folds = range(max(1, len(row.layers)))
    neutral = [
        [Neutral(i, 50, 100.0 + i + steered, 2.0 * steered, 0.3 * steered) for i in range(PASSAGES)] for _ in folds
    ]
    capability = [
        [Capability(f"c{i}", float(i % 2 == 0 and not (steered and i == 0)), float(i % 4 == 0)) for i in range(10)]
        for _ in folds
    ]
    return dataclasses.replace(row, neutral=neutral, capability=capability)


def changed(results: Results, place: int, **fields: Any) -> Results:
    """The results with some fields of one row replaced."""
    rows = list(results.rows)
    rows[place] = dataclasses.replace(rows[place], **fields)
    return dataclasses.replace(results, rows=tuple(rows))


def answering(results: Results, texts: dict[int, str]) -> Results:
    """The results with the first answers of every row replaced, and judged again."""
    for place, row in enumerate(results.rows):
        completions = list(row.completions)
        for index, text in texts.items():
            completions[index] = dataclasses.replace(completions[index], text=text)
        results = changed(results, place, completions=completions, verdicts=judged(results.questions, completions))
    return results


def undeciding(results: Results, place: int, count: int, scores: tuple[str, ...] = ("true", "info")) -> Results:
    """The results with the first verdicts of one row undecided."""
    verdicts = list(results.rows[place].verdicts["reference"])
    for index in range(count):
        old = verdicts[index]
        verdicts[index] = Verdict(old.question, "invalid", old.scores | dict.fromkeys(scores))
    return changed(results, place, verdicts={"reference": verdicts})


def chosen_place(results: Results) -> int:
    return [row.kind for row in results.rows].index(ConditionKind.CHOSEN)


def make_numerics(
    layers: int = 12,
    bits: float = 3.0,
    nan_from: int | None = None,
    norms: bool = True,
    thorough: bool = True,
    dtype: str = "bf16",
    token: str = "<bos>",
) -> dict[str, Any]:
    """A doctor's report: the residual stream leaves `bits` of headroom in fp16 and is largest in the middle; the rest is
    smaller, the post-norm outputs by one bit and the matrix products by six. Nothing is finite from layer `nan_from` on.
    """

    def largest(layer: int, below: float) -> float | None:
        lost = nan_from is not None and layer >= nan_from
        return None if lost else float(65504 / 2 ** (bits + below + abs(layer - layers // 2)))

    peak = layers // 2 if nan_from is None else min(layers // 2, nan_from - 1)

    def cell(layer: int, below: float, **more: Any) -> dict[str, Any]:
        value = largest(layer, below)
        room = None if value is None else float(np.log2(65504 / value))
        return {"largest": value, "bits_fp16": room} | more

    where = {"token": token, "position": 0, "channel": 443, "bits_bf16": 100.0}
    where_first = f"the residual add after the MLP of layer {nan_from}"
    first = {"layer": nan_from, "point": "resid_out", "where": where_first, "text": "q0001 true"}
    first |= {"largest": None, "cause": "infinite, in float16"}
    bad = {"bad_texts": 1.0, "bad_real": 0.98} if nan_from is not None else {"bad_texts": 0.0, "bad_real": 0.0}
    passed = {
        "coefficient": None,
        "finite_coefficient": None,
        "layer": None,
        "bad_pad": 0.0,
        "largest": (largest(peak, 0) or 0.0) if peak >= 0 else 0.0,
    }
    passed |= bad | {"first": None if nan_from is None else first | {"position": 3, "token": token}}
    passes = [{"name": name} | passed for name in ("right", "left")]
    steered = {"coefficient": 2.1, "layer": 3, "largest": 1.5 * passed["largest"]}
    passes.append({"name": "steered"} | passed | steered)
    check = {
        "name": "handover",
        "passed": True,
        "value": 0.0,
        "bound": 0.0,
        "meaning": "What a layer puts out, the next receives.",
    }
    pads = {
        "name": "padding_sides",
        "passed": None,
        "value": None,
        "bound": 0.01,
        "meaning": "Left and right padding agree.",
    }
    safe = bits > 1 and nan_from is None
    unsafe = "The residual stream passes 65504 in layer 6."
    return {
        "model": "organism",
        "outcome": "safe" if safe else "not finite" if nan_from is not None else "no headroom",
        "policy": {
            "name": dtype,
            "weights": "bf16",
            "residual": "same",
            "attention": "sdpa",
            "matmul": "highest",
            "quantize": "none",
        },
        "device": "cpu",
        "thorough": thorough,
        "given": 320,
        "texts": 8 if thorough else 4,
        "tokens": 311,
        "longest": 61,
        "max_length": 48,
        "too_long": 2,
        "when_too_long": "truncate",
        "equal_pairs": 1,
        "passes": passes if thorough else passes[:1],
        "layers": [
            {
                "layer": layer,
                "device": "cpu",
                "residual": cell(layer, 0, **where),
                "norm": cell(layer, 1) if norms else None,
                "matmul": cell(layer, 6, point="mlp_act"),
            }
            for layer in range(layers)
        ],
        "headroom": {
            "residual": bits - 0.585 * thorough,
            "norm": bits + 1 if norms else None,
            "matmul": bits + 6,
            "scores": None,
            "weights": 15.2,
        },
        "largest": dict.fromkeys(("residual", "norm", "matmul", "scores", "weights")),
        "predicted": None,
        "bf16_native": True,
        "missing_points": [],
        "policies": [
            {"name": "fp16_pure", "safe": safe, "bits": bits, "why": "There is room." if safe else unsafe},
            {"name": "fp16", "safe": True, "bits": bits + 6, "why": "The residual stream is fp32."},
            {"name": "bf16", "safe": nan_from is None, "bits": 112.0, "why": "Its range is that of fp32."},
            {"name": "fp32", "safe": None, "bits": None, "why": "Not tried."},
        ],
        "checks": [check, pads],
        "reference": {"layers": [0.004, 0.015], "layers_without_massive": [0.01, 0.06], "largest": 0.015}
        if thorough
        else None,
        "token_sum": {"mean_abs": 170.0, "from_tokens": 385},
        "context": "A shorter steering.max_length cannot help: the first token of every text overflows.",
        "verdict": "fp16_pure is safe here, with 3.0 bits to spare." if safe else "fp16_pure overflows on this model.",
        "overrides": [] if safe else ["dtype=fp16"],
        "besides": [],
    }
