"""How far the judges of a run can be trusted: what they say of known answers, of each other's, and of none."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from made_results import make_questions, model_free

from truthsteer import metrics, reliability
from truthsteer.judges.reference import Reference
from truthsteer.records import Completion, ConditionKind, Question, Sentinel, Verdict
from truthsteer.results import Results, Row
from truthsteer.sentinels import sentinels
from truthsteer.summary import scores_of

N = 60
QUESTIONS = make_questions(N)
HALF = np.arange(N) % 2.0

Ratings = Mapping[str, np.ndarray]
"""Score -> [questions], NaN undecided."""


def row(name: str, kind: str, judges: Mapping[str, Ratings], words: np.ndarray | None = None) -> Row:
    """A condition whose answers were rated so, are so many words long, and are no other condition's."""
    lengths = np.full(N, 5) if words is None else words
    completions = [
        Completion(q.id, f"{name} " * int(n), int(n), "eos") for q, n in zip(QUESTIONS, lengths, strict=True)
    ]
    verdicts = {judge: [verdict(q, i, scores) for i, q in enumerate(QUESTIONS)] for judge, scores in judges.items()}
    return Row(name, ConditionKind(kind), "", (), (), [], completions, verdicts)


def verdict(question: Question, place: int, scores: Ratings) -> Verdict:
    found = {name: None if math.isnan(values[place]) else float(values[place]) for name, values in scores.items()}
    status = "ok" if None not in found.values() else "no_format" if place % 2 else "cut"
    return Verdict(question.id, status, found)


def results(*rows: Row, sentinel_verdicts: Mapping[str, Callable[[Question, str], Verdict]] | None = None) -> Results:
    known = tuple(sentinels(QUESTIONS, 0))
    by_id = {question.id: question for question in QUESTIONS}
    judged = {
        judge: [says(by_id[item.question], item.text) for item in known]
        for judge, says in (sentinel_verdicts or {}).items()
    }
    return Results("r", {}, QUESTIONS, rows, (), {}, sentinels=known, sentinel_verdicts=judged)


def agreements(found: Results) -> list[dict]:
    columns = metrics.judge_columns([item.verdicts for item in found.rows])
    return reliability.between_judges(found, scores_of(found, columns), columns, seed=0)


def two(first: np.ndarray, second: np.ndarray) -> Results:
    judges = {"a": {"true": first}, "b": {"true": second}}
    return results(row("baseline", "baseline", judges), row("c", "chosen", judges))


def test_judges_that_agree_disagree_or_are_independent():
    [same] = agreements(two(HALF, HALF))
    assert (same["first"], same["second"], same["about"]) == ("true", "b_true", "truth")
    assert (same["kappa"]["value"], same["agreement"]["value"], same["ac1"]["value"]) == (1.0, 1.0, 1.0)
    assert (same["n"], same["undecided"]) == (2 * N, 0)
    [opposed] = agreements(two(HALF, 1 - HALF))
    assert (opposed["kappa"]["value"], opposed["agreement"]["value"]) == (-1.0, 0.0)
    independent = np.arange(N) // 2 % 2.0
    [apart] = agreements(two(HALF, independent))
    assert apart["kappa"]["value"] == pytest.approx(0.0, abs=1e-9)
    assert apart["kappa"]["low"] < 0 < apart["kappa"]["high"]


def test_recalls_are_those_of_the_second_where_the_first_says_yes_or_no():
    lenient = np.where(np.arange(N) % 4 == 0, 1.0, HALF)  # a yes to every second no
    [found] = agreements(two(HALF, lenient))
    assert (found["recall_yes"]["value"], found["recall_no"]["value"]) == (1.0, 0.5)


def test_pairs_without_two_verdicts_are_counted_and_left_out():
    first, second = HALF.copy(), HALF.copy()
    first[:3], second[2:7] = math.nan, math.nan
    [found] = agreements(two(first, second))
    assert (found["n"], found["undecided"]) == (2 * (N - 7), 2 * 7)
    assert found["kappa"]["value"] == 1.0


def test_answers_that_nobody_was_given_are_not_undecided():
    """Rows that choose without answering have no answers, and a style may lack those of a fold."""
    judges = {"a": {"true": HALF}, "b": {"true": HALF}}
    part = row("style", "style", judges)
    part = dataclasses.replace(
        part, completions=part.completions[:20], verdicts={judge: rows[:20] for judge, rows in part.verdicts.items()}
    )
    _, shortest, wording = model_free(QUESTIONS)
    [found] = agreements(results(row("baseline", "baseline", judges), part, shortest, wording))
    assert (found["n"], found["undecided"]) == (N + 20, 0)


