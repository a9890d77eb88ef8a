"""What steering costs elsewhere: nothing for the baseline, averages over folds, and None where it was not measured."""

from __future__ import annotations

import math

import numpy as np
import pytest
from made_results import make_questions

from truthsteer.costs import side_effects
from truthsteer.records import Capability, Completion, ConditionKind, Neutral
from truthsteer.results import Results, Row
from truthsteer.stats import compare, interval

QUESTIONS = make_questions(4)
TOKENS = (10, 20, 40, 10, 30)


def neutral(nll: list[float], kl: float = 0.0, peak: float = 0.0) -> list[Neutral]:
    """A fold: so many nats per token in each passage."""
    rows = zip(TOKENS, nll, strict=True)
    return [
        Neutral(i, n, n * value, n * kl * (i + 1), peak + i / 100 * (peak > 0)) for i, (n, value) in enumerate(rows)
    ]


def capability(right: list[float], per_char: list[float] | None = None) -> list[Capability]:
    return [Capability(f"c{i}", a, b) for i, (a, b) in enumerate(zip(right, per_char or right, strict=True))]


def row(name: str, kind: str, texts: tuple[str, ...] = ("a b", "a c", "a b", "d"), **parts: list) -> Row:
    completions = [Completion(q.id, text, 3, "eos") for q, text in zip(QUESTIONS, texts, strict=True)]
    return Row(name, ConditionKind(kind), "", (), (), [], completions, {}, **parts)


def effects(*rows: Row) -> list[dict]:
    return side_effects(Results("r", {}, QUESTIONS, rows, (), {}), seed=5)


BASE = [2.0, 2.5, 3.0, 1.0, 1.5]


def test_the_baseline_costs_nothing():
    found = effects(row("baseline", "baseline", neutral=[neutral(BASE), neutral(BASE)]))[0]
    assert (found["perplexity_ratio"], found["perplexity_low"], found["perplexity_high"]) == (1.0, 1.0, 1.0)
    assert (found["kl"], found["kl_low"], found["kl_high"], found["kl_max"]) == (0.0, 0.0, 0.0, 0.0)
    assert found["perplexity_p"] is None
    assert found["passages"] == 5
    assert found["perplexity"] == pytest.approx(math.exp(np.average(BASE, weights=TOKENS))), "long passages weigh more"


def test_the_ratio_is_the_geometric_mean_over_passages_with_its_evidence():
    steered = [value + gain for value, gain in zip(BASE, (0.1, 0.3, 0.2, 0.4, 0.0), strict=True)]
    base, found = effects(
        row("baseline", "baseline", neutral=[neutral(BASE)]),
        row("chosen", "chosen", neutral=[neutral(steered, kl=0.05, peak=0.7)]),
    )
    assert found["perplexity_ratio"] == pytest.approx(math.exp(0.2))
    own = compare(np.array(steered), np.array(BASE), np.arange(5), 5)
    assert found["perplexity_low"] == pytest.approx(math.exp(own.low))
    assert found["perplexity_high"] == pytest.approx(math.exp(own.high))
    assert found["perplexity_p"] == pytest.approx(own.p)
    assert found["perplexity_low"] < found["perplexity_ratio"] < found["perplexity_high"]
    assert found["kl"] == pytest.approx(0.05 * 3), "passages weigh alike: .05 to .25"
    wide = interval(0.05 * np.arange(1, 6), np.arange(5), binary=False)
    assert (found["kl_low"], found["kl_high"]) == (pytest.approx(max(0.0, wide.low)), pytest.approx(wide.high))
    assert found["kl_max"] == pytest.approx(0.74), "the largest at one token of any passage"
    assert base["perplexity"] < found["perplexity"]


def test_folds_are_averaged_passage_by_passage():
    """Every fold has its own vector; a passage is one case, however many folds read it."""
    low, high = [value + 0.1 for value in BASE], [value + 0.3 for value in BASE]
    _, found, part = effects(
        row("baseline", "baseline", neutral=[neutral(BASE)] * 2),
        row("chosen", "chosen", neutral=[neutral(low, 0.02, 0.4), neutral(high, 0.04, 0.2)]),
        row("style", "style", neutral=[neutral(high, 0.04, 0.2)]),
    )
    assert found["passages"] == 5
    assert found["perplexity_ratio"] == pytest.approx(math.exp(0.2))
    assert found["kl"] == pytest.approx(0.03 * 3)
    assert found["kl_max"] == pytest.approx(0.44)
    assert part["perplexity_ratio"] == pytest.approx(math.exp(0.3)), "a row of one fold alone"


def test_what_was_not_measured_is_none():
    measured, prompt = effects(
        row("baseline", "baseline", neutral=[neutral(BASE)], capability=[capability([1.0, 0.0])]),
        row("prompt help", "prompt"),
    )
    names = {name for name in measured if name.startswith(("perplexity", "kl", "passages"))}
    assert len(names) == 11
    assert {prompt[name] for name in names} == {None}
    assert {"capability", "capability_char"} & prompt.keys() == set()
    assert {"capability", "capability_char"} < measured.keys()
    assert prompt["condition"] == "prompt help"


def test_capability_has_an_interval_and_a_paired_difference():
    before, after = [1.0, 1.0, 1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    base, found = effects(
        row("baseline", "baseline", capability=[capability(before, after)]),
        row("chosen", "chosen", capability=[capability(after, before)]),
    )
    own = compare(np.array(after), np.array(before), np.arange(6), 5)
    item = found["capability"]
    assert (item["mean"], item["difference"], item["n"]) == (pytest.approx(1 / 3), pytest.approx(-1 / 3), 6)
    assert (item["difference_low"], item["difference_high"], item["p"]) == (own.low, own.high, own.p)
    assert (item["fixed"], item["broken"], item["mcnemar_p"]) == (1, 3, own.mcnemar_p)
    wide = interval(np.array(after), np.arange(6), binary=True)
    assert (item["low"], item["high"]) == (wide.low, wide.high)
    assert found["capability_char"]["difference"] == pytest.approx(1 / 3)
    assert base["capability"]["mean"] == pytest.approx(2 / 3)
    assert "difference" not in base["capability"], "the baseline has none to itself"


def test_capability_is_averaged_over_folds_item_by_item():
    base = [capability([1.0, 1.0, 0.0])] * 2
    _, found = effects(
        row("baseline", "baseline", capability=base),
        row("chosen", "chosen", capability=[capability([1.0, 0.0, 0.0]), capability([0.0, 0.0, 0.0])]),
    )
    assert found["capability"]["mean"] == pytest.approx(0.5 / 3)
    assert found["capability"]["difference"] == pytest.approx(-0.5)
    assert (found["capability"]["n"], found["capability"]["mcnemar_p"]) == (3, None)


def test_variety_is_over_all_answers_together():
    [found] = effects(row("baseline", "baseline"))
    assert found["distinct_1"] == pytest.approx(4 / 7), "a b c d of seven words"
    assert found["distinct_2"] == pytest.approx(2 / 3), "a b, a c, a b"
