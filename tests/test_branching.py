"""Batches of contexts and continuations: the same numbers as a text alone, at little cost."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from conftest import FAMILIES, build
from hypothesis import given, settings
from hypothesis import strategies as st

from truthsteer import branching, scoring
from truthsteer.branching import Brancher, alike
from truthsteer.config import DtypeConfig, Residual
from truthsteer.hooks import Injection, RowSteering
from truthsteer.model import LanguageModel
from truthsteer.operators import Add
from truthsteer.precision import DTYPES, apply
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


@pytest.fixture(scope="module")
def one_model(tokenizer) -> LanguageModel:
    return with_window("gemma3", tokenizer, 12)


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
    for _, unit in list(
        score(lm, asked, conditions, batch_tokens=600)
    ):  # its hooks are gone before any text is read alone
        for item in unit:
            branch = asked[item.branch]
            wanted = alone(lm, branch, branch.continuations[item.continuation], conditions[item.condition])
            assert item.logprob == pytest.approx(wanted, abs=2e-4)


def test_positions_may_be_multiplied_by_the_head_in_any_number_at_once(tokenizer, monkeypatch):
    lm = with_window("gemma3", tokenizer, 64)
    wanted = list(score(lm, branches(), [None]))
    for held in (1, 30):
        monkeypatch.setattr(scoring, "HELD", held)
        for (_, a), (_, b) in zip(score(lm, branches(), [None]), wanted, strict=True):
            assert [item.logprob for item in a] == pytest.approx([item.logprob for item in b], abs=1e-5)


TEXTS = st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple)
TREES = st.lists(st.tuples(TEXTS, st.lists(TEXTS, min_size=1, max_size=4)), min_size=1, max_size=12)


def walked(lm: LanguageModel, asked: list[Branch], conditions: list, budget: int, whole: bool) -> list[tuple]:
    """(units, passes of each) of branches, with what each pass was fed."""
    fed = []
    forward = lm.forward

    def watched(ids, *rest, **more):
        fed.append(ids)
        return forward(ids, *rest, **more)

    with RowSteering(lm, conditions, Add()) as steering, pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm, "forward", watched)
        brancher = Brancher(lm, asked, steering, len(conditions), budget)
        found = []
        for unit in brancher.units:
            for step in brancher.walk(unit, whole):
                found.append((unit, step, fed[-1]))
    return found


@settings(deadline=None, max_examples=40)
@given(TREES, st.integers(1, 3), st.integers(1, 200), st.booleans(), st.booleans(), st.booleans())
def test_a_pass_holds_every_text_once(one_model, trees, copies, budget, whole, steers, prefixed):
    prefix = tuple(range(100, 120)) if prefixed else ()
    asked = [Branch((*prefix, *context), tuple(continuations)) for context, continuations in trees]
    conditions = [None] * (copies - steers) + [Injection(1, torch.ones(one_model.hidden_size), 1.0)] * steers
    held = len(branching.common_prefix([branch.context[:-1] for branch in asked]))
    seen = Counter()
    for unit, step, ids in walked(one_model, asked, conditions, budget, whole):
        block = ids.reshape(-1)[: step.block]
        rows = step.block // ids.shape[1]
        assert len(ids) in (rows, rows * len(unit.conditions)), "one block, or one for each condition"
        slots = rows * len(unit.conditions) * (held + ids.shape[1])
        one = rows == 1 and len({path.branch for path in step.paths}) == 1
        assert slots <= budget or one, "more than the budget only where one branch needs it"
        for path in step.paths:
            text = asked[path.branch].continuations[path.continuation]
            text = text if whole else text[:-1]
            assert path.branch in unit.branches
            assert tuple(block[list(path.places[1:])].tolist()) == text
            assert block[path.places[0]] == asked[path.branch].context[-1]
            for condition in unit.conditions:
                seen[condition, path.branch, path.continuation] += 1
    every = [
        (c, b, i) for c in range(copies) for b, branch in enumerate(asked) for i in range(len(branch.continuations))
    ]
    assert seen == Counter(every)


def test_next_to_nothing_is_computed_twice(tokenizer):
    lm = with_window("gemma3", tokenizer, 64)
    stem = tuple(range(40, 48))
    ends = ((20,), (21, 22, 23), (24,), (20, 30, 31))
    asked = [Branch((2, 3, 4, 60 + place), (*((*stem, *end) for end in ends), (90, 91), (92,))) for place in range(8)]
    conditions = [None, Injection(1, torch.randn(lm.hidden_size, generator=torch.Generator().manual_seed(1)), 1.5)]
    [(_, _, ids)] = walked(lm, asked, conditions, 8192, whole=True)
    assert list(ids.shape) == [1, 3 + 8 * (1 + 8 + 1 + 3 + 1 + 2 + 2 + 1)], (
        "one row serves both conditions up to the steered layer"
    )


def test_a_large_branch_is_cut_and_its_context_repeated(one_model, monkeypatch):
    monkeypatch.setattr(branching, "LARGEST", 12)
    asked = [Branch((2, 3, 4), tuple((5, 6 + place, 7, 8) for place in range(8)))]
    found = walked(one_model, asked, [None], 24, whole=True)
    assert len({id(unit) for unit, _, _ in found}) == 1, "what reads a branch reads it whole"
    assert sum(len(step.paths) for _, step, _ in found) == 8
    assert all(ids.numel() <= 24 for _, _, ids in found)
    [(_, unit)] = list(score(one_model, asked, [None], batch_tokens=24))
    for item in unit:
        assert item.logprob == pytest.approx(
            alone(one_model, asked[0], asked[0].continuations[item.continuation], None), abs=2e-4
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_not_finite_stays_with_its_own_text(family, tokenizer):
    lm, asked = with_window(family, tokenizer, 64), branches()
    bad = 1710
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[bad] = float("inf")
    asked[3] = Branch(asked[3].context, (asked[3].continuations[0], (bad, 5, 6), asked[3].continuations[2]))
    finite = {}
    with RowSteering(lm, [None], Add()) as steering:
        brancher = Brancher(lm, asked, steering, 1, 8192)
        for unit in brancher.units:
            for step in brancher.walk(unit, whole=True):
                flat = step.hidden.reshape(-1, lm.hidden_size)
                finite |= {
                    (path.branch, path.continuation): bool(torch.isfinite(flat[list(path.places)]).all())
                    for path in step.paths
                }
    assert len(finite) == 36
    assert [key for key, value in finite.items() if not value] == [(3, 1)]


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_attention_sees_the_same(family, tokenizer):
    lm, asked = with_window(family, tokenizer, 12), branches(20)
    lm.model.set_attn_implementation("eager")
    for _, unit in list(score(lm, asked, [None])):
        for item in unit:
            wanted = alone(lm, asked[item.branch], asked[item.branch].continuations[item.continuation], None)
            assert item.logprob == pytest.approx(wanted, abs=2e-4)


@pytest.mark.parametrize("prefix", [0, 20], ids=["no prefix", "prefix"])
def test_attention_that_takes_no_mask_reads_each_text_alone(prefix, tokenizer, monkeypatch):
    lm, asked = with_window("gemma3", tokenizer, 12), branches(prefix)
    monkeypatch.setattr(lm, "any_mask", False)
    forward = lm.forward

    def unmasked(*given, mask=None, **more):
        assert mask is None
        return forward(*given, **more)

    monkeypatch.setattr(lm, "forward", unmasked)
    for _, unit in list(score(lm, asked, [None], batch_tokens=200)):
        for item in unit:
            wanted = alone(lm, asked[item.branch], asked[item.branch].continuations[item.continuation], None)
            assert item.logprob == pytest.approx(wanted, abs=2e-4)


def test_units_of_many_conditions_are_as_large_as_each_other(one_model):
    with RowSteering(one_model, [None] * 10, Add()) as steering:
        units = Brancher(one_model, branches(), steering, 10, 400).units
    assert len({len(unit.conditions) for unit in units}) == 1
    held = Counter((condition, place) for unit in units for condition in unit.conditions for place in unit.branches)
    assert held == Counter(itertools.product(range(10), range(12)))


BOUND = {torch.float32: 5e-6, torch.bfloat16: 0.05, torch.float16: 0.006}
"""Nats per token by which the batch that an answer stands in may change its log-probability: a few roundings of the dtype."""


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_shares_a_batch_changes_a_score_by_rounding_alone(family, dtype, tokenizer):
    model = build(family).to(dtype)
    policy = DtypeConfig("test", {v: k for k, v in DTYPES.items()}[dtype], Residual.same)
    apply(model, policy)
    lm, asked = LanguageModel(model, tokenizer), branches(20)
    conditions = [None, Injection(1, torch.randn(lm.hidden_size, generator=torch.Generator().manual_seed(1)), 1.5)]

    def scored(order: list[int], budget: int) -> dict[tuple[int, int, int], float]:
        found = {}
        for _, unit in score(lm, [asked[place] for place in order], conditions, batch_tokens=budget):
            for item in unit:
                place = order[item.branch]
                tokens = len(asked[place].continuations[item.continuation])
                found[item.condition, place, item.continuation] = item.logprob / tokens
        return found

    wanted = scored(list(range(12)), 8192)
    for order, budget in ((list(range(12)), 40), (list(range(12)), 200), (list(range(11, -1, -1)), 700)):
        found = scored(order, budget)
        assert max(abs(found[key] - wanted[key]) for key in wanted) <= BOUND[dtype]
    alone = {key: value for place in range(12) for key, value in scored([place], 8192).items()}
    assert max(abs(alone[key] - wanted[key]) for key in wanted) <= BOUND[dtype]


def test_a_context_that_is_long_is_not_repeated_for_its_answers(one_model):
    """Only what follows it counts towards the tokens at which a branch is cut."""
    contexts = (tuple(range(3, 1203)), tuple(range(4, 1204)))  # that begin otherwise
    asked = [Branch(context, tuple((1300 + place, 5, 6, 7) for place in range(8))) for context in contexts]
    [(_, step, ids)] = walked(one_model, asked, [None], 8192, whole=True)
    assert list(ids.shape) == [2, 1200 + 8 * 4]
    assert len(step.paths) == 16


def test_a_row_that_is_not_finite_is_done_again_and_no_other(one_model, monkeypatch):
    monkeypatch.setattr(branching, "ROW", 40)
    asked = branches()
    bad = 1710
    asked[3] = Branch(asked[3].context, (asked[3].continuations[0], (bad, 5, 6), asked[3].continuations[2]))
    weight = one_model.model.get_input_embeddings().weight
    before = weight[bad].clone()
    with torch.no_grad():
        weight[bad] = float("inf")
    found = walked(one_model, asked, [None], 8192, whole=True)
    with torch.no_grad():
        weight[bad] = before
    (_, first, ids), (_, again, _) = found
    assert len(ids) > 3
    assert {path.branch for path in first.paths}.isdisjoint({path.branch for path in again.paths})
    assert len(first.paths) + len(again.paths) == 36
    assert len(again.paths) < 12


@pytest.mark.parametrize("kinds", [None, ["full_attention"] * 4], ids=["all layers alike", "said to be full"])
def test_a_window_that_no_kind_of_layer_is_said_to_have(kinds, tokenizer):
    """Mistral's layers all have it, whatever the config says of their kinds."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=1714, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=9,
    )  # fmt: skip
    config.layer_types = kinds
    lm, asked = LanguageModel(MistralForCausalLM(config), tokenizer), branches(20)
    for _, unit in list(score(lm, asked, [None])):
        for item in unit:
            wanted = alone(lm, asked[item.branch], asked[item.branch].continuations[item.continuation], None)
            assert item.logprob == pytest.approx(wanted, abs=2e-4)


@pytest.mark.parametrize("refuses", [True, False])
def test_a_decoder_that_takes_no_mask_is_found_out(refuses, tokenizer, monkeypatch, caplog):
    model = build("gemma3")
    decoder = model.get_decoder()
    forward = decoder.forward

    def own_mask(*given, attention_mask=None, **more):
        if attention_mask is not None and not isinstance(attention_mask, torch.Tensor):
            if refuses:
                raise ValueError("attention_mask must have two dimensions")
            attention_mask = None
        return forward(*given, attention_mask=attention_mask, **more)

    caplog.set_level("INFO", "truthsteer")
    monkeypatch.setattr(decoder, "forward", own_mask)
    lm, asked = LanguageModel(model, tokenizer), branches(20)
    assert not lm.any_mask
    assert "each text is computed apart, which is slower" in caplog.text
    for _, unit in list(score(lm, asked, [None])):
        for item in unit:
            wanted = alone(lm, asked[item.branch], asked[item.branch].continuations[item.continuation], None)
            assert item.logprob == pytest.approx(wanted, abs=2e-4)


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
