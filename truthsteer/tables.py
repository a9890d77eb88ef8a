"""Text files that users give: read whole, decoded strictly, and as CSV record by record.

Whatever is wrong is a `UserError`, in which `name` says what the file is to its user (`data.path=FILE.csv`) and `remedy`
what to type instead. Knows no columns.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from truthsteer.errors import UserError, did_you_mean

_SAVE = "Save it as UTF-8 ('CSV UTF-8' in a spreadsheet)."


def read_text(path: Path, name: str, remedy: str) -> str:
    """The text of a UTF-8 file, with or without a byte order mark; line ends as they stand.

    Raises:
        UserError: no such file, not readable, not UTF-8, or binary.
    """
    return decode(read_bytes(path, name, remedy), name, remedy)


def read_bytes(path: Path, name: str, remedy: str) -> bytes:
    """For those who need the file's hash too: a pipe can be read only once.

    Raises:
        UserError: no such file, or not readable.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError) and path.parent.is_dir()
        hint = did_you_mean(path.name, [entry.name for entry in path.parent.iterdir()]) if missing else ""
        raise UserError(f"{name} cannot be read: {error.strerror}. {hint}{remedy}") from error


def decode(content: bytes, name: str, remedy: str) -> str:
    """What `read_text` makes of a file's bytes.

    Raises:
        UserError: not UTF-8, or binary: it holds a NUL.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(  # the codec counts bytes from behind the byte order mark
            f"{name} is not UTF-8 text (byte {error.start} is 0x{error.object[error.start]:02x}). {_SAVE} {remedy}"
        ) from error
    if "\0" in text:
        raise UserError(f"{name} is a binary file, not text. {_SAVE} {remedy}")
    return text


def csv_records(text: str, name: str, remedy: str) -> Iterator[tuple[int, list[str]]]:
    """Every record that is not blank, with the 1-based line it begins on: a quoted cell may hold line breaks.

    Raises:
        UserError: a quotation mark that is not closed, or not doubled inside a quoted cell.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{name} is not CSV at the record that begins on line {line}: {error}. "
                f"Look for a quotation mark that is not closed, or not doubled. {remedy}"
            ) from error
        if any(cell.strip() for cell in cells):
            yield line, cells
