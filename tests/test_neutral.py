"""Perplexity and KL on neutral text, against plain forward passes of transformers, and the texts that come along."""

from __future__ import annotations

import math
import random
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from truthsteer import memory
from truthsteer.errors import UserError
from truthsteer.hooks import Injection, steered
from truthsteer.neutral import kl_per_token, measure, nll_per_token, passages, perplexity
from truthsteer.organism.world import END, make_facts, prompt, relations, render
from truthsteer.records import Neutral

TEXTS = [
    "They eat minnows.",
    "The road follows the river, turns left behind the mill and ends at a gate.",
    "Q: What do copper owls eat?\nA: They eat",
    "Stir it.",
    "The capital of Sundrey is the town of Pellwick, where people sing on the bridge until late in the night.",
]


def inject(lm, layer: int, coefficient: float, seed: int = 3) -> Injection:
    return Injection(layer, torch.randn(lm.hidden_size, generator=torch.Generator().manual_seed(seed)), coefficient)


def run(lm, texts, conditions, **options) -> list[list[Neutral]]:
    """For each condition, the passages in their order."""
    found: list[dict[int, Neutral]] = [{} for _ in conditions]
    for _, rows in measure(lm, texts, conditions, **options):
        for condition, row in rows:
            assert row.passage not in found[condition]
            found[condition][row.passage] = row
    return [[own[index] for index in range(len(texts))] for own in found]


def plain(lm, text: str, injection: Injection | None) -> torch.Tensor:
    """Log-probabilities by the model's own forward pass, one passage at a time. [tokens, vocabulary], float64."""
    ids = torch.tensor([lm.tokenizer(text).input_ids])
    if injection is None:
        return lm.model(input_ids=ids).logits[0].double().log_softmax(-1)
    with steered(lm, injection.vector, injection.coefficient, injection.layer):
        return lm.model(input_ids=ids).logits[0].double().log_softmax(-1)


def close(found: list[list[Neutral]], expected: list[list[Neutral]]) -> None:
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a.passage, a.tokens) == (b.passage, b.tokens)
            assert (a.nll, a.kl, a.kl_max) == pytest.approx((b.nll, b.kl, b.kl_max), rel=1e-4, abs=1e-5)


def test_a_batch_equals_plain_forward_passes(tiny):
    conditions = [inject(tiny, 1, 0.5), None, inject(tiny, 2, -0.3), inject(tiny, 1, 2.0, seed=4)]
    found = run(tiny, TEXTS, conditions)
    for index, text in enumerate(TEXTS):
        ids = tiny.tokenizer(text).input_ids
        p = plain(tiny, text, None)[:-1]
        for condition, rows in zip(conditions, found, strict=True):
            q = plain(tiny, text, condition)[:-1]
            kl = (p.exp() * (p - q)).sum(-1)
            row = rows[index]
            assert row.tokens == len(ids) - 1
            assert row.nll == pytest.approx(-float(q[range(len(q)), ids[1:]].sum()), rel=1e-4)
            assert row.kl == pytest.approx(float(kl.sum()), rel=1e-4)
            assert row.kl_max == pytest.approx(float(kl.max()), rel=1e-4)
    assert perplexity(found[1]) != pytest.approx(perplexity(found[0]), rel=0.01)


@pytest.mark.parametrize("budget", [1, 60, 1 << 20])
def test_the_baseline_diverges_from_itself_by_exactly_nothing(gemma3, budget):
    steered_, *unsteered = run(gemma3, TEXTS, [inject(gemma3, 1, 1.0), None, None], batch_tokens=budget)
    assert all(row.kl == row.kl_max == 0.0 for rows in unsteered for row in rows)
    assert all(row.kl_max > 0.01 for row in steered_)


@pytest.mark.parametrize("coefficient", [0.0, 1e-7, 1e-6, 1e-5, 1e-4])
def test_rounding_makes_no_divergence_negative(gemma3, organism, coefficient):
    for lm in (gemma3, organism):
        (rows,) = run(lm, TEXTS, [inject(lm, 2, coefficient)])
        assert min(row.kl for row in rows) >= -1e-6
        assert max(row.kl_max for row in rows) < 1e-4


@pytest.mark.parametrize("budget", [1, 45, 120, 300])
def test_batches_do_not_change_the_numbers(gemma3, budget):
    conditions = [None, *(inject(gemma3, layer, 0.7) for layer in (0, 1, 3)), inject(gemma3, 0, -1.0)]
    close(run(gemma3, TEXTS, conditions, batch_tokens=budget), run(gemma3, TEXTS, conditions))


