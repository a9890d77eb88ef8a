"""The report: its numbers, its files, what it warns of, and that no text of a model can break out of it."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_results import (
    answering,
    changed,
    chosen_place,
    complete,
    judged,
    made_pairs,
    make_bank,
    make_results,
    undeciding,
)
from rich.console import Console

from truthsteer import findings, rendering
from truthsteer.multiplicity import holm
from truthsteer.records import ConditionKind, Verdict
from truthsteer.results import Results
from truthsteer.stages import report


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def results() -> Results:
    return make_results()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take most of a report's time."""
    monkeypatch.setattr(report.figures, "draw", lambda summary: [])


@pytest.fixture(scope="module")
def written(results: Results, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("report")
    return folder, report.run(results, folder, seed=42)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Path, dict[str, Any]]:
    """A run with everything in it, and its report."""
    folder = tmp_path_factory.mktemp("whole")
    results = complete(make_results(binary_task=True))
    return results, folder, report.run(results, folder, seed=42)


def test_metrics_csv_has_the_promised_columns_and_the_baseline_first(written):
    rows = read_csv(written[0] / "metrics.csv")
    header = list(rows[0])
    metrics = ["mc1", "mc2", "mc3", "true", "info", "true_info", "abstain", "length"]
    assert header[:10] == ["condition", "n", *metrics]
    assert header[10:34] == [f"{name}_{part}" for name in metrics for part in ("low", "high", "p")]
    assert header[34:39] == ["kind", "method", "layers", "coefficients", "mc_setting"]
    other = ["mc1_token", "mc2_token", "mc1_char", "mc2_char", "repetition", "refusal"]
    assert header[39:63] == [f"{name}{part}" for name in other for part in ("", "_low", "_high", "_p")]
    rest = ("n", "difference", "difference_low", "difference_high", "p_adjusted", "mde", "undecided", "withheld")
    every = written[1]["metrics"]
    assert sorted(every) == sorted([*metrics, *other])
    assert header[63:] == [f"{name}_{part}" for name in every for part in rest]
    for row, condition in zip(rows, written[1]["conditions"], strict=True):
        for name in every:
            for part in rest:
                shown = condition["metrics"][name][part]
                assert row[f"{name}_{part}"] == (
                    "" if shown is None else str(int(shown) if isinstance(shown, bool) else shown)
                )
    assert {row["mc_setting"] for row in rows} == {"qa, text, sum, v0"}
    assert rows[0]["condition"] == "baseline"
    assert rows[0]["n"] == "160"
    assert {rows[0][f"{name}_p"] for name in (*metrics, *other)} == {""}
    assert len(rows) == 13
    assert all(row[f"{name}_p"] for row in rows[1:] for name in (*metrics, *other))
    chosen = next(row for row in rows if row["kind"] == "chosen")
    assert (chosen["method"], chosen["layers"], chosen["coefficients"]) == ("mean_diff", "3", "0.7")


def test_the_numbers_are_those_of_the_answers(results, written):
    summary = written[1]
    for row, condition in zip(results.rows, summary["conditions"], strict=True):
        scores = [verdict.scores for verdict in row.verdicts["reference"]]
        expected = {name: np.mean([s[name] for s in scores]) for name in ("true", "info", "abstain")}
        expected["true_info"] = np.mean([s["true"] * s["info"] for s in scores])
        expected["length"] = np.mean([len(c.text.split()) for c in row.completions])
        for name, mean in expected.items():
            assert condition["metrics"][name]["mean"] == pytest.approx(mean, rel=1e-5)
    answers = read_csv(written[0] / "answers.csv")
    chosen = [float(row["mc1"]) for row in answers if row["condition"] == "mean_diff@+0.7"]
    item = next(row for row in summary["conditions"] if row["kind"] == "chosen")["metrics"]["mc1"]
    assert len(chosen) == 160
    assert np.mean(chosen) == pytest.approx(item["mean"])
    base = summary["conditions"][0]["metrics"]["mc1"]["mean"]
    assert item["difference"] == pytest.approx(item["mean"] - base, abs=1e-5)
    assert item["fixed"] - item["broken"] == pytest.approx(160 * item["difference"], abs=1e-3)


def test_the_verdict_states_the_effect_with_its_evidence(written):
    [verdict] = written[1]["verdict"]
    assert re.fullmatch(
        r"mean_diff at \+0\.70 residual norms, layer 3, raised truthful answers from \d+% \[\d+, \d+\] to "
        r"\d+% \[\d+, \d+\] \(\+\d+ points \[\+\d+, \+\d+\], p < \.001, n = 160; detectable: \d+ points\)\.",
        verdict["effect"],
    )
    assert "sign flipped lowered them to" in verdict["context"][0]
    assert (
        verdict["context"][1]
        == "None of the 6 random and shuffled directions differs from the baseline in truthful answers."
    )
    assert written[1]["warnings"] == []


def test_no_effect_is_not_called_one(results, tmp_path, undrawn):
    base = results.rows[0]
    results = changed(
        results, chosen_place(results), choices=base.choices, completions=base.completions, verdicts=base.verdicts
    )
    summary = report.run(results, tmp_path, seed=1)
    assert "did not detectably change truthful answers" in summary["verdict"][0]["effect"]
    assert "p = 1" in summary["verdict"][0]["effect"]


def test_two_runs_write_the_same_bytes(results, written, tmp_path):
    later = dataclasses.replace(results, record=results.record | {"seconds": {"extract": 99.0}, "host": "b"})
    report.run(later, tmp_path, seed=42)
    names = sorted(str(path.relative_to(written[0])) for path in written[0].rglob("*") if path.is_file())
    assert {"summary.json", "metrics.csv", "answers.csv", "report.html"} < set(names)
    drawn = {f"figures/{name}.svg" for name in ("dose_response", "frontier", "heat_map", "categories")}
    assert drawn == {name for name in names if name.startswith("figures/")}
    for name in names:
        assert (tmp_path / name).read_bytes() == (written[0] / name).read_bytes(), name


