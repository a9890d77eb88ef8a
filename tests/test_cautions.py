"""What a reader is warned of: each sentence from the numbers that it states, and its absence where they are harmless."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
from made_results import complete, make_results

from truthsteer import cautions, metrics
from truthsteer.records import ALL_STYLE, Verdict
from truthsteer.results import Results
from truthsteer.stages import report
from truthsteer.summary import scores_of, summarise

CHOSEN, STYLE, WITHOUT = "mean_diff@+0.7", "mean_diff style_negation", "mean_diff without_negation"


def summed(results: Results) -> dict[str, Any]:
    columns = metrics.judge_columns([row.verdicts for row in results.rows])
    return summarise(results, scores_of(results, columns), columns, seed=42)


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """A run without anything to beware of: its row of wording alone is weaker than steering."""
    summary = summed(complete(make_results()))
    rival(summary, "wording alone", "mc1", difference=0.1)
    return summary


@pytest.fixture
def summary(whole) -> dict[str, Any]:
    """To be edited."""
    return copy.deepcopy(whole)


def cell(summary: dict[str, Any], name: str, metric: str, **changes: Any) -> dict[str, Any]:
    """One cell of the table, changed."""
    [row] = [row for row in summary["conditions"] if row["name"] == name]
    row["metrics"][metric] |= changes
    return row["metrics"][metric]


def rival(summary: dict[str, Any], name: str, metric: str, **changes: Any) -> dict[str, Any]:
    """The chosen row minus that one, changed."""
    [row] = [row for row in summary["contrasts"]["mean_diff"] if row["name"] == name]
    row["metrics"][metric] |= changes
    return row["metrics"][metric]


def controls(summary: dict[str, Any]) -> list[str]:
    return [row["name"] for row in summary["conditions"] if row["kind"] in ("random", "shuffled")]


def test_a_run_that_is_in_order_is_not_warned_of(summary):
    assert cautions.warnings(summary) == []


# --------------------------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize(
    ("outcome", "warned"),
    [("not finite", True), ("wrong", True), ("no headroom", True), ("safe", False), ("unknown", False)],
)
def test_numbers_that_cannot_be_trusted_are_warned_of(summary, outcome, warned):
    summary["numerics"] = {"outcome": outcome, "verdict": "dtype=fp16_pure fails at layer 6."}
    said = ["dtype=fp16_pure fails at layer 6. See Numerics below, or type stages=[doctor]."]
    assert cautions.warnings(summary) == (said if warned else [])


def test_what_the_hardware_lacks_is_warned_of_on_a_page_that_is_otherwise_calm(tmp_path, monkeypatch):
    monkeypatch.setattr(cautions, "warnings", lambda summary: [])
    monkeypatch.setattr(report.figures, "draw", lambda summary: [])
    results, calm, slow = make_results(n=8), "No warning applies", "This GPU only emulates bf16."
    for facts, there, gone in (({}, calm, slow), ({"hardware": [slow]}, slow, calm)):
        report.run(dataclasses.replace(results, record=results.record | {"facts": facts}), tmp_path, seed=1)
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert there in page
        assert gone not in page


def test_a_vector_of_which_style_leaves_nothing_is_warned_of(summary):
    [row] = [row for row in summary["selection"]["mean_diff"]["style"] if row["style"] == "negation"]
    row["reason"] = ALL_STYLE
    assert cautions.warnings(summary) == [
        f"mean_diff: {ALL_STYLE}, so that the row without them is missing: it may be a vector of style."
    ]


# ----------------------------------------------------------------------------------------------------- rivals

WORDS = {"true": "truthful answers", "true_info": "true_info", "mc1": "MC1 (qa, text, sum, v0)"}
ASKED = ["few-shot", "prompt truthful", STYLE]
SCORES = [(name, metric) for name in ASKED for metric in WORDS]
ALONE = [("wording alone", "mc1"), ("shortest answer", "mc1")]


@pytest.mark.parametrize(("name", "metric"), [*SCORES, *ALONE, ("always abstain", "true_info")])
def test_a_row_that_does_at_least_as_well_as_the_chosen_one(summary, name, metric):
    apart = {"low": -0.09, "high": 0.051, "p_adjusted": 0.3}
    for difference, text in ((0.001, None), (0.0, "0"), (-0.02, "−2")):
        rival(summary, name, metric, difference=difference, **apart)
        expected = (
            f"{name} does at least as well as {CHOSEN} in {WORDS[metric]} (mean_diff minus it: {text} points [−9, +5], "
            "p = .30)."
        )
        assert cautions.warnings(summary) == ([expected] if text else [])


@pytest.mark.parametrize(
    "nothing",
    [{"p_adjusted": 0.05}, {"p": 0.05}, {"difference_low": 0.0}, {"difference": None}, {"difference": -0.3}],
)
def test_where_nothing_was_gained_only_rows_without_a_model_are_rivals(summary, nothing):
    """Of several methods the chosen rows are a family: p is that corrected for their number."""
    for name, metric in (*SCORES, *ALONE, ("always abstain", "true_info")):
        cell(summary, CHOSEN, metric, **nothing)
        rival(summary, name, metric, difference=-0.1, low=-0.2, high=-0.02, p_adjusted=0.0004)
    rival(summary, WITHOUT, "true", difference=0.3, low=0.2, high=0.4, p_adjusted=0.0004)
    assert cautions.warnings(summary) == [
        f"{name} does at least as well as {CHOSEN} in {WORDS['mc1']} (mean_diff minus it: −10 points [−20, −2], p < .001)."
        for name in ("shortest answer", "wording alone")
    ]


def test_always_abstaining_is_true_and_warned_of_only_where_nothing_tells_it_from_an_answer(summary):
    """With a judge of information, true_info shows it."""
    silent = rival(summary, "always abstain", "true")
    assert silent["difference"] == pytest.approx(-0.2375)
    [row] = [row for row in summary["contrasts"]["mean_diff"] if row["name"] == "always abstain"]
    del row["metrics"]["true_info"]
    assert cautions.warnings(summary) == [
        f"always abstain does at least as well as {CHOSEN} in truthful answers (mean_diff minus it: −24 points [−31, −17], "
        "p = .001)."
    ]


def test_controls_and_the_vector_without_style_are_no_rivals(summary):
    """Controls are counted against the baseline, elsewhere."""
    for name in (*controls(summary), WITHOUT):
        for metric in WORDS:
            rival(summary, name, metric, difference=-0.3, low=-0.4, high=-0.2, p_adjusted=0.001)
    assert cautions.warnings(summary) == []


def test_another_methods_rivals_are_not_held_against_this_one(summary):
    for row in summary["contrasts"]["mean_diff"]:
        for found in row["metrics"].values():
            found["difference"] = -0.5
    summary["contrasts"]["probe"] = summary["contrasts"].pop("mean_diff")
    assert cautions.warnings(summary) == []


def test_a_rival_without_a_metric_is_no_rival_in_it(summary):
    """Where one of the two is withheld, say."""
    for row in summary["contrasts"]["mean_diff"]:
        row["metrics"] = {}
    assert cautions.warnings(summary) == []


@pytest.mark.parametrize("metric", list(WORDS))
@pytest.mark.parametrize(
    ("changes", "warned"),
    [({}, True), ({"low": 0.0}, False), ({"p_adjusted": 0.05}, False), ({"p_adjusted": 0.049}, True)],
)
def test_a_vector_that_loses_effect_without_style(summary, metric, changes, warned):
    rival(summary, WITHOUT, metric, **({"difference": 0.16, "low": 0.08, "high": 0.241, "p_adjusted": 0.004} | changes))
    p = f"p = {changes.get('p_adjusted', 0.004):.3f}".replace("0.", ".", 1)
    expected = f"{WITHOUT} has less effect on {WORDS[metric]} than mean_diff, by +16 points [+8, +24], {p}."
    assert cautions.warnings(summary) == ([expected] if warned else [])


# -------------------------------------------------------------------------------------------------- side effects


@pytest.mark.parametrize(("ratio", "warned"), [(1.62, True), (1.5, False), (0.4, False), (None, False)])
def test_neutral_text_that_becomes_far_less_likely(summary, ratio, warned):
    for row in summary["side_effects"]:
        if row["condition"] == CHOSEN:
            row |= {"perplexity_ratio": ratio, "perplexity_low": 1.48, "perplexity_high": 1.771}
        else:
            row["perplexity_ratio"] = 9.0
    expected = (
        f"{CHOSEN}: the perplexity of neutral text is 1.62 times the baseline's [1.48, 1.77]: steering does not touch "
        "truthfulness alone."
    )
    assert cautions.warnings(summary) == ([expected] if warned else [])


# ------------------------------------------------------------------------------------------------------- judges


@pytest.mark.parametrize(("auc", "warned"), [(0.71, True), (0.29, True), (0.7, False), (0.31, False), (None, False)])
def test_a_verdict_that_length_predicts(summary, auc, warned):
    [row] = summary["length_bias"]
    row["auc"] = auc
    expected = f"true (reference): the length of an answer alone predicts the verdict with an AUC of {auc or 0:.2f}."
    assert cautions.warnings(summary) == ([expected] if warned else [])


def test_a_judge_that_calls_everything_true():
    """It fails the best incorrect answers, and the warning says so; what it passes is not listed."""
    results = complete(make_results(n=60))
    yes = {"true": 1.0, "info": 1.0, "abstain": 0.0}
    verdicts = [Verdict(sentinel.question, "ok", yes) for sentinel in results.sentinels]
    found = summed(Results(**{**vars(results), "sentinel_verdicts": {"reference": verdicts}}))
    passed = {(row["metric"], row["sentinel"]): row["passed"] for row in found["known_answers"]}
    assert passed["true", "best"] == passed["true", "no_comment"] == 1.0
    assert passed["true", "best_incorrect"] == 0.0
    often = "reference is often wrong where the right verdict is known"
    assert [warning for warning in found["warnings"] if often in warning] == [
        f"{often} (true): best incorrect right in 0% of 60, broken right in 0% of 60.",
        f"{often} (info): no comment right in 0% of 60, empty right in 0% of 60, elsewhere right in 0% of 60, "
        "broken right in 0% of 60.",
    ]


@pytest.mark.parametrize(("passed", "warned"), [(0.8, False), (0.79, True)])
def test_a_known_answer_is_failed_below_four_in_five(summary, passed, warned):
    summary["known_answers"][1]["passed"] = passed
    expected = "reference is often wrong where the right verdict is known (true): best incorrect right in 79% of 100."
    assert cautions.warnings(summary) == ([expected] if warned else [])


# ------------------------------------------------------------------------------------------------------ controls


@pytest.mark.parametrize(("p", "warned"), [(0.05 / 84 - 1e-5, True), (0.05 / 84 + 1e-5, False)])
def test_controls_that_differ_anywhere_after_correction_for_all_their_cells(summary, p, warned):
    """Six controls and fourteen metrics are one family."""
    names = controls(summary)
    assert (len(names), len(summary["metrics"])) == (6, 14)
    for name in names:
        for metric in summary["metrics"]:
            cell(summary, name, metric, p=0.9)
    cell(summary, names[2], "repetition", p=p)
    expected = (
        "Over all metrics, 1 of 84 cells of mean_diff's controls differ from the baseline after Holm's correction "
        "(repetition): there, to add any direction does something."
    )
    assert cautions.warnings(summary) == ([expected] if warned else [])
    cell(summary, CHOSEN, "repetition", p=1e-9)
    cell(summary, "mean_diff@+1.4", "repetition", p=1e-9)
    assert cautions.warnings(summary) == ([expected] if warned else []), "other rows are not in the family"


def test_cells_without_a_p_are_not_in_the_family(summary):
    """Withheld ones, say: of one control alone there are fourteen, and .003 is enough."""
    names = controls(summary)
    for name in names:
        for metric in summary["metrics"]:
            cell(summary, name, metric, p=0.9 if name == names[0] else None)
    for metric in ("length", "mc2"):
        cell(summary, names[0], metric, p=0.003)
    [found] = [warning for warning in cautions.warnings(summary) if warning.startswith("Over all metrics")]
    assert found.startswith("Over all metrics, 2 of 14 cells of mean_diff's controls differ")
    assert "(length, mc2)" in found


def test_a_control_that_differs_in_the_headline_is_named(summary):
    name = controls(summary)[4]
    cell(summary, name, "true", difference=0.1, difference_low=0.02, difference_high=0.19, p=0.03)
    assert cautions.warnings(summary) == [
        f"1 of 6 controls of mean_diff differ from the baseline: {name} +10 points (p = .030). About 0.3 would by chance."
    ]


def test_a_method_without_controls_shows_nothing_about_its_direction(summary):
    summary["conditions"] = [row for row in summary["conditions"] if row["kind"] not in ("random", "shuffled")]
    assert cautions.warnings(summary) == [
        "mean_diff has no control directions: nothing shows that its direction matters."
    ]


# ---------------------------------------------------------------------------------------------------------- data


def test_rows_of_the_capability_file_that_were_left_out():
    results = complete(make_results())
    problems = ("line 4: nothing in C; the row is left out.", "line 9: the answer is 'F', none of A, B, C, D; x.")
    one, two = (summed(Results(**{**vars(results), "capability_problems": problems[:count]})) for count in (1, 2))
    left_out = f"Rows of the capability file were left out: {problems[0]}"
    assert left_out in one["warnings"]
    assert f"{left_out} And 1 more." in two["warnings"]
    assert two["capability_problems"] == list(problems)


def test_the_gravest_comes_first(summary):
    """What makes the numbers meaningless, then what they rest on, then what is only little."""
    summary["proof"] = []
    rival(summary, STYLE, "true", difference=-0.1)
    rival(summary, "few-shot", "true", difference=-0.2)
    summary["length_bias"][0]["auc"] = 0.9
    summary["data"] = summary["data"] | {"leaks": 2}
    summary["withheld"] = ["info"]
    cell(summary, controls(summary)[0], "true", difference=0.9, difference_low=0.1, difference_high=1.0, p=0.001)
    starts = [
        "No steering proof was recorded",
        "info is withheld",
        "true (reference): the length",
        "1 of 6 controls of mean_diff differ",
        "1 of 6 controls raise truthful answers",
        f"{STYLE} does at least as well",
        "few-shot does at least as well",
        "2 near-duplicate questions",
    ]
    found = cautions.warnings(summary)
    assert [warning[: len(start)] for warning, start in zip(found, starts, strict=True)] == starts


@pytest.mark.parametrize(("left_out", "words"), [(True, "leaves them out"), (False, "counts them as 0")])
def test_a_warning_says_what_becomes_of_undecided_answers(summary, left_out, words):
    summary["undecided"][0] |= {"undecided": 3, "asked": 100, "left_out": left_out, "statuses": {"invalid": 3}}
    judge, metric = (summary["undecided"][0][name] for name in ("judge", "metric"))
    expected = f"{judge} reached no verdict on 3 of 100 answers (3.0%: 3 invalid); the mean of {metric} {words}."
    assert cautions.warnings(summary) == [expected]