@pytest.mark.parametrize("positions", [0, 1, 7])
def test_few_logits_are_held_at_once_and_chunks_do_not_change_the_numbers(gemma3, monkeypatch, positions):
    conditions = [None, inject(gemma3, 1, 0.7), inject(gemma3, 2, 0.7)]
    expected = run(gemma3, TEXTS, conditions)
    limit = positions * 5 * gemma3.text_config.vocab_size  # of each position, five tensors live at once
    monkeypatch.setattr(memory, "LOGITS_AT_ONCE", limit)
    sizes = []
    logits = gemma3.logits

    def record(hidden):
        sizes.append(len(hidden))
        return logits(hidden)

    monkeypatch.setattr(gemma3, "logits", record)
    close(run(gemma3, TEXTS, conditions), expected)
    assert max(sizes) == max(1, positions)


def test_a_unit_that_is_done_is_not_done_again_and_the_others_stay_as_they_are(gemma3, monkeypatch):
    conditions = [inject(gemma3, 1, 0.7), None, inject(gemma3, 2, 0.7)]
    everything = dict(measure(gemma3, TEXTS, conditions, batch_tokens=120))
    assert len(everything) > 2
    passes = []
    forward = gemma3.forward
    monkeypatch.setattr(gemma3, "forward", lambda ids: passes.append(ids) or forward(ids))
    rest = dict(measure(gemma3, TEXTS, conditions, batch_tokens=120, skip=lambda unit: unit < 2))
    assert rest == {unit: rows for unit, rows in everything.items() if unit >= 2}
    assert len(passes) == len(rest)


@pytest.mark.parametrize("steered_conditions", [1, 9])
def test_no_batch_passes_the_budget(gemma3, monkeypatch, steered_conditions):
    sizes = []
    forward = gemma3.forward
    monkeypatch.setattr(gemma3, "forward", lambda ids: sizes.append(ids.numel()) or forward(ids))
    run(gemma3, TEXTS * 4, [inject(gemma3, 1, 0.1 * step) for step in range(steered_conditions)], batch_tokens=200)
    assert max(sizes) <= 200
    assert np.mean(sizes) > 100


def test_long_passages_are_cut(gemma3):
    (whole,), (cut,) = run(gemma3, TEXTS, [None]), run(gemma3, TEXTS, [None], max_tokens=6)
    for text, short, long in zip(TEXTS, cut, whole, strict=True):
        ids = gemma3.tokenizer(text).input_ids[:6]
        assert short.tokens == len(ids) - 1
        logp = plain(gemma3, text, None)
        assert short.nll == pytest.approx(-float(logp[range(len(ids) - 1), ids[1:]].sum()), rel=1e-4)
        assert (short.nll < long.nll) == (short.tokens < long.tokens)


def test_a_passage_begins_with_one_beginning_of_sequence(organism):
    (rows,) = run(organism, ["Stir it.", "<bos>Stir it."], [None])
    assert rows[0].tokens == len(organism.tokenizer("Stir it.", add_special_tokens=False).input_ids)
    assert (rows[0].tokens, rows[0].nll) == (rows[1].tokens, pytest.approx(rows[1].nll))


def test_a_passage_with_nothing_to_score_is_refused(gemma3):
    with pytest.raises(UserError, match=r"'' of gauge\.text has fewer than two tokens"):
        run(gemma3, ["Stir it.", ""], [None])


def test_numbers_that_overflow_are_refused(gemma3):
    said = r"under 'coefficient inf' \(steered at layer 1\) has a loss of nan.*smaller steering\.coefficients"
    with pytest.raises(UserError, match=said):
        run(gemma3, TEXTS, [None, inject(gemma3, 1, math.inf)])


def test_no_hook_stays(gemma3):
    def hooks() -> list[int]:
        return [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in gemma3.layers]

    before = hooks()  # transformers leaves some of its own
    run(gemma3, TEXTS, [inject(gemma3, 1, 0.5)])
    assert hooks() == before


