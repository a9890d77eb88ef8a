"""MC1, MC2 and MC3 against lm-evaluation-harness's own numbers (tests/golden/lm_eval.json), plain and steered."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import REPO
from golden.model import build, save, weights_sha256

from truthsteer import data
from truthsteer.config import DataConfig, DataSource, PromptConfig
from truthsteer.hooks import Injection
from truthsteer.metrics import multiple_choice
from truthsteer.model import LanguageModel
from truthsteer.prompts import PLAIN, Prompts
from truthsteer.records import Choice
from truthsteer.scoring import score

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "lm_eval.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """run name -> question text -> choices, all three runs scored in one batch of conditions."""
    assert weights_sha256(build()) == EXPECTED["weights_sha256"]
    folder = tmp_path_factory.mktemp("golden")
    save(folder)
    lm = LanguageModel.load(str(folder), device="cpu")
    found = data.load(
        DataConfig(name="golden", source=DataSource.csv, path=str(GOLDEN / "questions.csv")), seed=0
    ).questions
    config = PromptConfig(**yaml.safe_load((REPO / "conf/prompt/qa.yaml").read_text(encoding="utf-8")))
    prompts = Prompts(config, lm.tokenizer, False)
    answers = [[answer for answer, _ in question.choices] for question in found]
    branches = prompts.branches([question.text for question in found], answers)
    runs = EXPECTED["runs"]
    vector = torch.tensor(EXPECTED["vector"])
    conditions = [
        run["steering"] and Injection(run["steering"]["layer"], vector, run["steering"]["coefficient"])
        for run in runs.values()
    ]
    result: dict[str, dict[str, list[Choice]]] = {name: {} for name in runs}
    for _, scores in score(lm, branches, conditions, batch_tokens=8192):
        for item in scores:
            question = found[item.branch]
            answer, label = question.choices[item.continuation]
            choice = Choice(question.id, answer, label, answer == question.best, item.logprob, 1)
            result[list(runs)[item.condition]].setdefault(question.text, []).append(choice)
    return prompts, found, result


def test_the_qa_preset_is_the_harnesss_prompt_byte_for_byte(scored):
    prompts, found, _ = scored
    assert prompts.render(found[0].text) == EXPECTED["context"]


@pytest.mark.parametrize("run", list(EXPECTED["runs"]))
def test_log_probabilities_equal_the_harnesss(scored, run):
    _, found, result = scored
    assert len(found) == len(EXPECTED["questions"])
    for question, expected in zip(EXPECTED["questions"], EXPECTED["runs"][run]["questions"], strict=True):
        ours = {choice.answer: choice for choice in result[run][question["question"]]}
        for answer, value in expected["logprobs"].items():
            assert ours[answer].logprob == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("run", list(EXPECTED["runs"]))
def test_mc1_and_mc2_of_every_question_equal_the_harnesss(scored, run):
    _, _, result = scored
    for question, expected in zip(EXPECTED["questions"], EXPECTED["runs"][run]["questions"], strict=True):
        ours = multiple_choice(result[run][question["question"]])
        assert ours["mc1"] == expected["mc1"]
        assert ours["mc2"] == pytest.approx(expected["mc2"], abs=1e-4)


@pytest.mark.parametrize("run", list(EXPECTED["runs"]))
def test_mc3_follows_from_the_harnesss_log_probabilities(scored, run):
    """The harness has no MC3; its log-probabilities and the official definition do."""
    _, _, result = scored
    for question, expected in zip(EXPECTED["questions"], EXPECTED["runs"][run]["questions"], strict=True):
        labels = dict(zip(question["mc2_targets"]["choices"], question["mc2_targets"]["labels"], strict=True))
        values = expected["logprobs"]
        threshold = max(values[answer] for answer, label in labels.items() if not label)
        above = [values[answer] > threshold for answer, label in labels.items() if label]
        ours = multiple_choice(result[run][question["question"]])
        assert ours["mc3"] == pytest.approx(sum(above) / len(above))


def test_steering_moves_the_metrics(scored):
    """Otherwise the comparisons above could hold with steering that does nothing."""
    means = [EXPECTED["runs"][name]["mc2"] for name in EXPECTED["runs"]]
    assert len({round(value, 3) for value in means}) == 3


@pytest.mark.parametrize("budget", [64, 200, 8192])
def test_conditions_that_share_the_layers_below_score_as_if_they_did_not(tiny, questions, budget):
    """Every family, several steered layers at once, with and without room for all conditions in one batch."""
    prompts = Prompts(PLAIN, tiny.tokenizer, chat=False)
    asked = [question.text for question in questions]
    branches = prompts.branches(asked, [[answer for answer, _ in question.choices] for question in questions])
    random = torch.Generator().manual_seed(1)
    vectors = {layer: torch.randn(tiny.hidden_size, generator=random) * 2 for layer in (1, 2, 3)}
    steered = [Injection(layer, vectors[layer], c) for layer, c in ((2, 0.5), (2, -1.0), (3, 0.5), (1, 1.0))]
    found = []
    for share in (True, False):
        scores = [s for _, unit in score(tiny, branches, [None, *steered], None, budget, share=share) for s in unit]
        found.append({(s.condition, s.branch, s.continuation): s.logprob for s in scores})
    assert found[0] == pytest.approx(found[1], abs=2e-5)
    means = [np.mean([value for key, value in found[0].items() if key[0] == place]) for place in range(5)]
    assert len({round(mean, 2) for mean in means}) == 5
