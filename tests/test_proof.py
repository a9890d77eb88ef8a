"""The steering proof passes on honest steering, in 32 and 16 bits and small batches, and fails on each way to cheat."""

from __future__ import annotations

import pytest
import torch

from truthsteer.bank import estimate
from truthsteer.branching import _Row
from truthsteer.data import load_questions
from truthsteer.errors import UserError
from truthsteer.extraction import extract
from truthsteer.hooks import Injection, RowSteering
from truthsteer.model import LanguageModel
from truthsteer.operators import Add
from truthsteer.prompts import PLAIN, Branch, Prompts
from truthsteer.proof import prove, worst

COEFFICIENT = 0.4


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def case(request):
    lm = LanguageModel.load("organism", dtype=request.param, device="cpu")
    asked = load_questions()[:40]
    vector = estimate(extract(lm, asked), layer=2)
    chosen = [asked[0], asked[9], asked[20], asked[33]]
    branches = Prompts(PLAIN, lm.tokenizer, False).branches(
        [q.text for q in chosen], [[q.best, q.incorrect[0]] for q in chosen]
    )
    return lm, branches, Injection(2, torch.from_numpy(vector.values), COEFFICIENT)


@pytest.mark.parametrize("budget", [16, 40, 768, 8192])
def test_honest_steering_passes_at_any_batch_size(case, budget):
    lm, branches, injection = case
    proof = worst([prove(lm, branches, injection, Add(), budget)] * 2)
    assert proof["passed"]
    assert len(proof["checks"]) == 7


class Twice(Add):
    """Adds the vector twice when several rows stand in a batch."""

    def apply(self, hidden, vector, coefficient):
        return super().apply(hidden, vector, coefficient * (2 if len(hidden) > 1 else 1))


class FirstRow(Add):
    """Steers the first row of a batch only."""

    def apply(self, hidden, vector, coefficient):
        changed = super().apply(hidden, vector, coefficient)
        return torch.cat([changed[:1], hidden[1:]])


class PromptOnly(Add):
    """Loses the vector once decoding has begun: single tokens are left alone."""

    def apply(self, hidden, vector, coefficient):
        return hidden if hidden.shape[1] == 1 else super().apply(hidden, vector, coefficient)


class Never(Add):
    """Does nothing."""

    def apply(self, hidden, vector, coefficient):
        return hidden


class NotNull(Add):
    """Changes rows whose coefficient is 0."""

    def apply(self, hidden, vector, coefficient):
        return super().apply(hidden, vector, coefficient + 0.05)


@pytest.mark.parametrize("operator", [Twice, FirstRow, PromptOnly, Never, NotNull])
def test_broken_operators_fail(case, operator):
    lm, branches, injection = case
    with pytest.raises(UserError, match=r"steering proof fails at layer 2: .*Nothing was measured"):
        prove(lm, branches, injection, operator(), 8192)


def test_wrong_positions_after_a_context_fail(case, monkeypatch):
    """A row alone and among others is wrong alike, and the whole text in one pass is not."""
    lm, branches, injection = case
    layout = _Row.layout

    def shifted(row, start):
        positions, sees = layout(row, start)
        positions[sorted({node for path in row.paths for node in path[2][1:]})] += 7
        return positions, sees

    monkeypatch.setattr(_Row, "layout", shifted)
    with pytest.raises(UserError, match="one_pass"):
        prove(lm, branches, injection, Add(), 8192)


def test_wrong_positions_after_a_shared_prefix_fail(case, monkeypatch):
    lm, branches, injection = case
    branches = [Branch(tuple(range(20, 50)) + branch.context, branch.continuations) for branch in branches]
    decoder, steps = lm.decoder, []

    def shifted(**given):
        cache = given["past_key_values"]
        later = cache is not None and cache.get_seq_length() > 0
        steps.append(later)
        return decoder(**given | {"position_ids": given["position_ids"] + 7 * later})

    monkeypatch.setattr(lm, "decoder", shifted)
    with pytest.raises(UserError, match=r"row_alone|one_pass"):
        prove(lm, branches, injection, Add(), 8192)
    assert any(steps)


def test_a_text_that_sees_others_of_its_row_fails(case, monkeypatch):
    lm, branches, injection = case
    layout = _Row.layout

    def open_(row, start):
        positions, sees = layout(row, start)
        return positions, torch.ones_like(sees).tril()

    monkeypatch.setattr(_Row, "layout", open_)
    with pytest.raises(UserError, match="row_alone"):
        prove(lm, branches, injection, Add(), 8192)


def test_a_padding_mask_that_is_ignored_fails(case, monkeypatch):
    lm, branches, injection = case
    forward = lm.forward

    def ignoring(ids, cache=None, mask=None, start=0, positions=None):
        left = mask is not None and mask.ndim == 2 and bool((mask[:, 0] == 0).any())
        return forward(ids, cache, None if left else mask, start, positions)

    monkeypatch.setattr(lm, "forward", ignoring)
    with pytest.raises(UserError, match="decoding"):
        prove(lm, branches, injection, Add(), 8192)


def test_an_injection_that_the_layer_never_sees_fails(case, monkeypatch):
    lm, branches, injection = case
    monkeypatch.setattr(RowSteering, "trunk_of", lambda self, conditions: None)
    monkeypatch.setattr(RowSteering, "assign", lambda self, rows, trunk=None: None)
    with pytest.raises(UserError, match="steering proof fails"):
        prove(lm, branches, injection, Add(), 8192)
