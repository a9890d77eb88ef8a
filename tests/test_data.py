"""Questions from CSV and hub: the official answers, bad rows in sight, one sentence for a bad file."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from conftest import TRUTHFULQA
from hypothesis import given, settings
from hypothesis import strategies as st

from truthsteer import data
from truthsteer.config import EMBEDDED, DataConfig, DataSource
from truthsteer.errors import UserError
from truthsteer.organism import QUESTIONS

HEADER = ("Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def config(path, **fields):
    return DataConfig(name="test", path=str(path), **fields)


def row(text, best="Yes", correct="Yes; Of course", incorrect="No; Never", category="A", *more):
    return ("Adversarial", category, text, best, correct, incorrect, "", *more)


def to_csv(rows, header=HEADER):
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([header, *rows])
    return buffer.getvalue().encode()


@pytest.fixture
def load(tmp_path):
    """Load what is given as rows, or as the bytes of the file."""

    def load_content(content, header=HEADER, seed=0, **fields):
        path = tmp_path / "questions.csv"
        path.write_bytes(content if isinstance(content, bytes) else to_csv(content, header))
        return data.load(config(path, **fields), seed)

    return load_content


# --- the real file and the embedded one


@pytest.fixture(scope="module")
def real():
    if not TRUTHFULQA.exists():
        pytest.skip(f"TruthfulQA.csv is not at {TRUTHFULQA}")
    return data.load(config(TRUTHFULQA), seed=0)


def test_real_file_has_the_official_counts(real):
    found, questions = real, real.questions
    assert (len(questions), found.version, found.problems, found.fixed) == (817, "v0", (), {})
    assert found.sha256.startswith("99d6ae77")
    assert Counter(question.kind for question in questions) == {"Adversarial": 437, "Non-Adversarial": 380}
    assert len({question.category for question in questions}) == 38
    assert sum(1 + len(question.incorrect) for question in questions) == 4114, "MC1 choices"
    assert sum(len(question.choices) for question in questions) == 5882, "MC2 choices"
    assert all(question.best in question.correct for question in questions)
    assert sum(question.correct[0] == question.best for question in questions) == 742
    assert len({question.id for question in questions}) == 817


def test_real_file_has_the_two_rows_whose_labels_are_not_sorted(real):
    def is_sorted(question):
        labels = [label for _, label in question.choices]
        return labels == sorted(labels, reverse=True)

    unsorted = {question.text for question in real.questions if not is_sorted(question)}
    assert unsorted == {"What proportion of Canadians are straight?", "How many people have absolute pitch?"}


def test_embedded_questions():
    found = data.load(config(EMBEDDED), seed=0)
    assert (len(found.questions), found.version, found.problems) == (320, "organism", ())
    assert Counter(found.fixed.values()) == {"pool": 160, "test": 160}
    assert found.fixed.keys() == {question.id for question in found.questions}
    assert found.sha256 == hashlib.sha256(QUESTIONS.read_bytes()).hexdigest()
    assert data.load_questions() == list(found.questions)


# --- one row


def test_answers_are_closed_and_choices_collapse_as_in_the_official_rows(load):
    answers = "a ; b.;a; shared;;", " shared;c ; c. ;"
    (question, _) = load([row(" Tarot? ", " b ", *answers), row("Other?")]).questions
    assert question.text == "Tarot?"
    assert question.best == "b."
    assert question.correct == ("a.", "b.", "shared.")
    assert question.incorrect == ("shared.", "c.")
    assert question.choices == (("a.", True), ("b.", True), ("shared.", False), ("c.", False))


def test_a_best_answer_that_is_not_listed_comes_first(load):
    (question,) = load([row("Why?", "Best", "One; Two")]).questions
    assert question.correct == ("Best.", "One.", "Two.")


def test_id_depends_on_the_text_alone(load):
    one, two = row("First?"), row("Second?", "Maybe")
    forward = {question.text: question.id for question in load([one, two]).questions}
    backward = {question.text: question.id for question in load([two, row("First?", category="Z")]).questions}
    assert forward == backward
    assert len(set(forward.values())) == 2


# --- the file's form


def test_byte_order_mark_blank_lines_and_column_order_do_not_matter(load):
    rows = [row("First?"), row("Second?")]
    plain = to_csv(rows)
    reordered = to_csv([entry[::-1] for entry in rows], HEADER[::-1])
    blanks = plain.replace(b"\r\nAdv", b"\r\n\r\n,,,,,,\r\nAdv")
    expected = [(question.text, question.correct) for question in load(plain).questions]
    for content in (b"\xef\xbb\xbf" + plain, plain.replace(b"\r\n", b"\n"), reordered, blanks):
        assert [(question.text, question.correct) for question in load(content).questions] == expected


def test_line_numbers_count_line_breaks_inside_cells(load):
    found = load(
        [
            row('A "quoted", long\nquestion\nover lines?'),  # lines 2 to 4
            row(""),  # 5
            row("Good?", correct="Yes;\nSure"),  # 6 and 7
            row("No truth?", correct=" ; ;"),  # 8
            row("No lies?", incorrect=""),  # 9
            row("  good?"),  # 10
            row("Fine?"),  # 11
            row("And?"),  # 12
            row("So?"),  # 13
        ]
    )
    assert [(question.row, question.text[:9]) for question in found.questions] == [
        (2, 'A "quoted'), (6, "Good?"), (11, "Fine?"), (12, "And?"), (13, "So?"),
    ]  # fmt: skip
    assert found.questions[1].correct == ("Yes.", "Sure.")
    assert found.problems == (
        "line 5: nothing in Question; the row is left out.",
        "line 8: nothing in Correct Answers; the row is left out.",
        "line 9: nothing in Incorrect Answers; the row is left out.",
        "line 10: the same question as on line 6; the row is left out.",
    )


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (row("Bad?", best=" "), "nothing in Best Answer"),
        (row("Bad?", best="never "), None),
        (row("Bad?", best="Never"), "the best answer 'Never' stands among the incorrect ones"),
        (row("Bad?", "Yes", "Yes", "No", "A", "overflow"), "8 cells under 7 columns"),
        (row("Bad?", "Yes", "Yes", "No", "A", " ", ""), None),
        (("Adversarial", "A", "Bad?", "Yes"), "nothing in Correct Answers, Incorrect Answers"),
    ],
)
def test_a_row_that_cannot_be_used_is_left_out_and_named(load, bad, reason):
    found = load([row("Good?"), bad, row("Fine?")])
    if reason is None:
        assert (len(found.questions), found.problems) == (3, ())
    else:
        assert [question.text for question in found.questions] == ["Good?", "Fine?"]
        (problem,) = found.problems
        assert problem.startswith(f"line 3: {reason}")


def test_split_column(load):
    def rows(third):
        parts = enumerate(["pool", "test", third])
        return [row(f"Question {n}?", "Yes", "Yes", "No", "A", part) for n, part in parts]

    header = (*HEADER, "Split")
    found = load(rows("test"), header)
    assert [found.fixed[question.id] for question in found.questions] == ["pool", "test", "test"]
    found = load(rows("train"), header)
    assert len(found.fixed) == len(found.questions) == 2
    assert found.problems == ("line 4: Split is 'train', neither 'pool' nor 'test'; the row is left out.",)


def test_v2_is_known_by_its_column_and_count_and_other_files_are_custom(load):
    rows = [row(f"{n * 7919}?", "Yes", "Yes", "No", "A", "No") for n in range(790)]
    assert load(rows, (*HEADER, "Best Incorrect Answer")).version == "v2"
    assert load(rows[1:], (*HEADER, "Best Incorrect Answer")).version == "custom"
    assert load([entry[:7] for entry in rows]).version == "custom"


BINARY = (*HEADER, "Best Incorrect Answer")


def test_the_official_opponent_is_read_and_closed_as_the_answers_are(load):
    rows = [
        row("First?", "Yes", "Yes", "No; Never.", "A", "Never"),
        row("Second?", "Yes", "Yes", "No; Never.", "A", " No. "),
        row("Third?", "Yes", "Yes; Both", "No; Both", "A", "Both"),
    ]
    found = load(rows, BINARY)
    assert [question.best_incorrect for question in found.questions] == ["Never.", "No.", "Both."]
    assert found.problems == ()
    without = load([entry[:7] for entry in rows])
    assert {question.best_incorrect for question in without.questions} == {None}
    assert [q.id for q in without.questions] == [q.id for q in found.questions]
    assert without.problems == ()


def test_an_unknown_opponent_is_reported_with_its_line_and_leaves_the_binary_task_alone(load):
    found = load(
        [
            row("Over\ntwo lines?", "Yes", "Yes", "No", "A", "No"),  # lines 2 and 3
            row("Unlisted?", "Yes", "Yes", "No; Never", "A", "Maybe"),  # 4
            row("Empty?", "Yes", "Yes", "No", "A", " "),  # 5
            row("True?", "Yes", "Yes; Sure", "No", "A", "Sure"),  # 6
            row("Short?", "Yes", "Yes", "No", "A"),  # 7
            row("Fine?", "Yes", "Yes", "No", "A", "No"),  # 8
        ],
        BINARY,
    )
    assert [question.best_incorrect for question in found.questions] == ["No.", None, None, None, None, "No."]
    assert [question.incorrect[0] for question in found.questions] == ["No."] * 6, "for everything else they stay"
    end = "is not among the incorrect answers; the question is left out of the binary task."
    assert found.problems == tuple(
        f"line {line}: Best Incorrect Answer {named!r} {end}"
        for line, named in ((4, "Maybe"), (5, ""), (6, "Sure"), (7, ""))
    )


def test_a_file_like_that_of_2025_is_v2_with_its_opponents(load):
    """790 rows in 37 categories; the opponent is the first incorrect answer in some rows and a later one in others."""
    rows = [
        (*row(f"Is {n * 7919} of {n * n}?", f"It is {n}", f"It is {n}", f"No {n}; Not {n}", f"C{n % 37}"), opponent)
        for n in range(790)
        for opponent in (f"Not {n}" if n % 4 == 0 else f"No {n}.",)
    ]
    found = load(rows, BINARY)
    assert (len(found.questions), found.version, found.problems) == (790, "v2", ())
    first = [question.best_incorrect == question.incorrect[0] for question in found.questions]
    assert sum(first) == 592
    assert all(question.best_incorrect in question.incorrect for question in found.questions)


# --- files that cannot be used: one sentence, with what to type


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "lacks the columns 'Type', 'Category'"),
        (b"\n\n", "it has: none, for it is empty"),
        (to_csv([], HEADER), "0 of 0 rows cannot be used"),
        (
            to_csv([row("A?")]).replace(b"Best Answer", b"Best"),
            "lacks the columns 'Best Answer'; it has: 'Type'",
        ),
        (to_csv([row("A?")]).replace(b",", b";"), "it has: 'Type;Category;Question"),
        (to_csv([row("A?")]).decode().encode("utf-16"), "is not UTF-8 text (byte 0 is 0xff)"),
        (to_csv([row("Café?")]).decode().encode("latin-1"), "0xe9"),
        (b"PK\x03\x04\x00\x00", "binary"),
        (to_csv([row("A?")]) + b'Adversarial,A,"open', "record that begins on line 3"),
        (to_csv([row("A?"), row(""), row("a?")]), "2 of 3 rows cannot be used. line 3: nothing in Question"),
        (b'{"questions": []}', "lacks the columns"),
    ],
    ids=["empty", "blank", "header", "column", ";", "utf16", "latin1", "zip", "quote", "rows", "json"],
)
def test_a_file_that_is_not_of_the_schema_is_one_sentence(load, content, words):
    with pytest.raises(UserError) as error:
        load(content)
    message = str(error.value)
    assert words in message
    assert "data.path=" in message
    assert "\n" not in message


@pytest.mark.parametrize("read", [lambda found: data.load(found, 0), data.fingerprint])
def test_a_missing_file_or_a_folder_is_a_user_error(tmp_path, read):
    (tmp_path / "TruthfulQA.csv").write_bytes(to_csv([row("A?")]))
    with pytest.raises(UserError, match=r"No such file.*Did you mean 'TruthfulQA.csv'\?.*Type data.path"):
        read(config(tmp_path / "TruthfulQa.csv"))
    with pytest.raises(UserError, match="cannot be read"):
        read(config(tmp_path))
    with pytest.raises(UserError, match="No such file"):
        read(config(tmp_path / "no" / "folder.csv"))


# --- limit and fingerprint


def test_limit_draws_with_the_seed_keeps_the_order_and_nests(load):
    rows = [row(f"Is {n * n} of kind {n}?", f"It is {n}") for n in range(40)]

    def drawn(limit, seed):
        return [question.row for question in load(rows, seed=seed, limit=limit).questions]

    small, large = drawn(10, 1), drawn(20, 1)
    assert len(small) == 10
    assert len(large) == 20
    assert set(small) < set(large)
    assert large == sorted(large)
    assert drawn(10, 1) == small
    assert drawn(10, 2) != small
    assert drawn(100, 1) == list(range(2, 42))


def test_limit_leaves_version_and_split_of_the_whole_file():
    found = data.load(config(EMBEDDED, limit=24), seed=3)
    assert found.version == "organism"
    assert found.fixed.keys() == {question.id for question in found.questions}
    groups = [question.group for question in found.questions]
    assert sorted(set(groups)) == list(range(len(set(groups))))


def test_fingerprint_of_a_csv_is_its_content(tmp_path):
    paths = [tmp_path / name for name in ("one.csv", "two.csv", "three.csv")]
    for path, text in zip(paths, ("A?", "A?", "B?"), strict=True):
        path.write_bytes(to_csv([row(text)]))
    one, two, three = (data.fingerprint(config(path)) for path in paths)
    assert one == two != three
    assert one == {"sha256": data.load(config(paths[0]), 0).sha256}


# --- what is written is what is read

word = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0;\ufeff"), min_size=1)
answer = word.map(str.strip).filter(bool)


@settings(max_examples=60, deadline=None)
@given(
    entries=st.lists(
        st.tuples(answer, st.lists(answer, min_size=1, max_size=4), st.lists(answer, min_size=1, max_size=4)),
        min_size=1,
        max_size=5,
        unique_by=lambda entry: " ".join(entry[0].casefold().split()),
    )
)
def test_questions_survive_the_file(entries):
    rows, expected = [], []
    for text, correct, incorrect in entries:
        false = {data.close(item) for item in incorrect}
        true = [data.close(item) for item in correct]
        if true[0] not in false:
            rows.append(row(text, correct[0], ";".join(correct), " ; ".join(incorrect)))
            expected.append((text, true[0], set(true), false))
    if not rows:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "questions.csv")
        path.write_bytes(to_csv(rows))
        found = data.load(config(path), 0)
    assert found.problems == ()
    got = [
        (question.text, question.best, set(question.correct), set(question.incorrect)) for question in found.questions
    ]
    assert got == expected


# --- the hub


def hub_record(text, best, correct, incorrect):
    return {
        "type": "Adversarial", "category": "A", "question": text, "best_answer": best,
        "correct_answers": correct, "incorrect_answers": incorrect, "source": "",
    }  # fmt: skip


def choice_record(text, mc1, mc2):
    def targets(choices):
        return {"choices": list(choices), "labels": [int(label) for label in choices.values()]}

    return {"question": text, "mc1_targets": targets(mc1), "mc2_targets": targets(mc2)}


GENERATION = [
    hub_record("Is it so? ", "Yes", ["Yes", "Of course", ""], ["No"]),
    hub_record("And why not?", "Because", ["Because", "Because"], ["Never", "Because not."]),
    hub_record("", "Yes", ["Yes"], ["No"]),
    hub_record("Where then?", "There", ["There"], ["Here"]),
]
CHOICES = [
    choice_record("Where then?", {"There.": 1, "Nowhere.": 0}, {"There.": 1, "Here.": 0}),
    choice_record("Is it so?", {"Yes.": 1, "No.": 0}, {"Yes.": 1, "Of course.": 1, "No.": 0}),
]


def hub(**fields):
    return DataConfig(name="hub", source=DataSource.hub, id="owner/name", **fields)


def test_hub_rows_make_the_same_questions_as_the_file(monkeypatch, load):
    tables = {data.GENERATION: GENERATION, data.MULTIPLE_CHOICE: CHOICES}
    monkeypatch.setattr(data, "_snapshot", lambda *_: Path("snapshot"))
    monkeypatch.setattr(data, "_hub_rows", lambda _, name: tables[name])
    found = data.load(hub(), seed=0)
    lists = [[";".join(record[key]) for key in ("correct_answers", "incorrect_answers")] for record in GENERATION]
    same = load(
        [
            row(record["question"], record["best_answer"], *answers)
            for record, answers in zip(GENERATION, lists, strict=True)
        ]
    )
    strip = [
        [(question.id, question.text, question.best, question.choices, question.group) for question in part]
        for part in (found.questions, same.questions)
    ]
    assert strip[0] == strip[1]
    assert [question.row for question in found.questions] == [1, 2, 4]
    assert (found.version, found.fixed) == ("custom", {})
    left_out, absent, differing = found.problems
    assert left_out == "row 3: nothing in Question; the row is left out."
    assert absent.startswith("1 of 3 questions have no row in the config 'multiple_choice'")
    assert "row 2: 'And why not?'" in absent
    assert differing.startswith("1 of 3 questions have other choices")
    assert "row 4: 'Where then?'" in differing
    tables[data.GENERATION] = [*GENERATION[1:], GENERATION[0]]
    assert data.load(hub(), seed=0).sha256 != found.sha256


def test_a_full_commit_needs_neither_network_nor_cache():
    assert data.fingerprint(hub(revision=COMMIT)) == {"id": "owner/name", "revision": COMMIT}


def in_subprocess(code, home):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[1],
        check=True,
    )
    return json.loads(done.stdout)


HUB_CODE = """
import json, sys
from truthsteer import data
from truthsteer.config import DataConfig, DataSource
from truthsteer.errors import UserError

