"""MC1 and MC2 with the preset of six answered questions, against lm-evaluation-harness's own tasks.

    python bench/multiple_choice.py
    python bench/multiple_choice.py --device cuda --size 4b --questions 817 --peer-questions 100 --peer-batch 64
    python bench/multiple_choice.py --steered         a grid of 8 coefficients at 3 layers, per cell, against its `steered`

The harness scores MC1 and MC2 in two tasks, each answer in a pass over preset, question and answer; ours scores every answer
once. Times are per question, or per question and cell. Its best batch size on a CPU is the default here.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import material
import numpy as np
from side_by_side import Arrays, Measured, Side, main, parser, timed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "golden"))

LAYERS, COEFFICIENTS = 3, (-2.0, -1.0, -0.5, 0.25, 0.5, 1.0, 2.0, 4.0)
CELL = (0, 6)
"""The peer's cell: the first layer at the coefficient of this place."""


def cells(num_layers: int) -> list[tuple[int, float]]:
    """(layer, coefficient) of the grid: at a third, half and two thirds of the depth."""
    layers = [num_layers * part // 12 for part in (4, 6, 8)]
    return [(layer, coefficient) for layer in layers for coefficient in COEFFICIENTS]


def vector(hidden: int) -> Any:
    import torch

    return torch.randn(hidden, generator=torch.Generator().manual_seed(7))


def ours(options: argparse.Namespace) -> Measured:
    from truthsteer.hooks import Injection
    from truthsteer.metrics import multiple_choice
    from truthsteer.prompts import Prompts
    from truthsteer.records import Choice
    from truthsteer.scoring import score

    lm = material.language_model(options)
    asked = material.questions(options, options.questions)
    grid: list[tuple[int, float] | None] = list(cells(lm.num_layers)) if options.steered else [None]
    conditions = [cell and Injection(cell[0], vector(lm.hidden_size), cell[1]) for cell in grid]
    prompts = Prompts(material.preset("qa"), lm.tokenizer, chat=False)
    with timed(options.device) as seconds:
        branches = prompts.branches([q.text for q in asked], [[a for a, _ in q.choices] for q in asked])
        found = {
            (item.condition, item.branch, item.continuation): item.logprob
            for _, unit in score(lm, branches, conditions, batch_tokens=options.batch_tokens)
            for item in unit
        }
        metrics = [
            [
                multiple_choice(
                    [
                        Choice(q.id, a, true, a == q.best, found[condition, place, index], 1)
                        for index, (a, true) in enumerate(q.choices)
                    ]
                )
                for place, q in enumerate(asked)
            ]
            for condition in range(len(conditions))
        ]
    own = metrics[CELL[0] * len(COEFFICIENTS) + CELL[1] if options.steered else 0]
    values = {name: np.array([row[name] for row in own], float) for name in ("mc1", "mc2")}
    return Measured(seconds[0], len(asked) * len(conditions), values, f"; {len(found)} answers scored")


def harness(options: argparse.Namespace) -> Measured:
    import make_lm_eval
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.hf_steered import SteeredModel
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = material.transformers_model(options), material.tokenizer(options)
    asked = sample(options)
    rows = [
        {
            "question": q.text,
            "mc1_targets": {"choices": [q.best, *q.incorrect], "labels": [1] + [0] * len(q.incorrect)},
            "mc2_targets": {"choices": [a for a, _ in q.choices], "labels": [int(true) for _, true in q.choices]},
        }
        for q in asked
    ]
    given: dict[str, Any] = {"pretrained": model, "tokenizer": tokenizer, "batch_size": options.peer_batch}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_lm_eval.write_tasks(folder, rows)
        if options.steered:
            layer, coefficient = cells(model.config.num_hidden_layers)[CELL[0] * len(COEFFICIENTS) + CELL[1]]
            hook = {
                "steering_vector": vector(model.config.hidden_size),
                "steering_coefficient": coefficient,
                "action": "add",
            }
            torch.save({f"layers.{layer}": hook}, folder / "steering.pt")
            lm: Any = SteeredModel(steer_path=str(folder / "steering.pt"), **given)
        else:
            lm = HFLM(**given)
        manager = TaskManager(include_path=name)
        tasks = [f"golden_{task}" for task in make_lm_eval.TASKS]
        with timed(options.device) as seconds:
            result = simple_evaluate(
                model=lm, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=True, verbosity="ERROR"
            )
    values = {}
    for task in make_lm_eval.TASKS:
        samples = sorted(result["samples"][f"golden_{task}"], key=lambda sample: sample["doc_id"])
        values[task.removeprefix("truthfulqa_")] = np.array([float(sample["acc"]) for sample in samples])
    return Measured(seconds[0], len(asked), values, f"; batch {options.peer_batch}")


def sample(options: argparse.Namespace) -> list[Any]:
    """Of our questions, the peer's."""
    asked = material.questions(options, options.questions)
    return [asked[index * len(asked) // options.peer_questions] for index in range(options.peer_questions)]


def check(found: Mapping[str, Arrays]) -> list[str]:
    theirs = found["lm-eval"]
    places = [index * len(found["truthsteer"]["mc1"]) // len(theirs["mc1"]) for index in range(len(theirs["mc1"]))]
    apart = {name: float(np.abs(found["truthsteer"][name][places] - theirs[name]).max()) for name in ("mc1", "mc2")}
    assert max(apart.values()) < 1e-3 or options.dtype != "fp32", apart
    return [f"over {len(places)} questions MC1 and MC2 are off by {apart['mc1']:.2g} and {apart['mc2']:.2g} at most"]


if __name__ == "__main__":
    typed = parser(__doc__)
    typed.add_argument("--questions", type=int, default=100)
    typed.add_argument("--peer-questions", type=int, default=8)
    typed.add_argument("--peer-batch", type=int, default=4, help="the best of 1, 4, 16, 64 here")
    typed.add_argument("--batch-tokens", type=int, default=8192)
    typed.add_argument("--steered", action="store_true")
    options = typed.parse_args()
    reach = 20.0 if options.steered else 30.0
    sides = {"truthsteer": Side(ours), "lm-eval": Side(harness, reach=reach, needs="lm_eval")}
    main(sides, check, options, "question and cell" if options.steered else "question")