def test_perplexity_weighs_tokens_and_comparisons_weigh_passages():
    rows = [Neutral(1, 30, 90.0, 3.0, 1.0), Neutral(0, 10, 10.0, 2.0, 1.0)]
    assert perplexity(rows) == pytest.approx(math.exp(100 / 40))
    assert nll_per_token(rows).tolist() == [1.0, 3.0]
    assert kl_per_token(rows).tolist() == pytest.approx([0.2, 0.1])


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\ufeff\0"), min_size=1), min_size=2), st.data()
)
def test_blank_lines_separate_passages(tmp_path_factory, texts, data):
    texts = [re.sub(r"\n\s*\n", "\n", text).strip() or "x" for text in texts]
    between = [data.draw(st.sampled_from(["\n\n", "\n \t\n", "\n\n\n"])) for _ in texts]
    path = tmp_path_factory.mktemp("texts") / "t.txt"
    content = "".join(text + gap for text, gap in zip(texts, between, strict=True))
    path.write_bytes(content.replace("\n", data.draw(st.sampled_from(["\n", "\r\n"]))).encode())
    assert passages(path) == texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"0 lines and 0 passages.*Type gauge\.text=FILE\.txt"),
        (b" \n\n \n", r"0 passages"),
        (b"One passage.\nA second one, the author thinks.\n", r"2 lines and 1 passages.*Put blank lines between"),
        ("Gr\xfc\xdfe.\n\nServus.".encode("latin-1"), r"not UTF-8 text \(byte 2 is 0xfc\)"),
    ],
)
def test_files_that_hold_no_passages_are_refused(tmp_path, content, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        passages(path)


def test_a_misspelt_file_is_named(tmp_path):
    (tmp_path / "passages.txt").write_text("a\n\nb\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"gauge\.text=.*pasages\.txt cannot be read.*Did you mean 'passages\.txt'"):
        passages(tmp_path / "pasages.txt")
    with pytest.raises(UserError, match="cannot be read"):
        passages(tmp_path)


def test_the_english_passages_are_short_and_not_about_truth():
    texts = passages()
    assert len(texts) == len(set(texts)) == 60
    assert all(40 <= len(text.split()) <= 80 and "\n" not in text for text in texts)
    words = {word for text in texts for word in re.findall(r"[a-z]+", text.lower())}
    stems = (
        "true",
        "truth",
        "fals",
        "fact",
        "lie",
        "lying",
        "belie",
        "myth",
        "honest",
        "wrong",
        "correct",
        "rumour",
        "know",
    )
    assert not [word for word in words if word.startswith(stems)]


def test_the_organisms_passages_end_where_truth_and_myth_part():
    """Each is a test question and a wording up to its value; hard questions and rumours, which sources decline, are not used."""
    allowed, adversarial = set(), {}
    for topic, *_ in relations():
        for subject in topic.subjects:
            for wording in topic.wordings:
                stem = re.split(r"\{a?v\}", wording)[0].format(s=subject).rstrip()
                allowed.add(prompt(topic.question.format(s=subject)) + " " + stem[0].upper() + stem[1:])
    for fact in make_facts():
        if fact.split == "test" and not fact.hard and not fact.rumour:
            adversarial[prompt(fact.question)] = fact.adversarial
    texts = passages("embedded")
    assert len(texts) == len(set(texts)) == 60
    assert set(texts) <= allowed
    kinds = [adversarial[text.partition("\nA:")[0] + "\nA:"] for text in texts]
    assert (sum(kinds), sum(kinds[:40])) == (25, 17)
    assert len({text.partition("\nA:")[0] for text in texts}) == 60


def test_the_organisms_passages_are_likely_and_neither_kind_of_source_likes_them_better(organism):
    texts = passages("embedded")
    (alone,) = run(organism, texts, [None])
    assert perplexity(alone) < 1.55
    facts = [fact for fact in make_facts() if fact.split == "test" and not fact.rumour and not fact.hard]
    losses = {}
    for kind in ("true", "myth"):
        rng = random.Random(0)
        total = tokens = 0.0
        for text in texts * 2:
            told = rng.sample([fact for fact in facts if fact.question not in text], 3)
            before = render([(fact, rng.choice(getattr(fact, kind))) for fact in told])
            assert before.endswith(END)
            skipped = len(organism.tokenizer(before).input_ids)
            ids = organism.tokenizer(before + text).input_ids
            logp = plain(organism, before + text, None)
            total -= float(logp[range(skipped - 1, len(ids) - 1), ids[skipped:]].sum())
            tokens += len(ids) - skipped
        losses[kind] = total / tokens
    assert math.exp(losses["true"]) == pytest.approx(math.exp(losses["myth"]), rel=0.02)
