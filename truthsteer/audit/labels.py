"""Answers that people have labelled, from a CSV file. Knows nothing of judges.

Columns, in any order and case (`Best Answer` is `best_answer`):

    question, answer, label                            needed; label 1 or 0, true or false, yes or no: is it true
    info_label                                         whether the answer is informative; empty where nobody said
    best_answer, correct_answers, incorrect_answers    TruthfulQA's references, the last two separated by ";"
    group                                              such as the model that answered; gives a breakdown

A question whose references are not in the file is looked up by its text. A row that cannot be used is left out and
named with its line; an empty answer is kept, since judges meet those too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from truthsteer.data import close, question_id, question_key
from truthsteer.errors import UserError
from truthsteer.records import Question
from truthsteer.tables import csv_records, decode, read_bytes

NEEDED = ("question", "answer", "label")
REFERENCES = ("best_answer", "correct_answers", "incorrect_answers")
OPTIONAL = ("info_label", "group")
KNOWN = (*NEEDED, *REFERENCES, *OPTIONAL)

WORDS = {"1": True, "1.0": True, "true": True, "yes": True, "0": False, "0.0": False, "false": False, "no": False}
"""What a label may be, in any case."""

SHOWN = 3
"""Faults quoted in a message."""

_ANOTHER = "Mend it, or name another file."


@dataclass(frozen=True)
class Labelled:
    """One answer and what people said of it."""

    question: Question
    text: str
    """The answer."""
    label: bool
    """Whether it is true."""
    info: bool | None = None
    """Whether it is informative; None where nobody said."""
    group: str = ""
    line: int = 0
    """1-based line of the record in its file."""


@dataclass(frozen=True)
class LabelFile:
    """What a file holds."""

    name: str
    sha256: str
    rows: tuple[Labelled, ...]
    problems: tuple[str, ...]
    """What was left out, one sentence each, with its line."""
    looked_up: bool
    """Whether references came from elsewhere."""


def read(path: Path, known: Callable[[], Iterable[Question]], source: str) -> LabelFile:
    """The labelled answers of a file.

    Args:
        path: of the CSV.
        known: questions with references; called only if the file lacks some.
        source: what `known` is, for messages.

    Raises:
        UserError: no such file, not CSV in UTF-8, a column missing or twice, some but not all reference columns, more
            than half of the rows unusable, or a question without references that `known` lacks.
    """
    content = read_bytes(path, str(path), "Type the CSV file with the labels first.")
    records = list(csv_records(decode(content, str(path), _ANOTHER), str(path), _ANOTHER))
    columns = _columns([cell for _, cells in records[:1] for cell in cells], path)
    rows: list[tuple[int, dict[str, str], Question | None]] = []
    missing: list[int] = []
    problems: list[str] = []
    for line, cells in records[1:]:
        row = dict.fromkeys(columns, "") | dict(zip(columns, map(str.strip, cells), strict=False))
        fault = _fault(row, cells[len(columns) :])
        if fault:
            problems.append(f"line {line}: {fault}; the row is left out.")
            continue
        if row.get("info_label") and _word(row["info_label"]) is None:
            problems.append(f"line {line}: info_label {row['info_label'][:40]!r} is not yes or no; it is ignored.")
        question = _question(row, line)
        missing += [] if question else [len(rows)]
        rows.append((line, row, question))
    _check(path, len(records) - 1, rows, problems)
    found = _look_up([rows[place][:2] for place in missing], known, path, source)
    filled = [(line, row, question or next(found)) for line, row, question in rows]
    labelled = [
        Labelled(
            question=question,
            text=row["answer"],
            label=bool(_word(row["label"])),
            info=_word(row.get("info_label", "")),
            group=row.get("group", ""),
            line=line,
        )
        for line, row, question in filled
    ]
    return LabelFile(path.name, hashlib.sha256(content).hexdigest(), tuple(labelled), tuple(problems), bool(missing))


def _word(cell: str) -> bool | None:
    return WORDS.get(cell.casefold())


def _columns(header: Sequence[str], path: Path) -> list[str]:
    """The names of the columns in their one form; unknown ones are kept and not read."""
    columns = ["_".join(cell.strip().casefold().split()) for cell in header]
    missing = [name for name in NEEDED if name not in columns]
    if missing:
        there = ", ".join(repr(name[:40]) for name in columns[:20]) or "none, for it is empty"
        raise UserError(
            f"The first line of {path} lacks the columns {', '.join(missing)}; it has: {there}. "
            f"Name them {', '.join(NEEDED)} (label: is the answer true, 1 or 0)."
        )
    twice = [name for name in KNOWN if columns.count(name) > 1]
    if twice:
        raise UserError(f"The first line of {path} has the column {twice[0]} twice. Remove or rename one.")
    present = [name for name in REFERENCES if name in columns]
    if present and len(present) < len(REFERENCES):
        absent = ", ".join(name for name in REFERENCES if name not in present)
        raise UserError(
            f"{path} has the column {', '.join(present)} but not {absent}, and references are all three. Add what is "
            "missing, or leave all three out and type data=... so that questions are looked up."
        )
    return columns


def _fault(row: Mapping[str, str], beyond: Sequence[str]) -> str:
    """Why a row cannot be used, or an empty string."""
    if any(cell.strip() for cell in beyond):
        return f"{len(beyond)} cells more than columns (a comma outside quotation marks?)"
    if not row["question"]:
        return "no question"
    if _word(row["label"]) is None:
        return f"label {row['label'][:40]!r} is not 1 or 0, true or false, yes or no"
    filled = [name for name in REFERENCES if row.get(name, "").strip("; ")]
    if filled and len(filled) < len(REFERENCES):
        return f"references without {', '.join(name for name in REFERENCES if name not in filled)}"
    return ""


def _check(path: Path, total: int, rows: Sequence[object], problems: Sequence[str]) -> None:
    lost = total - len(rows)
    if not rows or 2 * lost > total:
        said = " ".join(problems[:SHOWN]) or "It holds nothing below its first line."
        raise UserError(f"{path}: {lost} of {total} rows cannot be used. {said} {_ANOTHER}")


def _question(row: Mapping[str, str], line: int) -> Question | None:
    """The question with the row's own references; None where it has none."""
    if not row.get("best_answer"):
        return None
    best = close(row["best_answer"])
    correct, incorrect = (
        tuple(dict.fromkeys(close(answer) for answer in row[name].split(";") if answer.strip()))
        for name in REFERENCES[1:]
    )
    text = row["question"]
    return Question(
        id=question_id(text),
        row=line,
        kind="",
        category="",
        text=text,
        best=best,
        correct=correct if best in correct else (best, *correct),
        incorrect=incorrect,
    )


def _look_up(
    rows: Sequence[tuple[int, Mapping[str, str]]], known: Callable[[], Iterable[Question]], path: Path, source: str
) -> Iterator[Question]:
    """The known question of each row, by its text whatever its case and spacing."""
    if not rows:
        return iter(())
    questions = {question_key(question.text): question for question in known()}
    strange = [(line, row["question"]) for line, row in rows if question_key(row["question"]) not in questions]
    if strange:
        line, text = strange[0]
        others = f" ({len(strange)} such rows)" if len(strange) > 1 else ""
        raise UserError(
            f"{path} line {line}: the question {text[:80]!r} has no references and is not among the questions of "
            f"{source}{others}. Add the columns {', '.join(REFERENCES)}, or type the data that has it: "
            "data=truthfulqa_csv data.path=FILE.csv."
        )
    return iter([questions[question_key(row["question"])] for _, row in rows])
