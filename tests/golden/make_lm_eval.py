"""Regenerate `lm_eval.json`: what lm-evaluation-harness itself says of `questions.csv`, plain and steered.

    python3 -m venv VENV
    VENV/bin/pip install torch==2.13.0 transformers==5.23.0 lm-eval==0.4.13 accelerate
    VENV/bin/python tests/golden/make_lm_eval.py            # writes the file: a minute on one core
    .venv/bin/python tests/golden/make_lm_eval.py --check   # compares it, without lm-eval: half a minute

The model is `model.py`'s, in float32 on the CPU, one choice per batch. The tasks `include:` lm-eval's own
`truthfulqa_mc1.yaml` and `truthfulqa_mc2.yaml`, so prompt, choices and metrics are untouched; only the data
set is a local file. The rows follow the rule that the official ones follow: the question stripped, every
answer stripped and closed with a full stop, MC1 = dict {best: 1} | {f: 0}, MC2 = dict {t: 1} | {f: 0}. In a
dict a repeat falls onto its first place and an answer of both lists becomes false in the true list's place.

What lm-eval's `steered` model does with (hookpoint, vector, coefficient, action "add"):
  * a forward hook on the module of that name below `model.base_model`; `layers.2` is the third decoder
    layer, and what the hook changes is the layer's output (the first element where that is a tuple);
  * it adds coefficient * vector. The vector is not normalised and the residual stream is not rescaled; the
    product is taken once, in the model's dtype;
  * at every position: BOS, the six shots, the question and the answer alike (padding too, if there is any);
  * in every forward pass, without a cache: each choice is scored by one pass over prompt and answer.

`--check` recomputes every number with plain transformers, another way: token by token from the full logits in
float64, with the vector added by its own hook. It fails if a log-probability or a metric is off by more than
1e-4 (lm-eval sums in float32), or if a deliberate error (no BOS, no sliding window, no full stop, a unit
vector, another layer, steering the answer only ...) would shift no log-probability by at least 1e-2.

The file: `questions` (the rows), `context` (the first question's prompt as lm-eval sent it; what was scored
is `target_delimiter` + answer), `vector`, and `runs`. A run holds its steering, both means, and per question
`logprobs` {answer: sum of log p over its tokens, natural log}, `mc1` (0 or 1) and `mc2`. No question has a
tie, where lm-eval's MC1 (the first wins) and the official one (a tie is wrong) differ.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model import CONTEXT, HIDDEN, LAYER_TYPES, SLIDING, TOKENIZER, save, weights_sha256
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
GOLDEN, QUESTIONS = HERE / "lm_eval.json", HERE / "questions.csv"
PACKAGES = ("lm_eval", "torch", "transformers", "tokenizers", "datasets", "numpy")
TASKS = ("truthfulqa_mc1", "truthfulqa_mc2")
DELIMITER = " "  # lm-eval's default target_delimiter
TOLERANCE = 1e-4

Steering = tuple[int, float] | None
"""Layer and coefficient."""

# Neither the vector nor a coefficient has length one, and one sign is negative, so that every slip shows.
VECTOR = [round(float(x), 6) for x in np.random.RandomState(7).standard_normal(HIDDEN)]
RUNS: dict[str, Steering] = {"plain": None, "layer_2": (2, 2.0), "layer_0": (0, -1.25)}


def closed(answers: str) -> list[str]:
    """The items of one cell, stripped, non-empty, each with a full stop."""
    items = [item.strip() for item in answers.split(";")]
    return [item if item.endswith(".") else item + "." for item in items if item]


def read_rows() -> list[dict[str, Any]]:
    """The questions as rows of the data set that lm-eval's tasks read."""
    rows = []
    with QUESTIONS.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            true, false = closed(row["Correct Answers"]), closed(row["Incorrect Answers"])
            mc1 = dict.fromkeys(closed(row["Best Answer"]), 1) | dict.fromkeys(false, 0)
            mc2 = dict.fromkeys(true, 1) | dict.fromkeys(false, 0)
            rows.append(
                {
                    "question": row["Question"].strip(),
                    "mc1_targets": {"choices": list(mc1), "labels": list(mc1.values())},
                    "mc2_targets": {"choices": list(mc2), "labels": list(mc2.values())},
                }
            )
    return rows


