"""How time and memory grow: questions, conditions, layers and context doubled one at a time.

    python bench/scaling.py
    python bench/scaling.py --device cuda --size 4b --base-layers 8 --batch-tokens 16384

Each point is a process of its own, on questions of made-up words under a model of the size's own width. The exponent of a
column is the slope of log(time) over log(what is doubled): 1 is as it must be, below 1 something is shared, above 1 something
is wasted. Memory is what the work adds to the loaded model at its peak; it must grow neither with questions nor, once they
fill a batch, with conditions (extraction keeps its result, the activations of every pair: those are subtracted).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

import material
import torch
from gemma3_sizes import random_model
from side_by_side import parser, timed

from truthsteer.config import GenerationConfig
from truthsteer.hooks import Injection
from truthsteer.model import LanguageModel
from truthsteer.precision import DTYPES, apply
from truthsteer.prompts import PLAIN, Prompts
from truthsteer.records import Question

WORDS = ("red", "blue", "seven", "river", "stone", "cold", "bird", "table", "green", "north", "salt", "paper")
DOUBLED = {
    "extract": ("questions", "layers", "context"),
    "score": ("questions", "conditions", "layers", "context"),
    "generate": ("questions", "conditions", "layers", "context"),
}
TIMES = (1, 2, 4)


@dataclass(frozen=True)
class Point:
    """What is measured."""

    work: str
    questions: int
    conditions: int
    layers: int
    context: int
    """Words of a question."""


def questions(point: Point) -> list[Question]:
    drawn = random.Random(5)

    def words(count: int) -> str:
        return " ".join(drawn.choice(WORDS) for _ in range(count))

    found = []
    for number in range(point.questions):
        true, false = (tuple(f"{words(5)} {number} {side}{k}." for k in range(2)) for side in "tf")
        found.append(
            Question(f"q{number}", number + 1, "Adversarial", "made up", words(point.context), true[0], true, false)
        )
    return found


def model(options: argparse.Namespace, layers: int) -> LanguageModel:
    policy = material.policy(options)
    made = random_model(options.size, DTYPES[policy.weights], options.device, layers)
    apply(made, policy)
    lm = LanguageModel(made, material.tokenizer(options))
    lm.eos_ids = frozenset()
    return lm


def peak(device: str, begin: bool = False) -> int:
    """Bytes at the peak since `begin`; with it, bytes now."""
    if device.startswith("cuda"):
        if begin:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        return torch.cuda.max_memory_allocated()
    if begin:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    with open("/proc/self/status", encoding="ascii") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines["VmRSS" if begin else "VmHWM"].split()[0]) * 1024


def measure(options: argparse.Namespace, point: Point) -> dict[str, float]:
    """Seconds and MiB of one point, in this process."""
    lm = model(options, point.layers)
    steps = [
        Injection(point.layers // 2, torch.ones(lm.hidden_size), 0.01 * place) if place else None
        for place in range(point.conditions)
    ]
    work(options, lm, point, steps, questions(replace(point, questions=2)))  # what a first pass sets up
    asked = questions(point)
    before = peak(options.device, begin=True)
    with timed(options.device) as seconds:
        kept = work(options, lm, point, steps, asked)
    kept = 0 if options.device.startswith("cuda") else kept  # results are in the computer's memory
    return {"seconds": seconds[0], "mib": (peak(options.device) - before - kept) / 2**20}


def work(options: argparse.Namespace, lm: LanguageModel, point: Point, steps: list[Any], asked: list[Question]) -> int:
    """Do it, and say how many bytes of results are kept in memory."""
    from truthsteer.decoding import Request, decode
    from truthsteer.extraction import extract
    from truthsteer.scoring import score

    prompts = Prompts(PLAIN, lm.tokenizer, False)
    names = [question.text for question in asked]
    if point.work == "extract":
        found = extract(lm, asked, max_length=4096, batch_tokens=options.batch_tokens)
        return found.answer_mean.nbytes + found.answer_last.nbytes + found.prompt_last.nbytes
    if point.work == "score":
        branches = prompts.branches(names, [[answer for answer, _ in question.choices] for question in asked])
        for _ in score(lm, branches, steps, batch_tokens=options.batch_tokens):
            pass
        return 0
    contexts = prompts.contexts(names)
    requests = [Request(context, place) for place in range(point.conditions) for context in contexts]
    config = GenerationConfig(max_new_tokens=8)
    for _ in decode(lm, requests, steps, config=config, stop=(), batch_tokens=options.batch_tokens):
        pass
    return 0


def main() -> None:
    typed = parser(__doc__)
    typed.add_argument("--base-questions", type=int, default=24)
    typed.add_argument("--base-conditions", type=int, default=4)
    typed.add_argument("--base-layers", type=int, default=4)
    typed.add_argument("--base-context", type=int, default=16, help="words of a question")
    typed.add_argument("--batch-tokens", type=int, default=1024, help="small, so that the smallest point fills batches")
    typed.add_argument("--point", help=argparse.SUPPRESS)
    options = typed.parse_args()
    options.dtype = options.dtype or ("fp32" if options.device == "cpu" else "bf16")
    if options.point:
        torch.set_num_threads(options.threads)
        print(json.dumps(measure(options, Point(**json.loads(options.point)))))
        return
    base = Point("", options.base_questions, options.base_conditions, options.base_layers, options.base_context)
    print(f"Gemma 3 {options.size}'s width, {options.dtype}, {options.device}, {options.threads} threads; from {base}")
    for name, doubled in DOUBLED.items():
        for axis in doubled:
            found = []
            for times in TIMES:
                point = replace(base, work=name, **{axis: getattr(base, axis) * times})
                runs = [_child(point) for _ in range(options.rounds)]
                found.append({key: min(run[key] for run in runs) for key in runs[0]})
            slope = math.log(found[-1]["seconds"] / found[0]["seconds"]) / math.log(TIMES[-1])
            seconds = " ".join(f"{each['seconds']:7.2f}" for each in found)
            memory = " ".join(f"{each['mib']:6.0f}" for each in found)
            print(f"{name:9} {axis:11} seconds {seconds}  exponent {slope:5.2f}   MiB {memory}", flush=True)


def _child(point: Point) -> dict[str, float]:
    command = [sys.executable, *sys.argv, "--point", json.dumps(asdict(point))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
