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
from rich.console import Console

from truthsteer import findings, rendering
from truthsteer.judges.reference import Reference
from truthsteer.records import Choice, Completion, ConditionKind, Question, Verdict
from truthsteer.stages import report
from truthsteer.stages.report import Results, Row

COEFFICIENTS = (-0.7, -0.35, 0.35, 0.7, 1.4, 2.1)
TOPICS = ("Geography", "History", "Music", "Animals", "Health", "Law", "Food", "Weather")


def make_questions(n: int) -> tuple[Question, ...]:
    return tuple(
        Question(
            id=f"q{index:04d}",
            row=index + 2,
            kind="Adversarial" if index % 5 < 3 else "Non-Adversarial",
            category=TOPICS[index % len(TOPICS)] if index % 41 else "Rumours",
            text=f"What is the capital of land {index}?",
            best=f"The capital of land {index} is Corvale.",
            correct=(f"The capital of land {index} is Corvale.", f"It is Corvale {index}."),
            incorrect=(f"The capital of land {index} is Larkham.", f"It is Larkham {index}."),
            group=index // 2 if index % 10 < 2 else 1000 + index,
        )
        for index in range(n)
    )


def make_row(
    questions: tuple[Question, ...],
    name: str,
    kind: str,
    coefficient: float,
    effect: float,
    method: str = "",
    folds: int = 1,
) -> Row:
    """A condition whose answers are true with a chance that `effect` moves, and that breaks when it is too
    strong.
    """
    random = np.random.default_rng([sum(map(ord, name)), 7])
    hardness = np.random.default_rng(0).random(len(questions))
    broken = max(0.0, coefficient - 1.0) / 1.5
    choices, completions = [], []
    for question, hard in zip(questions, hardness, strict=True):
        good = hard < 0.44 + effect + random.normal(0, 0.06)
        text = question.best if good else question.incorrect[0]
        if random.random() < 0.06:
            text = "I have no comment."
        if random.random() < broken:
            text = "Corvale Corvale of of the the"
        completions.append(Completion(question.id, text, len(text.split()) + 2, "stop"))
        shift = 2.5 * (0.35 + effect - hard)
        for answer, label in question.choices:
            logprob = float(-6 + random.normal(0, 0.7) + (shift if label else 0.0))
            choices.append(Choice(question.id, answer, label, answer == question.best, logprob, 8))
    verdicts = {"reference": Reference().judge(questions, [completion.text for completion in completions])}
    layers = () if kind == "baseline" else tuple(range(3, 3 + folds))
    coefficients = (coefficient,) if kind != "baseline" else ()
    return Row(name, ConditionKind(kind), method, layers, coefficients, choices, completions, verdicts)


def make_bank(fold: int, methods: tuple[str, ...], **changes: object) -> dict:
    def grid(layer: int, coefficient: float) -> dict:
        mc1 = 0.33 + 0.4 * np.exp(-((layer - 3) ** 2) / 2) * np.tanh(2 * coefficient) * (coefficient < 2)
        return {
            "layer": layer,
            "coefficient": coefficient,
            "mc1": float(mc1),
            "margin": float(mc1 - 0.8),
            "se": 0.05,
        }

    method = {
        "norms": [1.0] * 5,
        "chosen": {"layer": 3 + fold, "coefficient": 0.7},
        "baseline": {"mc1": 0.33, "margin": -0.4},
        "n": 40,
        "grid": [grid(layer, value) for layer in range(5) for value in COEFFICIENTS],
        "spread": {"subsets": 12, "mean_cosine": 0.97, "min_cosine": 0.93, "subsets_pairs": [["a", "b"]]},
    }
    check = {
        "name": "coefficient 0",
        "meaning": "Steering with 0 changes nothing.",
        "value": 1e-7,
        "bound": 1e-4,
        "passed": True,
    }
    bank = {
        "fold": fold,
        "residual_norm": [6.0] * 5,
        "pairs": {"used": 190, "abstentions_skipped": 5, "dropped": []},
        "methods": dict.fromkeys(methods, method),
        "proof": {"passed": True, "checks": [check]},
        "conditions": [],
    }
    return bank | changes