def test_summary_json_is_strict_json_and_is_what_run_returned(written):
    def refuse(constant):
        raise AssertionError(constant)

    text = (written[0] / "summary.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=refuse) == written[1]


class Page(HTMLParser):
    """What a browser would act on, and what it would show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.text += " " if tag == "br" else ""
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_data(self, data):
        self.text += data


def test_the_page_is_self_contained(written):
    text = (written[0] / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"url\((?!#)|@import", text)
    assert page.tags.count("svg") == 4
    assert len(page.ids) == len(set(page.ids))
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(page.ids)
    assert text.count('role="img" aria-label="') == 4
    order = [
        "raised truthful answers",
        "All conditions",
        "Dose response",
        "Truth against information",
        "Layer and coefficient",
        "By category",
        "Other readings of multiple choice",
        "Texts",
    ]
    order += [
        "Side effects",
        "Judge audit",
        "Steering proof",
        "How layer and coefficient were chosen",
        "Before and after",
        "Verdicts",
        "Configuration",
    ]
    assert sorted(order, key=page.text.index) == order


def test_everything_that_was_measured_has_its_place_on_the_page(whole):
    results, folder, _ = whole
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    order = [
        "All conditions",
        "Surface-matched questions",
        "The 54 of 160 questions",
        "Truth against information",
        "Other readings of multiple choice",
        "qa, text, letters, v0",
        "qa, text, per character, v0",
        "Texts",
        "Side effects",
        "Answers whose verdict is known",
        "no comment",
        "How much is length",
        "mean_diff: style in the vector",
        "too few have it",
    ]
    assert sorted(order, key=page.text.index) == order
    for row in results.rows:
        assert row.name in page.text
    assert "control: direction of style" in page.text
    assert "no model, no question" in page.text
    flat = " ".join(page.text.split())
    ratio = r"mean_diff@\+0\.7128\.411\.02 \[1\.02, 1\.02\]p < \.001, detectable: 1\.\d\d0\.040 \[0\.04, 0\.04\]0\.30"
    assert re.search(ratio, flat), "perplexity, ratio, KL"
    assert re.search(r"40\.0% \[16\.8, 68\.7\]−10\.0 p = 1, detectable: \d+", flat), "capability, and its difference"


def test_rows_that_ask_no_model_have_only_what_their_scores_mean(whole):
    rows = {row["condition"]: row for row in read_csv(whole[1] / "metrics.csv")}
    wording, shortest, abstain = (rows[name] for name in ("wording alone", "shortest answer", "always abstain"))
    assert float(wording["mc1"]) == pytest.approx(106 / 160), "all but every third, where a false answer ties"
    assert float(wording["mc0"]) == 1.0, "the official opponent is never the one that ties"
    assert (float(shortest["mc1"]), float(shortest["mc3"])) == (0.0, 0.0)
    for row in (wording, shortest):
        assert row["mc_setting"] == ""
        assert row["mc3"]
        assert {row[name] for name in ("mc2", "mc1_token", "mc2_token", "mc1_char", "mc2_char", "true", "length")} == {
            ""
        }
    assert (abstain["true"], abstain["info"], abstain["true_info"], abstain["mc1"]) == ("1.0", "0.0", "0.0", "")


def test_a_row_names_the_preset_under_which_it_was_asked(whole):
    """Its own where it has another prompt; none where no model is asked."""
    _, folder, summary = whole
    found = {row["name"]: row["setting"] for row in summary["conditions"]}
    other = {
        "prompt truthful": "truthful, text, sum, v0",
        "few-shot": "few-shot, text, sum, v0",
        "always abstain": "",
        "shortest answer": "",
        "wording alone": "",
    }
    assert found == dict.fromkeys(found, "qa, text, sum, v0") | other
    assert {row["condition"]: row["mc_setting"] for row in read_csv(folder / "metrics.csv")} == found


def test_the_chosen_row_is_held_against_the_others_behind_the_table(whole):
    _, folder, summary = whole
    text = (folder / "report.html").read_text(encoding="utf-8")
    section = text[text.index("<h2>mean_diff chosen against the others</h2>") :].partition("</section>")[0]
    assert text.index("All conditions") < text.index(section) < text.index("Surface-matched questions")
    body = section.partition("<tbody>")[2]
    assert re.findall(r'<th scope="row">([^<]*)<', body) == [row["name"] for row in summary["contrasts"]["mean_diff"]]
    flat = " ".join(Page(body).text.replace("\xa0", " ").split())
    row = flat[flat.index("few-shot") :].partition("always abstain")[0]
    for metric in ("true", "true_info", "mc1"):
        [cell] = [item["metrics"][metric] for item in summary["contrasts"]["mean_diff"] if item["name"] == "few-shot"]
        low, high = (f"{100 * cell[end]:+.0f}" for end in ("low", "high"))
        assert f"{100 * cell['difference']:+.0f} [{low}, {high}]p = .001, detectable: {100 * cell['mde']:.0f}" in row
    assert flat.endswith("no model, no question––−18 [−29, −7]p = .007, detectable: 17"), "of wording alone only MC1"
    assert flat.count("–") == 1 + 2 + 2


def test_the_binary_task_is_reported_by_log_probability_and_by_letters(whole):
    results, _, summary = whole
    found = summary["conditions"][0]["metrics"]
    logprobs = {(choice.question, choice.answer): choice.logprob for choice in results.rows[0].choices}
    won = [logprobs[q.id, q.best] > logprobs[q.id, q.best_incorrect] for q in results.questions]
    assert found["mc0"]["mean"] == pytest.approx(np.mean(won))
    assert found["mc0_ab"]["mean"] == 0.875, "3 of 4 in both orders, the fourth in one"
    assert found["says_a"]["mean"] == 0.625
    assert summary["settings"]["mc0"] == "qa, text, sum, v0"
    assert summary["settings"]["mc0_ab"] == summary["settings"]["says_a"] == "qa, text, letters, v0"


def test_the_surface_matched_subset_is_what_wording_does_not_give_away(whole):
    """By hand from the choices: in these questions the best answer's score is no higher than some false one's."""
    results, folder, summary = whole
    surface = next(row for row in results.rows if row.kind is ConditionKind.SURFACE)
    best = {choice.question: choice.logprob for choice in surface.choices if choice.best}
    given = {q.id for q in results.questions}
    for choice in surface.choices:
        if not choice.label and choice.logprob >= best[choice.question]:
            given.discard(choice.question)
    kept = [q.id for q in results.questions if q.id not in given]
    found = summary["surface_matched"]
    assert found["n"] == len(kept) == 54
    assert [row["kind"] for row in found["rows"]] == ["baseline", "chosen"]
    means = {}
    for row in found["rows"]:
        answers = read_csv(folder / "answers.csv")
        own = {a["question_id"]: a for a in answers if a["condition"] == row["name"]}
        for name, column in (("mc1", "mc1"), ("mc2", "mc2"), ("true", "reference_true"), ("info", "reference_info")):
            mean = np.mean([float(own[question][column]) for question in kept])
            assert row["metrics"][name]["mean"] == pytest.approx(mean, rel=1e-5)
            assert row["metrics"][name]["n"] == 54
            means[row["kind"], name] = mean
    item = found["rows"][1]["metrics"]["true"]
    assert item["difference"] == pytest.approx(means["chosen", "true"] - means["baseline", "true"], rel=1e-5)
    assert item["low"] < means["chosen", "true"] < item["high"]
    [entry] = [row for row in summary["categories"]["mean_diff"] if row["level"] == "subset"]
    assert (entry["name"], entry["n"], entry["difference"]) == ("Surface-matched questions", 54, item["difference"])


def test_without_a_row_of_wording_alone_there_is_no_surface_matched_subset(written):
    folder, summary = written
    assert summary["surface_matched"] == {"n": 0, "rows": []}
    assert {row["level"] for row in summary["categories"]["mean_diff"]} == {"all", "type", "category"}
    assert "Surface-matched" not in (folder / "report.html").read_text(encoding="utf-8")


def test_what_was_not_measured_is_not_shown(written):
    folder, summary = written
    page = Page((folder / "report.html").read_text(encoding="utf-8")).text
    assert {row["perplexity"] for row in summary["side_effects"]} == {None}
    assert not {"mc0", "mc0_ab", "says_a"} & set(summary["metrics"])
    for words in ("Answers whose verdict is known", "Agreement between judges", "capability"):
        assert words not in page


def test_colours_follow_the_corrected_p(whole):
    """A random direction differs in MC1 by its own p, and no longer in its family."""
    _, folder, summary = whole
    row = next(row for row in summary["conditions"] if row["name"] == "mean_diff random 1")
    item = row["metrics"]["mc1"]
    assert item["p"] < 0.05 < item["p_adjusted"]
    assert findings.differs(item)
    assert not findings.differs(item, corrected=True)
    html = (folder / "report.html").read_text(encoding="utf-8")
    coloured = {}
    for name in ("mean_diff random 1", "mean_diff@-0.7"):
        shown = html[html.index(f'<th scope="row">{name}<') :].partition("</tr>")[0]
        coloured[name] = 'class="diff down"' in shown or 'class="diff up"' in shown
    assert coloured == {"mean_diff random 1": False, "mean_diff@-0.7": True}
    cells = [cell for column in report.table(summary, 200).columns for cell in column._cells]
    spans = {str(span.style) for cell in cells if "−11 p=.022" in str(cell) for span in cell.spans}
    assert not {"red", "green"} & spans
    assert any(str(span.style) == "red" for cell in cells if "−32 p<.001" in str(cell) for span in cell.spans)


@pytest.mark.parametrize(
    ("low", "high", "p", "adjusted", "plain", "corrected"),
    [
        (0.1, 0.3, 0.01, 0.04, True, True),
        (0.1, 0.3, 0.01, 0.05, True, False),
        (0.1, 0.3, 0.01, None, True, True),
        (-0.3, -0.1, 0.01, 0.01, True, True),
        (-0.1, 0.3, 0.01, 0.01, False, False),
        (0.1, 0.3, 0.05, None, False, False),
        (None, None, 0.01, 0.01, False, False),
        (0.1, 0.3, None, None, False, False),
    ],
)
def test_a_difference_needs_interval_and_p(low, high, p, adjusted, plain, corrected):
    item = {"difference_low": low, "difference_high": high, "p": p, "p_adjusted": adjusted}
    assert (findings.differs(item), findings.differs(item, corrected=True)) == (plain, corrected)


HOSTILE = {
    0: "<script>alert(1)</script>",
    1: '=cmd|"/c calc"!A1',
    2: "@SUM(A1)\twith a tab",
    3: "مرحبا \u202e بالعالم",
    4: "日本語の答え。",
    5: "x" * 10_000,
    6: "null \x00 byte and \x1b[31m and \ud800",
    7: '"><img src=x onerror=alert(1)>',
    8: "line one\nline two, with a comma",
    9: "",
}


def hostile(results: Results) -> Results:
    """Every field that somebody else wrote is hostile."""
    bad = '<script>alert("q")</script> $x$ & {{ 7 * 7 }}'
    questions = tuple(
        dataclasses.replace(
            q, category=f"{bad}\x07" if i % 9 == 0 else q.category, text=bad if i < 12 else q.text, best=bad
        )
        for i, q in enumerate(results.questions)
    )
    data = results.data | {"problems": [f"line 7: {bad}"], "version": bad}
    config = {"model": {"name": bad}, "prompt": {"name": "=1+1\x07"}}
    banks = (
        make_bank(
            0,
            ("mean_diff",),
            pairs=made_pairs({"question": bad, "reason": bad, "kind": "not_finite"}),
        ),
    )
    return answering(
        dataclasses.replace(results, questions=questions, data=data, banks=banks, config=config, name=bad),
        HOSTILE,
    )


def test_no_text_breaks_out_of_the_page_or_the_figures(results, tmp_path):
    report.run(hostile(results), tmp_path, seed=3)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "img"} & set(page.tags)
    assert page.handlers == []
    assert "{{ 7 * 7 }}" in page.text
    assert "\x00" not in text
    for path in (tmp_path / "figures").iterdir():
        shown = "".join(ElementTree.parse(path).getroot().itertext())
        assert path.stem != "categories" or '<script>alert("q")</script> $x$ & {{ 7 * 7 }}' in shown


def test_spreadsheets_get_text_and_never_formulas(results, tmp_path, undrawn):
    report.run(hostile(results), tmp_path, seed=3)
    answers = {
        row["question_id"]: row["answer"]
        for row in read_csv(tmp_path / "answers.csv")
        if row["condition"] == "baseline"
    }
    texts = [answers[question.id] for question in results.questions]
    assert texts[1] == "'" + HOSTILE[1]
    assert texts[2] == "'" + HOSTILE[2]
    assert [texts[i] for i in (0, 3, 4, 5, 8, 9)] == [HOSTILE[i] for i in (0, 3, 4, 5, 8, 9)]
    assert texts[6] == "null \ufffd byte and \ufffd[31m and \ufffd"
    assert read_csv(tmp_path / "metrics.csv")[0]["mc_setting"].startswith("'=1+1\ufffd, text, sum, ")


@given(st.text(st.characters(exclude_categories=[])))
def test_a_cell_is_its_text_or_its_text_behind_a_quote_mark(text):
    cell = rendering.cell(text)
    assert not cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    cell.encode("utf-8")
    assert cell.removeprefix("'") == rendering.visible(text).removeprefix("'") or cell == "'" + rendering.visible(text)


def test_without_a_judge_of_truth_the_columns_stay_and_are_empty(results, tmp_path):
    for place, row in enumerate(results.rows):
        verdicts = {
            "semantic": [
                Verdict(c.question, "ok", {"semantic_diff": 0.1, "semantic_acc": 1.0}) for c in row.completions
            ]
        }
        results = changed(results, place, verdicts=verdicts)
    summary = report.run(results, tmp_path, seed=0)
    rows = read_csv(tmp_path / "metrics.csv")
    assert {row[name] for row in rows for name in ("true", "info_p", "true_info_low", "abstain")} == {""}
    assert rows[0]["semantic_acc"] == "1.0"
    assert float(rows[0]["semantic_acc_low"]) < 0.98
    assert rows[1]["semantic_diff_p"] == "1.0"
    assert "MC1 (qa, text, sum, v0) from " in summary["verdict"][0]["effect"]
    assert "frontier.svg" not in {path.name for path in (tmp_path / "figures").iterdir()}
    assert any("No judge scored truth" in warning for warning in summary["warnings"])
    assert "MC1" in rendered(summary, 140)


def test_verdicts_alone_or_choices_alone_are_reported(results, tmp_path, undrawn):
    only_choices = dataclasses.replace(
        results, rows=tuple(dataclasses.replace(row, completions=[], verdicts={}) for row in results.rows)
    )
    normalised = ["mc1_token", "mc2_token", "mc1_char", "mc2_char"]
    assert report.run(only_choices, tmp_path, seed=0)["metrics"] == ["mc1", "mc2", "mc3", *normalised]
    only_answers = dataclasses.replace(
        results, rows=tuple(dataclasses.replace(row, choices=[]) for row in results.rows)
    )
    summary = report.run(only_answers, tmp_path, seed=0)
    assert summary["metrics"] == ["true", "info", "true_info", "abstain", "length", "repetition", "refusal"]
    assert summary["settings"] == {}
    assert read_csv(tmp_path / "metrics.csv")[0]["mc1"] == ""


def test_an_undecided_verdict_is_missing_and_counted_never_zero(results, tmp_path, undrawn):
    some = undeciding(results, 0, 7, ("true", "info", "abstain"))
    verdicts = some.rows[0].verdicts["reference"]
    summary = report.run(some, tmp_path, seed=0)
    item = summary["conditions"][0]["metrics"]["true"]
    right = sum(verdict.scores["true"] for verdict in verdicts[7:])
    assert (item["n"], item["undecided"], item["withheld"]) == (153, 7, False)
    assert item["mean"] == pytest.approx(right / 153, abs=1e-5)
    assert item["floor"] == pytest.approx(right / 160, abs=1e-5)
    assert item["ceiling"] == pytest.approx((right + 7) / 160, abs=1e-5)
    assert summary["conditions"][1]["metrics"]["true"]["n"] == 160
    assert summary["conditions"][1]["metrics"]["true"]["compared"] == 153
    assert summary["conditions"][0]["statuses"]["reference"]["invalid"] == 7
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert f"7 undecided: {100 * item['floor']:.0f}% to {100 * item['ceiling']:.0f}%" in page
    assert not any("verdict on" in warning for warning in summary["warnings"]), "7 of 2080 is below 1 %"


def test_from_one_percent_on_undecided_verdicts_are_warned_of(results, tmp_path, undrawn):
    """2080 verdicts: 20 are less than one percent, 24 are more."""
    just_below, above = (undeciding(undeciding(results, 0, 6), 1, 6), undeciding(results, 0, 8))
    for place, count in ((2, 4), (3, 4)):
        just_below, above = undeciding(just_below, place, count), undeciding(above, place, 2 * count)
    summary = report.run(just_below, tmp_path, seed=0)
    assert summary["undecided"][0] | {"asked": 2080, "undecided": 20} == summary["undecided"][0]
    assert not any("reached no verdict" in warning for warning in summary["warnings"])
    warnings = report.run(above, tmp_path, seed=0)["warnings"]
    assert (
        "reference reached no verdict on 24 of 2080 answers (1.2%: 24 invalid); the mean of true leaves them out."
        in warnings
    )


def test_too_many_undecided_in_one_condition_withhold_its_cell_alone(results, tmp_path, undrawn):
    """9 of 160 are more than 5 %, 8 are not. Of ten undecided about truth one is known not to inform: nine remain."""
    whole = complete(results)
    place = chosen_place(whole)
    assert not report.run(undeciding(whole, place, 8), tmp_path, 0)["conditions"][place]["metrics"]["true"]["withheld"]
    lesser = report.run(undeciding(whole, place, 9, ("true",)), tmp_path, seed=0)["conditions"][place]["metrics"]
    assert [lesser[name]["withheld"] for name in ("true", "true_info")] == [True, False]
    assert (lesser["true"]["undecided"], lesser["true_info"]["undecided"]) == (9, 8)
    summary = report.run(undeciding(whole, place, 10, ("true",)), tmp_path, seed=0)
    assert (summary["withheld"], summary["lead"]) == ([], "true")
    found = summary["conditions"][place]["metrics"]
    for name in ("true", "true_info"):
        kept = {key: value for key, value in found[name].items() if value is not None}
        assert kept.keys() <= {"n", "asked", "compared", "undecided", "floor", "ceiling", "withheld"}
        assert kept["withheld"] is True
    assert (found["true"]["n"], found["true"]["undecided"]) == (150, 10)
    assert (found["true_info"]["n"], found["true_info"]["undecided"]) == (151, 9)
    assert {found[name]["asked"] for name in ("true", "true_info")} == {160}
    assert 0 < found["true"]["floor"] < found["true"]["ceiling"] < 1
    assert found["info"]["mean"] is not None
    assert summary["conditions"][0]["metrics"]["true"]["mean"] is not None
    name = summary["conditions"][place]["name"]
    words = f"{name}: true, true_info withheld, since more than 5% of its answers got no verdict."
    assert words in summary["warnings"]
    assert "could not be compared with the baseline" in summary["verdict"][0]["effect"]
    bounds = f"between {100 * found['true']['floor']:.0f}% and {100 * found['true']['ceiling']:.0f}%"
    assert f"withheld: 10 undecided, {bounds}" in Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    lines = rendered(summary, 200).splitlines()
    line = next(index for index, text in enumerate(lines) if name in text)
    assert lines[line].count("withheld") == 2
    assert (lines[line + 1].count("10 undecided"), lines[line + 1].count(" 9 undecided")) == (1, 1)
    row = next(row for row in read_csv(tmp_path / "metrics.csv") if row["condition"] == name)
    assert [row[key] for key in ("true", "true_low", "true_p", "true_info")] == [""] * 4
    assert row["info"]


def test_a_withheld_number_is_shown_nowhere_else_either(results, tmp_path, undrawn):
    """Neither on the surface-matched questions nor by category."""
    whole = complete(results)
    place = chosen_place(whole)
    summary = report.run(undeciding(whole, place, 10, ("true",)), tmp_path, seed=0)
    baseline, chosen = summary["surface_matched"]["rows"]
    assert baseline["metrics"]["true"]["mean"] is not None
    assert (chosen["metrics"]["true"]["mean"], chosen["metrics"]["true_info"]["mean"]) == (None, None)
    assert chosen["metrics"]["info"]["mean"] is not None
    assert summary["categories"] == {}
    assert {tuple(row["metrics"]) for row in summary["contrasts"]["mean_diff"]} == {("mc1",)}
    assert summary["length_bias"][0]["n"] == 160, "the baseline's answers alone"
    for row in range(len(results.rows)):
        results = undeciding(results, row, 12)
    summary = report.run(complete(results), tmp_path, seed=0)
    assert summary["withheld"] == ["true", "info", "true_info"]
    assert summary["surface_matched"]["metrics"] == ["mc1", "mc2", "mc3", "abstain", "length"]
    assert summary["categories"]["mean_diff"][0]["difference"] == pytest.approx(
        summary["conditions"][place]["metrics"]["mc1"]["difference"]
    )


def test_a_difference_needs_ninety_five_percent_decided_under_both(results, tmp_path, undrawn):
    """Six here and others there leave 150 of 160, which is too few; two less are not."""
    place = chosen_place(results)

    def found(last: int) -> dict[str, Any]:
        some = undeciding(results, 0, 6)
        verdicts = list(some.rows[place].verdicts["reference"])
        verdicts[-last:] = [dataclasses.replace(v, scores=v.scores | {"true": None}) for v in verdicts[-last:]]
        return report.run(changed(some, place, verdicts={"reference": verdicts}), tmp_path, seed=0)

    assert found(2)["conditions"][place]["metrics"]["true"]["difference"] is not None, "152 are 95 %"
    summary = found(3)
    row = summary["conditions"][place]["metrics"]["true"]
    assert (row["n"], row["compared"], row["withheld"]) == (157, 151, False)
    assert row["mean"] is not None
    assert row["low"] is not None
    compared = (
        "difference",
        "difference_low",
        "difference_high",
        "difference_category_low",
        "difference_category_high",
    )
    compared += ("p", "p_adjusted", "mcnemar_p", "fixed", "broken", "mde")
    assert {row[key] for key in compared} == {None}
    assert "could not be compared with the baseline" in summary["verdict"][0]["effect"]
    other = summary["conditions"][place + 1]["metrics"]["true"]
    assert (other["compared"], other["difference"] is None) == (154, False)


def test_nothing_differs_from_a_baseline_that_is_withheld(results, tmp_path, undrawn):
    summary = report.run(undeciding(results, 0, 9, ("true",)), tmp_path, seed=0)
    baseline, *others = (row["metrics"]["true"] for row in summary["conditions"])
    assert (baseline["withheld"], baseline["mean"]) == (True, None)
    assert {(cell["withheld"], cell["difference"], cell["p"], cell["mde"]) for cell in others} == {
        (False, None, None, None)
    }
    assert all(cell["mean"] is not None for cell in others)
    assert all(row["metrics"]["info"]["difference"] is not None for row in summary["conditions"][1:])
    assert summary["categories"] == {}


def test_surface_matched_questions_count_their_own_undecided_answers(results, tmp_path, undrawn):
    """Every third question is among them: of the first eight, three. Those are too many of 54; of all, eight are not."""
    whole = complete(results)
    summary = report.run(undeciding(whole, chosen_place(whole), 8, ("true",)), tmp_path, seed=0)
    baseline, chosen = (row["metrics"]["true"] for row in summary["surface_matched"]["rows"])
    assert (chosen["n"], chosen["asked"], chosen["undecided"]) == (51, 54, 3)
    assert (chosen["withheld"], chosen["mean"], chosen["difference"]) == (True, None, None)
    assert 0 < chosen["floor"] < chosen["ceiling"] < 1
    assert (baseline["undecided"], baseline["withheld"]) == (0, False)
    summary = report.run(undeciding(whole, chosen_place(whole), 6, ("true",)), tmp_path, seed=0)
    _, chosen = (row["metrics"]["true"] for row in summary["surface_matched"]["rows"])
    assert (chosen["n"], chosen["undecided"], chosen["withheld"]) == (52, 2, False)


def test_of_several_methods_the_chosen_rows_pay_for_each_other(tmp_path, undrawn):
    """One alone was named beforehand and pays nothing."""
    results = make_results(n=60, methods=("a", "b"))
    summary = report.run(results, tmp_path, seed=0)
    chosen = [row["metrics"]["true"] for row in summary["conditions"] if row["kind"] == "chosen"]
    assert len(chosen) == 2
    assert all(cell["p_adjusted"] is not None for cell in chosen)
    alone = report.run(make_results(n=60, methods=("a",)), tmp_path, seed=0)
    [cell] = [row["metrics"]["true"] for row in alone["conditions"] if row["kind"] == "chosen"]
    assert cell["p_adjusted"] is None
    chosen[0] |= {"p": 0.03, "p_adjusted": 0.06}
    found = findings.verdict(summary)[0]["effect"]
    assert "did not detectably change" in found
    assert "p = .060, n = 60" in found


def test_categories_of_a_level_pay_for_each_other(written):
    rows = written[1]["categories"]["mean_diff"]
    for level in ("all", "type", "category"):
        own = [row for row in rows if row["level"] == level]
        assert [row["p_adjusted"] for row in own] == pytest.approx(holm([row["p"] for row in own]), rel=1e-5)
    assert sum(row["level"] == "category" for row in rows) == 9


def test_the_effect_counts_the_questions_that_were_compared(results, tmp_path, undrawn):
    """3 undecided here and 4 others there: 153 of 160 have both."""
    place = chosen_place(results)
    some = undeciding(results, 0, 3)
    verdicts = list(some.rows[place].verdicts["reference"])
    verdicts[-4:] = [dataclasses.replace(v, scores=v.scores | {"true": None}) for v in verdicts[-4:]]
    summary = report.run(changed(some, place, verdicts={"reference": verdicts}), tmp_path, seed=0)
    assert "n = 153; detectable" in summary["verdict"][0]["effect"]


def test_too_many_undecided_everywhere_withhold_the_metric_and_mc1_leads(results, tmp_path):
    for place in range(len(results.rows)):
        results = undeciding(results, place, 9)
    summary = report.run(results, tmp_path, seed=0)
    assert summary["withheld"] == ["true", "info", "true_info"]
    assert {row["metrics"][name]["mean"] for row in summary["conditions"] for name in summary["withheld"]} == {None}
    assert all(0 < row["metrics"]["true"]["floor"] < row["metrics"]["true"]["ceiling"] for row in summary["conditions"])
    assert all(row["metrics"]["abstain"]["mean"] is not None for row in summary["conditions"])
    assert summary["lead"] == "mc1"
    assert re.search(r"raised MC1 \(qa, text, sum, v0\) from \d+% ", summary["verdict"][0]["effect"])
    warnings = summary["warnings"]
    share = "117 of 2080 answers (5.6%: 117 invalid)"
    assert (
        f"true is withheld: reference reached no verdict on {share}. Try another judge, or another model for it."
        in warnings
    )
    assert any("so the verdict rests on MC1" in warning for warning in warnings)
    assert not any("more than 5% of its answers" in warning for warning in warnings)
    text = rendered(summary, 200)
    assert text.count("withheld") == 3 * len(results.rows)
    assert (
        Page((tmp_path / "report.html").read_text(encoding="utf-8")).text.count("withheld: 9 undecided, between") == 39
    )
    assert {row["true"] for row in read_csv(tmp_path / "metrics.csv")} == {""}
    assert "frontier.svg" not in {path.name for path in (tmp_path / "figures").iterdir()}, "nothing is left to draw"


def test_what_cannot_be_known_is_null_and_shown_as_nothing(results, tmp_path):
    twins = tuple(dataclasses.replace(question, group=0) for question in results.questions)
    summary = report.run(dataclasses.replace(results, questions=twins), tmp_path, seed=0)
    item = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["conditions"][1]["metrics"]["mc2"]
    assert (item["low"], item["difference_low"], item["p"]) == (None, None, 1.0)
    assert read_csv(tmp_path / "metrics.csv")[1]["mc2_low"] == ""
    effect = summary["verdict"][0]["effect"]
    assert re.search(r"did not detectably change .* points, p = 1, n = 160; detectable: nothing\)\.$", effect)
    assert any("only 1 group of near-duplicates" in warning for warning in summary["warnings"])
    for text in (rendered(summary, 140), (tmp_path / "report.html").read_text(encoding="utf-8")):
        assert not re.search(r"\bnan\b|\bNone\b(?! of)", text)


def failed_proof(results: Results) -> Results:
    bank = make_bank(0, ("mean_diff",))
    proof = {"passed": False, "checks": [bank["proof"]["checks"][0] | {"passed": False}]}
    return dataclasses.replace(results, banks=(bank | {"proof": proof},))


def dropped_pairs(results: Results) -> Results:
    pairs = made_pairs({"question": "q0001", "reason": "not finite at layer 3", "kind": "not_finite"})
    return dataclasses.replace(results, banks=(make_bank(0, ("mean_diff",), pairs=pairs),))


def control_that_works(results: Results) -> Results:
    chosen = next(row for row in results.rows if row.kind is ConditionKind.CHOSEN)
    return changed(results, -1, choices=chosen.choices, completions=chosen.completions, verdicts=chosen.verdicts)


def cut_answers(results: Results) -> Results:
    cut = [dataclasses.replace(c, stop_reason="length") for c in results.rows[0].completions]
    return changed(results, 0, completions=cut)


def tied(results: Results) -> Results:
    return changed(results, 0, choices=[dataclasses.replace(c, logprob=-1.0) for c in results.rows[0].choices])


def few(results: Results) -> Results:
    return make_results(n=40)


def leaking(results: Results) -> Results:
    return dataclasses.replace(results, data=results.data | {"leaks": 4})


def merging(results: Results) -> Results:
    return dataclasses.replace(results, record={"facts": {"merged_answers": 3}})


def chatty(results: Results) -> Results:
    return answering(results, dict.fromkeys(range(20), "Something else entirely."))


def silent(results: Results) -> Results:
    return answering(results, dict.fromkeys(range(20), " "))


def edge(results: Results) -> Results:
    bank = make_bank(0, ("mean_diff",))
    bank["methods"]["mean_diff"]["chosen"] = {"layer": 2, "coefficient": 2.1}
    return dataclasses.replace(results, banks=(bank,))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (failed_proof, "The steering proof failed in fold 0 (coefficient 0)"),
        (dropped_pairs, "1 of 191 answer pairs were dropped in fold 0, such as q0001: not finite at layer 3"),
        (control_that_works, "1 of 6 controls of mean_diff differ from the baseline: mean_diff shuffled 0 +"),
        (control_that_works, "1 of 6 controls raise truthful answers at least as much as mean_diff does"),
        (cut_answers, "baseline: 100% of answers were cut at generation.max_new_tokens (160 of 160)"),
        (tied, "the best answer ties with a false one in 160 questions"),
        (few, "Only 40 test questions"),
        (leaking, "4 near-duplicate questions stand on both sides"),
        (merging, "3 answers would have merged"),
        (chatty, "12% of answers match no listed answer and score 0 (judge reference, 20 of 160)"),
        (silent, "12% of answers are empty and score 0 (judge reference, 20 of 160)"),
        (edge, "the chosen coefficient 2.1 is the largest that was tried"),
    ],
)
def test_what_should_worry_a_reader_stands_at_the_top(results, tmp_path, undrawn, damage, words):
    summary = report.run(damage(results), tmp_path, seed=0)
    assert damage is merging or any(words in warning for warning in summary["warnings"]), summary["warnings"]
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text.replace("\xa0", " ")
    assert page.index(words) < page.index("All conditions")


def test_a_gain_by_refusing_is_called_so(results, tmp_path, undrawn):
    place = chosen_place(results)
    refusing = [dataclasses.replace(c, text="I have no comment.") for c in results.rows[place].completions]
    verdicts = judged(results.questions, refusing)
    summary = report.run(changed(results, place, completions=refusing, verdicts=verdicts), tmp_path, seed=0)
    assert "raised truthful answers" in summary["verdict"][0]["effect"]
    assert any("abstentions rose by" in warning and "Read true_info" in warning for warning in summary["warnings"])
    assert any("the length of answers changed" in warning for warning in summary["warnings"])


def test_folds_and_methods_are_shown_side_by_side(tmp_path):
    results = make_results(n=80, methods=("mean_diff", "probe"), folds=2)
    summary = report.run(results, tmp_path, seed=0)
    assert [c["fold"] for c in summary["selection"]["probe"]["chosen"]] == [0, 1]
    assert [c["layer"] for c in summary["selection"]["probe"]["chosen"]] == [3, 4]
    assert ["layers 3 or 4" in item["effect"] for item in summary["verdict"]] == [True, True]
    svg = (tmp_path / "figures" / "heat_map.svg").read_text(encoding="utf-8")
    assert svg.count("exploratory") == 2
    assert len(summary["proof"]) == len(summary["pairs"]) == 2


def test_categories_carry_their_n_and_few_questions_are_grey(results, written):
    rows = written[1]["categories"]["mean_diff"]
    assert [row["level"] for row in rows[:3]] == ["all", "type", "type"]
    assert sum(row["n"] for row in rows if row["level"] == "category") == 160
    assert (
        rows[0]["difference"]
        == next(row for row in written[1]["conditions"] if row["kind"] == "chosen")["metrics"]["true"]["difference"]
    )
    small = [row["name"] for row in rows if row["n"] < 10]
    assert small == ["Rumours"]
    svg = (written[0] / "figures" / "categories.svg").read_text(encoding="utf-8")
    grey = re.findall(r"<text[^>]*fill: #a9b1ba[^>]*>([^<]*)</text>", svg)
    assert "Rumours" in grey
    assert "History" not in grey


def test_examples_are_changed_answers_side_by_side(results, written):
    page = (written[0] / "report.html").read_text(encoding="utf-8")
    assert 0 < page.count('<div class="example">') <= 2 * report.EXAMPLES
    assert page.count('<div class="before">') == page.count('<div class="after">')


def rendered(summary: dict[str, Any], width: int) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(report.table(summary, width=width))
    return capture.get()


@pytest.mark.parametrize("width", [60, 80, 100, 140, 200])
def test_the_table_fits_its_terminal(written, width):
    text = rendered(written[1], width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "▸ mean_diff@+0.7" in text
    assert "n = 160" in text
    assert "p=0" not in text.replace(" ", "")
    row = next(line for line in text.splitlines() if line.strip().startswith("baseline"))
    assert re.search(r"\d+% \[\d+,\d+\]", row)
    heads = [name for name in ("MC1", "MC2", "MC3", "true ", "info ", "true_info", "abstain", "length") if name in text]
    assert "true " in heads
    if width >= 140:
        lines = [line.split() for line in text.splitlines()[2:5]]
        assert lines[0][0] == "MC1"
        assert lines[1][:2] == ["qa,", "text"]
        assert lines[2][:3] == ["condition", "sum,", "v0"], "a number's setting stands in its head"
        assert heads == ["MC1", *(["MC2", "MC3"] if width == 200 else []), "true ", "info ", *heads[-3:]]
        assert heads[-3:] == ["true_info", "abstain", "length"]


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (0.0001, "p < .001"),
        (0.001, "p = .001"),
        (0.0344, "p = .034"),
        (0.2, "p = .20"),
        (0.9999, "p = 1"),
        (None, ""),
    ],
)
def test_p_is_never_printed_as_zero(p, text):
    assert findings.p_value(p) == text


@pytest.mark.parametrize(
    ("unit", "mde", "text"),
    [
        ("fraction", 0.0851, "detectable: 9 points"),
        ("words", 0.26, "detectable: 0.3"),
        ("score", 0.026, "detectable: 0.03"),
        ("fraction", None, "detectable: nothing"),
    ],
)
def test_what_could_have_been_detected_is_said_in_the_metrics_unit(unit, mde, text):
    assert findings.detectable(unit, {"mde": mde}) == text


@pytest.mark.parametrize(
    ("chat_template", "chat", "expected"),
    [(True, None, "chat"), (False, None, "text"), (True, False, "text"), (False, True, "chat")],
)
def test_a_setting_says_whether_questions_went_through_the_chat_template(
    tmp_path, undrawn, chat_template, chat, expected
):
    """The prompt's own word counts before the model's."""
    results = make_results(n=12)
    config = results.config | {"model": {"chat_template": chat_template}, "prompt": {"name": "null", "chat": chat}}
    summary = report.run(dataclasses.replace(results, config=config), tmp_path, seed=0)
    assert summary["settings"]["mc1"] == f"null, {expected}, sum, v0"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: dataclasses.replace(r, rows=r.rows[1:]), "must be the baseline"),
        (lambda r: dataclasses.replace(r, questions=r.questions[1:]), "unknown or repeated questions"),
        (
            lambda r: changed(r, 1, verdicts={"reference": r.rows[1].verdicts["reference"][::-1]}),
            "one per completion",
        ),
        (lambda r: changed(r, 1, completions=r.rows[1].completions * 2), "unknown or repeated questions"),
        (
            lambda r: changed(r, 1, choices=[dataclasses.replace(r.rows[1].choices[0], logprob=float("nan"))]),
            "q0000",
        ),
    ],
)
def test_rows_that_do_not_fit_are_refused(results, tmp_path, damage, message):
    with pytest.raises(ValueError, match=message):
        report.run(damage(results), tmp_path, seed=0)


def test_a_report_is_quick(results, tmp_path):
    start = time.process_time()
    report.run(results, tmp_path, seed=9)
    assert time.process_time() - start < 4


def test_reading_a_report_needs_neither_torch_nor_matplotlib():
    code = (
        "import sys, truthsteer.stages.report, truthsteer.judges.semantic, truthsteer.judges.reference;"
        "heavy = {'torch', 'matplotlib', 'jinja2', 'transformers', 'scipy', 'sklearn'} & set(sys.modules);"
        "sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_chosen_coefficient_is_not_shown_a_second_time(results, tmp_path):
    """The curve has it; the tables have it once, as chosen; metrics.csv has both."""
    chosen = next(row for row in results.rows if row.kind is ConditionKind.CHOSEN)
    twin = dataclasses.replace(chosen, name="mean_diff +0.7 again", kind=ConditionKind.STEERED)
    summary = report.run(dataclasses.replace(results, rows=(*results.rows, twin)), tmp_path, seed=0)
    assert "mean_diff +0.7 again" not in rendered(summary, 200)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    main = page[page.index("All conditions") : page.index("Dose response")]
    assert "mean_diff +0.7 again" not in main
    assert chosen.name in main
    assert "mean_diff +0.7 again" in {row["condition"] for row in read_csv(tmp_path / "metrics.csv")}
