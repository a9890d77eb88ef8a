"""Live against lm-evaluation-harness: other questions and layers than the golden files', plain and by its `steered` model.

pip install lm-eval==0.4.13
pytest -m lm_eval
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPO

from truthsteer.config import Device, DtypeConfig, ModelConfig, PromptConfig
from truthsteer.data import load_questions
from truthsteer.hooks import Injection
from truthsteer.judges.lexical import Lexical
from truthsteer.metrics import multiple_choice
from truthsteer.model import LanguageModel
from truthsteer.prompts import Prompts
from truthsteer.records import Choice
from truthsteer.scoring import score

pytestmark = [pytest.mark.lm_eval, pytest.mark.slow]
pytest.importorskip("lm_eval", reason="pip install lm-eval==0.4.13 to compare live")
QUESTIONS = load_questions()[40:48]
STEERING = {"plain": None, "layer 1": (1, -0.75), "layer 3": (3, 1.5)}


@pytest.fixture(scope="module")
def harness():
    """The golden files' script: how lm-eval is asked."""
    sys.path.insert(0, str(REPO / "tests" / "golden"))
    try:
        import make_lm_eval

        yield make_lm_eval
    finally:
        sys.path.remove(str(REPO / "tests" / "golden"))


@pytest.fixture(scope="module")
def checkpoint(harness, tmp_path_factory) -> Path:
    return harness.save(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", STEERING)
def test_every_log_probability_and_mc1_and_mc2_equal_the_harnesss(harness, checkpoint, tmp_path, monkeypatch, name):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {
            "question": q.text,
            "mc1_targets": {"choices": [q.best, *q.incorrect], "labels": [1] + [0] * len(q.incorrect)},
            "mc2_targets": {"choices": [a for a, _ in q.choices], "labels": [int(true) for _, true in q.choices]},
        }
        for q in QUESTIONS
    ]
    harness.write_tasks(tmp_path, rows)
    steering = STEERING[name]
    theirs = harness.record(harness.evaluate(tmp_path, checkpoint, steering), rows, steering)

    config = ModelConfig(name="golden", path=str(checkpoint))
    lm = LanguageModel.from_config(config, DtypeConfig("fp32"), Device.cpu)
    preset = yaml.safe_load((REPO / "conf" / "prompt" / "qa.yaml").read_text(encoding="utf-8"))
    prompts = Prompts(PromptConfig(**preset), lm.tokenizer, chat=False)
    branches = prompts.branches([q.text for q in QUESTIONS], [[a for a, _ in q.choices] for q in QUESTIONS])
    injection = None if steering is None else Injection(steering[0], torch.tensor(harness.VECTOR), steering[1])
    ours = {(s.branch, s.continuation): s.logprob for _, unit in score(lm, branches, [injection]) for s in unit}
    for place, (question, expected) in enumerate(zip(QUESTIONS, theirs["questions"], strict=True)):
        choices = [
            Choice(question.id, answer, true, answer == question.best, ours[place, index], 1)
            for index, (answer, true) in enumerate(question.choices)
        ]
        for choice in choices:
            assert choice.logprob == pytest.approx(expected["logprobs"][choice.answer], abs=1e-4)
        found = multiple_choice(choices)
        assert found["mc1"] == expected["mc1"]
        assert found["mc2"] == pytest.approx(expected["mc2"], abs=1e-4)


def test_bleu_and_rouge_equal_the_harnesss():
    from lm_eval.tasks.truthfulqa.utils import process_results_gen

    for question, text in zip(QUESTIONS, [q.incorrect[-1].upper() for q in QUESTIONS], strict=True):
        document = {"correct_answers": [*question.correct], "incorrect_answers": [*question.incorrect]}
        if "I have no comment." not in document["correct_answers"]:
            document["correct_answers"].append("I have no comment.")
        theirs = process_results_gen(document, [text])
        [verdict] = Lexical().judge([question], [text])
        for name, value in verdict.scores.items():
            metric = name.replace("rougel", "rougeL")
            assert value == pytest.approx(float(theirs[metric]), abs=1e-9), name