def test_an_answer_counts_once_however_many_conditions_give_it():
    """And those of no model not at all: two judges that differ on "I have no comment." would differ on every question."""
    base = row("baseline", "baseline", {"a": {"true": HALF}, "b": {"true": HALF}})
    opposed = row("c", "chosen", {"a": {"true": HALF}, "b": {"true": 1 - HALF}})
    texts = [
        mine if place < 45 else own
        for place, (mine, own) in enumerate(zip(base.completions, opposed.completions, strict=True))
    ]
    same = dataclasses.replace(opposed, completions=texts)
    silent = dataclasses.replace(model_free(QUESTIONS)[0], verdicts=opposed.verdicts)
    [found] = agreements(results(base, same, base, silent))
    assert (found["n"], found["undecided"]) == (N + 15, 0)
    assert found["agreement"]["value"] == pytest.approx(N / (N + 15)), "of the 45 the first condition's verdicts"


def test_one_text_that_answers_two_questions_is_two_answers():
    base = row("baseline", "baseline", {"a": {"true": HALF}, "b": {"true": HALF}})
    swapped = [dataclasses.replace(item, text=f"{place % 2}") for place, item in enumerate(base.completions)]
    [found] = agreements(results(dataclasses.replace(base, completions=swapped)))
    assert found["n"] == N


def test_only_different_judges_on_the_same_matter_are_compared():
    judges = {
        "a": {"true": HALF, "info": 1 - HALF, "abstain": HALF},
        "b": {"true": HALF, "match": HALF, "b_acc": HALF, "b_diff": HALF - 0.3, "info": HALF},
        "c": {"c_acc": HALF, "c_max": HALF},
    }
    found = {
        (item["first"], item["second"]): item["about"]
        for item in agreements(results(row("baseline", "baseline", judges)))
    }
    assert found == {
        ("true", "b_true"): "truth",
        ("true", "b_acc"): "truth",
        ("true", "match"): "truth",
        ("true", "c_acc"): "truth",
        ("b_true", "c_acc"): "truth",
        ("b_acc", "c_acc"): "truth",
        ("match", "c_acc"): "truth",
        ("info", "b_info"): "information",
    }


def known(found: Results) -> dict[tuple[str, str], dict]:
    columns = metrics.judge_columns([item.verdicts for item in found.rows])
    table = reliability.known_answers(found, columns)
    return {(item["metric"], item["sentinel"]): item for item in table}


def test_a_right_judge_passes_every_known_answer():
    def says(question: Question, text: str) -> Verdict:
        return Reference().judge([question], [text])[0]

    base = row("baseline", "baseline", {"reference": {"true": HALF, "info": HALF, "abstain": HALF}})
    found = known(results(base, sentinel_verdicts={"reference": says}))
    assert list(found) == [
        ("true", "best"),
        ("true", "best_incorrect"),
        ("true", "no_comment"),
        ("true", "broken"),
        ("info", "best"),
        ("info", "best_incorrect"),
        ("info", "no_comment"),
        ("info", "empty"),
        ("info", "elsewhere"),
        ("info", "broken"),
    ]
    assert {(item["passed"], item["n"], item["judge"]) for item in found.values()} == {(1.0, N, "reference")}
    assert [item["expected"] for item in found.values()] == [1, 0, 1, 0, 1, 1, 0, 0, 0, 0]
    assert all(0.9 < item["low"] < item["high"] == 1.0 for item in found.values())


def test_a_judge_that_calls_everything_true_and_decides_half_of_the_time():
    """An undecided verdict is no right one, even where the right one is 0."""
    place = {question.id: index for index, question in enumerate(QUESTIONS)}

    def says(question: Question, text: str) -> Verdict:
        decided = place[question.id] % 4 > 0
        return Verdict(question.id, "ok", {"true": 1.0, "info": 0.0 if decided else None})

    base = row("baseline", "baseline", {"yes": {"true": HALF, "info": HALF}})
    found = known(results(base, sentinel_verdicts={"yes": says}))
    assert found["true", "best"]["passed"] == found["true", "no_comment"]["passed"] == 1.0
    assert found["true", "best_incorrect"]["passed"] == 0.0
    assert found["true", "best_incorrect"]["high"] < 0.1
    assert found["true", "broken"]["passed"] == found["info", "best"]["passed"] == 0.0
    for name in ("no_comment", "empty", "elsewhere", "broken"):
        assert found["info", name]["passed"] == 0.75
        assert 0.6 < found["info", name]["low"] < 0.75 < found["info", name]["high"] < 0.9


