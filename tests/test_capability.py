"""Capability questions: reading their CSV, and what counts as correct."""

from __future__ import annotations

import csv
import io
from string import ascii_uppercase

import pytest
import torch
from conftest import build
from hypothesis import given
from hypothesis import strategies as st

from truthsteer.capability import Item, correct, read
from truthsteer.config import PromptConfig
from truthsteer.errors import UserError
from truthsteer.model import LanguageModel
from truthsteer.prompts import Prompts
from truthsteer.scoring import score

HEADER = "question,A,B,C,D,answer\n"
ROWS = (
    HEADER + 'How many legs has a stool?,"Two, or so",Three,Ninety,None,B\nWhich is a tool?,hammer,pear,rain,song,a\n'
)


@pytest.fixture
def write(tmp_path):
    def to_file(content: str | bytes, name: str = "questions.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return to_file


def test_mmlus_layout(write):
    first, second = read(write("\ufeff" + ROWS))[0]
    assert (first.text, first.choices, first.answer) == (
        "How many legs has a stool?",
        ("Two, or so", "Three", "Ninety", "None"),
        1,
    )
    assert second.answer == 0
    assert first.id != second.id


def test_columns_may_stand_in_any_order_and_others_are_ignored(write):
    path = write(
        "subject,Answer,D,C,B,A,N,Question,E\nx,D,4,3,2,1,7,What?,5\nx,E,4,3,2,1,7,Who?,5\nx,B,4,3,2,1,7,When?,\n"
    )
    items = read(path)[0]
    assert [(item.text, item.choices, item.answer) for item in items] == [
        ("What?", ("1", "2", "3", "4", "5"), 3),
        ("Who?", ("1", "2", "3", "4", "5"), 4),
        ("When?", ("1", "2", "3", "4"), 1),
    ]


def test_a_questions_id_is_that_of_its_content(write):
    before = read(write(ROWS))[0]
    after = read(write(HEADER + "Another?,1,2,3,4,A\n" + ROWS.removeprefix(HEADER)))[0]
    assert [item.id for item in after[1:]] == [item.id for item in before]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("What?,1,,3,4,A", "nothing in B"),
        (",1,2,3,4,A", "nothing in question"),
        ("What?,1,2,3,4,", "nothing in answer"),
        ("What?,1,2,3", "nothing in D, answer"),
        ("What?,1,2,3,4,F", "the answer is 'F', none of A, B, C, D"),
        ("What?,1,2,3,4,2", "the answer is '2', none of A, B, C, D"),
        ("What?,1,2,3,4,5,A", "7 cells under 6 columns"),
        ("What?,1,1,3,4,A", "the right answer '1' stands there twice"),
        ("Good?,1,2,3,4,B", "the same question and choices as on line 2"),
    ],
)
def test_a_row_that_cannot_be_used_is_left_out_with_its_line(write, row, problem):
    path = write(HEADER + 'Good?,1,2,3,4,A\n\n"Good,\ntoo?",1,2,3,4,D\n' + row + "\nGood as well?,1,1,3,4,C\n")
    items, problems = read(path)
    assert [item.text for item in items] == ["Good?", "Good,\ntoo?", "Good as well?"]
    assert len(problems) == 1
    assert problems[0].startswith(f"line 6: {problem}")
    assert read(path)[0] == items


def test_a_gap_before_a_later_choice_is_a_fault(write):
    _, problems = read(write("question,A,B,C,D,E,F,answer\nWhat?,1,2,3,4,,6,F\nWho?,1,2,3,4,5,6,F\n"))
    assert problems == ("line 2: nothing in E; the row is left out.",)