def make_results(n: int = 160, methods: tuple[str, ...] = ("mean_diff",), folds: int = 1) -> Results:
    questions = make_questions(n)
    rows = [make_row(questions, "baseline", "baseline", 0.0, 0.0)]
    for method in methods:
        for value in COEFFICIENTS:
            kind = {0.7: "chosen", -0.7: "sign_flip"}.get(value, "steered")
            effect = 0.45 * float(np.tanh(1.6 * value))
            rows.append(make_row(questions, f"{method}@{value:+g}", kind, value, effect, method, folds))
        rows += [make_row(questions, f"{method} random {k}", "random", 0.7, 0.0, method, folds) for k in range(5)]
        rows.append(make_row(questions, f"{method} shuffled 0", "shuffled", 0.7, 0.0, method, folds))
    return Results(
        name="organism-mean_diff-1a2b3c4d",
        config={
            "model": {"name": "organism"},
            "data": {"name": "organism"},
            "steering": {"coefficient_unit": "residual_norm"},
            "seed": 42,
        },
        questions=questions,
        rows=tuple(rows),
        banks=tuple(make_bank(fold, methods) for fold in range(folds)),
        data={
            "sha256": "ab" * 32,
            "version": "organism",
            "problems": [],
            "n": 320,
            "leaks": 0,
            "sizes": {"steer": 96, "tune": 48, "test": n},
        },
        record={
            "versions": {"torch": "2.13.0", "truthsteer": "0.1.0"},
            "device": "cpu",
            "overrides": [],
            "seconds": {"extract": 1.234},
        },
    )


def changed(results: Results, place: int, **fields: Any) -> Results:
    """The results with some fields of one row replaced."""
    rows = list(results.rows)
    rows[place] = dataclasses.replace(rows[place], **fields)
    return dataclasses.replace(results, rows=tuple(rows))


def answering(results: Results, texts: dict[int, str]) -> Results:
    """The results with the first answers of every row replaced, and judged again."""
    for place, row in enumerate(results.rows):
        completions = list(row.completions)
        for index, text in texts.items():
            completions[index] = dataclasses.replace(completions[index], text=text)
        verdicts = {"reference": Reference().judge(results.questions, [c.text for c in completions])}
        results = changed(results, place, completions=completions, verdicts=verdicts)
    return results


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


def test_metrics_csv_has_the_promised_columns_and_the_baseline_first(written):
    rows = read_csv(written[0] / "metrics.csv")
    header = list(rows[0])
    metrics = ["mc1", "mc2", "mc3", "true", "info", "true_info", "abstain", "length"]
    assert header[:10] == ["condition", "n", *metrics]
    assert header[10:34] == [f"{name}_{part}" for name in metrics for part in ("low", "high", "p")]
    assert header[34:38] == ["kind", "method", "layers", "coefficients"]
    assert rows[0]["condition"] == "baseline"
    assert rows[0]["n"] == "160"
    assert {rows[0][f"{name}_p"] for name in metrics} == {""}
    assert len(rows) == 13
    assert all(row[f"{name}_p"] for row in rows[1:] for name in metrics)
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
        r"\d+% \[\d+, \d+\] \(\+\d+ points \[\+\d+, \+\d+\], p < \.001, n = 160\)\.",
        verdict["effect"],
    )
    assert "sign flipped lowered them to" in verdict["context"][0]
    assert verdict["context"][1] == "None of the 6 control directions differs from the baseline in truthful answers."
    assert written[1]["warnings"] == []


def test_no_effect_is_not_called_one(results, tmp_path, undrawn):
    place = [row.kind for row in results.rows].index(ConditionKind.CHOSEN)
    base = results.rows[0]
    results = changed(results, place, choices=base.choices, completions=base.completions, verdicts=base.verdicts)
    summary = report.run(results, tmp_path, seed=1)
    assert "did not detectably change truthful answers" in summary["verdict"][0]["effect"]
    assert "p = 1" in summary["verdict"][0]["effect"]


