"""Which figures a summary gives, and what stands in them: the frontier, and the tune split's map with what chance does."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from made_results import complete, make_bank, make_results

from truthsteer import figures, metrics
from truthsteer.figures.frontier import frontier
from truthsteer.figures.heat_map import heat_map
from truthsteer.figures.style import Figure, style
from truthsteer.summary import scores_of, summarise


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    results = complete(make_results(n=80))
    columns = metrics.judge_columns([row.verdicts for row in results.rows])
    return summarise(results, scores_of(results, columns), columns, seed=0)


@pytest.fixture
def summary(whole) -> dict[str, Any]:
    """To be edited."""
    return copy.deepcopy(whole)


def drawn(make: Any, summary: dict[str, Any]) -> Figure:
    with style():
        figure = make(summary)
    assert figure is not None
    return figure


def texts(figure: Figure) -> list[str]:
    return [text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", figure.svg)]


def lines(figure: Figure) -> int:
    return figure.svg.count('id="line2d_')


def test_the_frontier_stands_between_strengths_and_grid(whole):
    found = figures.draw(whole)
    assert [figure.name for figure in found] == ["dose_response", "frontier", "heat_map", "categories"]
    assert len({figure.title for figure in found}) == 4


@pytest.mark.parametrize("missing", ["true", "info"])
def test_no_frontier_without_truth_and_information(summary, missing):
    summary["metrics"].remove(missing)
    assert frontier(summary) is None
    summary["metrics"].append(missing)
    summary["withheld"] = [missing]
    assert frontier(summary) is None
    summary["withheld"] = []
    assert drawn(frontier, summary).name == "frontier"


def test_no_frontier_without_a_chosen_row(summary):
    summary["conditions"] = [row for row in summary["conditions"] if row["kind"] != "chosen"]
    assert frontier(summary) is None


def test_the_frontier_joins_strengths_and_shows_what_needs_no_vector(summary):
    figure = drawn(frontier, summary)
    found = texts(figure)
    for name in ("baseline", "−0.7", "−0.35", "+0.35", "+0.7", "+1.4", "+2.1"):
        assert name in found
    for name in ("prompt truthful", "few-shot", "always abstain"):
        assert name in found
    assert not {"wording alone", "mean_diff random 0", "mean_diff style_negation"} & set(found)
    rows = {row["name"]: row["metrics"] for row in summary["conditions"]}
    true, info = (100 * rows["mean_diff@+0.7"][name]["mean"] for name in ("true", "info"))
    assert f"; 0.7: {true:.0f}% and {info:.0f}%;" in figure.alt
    before = lines(figure)
    for row in summary["conditions"]:
        if row["name"] == "prompt truthful":
            row["metrics"]["info"] |= {"mean": None, "low": None, "high": None}
    without = drawn(frontier, summary)
    assert "prompt truthful" not in texts(without)
    assert before - lines(without) == 3, "a point and its two intervals"


def test_the_map_names_the_setting_of_its_metric(summary):
    title = next(text for text in texts(drawn(heat_map, summary)) if "exploratory" in text)
    assert title == "mean_diff: MC1 (qa, text, sum, v0), %, exploratory; baseline 33"


def test_below_the_map_stands_what_random_directions_reach(summary):
    """21 draws, the lowest .30 and the highest .34; a coefficient and its opposite share them."""
    [item] = summary["selection"].values()
    assert [entry["coefficient"] for entry in item["envelope"]] == [0.35, 0.7, 1.4, 2.1]
    for entry in item["envelope"]:
        assert (entry["low"], entry["high"], entry["draws"]) == (pytest.approx(0.3), pytest.approx(0.34), 21)
    figure = drawn(heat_map, summary)
    assert texts(figure).count("30–34") == 6
    assert "random" in texts(figure)
    assert "the lowest and highest of 21 random directions of the same norm at the chosen layer" in figure.caption
    item["envelope"] = []
    without = drawn(heat_map, summary)
    assert not {"random", "30–34"} & set(texts(without))
    assert "random directions" not in without.caption


def test_what_survives_the_correction_is_underlined(summary):
    [item] = summary["selection"].values()
    row, place = item["p_adjusted"][3], item["coefficients"].index(0.7)
    assert [p for other in item["p_adjusted"] for p in other if p < 0.05] == [row[place]] == [0.004]
    counts = []
    for row[place] in (0.4, 0.05, None, 0.049, 0.004):
        counts.append(lines(drawn(heat_map, summary)))
    none = counts[0]
    assert counts == [none, none, none, none + 1, none + 1]


def test_over_folds_a_cell_must_survive_in_each_and_draws_are_averaged():
    results = make_results(n=20, folds=2)
    second = make_bank(1, ("mean_diff",))
    for cell in second["methods"]["mean_diff"]["grid"]:
        cell["p_adjusted"] = 0.03 if cell["layer"] == 3 else 0.4
    banks = (results.banks[0], second)
    columns = metrics.judge_columns([row.verdicts for row in results.rows])
    scores = scores_of(results, columns)
    both = type(results)(**{**vars(results), "banks": banks})
    [item] = summarise(both, scores, columns, seed=0)["selection"].values()
    place = item["coefficients"].index(0.7)
    assert item["p_adjusted"][3][place] == 0.03, "the larger of .004 and .03"
    assert item["p_adjusted"][3][place + 1] == 0.4
    assert item["envelope"][1] == {
        "coefficient": 0.7,
        "low": pytest.approx(0.31),
        "high": pytest.approx(0.35),
        "draws": 21,
    }