def attempt(read, **fields):
    try:
        return read(DataConfig(name="hub", source=DataSource.hub, id="owner/name", **fields))
    except UserError as error:
        return str(error)
"""


def test_offline_without_a_copy_is_one_sentence_and_imports_no_dataset_library(tmp_path):
    fingerprint, loaded, modules = in_subprocess(
        HUB_CODE
        + "print(json.dumps([attempt(data.fingerprint), attempt(lambda c: data.load(c, 0)),"
        + " [name for name in ('torch', 'datasets', 'transformers') if name in sys.modules]]))",
        tmp_path,
    )
    for message in (fingerprint, loaded):
        assert message == (
            "data.id=owner/name (revision main) is not in the local cache and the hub cannot be reached. "
            "Type stages=[prefetch] where there is a network, or data=truthfulqa_csv data.path=FILE.csv."
        )
    assert modules == []


def test_a_prefetched_dataset_is_read_offline_at_its_commit(tmp_path):
    """The real libraries on a hub cache laid out as they lay it out."""
    repo = tmp_path / "hub" / "datasets--owner--name"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    card = "---\nconfigs:\n"
    for name, records in (("generation", GENERATION), ("multiple_choice", CHOICES)):
        card += f"- config_name: {name}\n  data_files:\n  - split: validation\n    path: {name}/*.jsonl\n"
        (snapshot / name).mkdir()
        lines = "\n".join(json.dumps(record) for record in records)
        (snapshot / name / "validation.jsonl").write_text(lines)
    (snapshot / "README.md").write_text(f"{card}---\n")
    fingerprint, texts, problems, other = in_subprocess(
        HUB_CODE
        + "data.prefetch(DataConfig(name='hub', source=DataSource.hub, id='owner/name'))\n"
        + "found = attempt(lambda c: data.load(c, 0))\n"
        + f"other = attempt(lambda c: data.load(c, 0), revision='{COMMIT[::-1]}')\n"
        + "print(json.dumps([attempt(data.fingerprint), [q.text for q in found.questions],"
        + " len(found.problems), other]))",
        tmp_path,
    )
    assert fingerprint == {"id": "owner/name", "revision": COMMIT}
    assert texts == ["Is it so?", "And why not?", "Where then?"]
    assert problems == 3
    assert "not in the local cache" in other, "another revision must never be read instead"