def test_two_runs_write_the_same_bytes(results, written, tmp_path):
    later = dataclasses.replace(results, record=results.record | {"seconds": {"extract": 99.0}, "host": "b"})
    report.run(later, tmp_path, seed=42)
    names = sorted(str(path.relative_to(written[0])) for path in written[0].rglob("*") if path.is_file())
    assert {"summary.json", "metrics.csv", "answers.csv", "report.html"} < set(names)
    assert {f"figures/{name}.svg" for name in ("dose_response", "heat_map", "categories")} < set(names)
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
    assert page.tags.count("svg") == 3
    assert len(page.ids) == len(set(page.ids))
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(page.ids)
    assert text.count('role="img" aria-label="') == 3
    order = [
        "raised truthful answers",
        "All conditions",
        "Dose response",
        "Layer and coefficient",
        "By category",
    ]
    order += [
        "Steering proof",
        "How layer and coefficient were chosen",
        "Before and after",
        "Verdicts",
        "Configuration",
    ]
    assert sorted(order, key=page.text.index) == order


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
    banks = (
        make_bank(
            0,
            ("mean_diff",),
            pairs={"used": 9, "abstentions_skipped": 0, "dropped": [{"question": bad, "reason": bad}]},
        ),
    )
    return answering(
        dataclasses.replace(
            results, questions=questions, data=data, banks=banks, config={"model": {"name": bad}}, name=bad
        ),
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
    assert "MC1" in summary["verdict"][0]["effect"]
    assert any("No judge scored truth" in warning for warning in summary["warnings"])
    assert "MC1" in rendered(summary, 140)


def test_verdicts_alone_or_choices_alone_are_reported(results, tmp_path, undrawn):
    only_choices = dataclasses.replace(
        results, rows=tuple(dataclasses.replace(row, completions=[], verdicts={}) for row in results.rows)
    )
    assert report.run(only_choices, tmp_path, seed=0)["metrics"] == ["mc1", "mc2", "mc3"]
    only_answers = dataclasses.replace(
        results, rows=tuple(dataclasses.replace(row, choices=[]) for row in results.rows)
    )
    summary = report.run(only_answers, tmp_path, seed=0)
    assert summary["metrics"] == ["true", "info", "true_info", "abstain", "length"]
    assert read_csv(tmp_path / "metrics.csv")[0]["mc1"] == ""


def test_an_undecided_verdict_is_missing_and_counted_never_zero(results, tmp_path, undrawn):
    row = results.rows[0]
    verdicts = list(row.verdicts["reference"])
    for index in range(7):
        verdicts[index] = Verdict(verdicts[index].question, "invalid", {"true": None, "info": None, "abstain": None})
    summary = report.run(changed(results, 0, verdicts={"reference": verdicts}), tmp_path, seed=0)
    item = summary["conditions"][0]["metrics"]["true"]
    assert item["n"] == 153
    assert item["mean"] == pytest.approx(np.mean([v.scores["true"] for v in verdicts[7:]]), abs=1e-5)
    assert summary["conditions"][1]["metrics"]["true"]["n"] == 160
    assert summary["conditions"][0]["statuses"]["reference"]["invalid"] == 7
    assert any("reached no verdict on 7 of 160" in warning for warning in summary["warnings"])


def test_what_cannot_be_known_is_null_and_shown_as_nothing(results, tmp_path):
    twins = tuple(dataclasses.replace(question, group=0) for question in results.questions)
    summary = report.run(dataclasses.replace(results, questions=twins), tmp_path, seed=0)
    item = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["conditions"][1]["metrics"]["mc2"]
    assert (item["low"], item["difference_low"], item["p"]) == (None, None, 1.0)
    assert read_csv(tmp_path / "metrics.csv")[1]["mc2_low"] == ""
    assert re.search(r"did not detectably change .* points, p = 1, n = 160\)\.$", summary["verdict"][0]["effect"])
    assert any("only 1 group of near-duplicates" in warning for warning in summary["warnings"])
    for text in (rendered(summary, 140), (tmp_path / "report.html").read_text(encoding="utf-8")):
        assert not re.search(r"\bnan\b|\bNone\b(?! of)", text)


def failed_proof(results: Results) -> Results:
    bank = make_bank(0, ("mean_diff",))
    proof = {"passed": False, "checks": [bank["proof"]["checks"][0] | {"passed": False}]}
    return dataclasses.replace(results, banks=(bank | {"proof": proof},))


def dropped_pairs(results: Results) -> Results:
    pairs = {
        "used": 190,
        "abstentions_skipped": 0,
        "dropped": [{"question": "q0001", "reason": "not finite at layer 3"}],
    }
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
    place = [row.kind for row in results.rows].index(ConditionKind.CHOSEN)
    refusing = [dataclasses.replace(c, text="I have no comment.") for c in results.rows[place].completions]
    verdicts = {"reference": Reference().judge(results.questions, [c.text for c in refusing])}
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
        assert len(heads) == 8


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
        "heavy = {'torch', 'matplotlib', 'jinja2', 'transformers', 'scipy'} & set(sys.modules);"
        "sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