def test_mostly_bad_rows_are_an_error(write):
    with pytest.raises(
        UserError, match=r"2 of 3 rows cannot be used\. line 3: nothing in C.*gauge\.capability=FILE\.csv"
    ):
        read(write(HEADER + "A?,1,2,3,4,A\nB?,1,2,,4,A\nC?,1,2,3,4,Z\n"))[0]
    assert len(read(write(HEADER + "A?,1,2,3,4,A\nB?,1,2,,4,A\n"))[0]) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"lacks the columns 'question', 'A'.*MMLU's own files come without that line"),
        (ROWS.removeprefix(HEADER), r"lacks the columns .*put it above them"),
        ("question,A,B,answer\nx,1,2,A\n", r"lacks the columns 'C', 'D'\."),
        (HEADER, "0 of 0 rows cannot be used"),
        (HEADER + '"What?,1,2,3,4,A\n', "not CSV at the record that begins on line 2"),
        ("question,A,B,C,D,answer\nM\xfcll?,1,2,3,4,A\n".encode("latin-1"), r"not UTF-8 text \(byte 25 is 0xfc\)"),
    ],
)
def test_files_of_another_kind_are_refused(write, content, message):
    with pytest.raises(UserError, match=message):
        read(write(content))[0]


def test_a_misspelt_file_is_named(write):
    path = write(ROWS)
    with pytest.raises(UserError, match=r"gauge\.capability=.*Did you mean 'questions\.csv'"):
        read(path.with_name("question.csv"))[0]


CELL = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).map(str.strip).filter(bool)


@given(
    st.lists(st.tuples(CELL, st.lists(CELL, min_size=4, max_size=7, unique=True), st.data()), min_size=1, max_size=4)
)
def test_what_csv_writes_is_what_is_read(tmp_path_factory, rows):
    """Of each row its right place is drawn; repeated rows are read once."""
    letters = ascii_uppercase[:7]
    places = [data.draw(st.integers(0, len(choices) - 1)) for _, choices, data in rows]
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["question", *letters, "answer"])
    expected = {}
    for (text, choices, _), place in zip(rows, places, strict=True):
        writer.writerow([text, *choices, *[""] * (7 - len(choices)), letters[place]])
        expected.setdefault((text, tuple(choices)), place)
    path = tmp_path_factory.mktemp("csv") / "q.csv"
    path.write_bytes(file.getvalue().encode())
    if 2 * len(expected) >= len(rows):
        assert {(item.text, item.choices): item.answer for item in read(path)[0]} == expected


def test_correct_by_sum_and_by_character():
    item = Item("x", "What?", ("a", "abcd", "ab"), 1)
    assert correct(item, [-1.0, -2.0, -3.0]) == (0.0, 1.0)
    assert correct(item, [-9.0, -8.5, -10.0]) == (1.0, 1.0)
    assert correct(item, [-0.1, -8.0, -9.0]) == (0.0, 0.0)
    assert correct(Item("x", "What?", ("abcd", "a"), 1), [-3.0, -2.0]) == (1.0, 0.0)


@pytest.mark.parametrize("answer", [0, 1])
def test_a_tie_is_wrong_wherever_it_stands(answer):
    assert correct(Item("x", "What?", ("ab", "cd", "ef"), answer), [-1.0, -1.0, -5.0]) == (0.0, 0.0)


def test_a_choice_is_scored_as_the_answer_to_the_runs_prompt(write, tokenizer):
    """The way a run scores them, against a plain forward pass."""
    lm = LanguageModel(build("gemma3"), tokenizer)
    prompts = Prompts(PromptConfig(name="p", text="Q: {question}\nA:", chat_text="{question}"), tokenizer, chat=False)
    items = read(write(ROWS))[0]
    branches = prompts.branches([item.text for item in items], [item.choices for item in items])
    logprobs = {(one.branch, one.continuation): one.logprob for _, rows in score(lm, branches, [None]) for one in rows}
    for place, item in enumerate(items):
        context = tokenizer(f"Q: {item.text}\nA:").input_ids
        expected = []
        for choice in item.choices:
            ids = tokenizer(f"Q: {item.text}\nA: {choice}").input_ids
            logp = lm.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            expected.append(sum(float(logp[at - 1, ids[at]]) for at in range(len(context), len(ids))))
        found = [logprobs[place, index] for index in range(len(item.choices))]
        assert found == pytest.approx(expected, rel=1e-4)
        assert correct(item, found) == correct(item, expected)
