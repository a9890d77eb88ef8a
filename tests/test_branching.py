"""Batches of contexts and continuations: the same numbers as a text alone, at little cost."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import FAMILIES, build
from hypothesis import given
from hypothesis import strategies as st

from truthsteer import scoring
from truthsteer.branching import PASS_COST, Brancher, alike, batched
from truthsteer.hooks import Injection, RowSteering
from truthsteer.model import LanguageModel
from truthsteer.operators import Add
from truthsteer.prompts import Branch
from truthsteer.scoring import score


def branches(prefix: int = 0) -> list[Branch]:
    """Contexts of 5 to 14 tokens behind a common prefix, answers of 1 to 9."""
    random = torch.Generator().manual_seed(3)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 1700, (count,), generator=random).tolist())

    shared = tokens(prefix)
    return [
        Branch((2, *shared, *tokens(4 + place % 7 + place % 3)), tuple(tokens(1 + (place + i) % 9) for i in range(3)))
        for place in range(12)
    ]


def with_window(family: str, tokenizer, window: int) -> LanguageModel:
    model = build(family)
    config = model.config.get_text_config()
    if getattr(config, "sliding_window", None):
        config.sliding_window = window
    return LanguageModel(model, tokenizer)


@torch.no_grad()
def alone(lm: LanguageModel, branch: Branch, answer: tuple[int, ...], injection: Injection | None) -> float:
    """The log-probability of an answer, its text read alone and from the beginning."""
    ids = torch.tensor([[*branch.context, *answer]])
    with RowSteering(lm, [injection], Add()) as steering:
        steering.assign(torch.zeros(1, dtype=torch.long))
        logits = lm.model(input_ids=ids).logits[0].float()
    first = len(branch.context) - 1
    return float(logits[first:-1].log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)].double().sum())


@pytest.mark.parametrize("prefix", [0, 20], ids=["no prefix", "prefix"])
@pytest.mark.parametrize("window", [12, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_score_as_their_texts_do_alone(family, window, prefix, tokenizer):
    lm, asked = with_window(family, tokenizer, window), branches(prefix)
    conditions = [None, Injection(1, torch.randn(lm.hidden_size, generator=torch.Generator().manual_seed(1)), 1.5)]
    for _, unit in score(lm, asked, conditions, batch_tokens=600):
        for item in unit:
            branch = asked[item.branch]
            wanted = alone(lm, branch, branch.continuations[item.continuation], conditions[item.condition])
            assert item.logprob == pytest.approx(wanted, abs=2e-4)


@pytest.mark.parametrize(("window", "mixed"), [(12, False), (64, True)])
def test_contexts_are_padded_only_where_no_window_loses_by_it(window, mixed, tokenizer):
    lm, asked = with_window("gemma3", tokenizer, window), branches()
    with RowSteering(lm, [None], Add()) as steering:
        units = Brancher(lm, asked, steering, 1, 8192).units
    lengths = [{len(asked[place].context) for place in unit.branches} for unit in units]
    assert any(len(found) > 1 for found in lengths) == mixed
    assert sorted(place for unit in units for place in unit.branches) == list(range(len(asked)))


def test_positions_may_be_multiplied_by_the_head_in_any_number_at_once(tokenizer, monkeypatch):
    lm = with_window("gemma3", tokenizer, 64)
    wanted = list(score(lm, branches(), [None]))
    for held in (1, 30):
        monkeypatch.setattr(scoring, "HELD", held)
        for (_, a), (_, b) in zip(score(lm, branches(), [None]), wanted, strict=True):
            assert [item.logprob for item in a] == pytest.approx([item.logprob for item in b], abs=1e-5)


ROWS = st.lists(st.integers(1, 30), min_size=1, max_size=40).map(lambda found: sorted(found, reverse=True))


def cost(spans: list[tuple[int, int]], lengths: list[int], overhead: float) -> float:
    return sum(overhead + (last - first) * lengths[first] for first, last in spans)


@given(ROWS, st.integers(1, 400), st.floats(0, 200))
def test_batches_hold_every_row_once_within_the_budget(lengths, budget, overhead):
    fits = [max(1, budget // length) for length in lengths]
    spans = batched(lengths, fits, overhead)
    assert [place for first, last in spans for place in range(first, last)] == list(range(len(lengths)))
    assert all(last - first <= fits[first] for first, last in spans)
    each = [(place, place + 1) for place in range(len(lengths))]
    same = [
        (first, min(first + fits[first], last))
        for _, group in itertools.groupby(range(len(lengths)), key=lengths.__getitem__)
        for own in [list(group)]
        for first, last in [(place, own[-1] + 1) for place in own[:: fits[own[0]]]]
    ]
    assert cost(spans, lengths, overhead) <= min(cost(each, lengths, overhead), cost(same, lengths, overhead)) + 1e-6


def test_cheap_passes_are_many_and_dear_ones_few():
    lengths = [30] * 10 + [3] * 10
    assert batched(lengths, [100] * 20, 1.0) == [(0, 10), (10, 20)]
    assert batched(lengths, [100] * 20, 1000.0) == [(0, 20)]
    assert batched(lengths, [100] * 20, float(PASS_COST["cpu"])) == [(0, 10), (10, 20)]
    assert batched([], [], 1.0) == []


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40).map(tuple), min_size=1, max_size=12))
def test_every_text_is_in_one_group_and_begins_as_it_does(texts):
    texts = sorted(texts)
    groups = alike(texts, 2)
    assert [place for first, last, _ in groups for place in range(first, last)] == list(range(len(texts)))
    for first, last, shared in groups:
        assert 0 <= shared <= len(texts[first])
        assert len({text[:shared] for text in texts[first:last]}) == 1


def test_groups_end_where_texts_share_less():
    orders = [
        (1, *question, *lists, *answer)
        for question in ((2,) * 9, (3,) * 9)
        for lists in ((4,) * 9, (5,) * 9)
        for answer in ((6,), (7,))
    ]
    assert alike(sorted(orders), 5) == [(0, 2, 19), (2, 4, 19), (4, 6, 19), (6, 8, 19)]
    assert alike([(1, 2), (1, 3)], 3) == [(0, 1, 2), (1, 2, 2)]
    assert alike([], 3) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_what_answers_begin_with_alike_is_computed_once(family, tokenizer, monkeypatch):
    lm = with_window(family, tokenizer, 64)
    stem = (5, 6, 7, 8, 9, 10, 11, 12)
    ends = ((20,), (21, 22, 23), (24,), (), (20, 30, 31))
    asked = [
        Branch((2, *range(40, 44 + place)), (*((*stem, *end) for end in ends), (90, 91), (92,))) for place in range(8)
    ]
    conditions = [None, Injection(1, torch.randn(lm.hidden_size, generator=torch.Generator().manual_seed(1)), 1.5)]
    with RowSteering(lm, conditions, Add()) as steering:
        brancher = Brancher(lm, asked, steering, 2, 8192)
        fed = [
            (row, length)
            for unit in brancher.units
            for step in brancher.walk(unit, whole=True)
            for row, length in zip(step.rows, step.lengths, strict=True)
        ]
    for condition, place in itertools.product(range(2), range(8)):
        held = dict.fromkeys(range(7), 0)
        for row, length in fed:
            if (row.condition, row.branch) == (condition, place):
                for index in row.continuations:
                    assert row.start == held[index], "what comes first is computed first"
                    held[index] += length
        assert [held[index] for index in range(7)] == list(map(len, asked[place].continuations))
    computed = sum(length for row, length in fed if row.continuations)
    assert computed == 2 * 8 * (8 + 1 + 3 + 1 + 3 + 2 + 1)
    for _, unit in score(lm, asked, conditions):
        for item in unit:
            answer = asked[item.branch].continuations[item.continuation]
            wanted = alone(lm, asked[item.branch], answer, conditions[item.condition])
            assert item.logprob == pytest.approx(wanted, abs=2e-4)
