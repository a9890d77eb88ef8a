"""Text files that users give: what is read, and one sentence for whatever cannot be."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truthsteer.errors import UserError
from truthsteer.tables import csv_records, read_text

NAME, REMEDY = "key=FILE", "Type key=OTHER."


def records(text: str) -> list[tuple[int, list[str]]]:
    return list(csv_records(text, NAME, REMEDY))


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_text_is_read_as_it_stands_but_for_the_byte_order_mark(tmp_path, mark):
    path = tmp_path / "a.txt"
    path.write_bytes(f"{mark}Grüße\r\nund\n\n".encode())
    assert read_text(path, NAME, REMEDY) == "Grüße\r\nund\n\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("Grüße".encode("latin-1"), "is not UTF-8 text (byte 2 is 0xfc). Save it as UTF-8"),
        (b"\xef\xbb\xbfab\xfc", "is 0xfc"),
        ("a".encode("utf-16"), "is not UTF-8 text (byte 0 is 0xff)"),
        (b"PK\x03\x04\x00", "is a binary file"),
    ],
)
def test_other_encodings_and_binary_files_are_refused(tmp_path, content, words):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_text(path, NAME, REMEDY)
    assert str(caught.value).startswith(f"{NAME} {words}" if words.startswith("is not") else NAME)
    assert words in str(caught.value)
    assert str(caught.value).endswith(REMEDY)


def test_a_file_that_is_not_there_is_looked_for_under_similar_names(tmp_path):
    (tmp_path / "labels.csv").touch()
    with pytest.raises(UserError, match=r"^key=FILE cannot be read: No such .*Did you mean 'labels\.csv'\? Type key"):
        read_text(tmp_path / "lables.csv", NAME, REMEDY)
    with pytest.raises(UserError, match=r"^key=FILE cannot be read: No such file or directory\. Type key=OTHER\.$"):
        read_text(tmp_path / "no" / "labels.csv", NAME, REMEDY)
    with pytest.raises(UserError, match=r"^key=FILE cannot be read: Is a directory\. Type key=OTHER\.$"):
        read_text(tmp_path, NAME, REMEDY)


def test_records_have_the_line_they_begin_on_and_blank_ones_none():
    text = 'a,b\r\n\r\n"two\r\nlines",x\n , \n"say ""so""",\n'
    assert records(text) == [(1, ["a", "b"]), (3, ["two\r\nlines", "x"]), (6, ['say "so"', ""])]
    assert records("") == []


@pytest.mark.parametrize("text", ['a,b\n\nc,"open\nand on', 'a,b\n\n"not "doubled",d\n'])
def test_a_quotation_mark_that_is_not_closed_is_named_with_its_record(text):
    found = csv_records(text, NAME, REMEDY)
    assert next(found) == (1, ["a", "b"])
    with pytest.raises(
        UserError, match=r"^key=FILE is not CSV at the record that begins on line 3: .* Type key=OTHER\.$"
    ):
        next(found)


CELL = st.text(st.characters(codec="utf-8", exclude_characters="\0"))


@given(st.lists(st.lists(CELL, min_size=1, max_size=4), max_size=5))
def test_what_csv_writes_is_what_is_read(rows):
    file = io.StringIO(newline="")
    csv.writer(file).writerows(rows)
    assert [cells for _, cells in records(file.getvalue())] == [row for row in rows if any(map(str.strip, row))]