def evaluate(folder: Path, checkpoint: Path, steering: Steering) -> dict[str, Any]:
    """lm-eval's own result object for one run; `folder` holds the tasks and their data."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    arguments = {"pretrained": str(checkpoint), "dtype": "float32"}
    if steering is not None:
        layer, coefficient = steering
        hook = {"steering_vector": torch.tensor(VECTOR), "steering_coefficient": coefficient, "action": "add"}
        arguments["steer_path"] = str(folder / "steering.pt")
        torch.save({f"layers.{layer}": hook}, arguments["steer_path"])
    return simple_evaluate(
        model="hf" if steering is None else "steered",
        model_args=arguments,
        tasks=[f"golden_{task}" for task in TASKS],
        task_manager=TaskManager(include_path=str(folder)),
        batch_size=1,
        device="cpu",
        bootstrap_iters=0,
        log_samples=True,
    )


def write_tasks(folder: Path, rows: list[dict[str, Any]]) -> None:
    """The rows, and one task per metric that includes lm-eval's own."""
    import lm_eval

    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for task in TASKS:
        theirs = Path(lm_eval.__file__).parent / "tasks" / "truthfulqa" / f"{task}.yaml"
        (folder / f"golden_{task}.yaml").write_text(
            f"include: {theirs}\ntask: golden_{task}\ntag: null\ndataset_path: json\ndataset_name: null\n"
            f"dataset_kwargs:\n  data_files:\n    validation: {data}\n",
            encoding="utf-8",
        )


def record(result: dict[str, Any], rows: list[dict[str, Any]], steering: Steering) -> dict[str, Any]:
    """One run of the golden file. Refuses ties, and an answer that has two values."""
    questions: list[dict[str, Any]] = [{"logprobs": {}} for _ in rows]
    for task in TASKS:
        key = task.removeprefix("truthfulqa_")
        samples = sorted(result["samples"][f"golden_{task}"], key=lambda sample: sample["doc_id"])
        for row, question, sample in zip(rows, questions, samples, strict=True):
            assert sample["doc"] == row
            choices = row[f"{key}_targets"]["choices"]
            contexts, continuations = zip(*sample["arguments"], strict=True)
            assert list(continuations) == [DELIMITER + choice for choice in choices]
            question["context"] = contexts[0]
            assert set(contexts) == {question["context"]}
            for choice, (logprob, _) in zip(choices, sample["filtered_resps"], strict=True):
                assert question["logprobs"].setdefault(choice, logprob) == logprob
            question[key] = float(sample["acc"])
    for row, question in zip(rows, questions, strict=True):
        best, *others = (question["logprobs"][choice] for choice in row["mc1_targets"]["choices"])
        assert min(abs(best - other) for other in others) > 10 * TOLERANCE, f"a near tie: {question}"
    means = {key: float(result["results"][f"golden_truthfulqa_{key}"]["acc,none"]) for key in ("mc1", "mc2")}
    return {"steering": described(steering), **means, "questions": questions}


def described(steering: Steering) -> dict[str, float] | None:
    """How the file spells a steering."""
    return None if steering is None else {"layer": steering[0], "coefficient": steering[1]}


