"""Judges against human labels: numbers by hand, bad files, and the command itself."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from conftest import MINILM, REPO, needs_minilm
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from truthsteer import judge_model
from truthsteer.audit import Labelled, ask, audit
from truthsteer.audit.__main__ import main
from truthsteer.audit.labels import WORDS, read
from truthsteer.audit.measures import by_length
from truthsteer.data import load_questions
from truthsteer.errors import UserError
from truthsteer.judges.reference import Reference
from truthsteer.judges.semantic import Semantic
from truthsteer.records import Question, Verdict


def question(number: int) -> Question:
    """One that shares nothing with the others."""
    letters = np.random.default_rng(number).integers(97, 123, 24)
    word = "".join(map(chr, letters))
    return Question(
        f"q{number}", number, "", "", f"{word}?", f"{word} a.", (f"{word} a.", f"{word} b."), (f"{word} c.",)
    )


def labelled(labels: Sequence[int], texts: Sequence[str] | None = None, **columns: Sequence[Any]) -> list[Labelled]:
    """One answer to each of as many unlike questions."""
    found = texts or ["some words"] * len(labels)
    return [
        Labelled(question(place), text, bool(label), **{name: cells[place] for name, cells in columns.items()})
        for place, (label, text) in enumerate(zip(labels, found, strict=True))
    ]


@dataclass(frozen=True)
class Told:
    """A judge that was told what to say."""

    scores: dict[str, list[float | None]]
    probabilities: dict[str, list[float]] = field(default_factory=dict)
    statuses: list[str] = field(default_factory=list)
    metrics: ClassVar[tuple[str, ...]] = ("true",)
    asked: list[int] = field(default_factory=list)
    rows_at_once: int = 7

    def identity(self) -> dict[str, Any]:
        return {}

    def prefetch(self) -> None:
        """Nothing."""

    def judge(self, questions: Sequence[Question], texts: Sequence[str]) -> list[Verdict]:
        first = sum(self.asked)
        self.asked.append(len(questions))
        return [
            Verdict(
                each.id,
                self.statuses[first + place] if self.statuses else "ok",
                {name: values[first + place] for name, values in self.scores.items()},
                {name: values[first + place] for name, values in self.probabilities.items()},
                raw="said so",
            )
            for place, each in enumerate(questions)
        ]


def rows_of(summary: dict[str, Any], about: str = "truth") -> dict[str, dict[str, Any]]:
    return {f"{row['judge']} {row['metric']}".strip(): row for row in summary["rows"] if row["about"] == about}


LABELS = [1] * 30 + [0] * 20
SAID = [1.0] * 24 + [0.0] * 6 + [1.0] * 5 + [0.0] * 15


def test_numbers_of_a_judge_and_of_what_it_must_beat_by_hand():
    summary = audit({"told": Told({"true": list(SAID)})}, labelled(LABELS), seed=0)
    assert (summary["answers"], summary["questions"], summary["clusters"]) == (50, 50, 50)
    assert summary["labels"] == {"truth": {"n": 50, "yes": 30}}
    found = rows_of(summary)
    assert list(found) == ["told true", "always yes", "always no", "length longer"]
    own = found["told true"]
    assert own["n"] == 50
    assert own["accuracy"]["value"] == pytest.approx(39 / 50)
    assert own["recall_yes"]["value"] == pytest.approx(24 / 30)
    assert own["recall_no"]["value"] == pytest.approx(15 / 20)
    assert own["kappa"]["value"] == pytest.approx((0.78 - 0.516) / (1 - 0.516), abs=1e-5)
    assert own["accuracy"]["low"] < 0.78 < own["accuracy"]["high"]
    assert own["auc"]["value"] is own["ece"]["value"] is None
    assert found["always yes"]["accuracy"]["value"] == pytest.approx(0.6)
    assert found["always yes"]["kappa"]["value"] == 0
    assert found["always no"]["accuracy"]["value"] == pytest.approx(0.4)
    assert own["over_length"]["difference"] == pytest.approx(0.78 - 0.6), "all answers are as long: the rule says yes"
    assert own["over_length"]["low"] > 0
    assert own["over_length"]["p"] > 0.05, "the interval alone claims nothing"
    assert summary["warnings"] == ["told true is not shown to beat the length of an answer alone (+18 points)."]
    json.dumps(summary, allow_nan=False)


@pytest.mark.parametrize(("undecided", "warned", "withheld"), [(1, False, False), (2, True, False), (6, True, True)])
def test_undecided_answers_are_counted_by_status_warned_of_and_withheld(undecided, warned, withheld):
    labels = [1, 0] * 50
    said: list[float | None] = [float(label) for label in labels]
    statuses = ["ok"] * 100
    for place in range(undecided):
        said[place], statuses[place] = None, "invalid" if place else "cut"
    summary = audit({"told": Told({"true": said}, statuses=statuses)}, labelled(labels), seed=0)
    row = rows_of(summary)["told true"]
    assert (row["n"], row["undecided"], row["withheld"]) == (100 - undecided, undecided, withheld)
    assert sum(row["undecided_statuses"].values()) == undecided
    assert row["undecided_statuses"]["cut"] == 1
    assert row["statuses"]["ok"] == 100 - undecided
    assert ("accuracy" in row) != withheld
    assert any(f"{undecided} of 100" in warning for warning in summary["warnings"]) == warned


def test_probabilities_and_differences_rank_and_probabilities_are_calibrated():
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 80)
    stated = np.clip(0.5 + 0.3 * (labels - 0.5) + random.normal(0, 0.2, 80), 0, 1)
    scores = {
        "true": (stated >= 0.5).astype(float).tolist(),
        "bleu_acc": (stated > 0.4).astype(float).tolist(),
        "bleu_diff": (stated - 0.4).tolist(),
        "abstain": [0.0] * 80,
    }
    judge = Told(scores, {"true": stated.tolist()})
    found = rows_of(audit({"told": judge}, labelled(labels.tolist()), seed=0))
    assert not any("diff" in name or "abstain" in name for name in found)
    for name in ("told true", "told bleu_acc"):
        assert found[name]["auc"]["value"] == pytest.approx(roc_auc_score(labels, stated), abs=1e-5)
        assert found[name]["auc"]["low"] < found[name]["auc"]["value"] < found[name]["auc"]["high"]
    assert 0 < found["told true"]["ece"]["value"] < 0.4
    assert found["told bleu_acc"]["ece"]["value"] is None


def test_a_graded_score_is_yes_from_one_half_and_ranks_by_itself():
    graded = [0.5, 0.9, 0.2, 0.4]
    found = rows_of(audit({"told": Told({"true": list(graded)})}, labelled([1, 1, 0, 1]), seed=0))["told true"]
    assert found["accuracy"]["value"] == 0.75
    assert found["auc"]["value"] == 1.0


def test_information_is_held_against_its_own_label_where_somebody_said():
    infos = [True] * 10 + [False] * 5 + [None] * 5
    said = {"true": [1.0] * 20, "info": [1.0] * 9 + [0.0] + [0.0] * 4 + [1.0] + [None] * 5}
    summary = audit({"told": Told(said)}, labelled([1] * 10 + [0] * 10, info=infos), seed=0)
    row = rows_of(summary, "information")["told info"]
    assert summary["labels"]["information"] == {"n": 15, "yes": 10}
    assert (row["n"], row["undecided"], row["undecided_statuses"]) == (15, 0, {})
    assert (row["recall_yes"]["value"], row["recall_no"]["value"]) == (0.9, 0.8)
    assert "told info" not in rows_of(summary)


def test_near_duplicate_questions_are_one_cluster():
    twins = [
        Question(
            f"t{place}",
            place,
            "",
            "",
            f"What happens to you if you eat watermelon seeds {word}?",
            "a.",
            ("a.",),
            ("b.",),
        )
        for place, word in enumerate(["today", "now", "often"])
    ]
    rows = [Labelled(each, "text", True) for each in [*twins, *twins, question(1)]]
    summary = audit({"told": Told({"true": [1.0] * 7})}, rows, seed=0)
    assert (summary["answers"], summary["questions"], summary["clusters"]) == (7, 4, 2)
    assert any("only 2 groups" in warning for warning in summary["warnings"])
    assert any("All labels about truth are yes" in warning for warning in summary["warnings"])


def test_length_alone_is_learnt_in_its_direction_and_never_from_the_question_itself():
    lengths = np.arange(60.0)
    clusters = np.arange(60)
    assert (by_length(lengths, (lengths >= 20).astype(float), clusters, 0) == (lengths >= 20)).mean() > 0.95
    assert (by_length(lengths, (lengths < 20).astype(float), clusters, 0) == (lengths < 20)).mean() > 0.95
    # In two clusters with opposite labels each is rated by the other's rule: always wrong.
    label = (np.arange(60) % 2).astype(float)
    assert (by_length(np.ones(60), label, np.arange(60) % 2, 0) == 1 - label).all()
    assert np.isnan(by_length(lengths, label, np.zeros(60), 0)).all()


def test_a_judge_that_counts_words_is_not_shown_to_beat_length():
    random = np.random.default_rng(1)
    counts = random.integers(1, 20, 100)
    labels = (counts + random.normal(0, 6, 100) > 10).astype(int).tolist()
    texts = ["word " * count for count in counts]
    judge = Told({"true": (counts > 10).astype(float).tolist()})
    summary = audit(
        {"told": judge, "right": Told({"true": [float(x) for x in labels]})}, labelled(labels, texts), seed=0
    )
    found = rows_of(summary)
    assert found["length longer"]["auc"]["value"] == pytest.approx(roc_auc_score(labels, counts), abs=1e-5)
    assert found["length longer"]["over_length"]["difference"] == 0
    assert any("told true is not shown to beat the length" in warning for warning in summary["warnings"])
    assert not any(warning.startswith("right") for warning in summary["warnings"])


def test_a_judge_that_is_right_no_more_often_than_a_constant_is_named():
    labels = [1] * 45 + [0] * 15
    said = [1.0] * 40 + [0.0] * 5 + [1.0] * 10 + [0.0] * 5
    summary = audit({"told": Told({"true": said})}, labelled(labels), seed=0)
    assert "told true is right in 75%, always yes in 75%." in summary["warnings"]


def test_the_corrected_share_uses_the_errors_of_the_other_groups():
    """Both groups are judged with sensitivity .8 and specificity .9, so that the correction meets the labels' share."""
    labels, said, groups = [], [], []
    for name, yes, no in (("a", 50, 50), ("b", 20, 80)):
        labels += [1] * yes + [0] * no
        said += [1.0] * (yes * 8 // 10) + [0.0] * (yes * 2 // 10) + [1.0] * (no // 10) + [0.0] * (no * 9 // 10)
        groups += [name] * 100
    rows = labelled(labels, group=groups)
    found = rows_of(audit({"told": Told({"true": said})}, rows, seed=0))["told true"]["groups"]
    first, second = found
    assert (first["group"], first["n"], second["n"]) == ("a", 100, 100)
    assert first["labelled_yes"]["value"] == pytest.approx(0.5)
    assert first["judged_yes"]["value"] == pytest.approx(0.45)
    assert first["corrected_yes"]["value"] == pytest.approx(0.5)
    assert second["judged_yes"]["value"] == pytest.approx(0.24)
    assert second["corrected_yes"]["value"] == pytest.approx(0.2)
    assert second["recall_no"]["value"] == pytest.approx(0.9)
    assert second["corrected_yes"]["high"] - second["corrected_yes"]["low"] > 0.05
    # Errors that differ: b is judged yes always, and a's errors cannot know.
    said[100:] = [1.0] * 100
    wrong = rows_of(audit({"told": Told({"true": said})}, rows, seed=0))["told true"]["groups"][1]
    assert wrong["corrected_yes"]["value"] == 1.0


def test_one_group_is_not_corrected_by_its_own_errors_and_none_gives_no_breakdown():
    said = {"true": list(SAID)}
    [only] = rows_of(audit({"told": Told(said)}, labelled(LABELS, group=["m"] * 50), seed=0))["told true"]["groups"]
    assert only["corrected_yes"]["value"] is None
    assert rows_of(audit({"told": Told(said)}, labelled(LABELS), seed=0))["told true"]["groups"] == []


def test_judges_are_asked_in_parts_by_model_and_the_model_is_freed(monkeypatch):
    freed: list[bool] = []
    monkeypatch.setattr(judge_model, "release", lambda: freed.append(True))

    @dataclass(frozen=True)
    class Loading(Told):
        loads: str = "model"

    first, second = Told({"true": list(SAID)}), Loading({"true": list(SAID)})
    assert list(ask({"b": second, "a": first}, labelled(LABELS))) == ["b", "a"]
    assert first.asked == [7] * 7 + [1]
    assert freed == [True]
    ask({"a": Told({"true": list(SAID)})}, labelled(LABELS))
    assert freed == [True], "nothing was loaded"


def test_a_judge_that_loses_answers_is_refused():
    class Short(Reference):
        def judge(self, questions: Sequence[Question], texts: Sequence[str]) -> list[Verdict]:
            return super().judge(questions, texts)[1:]

    with pytest.raises(ValueError, match="one verdict per answer"):
        audit({"short": Short()}, labelled(LABELS), seed=0)
    with pytest.raises(ValueError, match="no labelled answers"):
        audit({"reference": Reference()}, [], seed=0)


@needs_minilm
def test_real_judges_side_by_side():
    rows = [
        Labelled(each, answer, label)
        for each in load_questions()[:25]
        for answer, label in ((each.best, True), (each.incorrect[0], False))
    ]
    summary = audit({"reference": Reference(), "semantic": Semantic(str(MINILM))}, rows, seed=0)
    found = rows_of(summary)
    assert found["reference true"]["accuracy"]["value"] == 1.0
    assert found["semantic semantic_acc"]["accuracy"]["value"] > 0.9
    assert found["semantic semantic_acc"]["auc"]["value"] > 0.95


# Files


def written(tmp_path: Path, *lines: str, header: str = "question,answer,label") -> Path:
    path = tmp_path / "labels.csv"
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def known() -> list[Question]:
    return [question(number) for number in range(20)]


def test_references_in_the_file_or_looked_up_by_text_whatever_its_case(tmp_path):
    header = "Group, QUESTION ,Answer,Label,Best Answer,Correct Answers,Incorrect Answers,note"
    text = question(3).text
    path = written(
        tmp_path,
        'm,"Own?",yes it is,TRUE,Best,Right; ;Right;,"Wrong; wronger. ",x',
        f'm,"  {text.upper()}",,0,,,,',
        header=header,
    )
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    found = read(path, known, "data=x")
    own, looked_up = found.rows
    assert (own.question.best, own.question.correct) == ("Best.", ("Best.", "Right."))
    assert own.question.incorrect == ("Wrong.", "wronger.")
    assert (own.text, own.label, own.group, own.line) == ("yes it is", True, "m", 2)
    assert looked_up.question == question(3)
    assert (looked_up.text, looked_up.label, looked_up.line) == ("", False, 3)
    assert found.looked_up
    assert found.problems == ()


def test_a_file_with_its_own_references_needs_no_data(tmp_path):
    path = written(
        tmp_path, "Q?,a,1,B,C,D", header="question,answer,label,best_answer,correct_answers,incorrect_answers"
    )

    def nobody() -> list[Question]:
        raise AssertionError("data was loaded")

    assert not read(path, nobody, "data=x").looked_up


def test_every_word_for_yes_and_no_and_missing_information(tmp_path):
    lines = [f"{question(0).text},a,{word.upper()},{'' if place % 2 else word}" for place, word in enumerate(WORDS)]
    rows = read(written(tmp_path, *lines, header="question,answer,label,info_label"), known, "data=x").rows
    assert [row.label for row in rows] == list(WORDS.values())
    assert [row.info for row in rows] == [None if place % 2 else yes for place, yes in enumerate(WORDS.values())]


def test_rows_that_cannot_be_used_are_named_with_their_lines(tmp_path):
    text = question(0).text
    lines = [
        f'{text},"two\nlines",1,',
        f"{text},a,perhaps,",
        f"{text},a,,",
        f"{text},a,0,maybe",
        ",a,1,",
        f"{text},a,1,1,x,y",
        *[f"{text},a,0,"] * 4,
    ]
    found = read(written(tmp_path, *lines, header="question,answer,label,info_label"), known, "data=x")
    assert [row.line for row in found.rows] == [2, 6, 9, 10, 11, 12]
    assert found.rows[0].text == "two\nlines"
    assert found.rows[1].info is None
    for place, words in enumerate(
        [
            "line 4: label 'perhaps'",
            "line 5: label ''",
            "line 6: info_label 'maybe'",
            "line 7: no question",
            "line 8: 2 cells",
        ]
    ):
        assert found.problems[place].startswith(words)


@pytest.mark.parametrize(
    ("header", "lines", "words"),
    [
        ("question,answer", ["a,b"], "lacks the columns label"),
        ("", [], "lacks the columns question, answer, label"),
        ("question,answer,label", [], "It holds nothing below its first line"),
        ("question,answer,label,Answer", ["a,b,1,c"], "has the column answer twice"),
        ("question,answer,label,best_answer", ["a,b,1,c"], "but not correct_answers, incorrect_answers"),
        ("question,answer,label", ["a,b,x", "a,b,y", "a,b,1"], "2 of 3 rows cannot be used. line 2: label 'x'"),
        ("question,answer,label", ["Unheard of?,b,1"], "line 2: the question 'Unheard of?' has no references"),
        (
            "question,answer,label",
            ["Unheard of?,b,1", "Nor this?,b,1"],
            "data=x (2 such rows). Add the columns best_answer",
        ),
        ("question,answer,label", ['a,"b,1'], "is not CSV at the record that begins on line 2"),
        (
            "question,answer,label,best_answer,correct_answers,incorrect_answers",
            ["a,b,1,c,d,;"],
            "references without incorrect_answers",
        ),
    ],
)
def test_files_that_cannot_be_used_say_what_to_do(tmp_path, header, lines, words):
    with pytest.raises(UserError) as caught:
        read(written(tmp_path, *lines, header=header), known, "data=x")
    assert words in str(caught.value)


def test_a_missing_file_and_another_encoding(tmp_path):
    path = written(tmp_path, f"{question(0).text},a,1")
    with pytest.raises(UserError, match=r"Did you mean 'labels.csv'\?"):
        read(tmp_path / "lables.csv", known, "data=x")
    path.write_bytes(path.read_bytes() + "é".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read(path, known, "data=x")


@given(
    st.text(max_size=200)
    | st.lists(st.text(max_size=8), max_size=40).map(lambda c: "question,answer,label\n" + ",".join(c))
)
def test_reading_anything_ends_in_rows_or_in_one_sentence(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("any") / "labels.csv"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(UserError):
        assert read(path, known, "data=x").rows


# The command


def labels_of_the_organism(tmp_path: Path) -> Path:
    rows = [
        (each.text, answer, label, group)
        for each in load_questions()[:30]
        for group in ("one", "two")
        for answer, label in ((each.best, "yes"), (each.incorrect[0], "no"), ("=1+1", "0"))
    ]
    path = tmp_path / "labels.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("question", "answer", "label", "group"), *rows])
    return path


def test_the_command_writes_the_same_files_twice_and_shows_tables(tmp_path):
    path = labels_of_the_organism(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from typing import ClassVar\n"
        "from truthsteer.records import Verdict\n"
        "@dataclass(frozen=True)\n"
        "class Mine:\n"
        "    floor: float = 0.0\n"
        "    metrics: ClassVar = ('match',)\n"
        "    def identity(self): return {'version': 1}\n"
        "    def prefetch(self): pass\n"
        "    def judge(self, questions, texts):\n"
        "        said = [t == q.best for q, t in zip(questions, texts)]\n"
        "        stated = [max(self.floor, 0.8 * yes) for yes in said]\n"
        "        return [Verdict(q.id, 'ok', {'match': float(yes)}, {'match': p})\n"
        "                for q, yes, p in zip(questions, said, stated)]\n"
    )
    command = [sys.executable, "-m", "truthsteer.audit", str(path), f"paths.root={tmp_path / 'root'}"]
    command += ["judge=[reference]", "+judge.mine._target_=mine.Mine", "+judge.mine.floor=0.1"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}

    def start() -> str:
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    shown = start()
    [folder] = (tmp_path / "root").glob("audit-*")
    for words in (
        "Is the answer true? 180 labelled answers, 60 yes",
        "mine match",
        "always no",
        "By group",
        str(folder),
    ):
        assert words in shown
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert set(before) == {"audit.csv", "audit.json"}
    summary = json.loads(before["audit.json"])
    assert summary["file"] == "labels.csv"
    assert str(tmp_path) not in before["audit.json"].decode()
    mine = rows_of(summary)["mine match"]
    assert (mine["accuracy"]["value"], mine["auc"]["value"]) == (1.0, 1.0)
    assert mine["ece"]["value"] == pytest.approx((60 * 0.2 + 120 * 0.1) / 180, abs=1e-5)
    with (folder / "audit.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 180
    assert lines[2]["answer"] == "'=1+1"
    assert (lines[0]["mine_match"], lines[0]["mine_match_probability"], lines[0]["reference_status"]) == (
        "1.0",
        "0.8",
        "true",
    )
    assert start() == shown
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def run_main(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["audit", *arguments])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


def test_other_labels_or_another_seed_are_another_folder(monkeypatch, capsys, tmp_path):
    path = labels_of_the_organism(tmp_path)
    root = f"paths.root={tmp_path / 'root'}"
    for more in ((), ("seed=1",), ("seed=1", "verbose=true")):
        code, shown, _ = run_main(monkeypatch, capsys, str(path), root, *more)
        assert code == 0
        assert "audit-" in shown
    path.write_text(path.read_text(encoding="utf-8") + '"What?",a,x,\n', encoding="utf-8")
    code, shown, _ = run_main(monkeypatch, capsys, str(path), root)
    assert "labels.csv line 182: label 'x' is not 1 or 0" in shown
    assert len(list((tmp_path / "root").glob("audit-*"))) == 3


def test_help_is_readable_and_nothing_typed_is_an_error(monkeypatch, capsys):
    code, shown, _ = run_main(monkeypatch, capsys, "--help")
    assert code == 0
    for words in ("LABELS.csv", "judge=[reference,semantic]", "info_label", "always yes"):
        assert words in shown
    code, shown, error = run_main(monkeypatch, capsys)
    assert (code, shown) == (2, "")
    assert "LABELS.csv" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["judge=[reference]"], "Type the CSV file first"),
        (["nowhere.csv"], "nowhere.csv cannot be read"),
        (["labels.csv", "judge=[referense]"], "Did you mean 'reference'?"),
        (["labels.csv", "+foo=1"], "'foo' is not a key"),
        (["labels.csv", "seed=-1"], "seed=-1 is below 0"),
        (["labels.csv", "--cfg"], "'--cfg' is not known here"),
        (["labels.csv", "data=truthfulqa_csv"], "Type data.path=FILE.csv"),
        (["labels.csv", "judge=[semantic]", "judge.semantic.model=no/such"], "judge.semantic.model=no/such"),
    ],
)
def test_mistakes_end_in_one_sentence(monkeypatch, capsys, tmp_path, arguments, words):
    labels_of_the_organism(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, shown, error = run_main(monkeypatch, capsys, *arguments, "paths.root=root")
    assert (code, shown) == (2, "")
    assert error.startswith("truthsteer: ")
    assert words in error
    assert not (tmp_path / "root").exists()


def test_what_cannot_be_shown_is_said_in_words(monkeypatch, capsys, tmp_path):
    """An undecided judge's row stays in the table, without numbers."""
    path = labels_of_the_organism(tmp_path)
    told: list[float | None] = [None] * 20 + [1.0] * 160
    monkeypatch.setattr("truthsteer.audit.__main__.build_all", lambda nodes, key: {"reference": Told({"true": told})})
    monkeypatch.setattr("truthsteer.audit.__main__.content", lambda node, judge: {})
    code, shown, error = run_main(monkeypatch, capsys, str(path), f"paths.root={tmp_path / 'root'}")
    assert code == 0, error
    [line] = [line for line in shown.splitlines() if line.startswith(" reference true")]
    assert "withheld" in line
    assert "20 undecided" in shown
    assert "Warning: reference true is withheld: 20 of 180 answers are undecided (ok 20)." in shown
