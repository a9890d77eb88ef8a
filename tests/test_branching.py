"""Batches of contexts and continuations: the same numbers as a text alone, at little cost."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import FAMILIES, build
from hypothesis import given
from hypothesis import strategies as st

from truthsteer.branching import PASS_COST, Brancher, batched
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