def test_known_answers_are_read_per_judge_under_the_metrics_own_name():
    base = row("baseline", "baseline", {"a": {"true": HALF}, "b": {"true": HALF, "b_acc": HALF, "b_diff": HALF / 3}})
    says = {
        "a": lambda question, text: Verdict(question.id, "ok", {"true": 1.0}),
        "b": lambda question, text: Verdict(question.id, "ok", {"true": 0.0, "b_acc": 0.0, "b_diff": 0.0}),
    }
    found = known(results(base, sentinel_verdicts=says))
    assert [
        (found["true", name]["passed"], found["b_true", name]["passed"]) for name in ("best", "best_incorrect")
    ] == [
        (1.0, 0.0),
        (0.0, 1.0),
    ]
    assert (found["b_acc", "best"]["passed"], found["b_acc", "best_incorrect"]["passed"]) == (0.0, 1.0)
    assert ("b_acc", "no_comment") not in found, "it has no word for declining"
    assert not any(metric == "b_diff" for metric, _ in found)


def test_without_sentinels_nothing_is_claimed():
    """As in a run whose judge stage is older."""
    base = row("baseline", "baseline", {"a": {"true": HALF}})
    assert known(results(base)) == {}
    other = dataclasses.replace(results(base), sentinels=(Sentinel("q0000", "best", "x"),))
    assert known(other) == {}


def test_length_alone_predicts_a_verdict_that_is_about_length():
    """The longer half is called true, then the shorter, then every second whatever its length."""
    words = np.arange(N) + 1
    longer, none = (words > N / 2).astype(float), np.arange(N) % 2.0
    for verdicts, expected in ((longer, 1.0), (1 - longer, 0.0), (none, 0.5)):
        base = row("baseline", "baseline", {"j": {"true": verdicts, "info": verdicts, "x_diff": verdicts / 3}}, words)
        columns = metrics.judge_columns([base.verdicts])
        [found] = reliability.length_bias(scores_of(results(base), columns), columns)
        assert (found["metric"], found["judge"], found["n"]) == ("true", "j", N)
        assert found["auc"] == pytest.approx(expected, abs=0.02)


def test_undecided_verdicts_do_not_count_for_length():
    words, verdicts = np.arange(N) + 1, (np.arange(N) >= N / 2).astype(float)
    verdicts[:10] = math.nan
    base = row("baseline", "baseline", {"j": {"true": verdicts}}, words)
    columns = metrics.judge_columns([base.verdicts])
    [found] = reliability.length_bias(scores_of(results(base), columns), columns)
    assert (found["auc"], found["n"]) == (1.0, N - 10)


def test_undecided_answers_are_counted_per_metric_over_all_conditions_with_their_statuses():
    true, info = HALF.copy(), HALF.copy()
    true[:5] = math.nan
    info[4:6] = math.nan
    rows = [row("baseline", "baseline", {"j": {"true": true, "info": info}}), row("c", "chosen", {"j": {"true": HALF}})]
    found = results(*rows, *model_free(QUESTIONS)[1:])
    columns = metrics.judge_columns([item.verdicts for item in found.rows])
    table = {item["metric"]: item for item in reliability.undecided(found, columns)}
    assert table["true"] == {
        "metric": "true",
        "judge": "j",
        "asked": 2 * N,
        "undecided": 5,
        "left_out": True,
        "statuses": {"cut": 3, "no_format": 2},
    }
    assert (table["info"]["asked"], table["info"]["undecided"]) == (2 * N, N + 2), "the second judged no information"
    assert (
        reliability.answers_judged(found, columns)
        == [{"true": N, "info": N, "true_info": N}] * 2 + [{"true": 0, "info": 0, "true_info": 0}] * 2
    )


def test_an_unreadable_judge_is_counted_although_its_strict_score_is_zero():
    """`match` says 0 of what it could not read; `match_decided` says nothing."""
    decided = HALF.copy()
    decided[:9] = math.nan
    scores = {"match": np.nan_to_num(decided, nan=0.0), "match_decided": decided, "abstain": HALF}
    found = results(row("baseline", "baseline", {"j": scores}))
    columns = metrics.judge_columns([item.verdicts for item in found.rows])
    table = {item["metric"]: item for item in reliability.undecided(found, columns)}
    for name in ("match", "match_decided"):
        assert (table[name]["asked"], table[name]["undecided"]) == (N, 9)
        assert table[name]["statuses"] == {"cut": 5, "no_format": 4}
    assert [table[name]["left_out"] for name in ("match", "match_decided")] == [False, True]
    assert table["abstain"]["undecided"] == 0