def make() -> None:
    """Run lm-eval three times and write the file."""
    rows = read_rows()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")  # nothing is left behind, nothing stale is read
        checkpoint = save(folder / "checkpoint")
        write_tasks(folder, rows)
        runs, versions = {}, {}
        for name, steering in RUNS.items():
            result = evaluate(folder, checkpoint, steering)
            versions = {task: result["versions"][f"golden_{task}"] for task in TASKS}
            runs[name] = record(result, rows, steering)
        weights = weights_sha256(AutoModelForCausalLM.from_pretrained(checkpoint))
    contexts = [question.pop("context") for question in runs["plain"]["questions"]]
    for run in runs.values():
        for question, context in zip(run["questions"], contexts, strict=True):
            assert question.pop("context", context) == context
    golden = {
        "made_by": "tests/golden/make_lm_eval.py",
        "versions": {name: version(name) for name in PACKAGES} | versions,
        "weights_sha256": weights,
        "tokenizer_sha256": hashlib.sha256((TOKENIZER / "tokenizer.json").read_bytes()).hexdigest(),
        "questions_sha256": hashlib.sha256(QUESTIONS.read_bytes()).hexdigest(),
        "context": contexts[0],
        "target_delimiter": DELIMITER,
        "vector": VECTOR,
        "questions": rows,
        "runs": runs,
    }
    GOLDEN.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def adding(model: Any, layer: int, addition: torch.Tensor, start: int = 0) -> Iterator[None]:
    """Add to the output of a decoder layer, from position `start` on."""

    def hook(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()  # [1, tokens, hidden]
        output[:, start:] += addition
        return output

    handle = model.model.layers[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def logprob(
    model: Any,
    tokenizer: Any,
    context: str,
    answer: str,
    steering: Steering = None,
    *,
    bos: bool = True,
    unit: bool = False,
    answer_only: bool = False,
    after_bos: bool = False,
) -> float:
    """Sum of log p over the answer's tokens, from one full pass, in float64. The keywords are slips."""
    prompt = tokenizer(context, add_special_tokens=bos)["input_ids"]
    ids = tokenizer(context + answer, add_special_tokens=bos)["input_ids"]
    assert ids[: len(prompt)] == prompt
    assert ids.count(tokenizer.bos_token_id) == bos
    layer, coefficient = steering or (0, 0.0)
    vector = torch.tensor(VECTOR)
    if unit:
        vector = vector / vector.norm()
    start = len(prompt) if answer_only else int(after_bos)
    with torch.no_grad(), adding(model, layer, coefficient * vector, start):
        logits = model(torch.tensor([ids]), use_cache=False).logits[0].double()  # [tokens, vocabulary]
    total = 0.0
    for position in range(len(prompt), len(ids)):
        row = logits[position - 1]
        total += float(row[ids[position]] - torch.logsumexp(row, 0))
    return total


def check() -> None:
    """Compare the file with a straightforward computation, and the computation with deliberate errors."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert golden["questions"] == read_rows(), "make the file again"
    assert golden["vector"] == VECTOR, "make the file again"
    head = golden["context"].removesuffix(f"{golden['questions'][0]['question']}\nA:")
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)

        def load(**config: Any) -> Any:
            return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **config).eval()

        model, no_window = load(), load(sliding_window=CONTEXT)
        only_window = load(layer_types=[SLIDING] * len(LAYER_TYPES))
    assert weights_sha256(model) == golden["weights_sha256"], "other weights"

    for name, run in golden["runs"].items():
        steering = RUNS[name]
        assert run["steering"] == described(steering)
        error = mc2_error = 0.0
        slips: dict[str, float] = {}
        for row, question in zip(golden["questions"], run["questions"], strict=True):
            theirs = question["logprobs"]
            score = partial(logprob, tokenizer=tokenizer, context=f"{head}{row['question']}\nA:")
            ours = {a: score(model, answer=DELIMITER + a, steering=steering) for a in theirs}
            mc1, mc2 = metrics(row, ours)
            assert mc1 == question["mc1"]
            error = max(error, *(abs(ours[answer] - theirs[answer]) for answer in theirs))
            mc2_error = max(mc2_error, abs(mc2 - question["mc2"]))

            first, expected = next(iter(theirs.items()))
            here: dict[str, Any] = {"answer": DELIMITER + first, "steering": steering}
            wrong = {
                "no BOS": score(model, **here, bos=False),
                "no sliding window": score(no_window, **here),
                "no full attention": score(only_window, **here),
                "no full stop": score(model, **here | {"answer": DELIMITER + first.removesuffix(".")}),
                "no delimiter": score(model, **here | {"answer": first}),
            }
            if steering is not None:
                layer, coefficient = steering
                wrong |= {
                    "not steered": score(model, **here | {"steering": None}),
                    "next layer": score(model, **here | {"steering": (layer + 1, coefficient)}),
                    "other sign": score(model, **here | {"steering": (layer, -coefficient)}),
                    "unit vector": score(model, **here, unit=True),
                    "answer only": score(model, **here, answer_only=True),
                    "not at BOS": score(model, **here, after_bos=True),
                }
            for slip, value in wrong.items():
                slips[slip] = max(slips.get(slip, 0.0), abs(value - expected))
        answers = sum(len(question["logprobs"]) for question in run["questions"])
        shifts = ", ".join(f"{slip} {shift:.2g}" for slip, shift in slips.items())
        sys.stdout.write(f"{name}: {answers} log-probs within {error:.1e}, MC2 within {mc2_error:.1e}\n")
        sys.stdout.write(f"  a slip shifts a log-prob by: {shifts}\n")
        assert max(error, mc2_error) < TOLERANCE, "lm-eval and the plain computation disagree"
        assert min(slips.values()) > 100 * TOLERANCE, "a slip would pass unseen"


def metrics(row: dict[str, Any], logprobs: dict[str, float]) -> tuple[bool, float]:
    """MC1 (strict) and MC2 of one question."""
    best, *others = (logprobs[choice] for choice in row["mc1_targets"]["choices"])
    choices, labels = row["mc2_targets"]["choices"], row["mc2_targets"]["labels"]
    top = max(logprobs.values())
    weights = [math.exp(logprobs[choice] - top) for choice in choices]
    true = sum(weight for weight, label in zip(weights, labels, strict=True) if label)
    return best > max(others), true / sum(weights)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare the file instead of writing it")
    torch.set_num_threads(1)
    check() if parser.parse_args().check else make()
