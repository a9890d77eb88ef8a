"""The chosen row minus every other: who is a rival, whose questions are compared, and what correction costs."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from made_results import changed, chosen_place, complete, make_results

from truthsteer import metrics
from truthsteer.contrasts import METRICS, RIVALS, against_the_chosen
from truthsteer.evidence import Design
from truthsteer.multiplicity import holm
from truthsteer.records import ConditionKind
from truthsteer.results import Results
from truthsteer.stats import compare
from truthsteer.summary import scores_of

ALL = (*METRICS, "mc2", "info")


def design(results: Results) -> Design:
    groups, categories = [q.group for q in results.questions], [q.category for q in results.questions]
    return Design(np.array(groups), np.array(categories), seed=42)


def scored(results: Results) -> list[metrics.Scores]:
    return scores_of(results, metrics.judge_columns([row.verdicts for row in results.rows]))


@pytest.fixture(scope="module")
def results() -> Results:
    return complete(make_results(n=100))


@pytest.fixture(scope="module")
def found(results) -> list[dict[str, Any]]:
    [(method, rows)] = against_the_chosen(results, scored(results), ALL, design(results)).items()
    assert method == "mean_diff"
    return rows


def test_rivals_are_controls_and_rows_without_steering_in_the_tables_order(results, found):
    no_rivals = {"baseline", "chosen", "steered", "sign_flip"}
    assert {str(kind) for kind in ConditionKind} - {str(kind) for kind in RIVALS} == no_rivals
    assert [(row["name"], row["kind"]) for row in found] == [
        (row.name, str(row.kind)) for row in results.rows if str(row.kind) not in no_rivals
    ]
    assert len(found) == 13


def test_a_rival_has_those_metrics_that_both_rows_have(found):
    """And of those only the three that the page shows."""
    has = {row["name"]: tuple(row["metrics"]) for row in found}
    assert has["mean_diff random 0"] == has["few-shot"] == has["mean_diff without_negation"] == METRICS
    assert has["always abstain"] == ("true", "true_info")
    assert has["wording alone"] == has["shortest answer"] == ("mc1",)


def test_a_cell_is_the_chosen_row_minus_the_rival_on_the_same_questions(results, found):
    scores, place = scored(results), chosen_place(results)
    where = {row.name: index for index, row in enumerate(results.rows)}
    for row in found:
        for name, cell in row["metrics"].items():
            pair = scores[place][name], scores[where[row["name"]]][name]
            own = compare(*pair, design(results).clusters, seed=42)
            assert {key: cell[key] for key in dataclasses.asdict(own)} == dataclasses.asdict(own)
    [few] = [row["metrics"]["true"] for row in found if row["name"] == "few-shot"]
    assert few["difference"] > 0.1, "steering does better, and not the other way round"
    assert few["n"] == 100


def test_p_is_corrected_for_the_rivals_of_one_metric(found):
    for name in METRICS:
        family = [row["metrics"][name] for row in found if name in row["metrics"]]
        assert len(family) == {"true": 11, "true_info": 11, "mc1": 12}[name]
        assert [cell["p_adjusted"] for cell in family] == holm([cell["p"] for cell in family])
    assert any(cell["p_adjusted"] > cell["p"] for row in found for cell in row["metrics"].values())


def test_what_is_withheld_or_not_shown_is_not_compared(results):
    """Scores without a metric are those of a withheld cell; a metric that leaves the table is not among the names."""
    scores = scored(results)
    place = chosen_place(results)
    lost = [dict(row) for row in scores]
    del lost[place]["true"]
    rows = against_the_chosen(results, lost, ALL, design(results))["mean_diff"]
    assert not any("true" in row["metrics"] for row in rows)
    assert all("true_info" in row["metrics"] for row in rows if row["kind"] == "abstain")
    rows = against_the_chosen(results, scores, ("mc1", "mc2"), design(results))["mean_diff"]
    assert {tuple(row["metrics"]) for row in rows} == {("mc1",)}
    assert "always abstain" not in [row["name"] for row in rows], "nothing of it is left"
    assert against_the_chosen(results, scores, (), design(results)) == {"mean_diff": []}


def test_undecided_answers_of_either_leave_the_pair(results):
    scores = [dict(row) for row in scored(results)]
    place = chosen_place(results)
    scores[place]["true"] = np.where(np.arange(100) < 4, np.nan, scores[place]["true"])
    rows = against_the_chosen(results, scores, ALL, design(results))["mean_diff"]
    assert {row["metrics"]["true"]["n"] for row in rows if "true" in row["metrics"]} == {96}


def test_another_methods_controls_are_no_rivals_and_rows_of_no_method_are_everybodys():
    results = complete(make_results(n=40, methods=("a", "b")))
    found = against_the_chosen(results, scored(results), ALL, design(results))
    assert list(found) == ["a", "b"]
    free = ["prompt truthful", "few-shot", "always abstain", "shortest answer", "wording alone"]
    for method, rows in found.items():
        own = [f"{method} random {k}" for k in range(5)]
        own += [f"{method} shuffled 0", f"{method} style_negation", f"{method} without_negation"]
        assert [row["name"] for row in rows] == own + free


def test_without_a_chosen_row_or_rivals_there_is_nothing():
    plain = make_results(n=20)
    place = chosen_place(plain)
    steered = changed(plain, place, kind=ConditionKind.STEERED)
    assert against_the_chosen(steered, scored(steered), ALL, design(steered)) == {}
    alone = dataclasses.replace(plain, rows=(plain.rows[0], plain.rows[place]))
    assert against_the_chosen(alone, scored(alone), ALL, design(alone)) == {"mean_diff": []}
