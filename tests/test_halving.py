"""A GPU's memory that runs out: the same numbers from smaller batches, and one sentence where there are none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import build, make_questions
from test_branching import branches

from truthsteer.branching import Unit
from truthsteer.config import GenerationConfig
from truthsteer.decoding import Request, decode
from truthsteer.errors import UserError
from truthsteer.extraction import extract
from truthsteer.halving import in_halves
from truthsteer.hooks import Injection
from truthsteer.model import LanguageModel
from truthsteer.scoring import score


@pytest.fixture
def lm(tokenizer) -> LanguageModel:
    return LanguageModel(build("gemma3"), tokenizer)


def small(lm: LanguageModel, monkeypatch, tokens: int) -> None:
    """Passes of more tokens run out of memory."""
    forward = lm.forward

    def limited(ids, *rest, **more):
        if ids.numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(ids, *rest, **more)

    monkeypatch.setattr(lm, "forward", limited)


def conditions(lm: LanguageModel) -> list[Injection | None]:
    return [None, Injection(1, torch.randn(lm.hidden_size, generator=torch.Generator().manual_seed(1)), 1.5)]


def test_scores_are_the_same(lm, monkeypatch, caplog):
    def scored() -> list[tuple[int, list]]:
        return [(number, [(s.condition, s.branch, s.continuation) for s in unit]) for number, unit in found]

    def values() -> list[float]:
        return [s.logprob for _, unit in found for s in unit]

    found = list(score(lm, branches(), conditions(lm)))
    keys, wanted = scored(), values()
    small(lm, monkeypatch, 60)
    found = list(score(lm, branches(), conditions(lm)))
    assert scored() == keys
    assert values() == pytest.approx(wanted, abs=1e-4)
    assert "The GPU's memory ran out: going on with half a batch." in caplog.text
    small(lm, monkeypatch, 0)
    with pytest.raises(UserError, match=r"does not suffice for a single text\. Type a smaller model"):
        list(score(lm, branches(), conditions(lm)))


def test_activations_are_the_same(lm, monkeypatch):
    questions = make_questions(8)
    wanted = extract(lm, questions)
    small(lm, monkeypatch, 100)
    found = extract(lm, questions)
    assert found.pairs == wanted.pairs
    for name in ("answer_mean", "answer_last", "prompt_last", "norms", "tokens"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", [0, 20], ids=["no prefix", "prefix"])
def test_answers_are_the_same(lm, monkeypatch, prefix):
    requests = [Request(branch.context, place % 2) for place, branch in enumerate(branches(prefix))]

    def answers() -> list:
        config = GenerationConfig(max_new_tokens=4)
        return list(decode(lm, requests, conditions(lm), config=config, stop=()))

    wanted = answers()
    small(lm, monkeypatch, 100)
    assert answers() == wanted


@pytest.mark.parametrize("layer", [0, 2])
def test_a_beginning_that_memory_did_not_suffice_for_is_computed_again(lm, monkeypatch, layer):
    requests = [Request(branch.context, place % 2) for place, branch in enumerate(branches(20))]

    def answers() -> list:
        config = GenerationConfig(max_new_tokens=4)
        return list(decode(lm, requests, conditions(lm), config=config, stop=()))

    wanted, failed = answers(), []

    def fail_once(*_):
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = lm.layers[layer].register_forward_pre_hook(fail_once)
    assert answers() == wanted
    assert failed
    handle.remove()


def test_a_unit_is_halved_until_it_is_one_question_under_one_condition():
    parts = [Unit((0, 1, 2), (4, 5, 6, 7, 8))]
    while any(part.halves() for part in parts):
        parts = [half for part in parts for half in (part.halves() or [part])]
    assert sorted((part.conditions, part.branches) for part in parts) == sorted(
        ((condition,), (branch,)) for condition in (0, 1, 2) for branch in (4, 5, 6, 7, 8)
    )


def test_another_error_is_no_reason_to_halve():
    with pytest.raises(ValueError, match="no"):
        in_halves(lambda _: (_ for _ in ()).throw(ValueError("no")), [1, 2], lambda part: [part[:1], part[1:]])
