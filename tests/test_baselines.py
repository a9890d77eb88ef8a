"""Rows without steering: which there are, what they see, and that artifacts stand in the order of their conditions."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
from made_results import make_questions

from truthsteer import baselines
from truthsteer.conditions import per_prompt
from truthsteer.config import FEW_SHOT, BaselinesConfig, PromptConfig, Stage
from truthsteer.errors import UserError
from truthsteer.prompts import PLAIN
from truthsteer.records import NO_COMMENT, Choice, Completion, Condition, ConditionKind, Splits
from truthsteer.store import Store
from truthsteer.surface import matched
from truthsteer.workspace import Workspace

QUESTIONS = make_questions(64)
OTHER = PromptConfig(name="other", text="{question} Answer:", chat_text="{question}")
SPLIT = Splits(0, QUESTIONS[:20], QUESTIONS[20:30], QUESTIONS[30:40], QUESTIONS[40:])


def workspace(tmp_path, stages: tuple[Stage, ...] = tuple(Stage), **fields) -> Workspace:
    """The parts of a workspace that rows without a model need."""
    config = SimpleNamespace(prompt=PLAIN, seed=3, baselines=BaselinesConfig(**fields), stages=stages)
    ws = object.__new__(Workspace)
    ws.config, ws.store = config, Store(tmp_path)
    return ws


def test_every_row_stands_in_its_order_and_can_be_left_out():
    config = BaselinesConfig(prompts={"b": PLAIN, "a": OTHER})
    found = baselines.conditions(config, SPLIT)
    assert [(item.name, str(item.kind), item.prompt) for item in found] == [
        ("prompt a", "prompt", "a"),
        ("prompt b", "prompt", "b"),
        ("few-shot", "few_shot", FEW_SHOT),
        ("always abstain", "abstain", ""),
        ("shortest answer", "shortest", ""),
        ("wording alone", "surface", ""),
    ]
    assert {(item.fold, item.layer, item.vector) for item in found} == {(0, None, "")}
    assert baselines.names(config) == [item.name for item in found], "the plan names what will be there"
    none = BaselinesConfig(few_shot=0, abstain=False, shortest=False, surface=False)
    assert baselines.conditions(none, SPLIT) == []
    assert baselines.names(BaselinesConfig(few_shot=0, shortest=False)) == ["always abstain", "wording alone"]


def test_without_train_questions_there_are_no_examples():
    untrained = dataclasses.replace(SPLIT, train=())
    assert "few-shot" not in [item.name for item in baselines.conditions(BaselinesConfig(), untrained)]


def test_examples_are_best_answers_of_train_questions_drawn_with_the_seed(tmp_path):
    ws = workspace(tmp_path, few_shot=3)
    found = ws.prompt(FEW_SHOT, SPLIT)
    shown = found.text.removesuffix(PLAIN.text).removesuffix("\n\n").split("\n\n")
    train = {f"Q: {question.text}\nA: {question.best}" for question in SPLIT.train}
    assert len(shown) == 3
    assert set(shown) < train
    assert ws.prompt(FEW_SHOT, SPLIT) == found
    more = workspace(tmp_path, few_shot=5).prompt(FEW_SHOT, SPLIT)
    assert more.text.startswith("\n\n".join(shown)), "more examples come after those"
    ws.config.seed = 4
    assert ws.prompt(FEW_SHOT, SPLIT) != found
    assert ws.prompt() == PLAIN


def test_artifacts_stand_in_the_order_of_their_conditions():
    """All that ask a model at once, by prompt; those that ask none, singly."""
    rows = [("shortest", ""), ("baseline", ""), ("prompt", "x"), ("surface", ""), ("chosen", ""), ("prompt", "x")]
    conditions = [
        Condition(f"{place}", ConditionKind(kind), 0, prompt=prompt) for place, (kind, prompt) in enumerate(rows)
    ]
    calls = []

    def make(prompt, own):
        calls.append((prompt, [item.name for item in own]))
        return [f"asked {item.name}" for item in own]

    ws = SimpleNamespace(prompt=lambda name, split: f"prompt {name!r}")
    found = baselines.beside(
        conditions, lambda asked: per_prompt(ws, SPLIT, asked, make), lambda item: f"free {item.name}"
    )
    assert found == ["free 0", "asked 1", "asked 2", "free 3", "asked 4", "asked 5"]
    assert calls == [("prompt ''", ["1", "4"]), ("prompt 'x'", ["2", "5"])]


def test_the_classifier_sees_all_but_the_test_questions_as_the_vector_does():
    """Near-duplicates too, where splits do not keep them together: what leaks to the one leaks to the other."""
    twin = dataclasses.replace(QUESTIONS[0], group=QUESTIONS[50].group)
    split = dataclasses.replace(SPLIT, steer=(twin, *SPLIT.steer[1:]))
    seen = baselines.fitted_on(split)
    assert seen == (twin, *QUESTIONS[1:40])
    assert baselines.fitted_on(SPLIT) == QUESTIONS[:40]


def test_scores_of_rows_that_ask_no_model(tmp_path):
    ws = workspace(tmp_path)
    found = {
        item.name: baselines.choices(ws, SPLIT, item).rows(Choice)
        for item in baselines.conditions(BaselinesConfig(few_shot=0), SPLIT)
    }
    assert found["always abstain"] == []
    listed = [(q.id, answer, label, answer == q.best) for q in SPLIT.test for answer, label in q.choices]
    for name in ("shortest answer", "wording alone"):
        assert [(row.question, row.answer, row.label, row.best) for row in found[name]] == listed
    assert [row.logprob for row in found["shortest answer"]] == [-float(len(answer)) for _, answer, _, _ in listed]
    scores: dict[str, dict[str, float]] = {}
    for row in found["wording alone"]:
        scores.setdefault(row.question, {})[row.answer] = row.logprob
    assert matched(SPLIT.test, scores) == set(), "here one word, Corvale, gives every best answer away"


def test_only_abstaining_has_answers_and_they_decline(tmp_path):
    ws = workspace(tmp_path)
    abstain, shortest, surface = (
        baselines.completions(ws, SPLIT, item).rows(Completion)
        for item in baselines.conditions(BaselinesConfig(few_shot=0), SPLIT)
    )
    assert shortest == surface == []
    assert [(row.question, row.text, row.tokens) for row in abstain] == [(q.id, NO_COMMENT, 0) for q in SPLIT.test]


def test_the_classifiers_row_depends_on_what_it_was_fitted_on_and_the_others_do_not(tmp_path):
    ws = workspace(tmp_path)
    other = dataclasses.replace(SPLIT, train=SPLIT.train[1:])
    made = [
        [baselines.choices(ws, split, item).key for item in baselines.conditions(BaselinesConfig(few_shot=0), split)]
        for split in (SPLIT, other)
    ]
    assert [a == b for a, b in zip(*made, strict=True)] == [True, True, False]


def test_a_run_that_leaves_the_stage_out_needs_what_it_would_make(tmp_path):
    ws = workspace(tmp_path, stages=(Stage.judge,))
    [item] = baselines.conditions(BaselinesConfig(few_shot=0, abstain=False, surface=False), SPLIT)
    with pytest.raises(UserError, match="Add choose to stages"):
        baselines.choices(ws, SPLIT, item)
    with pytest.raises(UserError, match="Add generate to stages"):
        baselines.completions(ws, SPLIT, item)
