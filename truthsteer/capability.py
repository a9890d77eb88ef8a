"""Multiple-choice questions of capability, to see what steering costs: MMLU's CSV layout, or any other set in it.

A question is asked in the run's prompt and every choice's text is scored as its answer: the cloze form, as
lm-evaluation-harness scores ARC or HellaSwag. It shows no letters, so that its accuracy on MMLU's questions is not the
number known as MMLU, which is a choice between letters. Choices are scored as they stand, without a full stop added.

It knows no models: log-probabilities come from `scoring.score`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from string import ascii_uppercase

from truthsteer.errors import UserError
from truthsteer.tables import csv_records, read_text

REQUIRED = ("question", "A", "B", "C", "D", "answer")
_LAYOUT = f"Its first line must be {','.join(REQUIRED)}; MMLU's own files come without that line: put it above them."
_ANOTHER = "Type gauge.capability=FILE.csv, or leave it out."


@dataclass(frozen=True)
class Item:
    """One question."""

    id: str
    """12 hexadecimal digits of question and choices."""
    text: str
    choices: tuple[str, ...]
    """Two or more."""
    answer: int
    """Place of the right one among the choices."""


def read(path: str | Path) -> tuple[tuple[Item, ...], tuple[str, ...]]:
    """The questions of a CSV, in its order, and a sentence with its line for each row that is left out.

    The columns are question, A, B, C, D, perhaps E and so on, and answer, a letter; others are ignored. Choices from E on
    may be empty.

    Raises:
        UserError: no such file, not UTF-8, not CSV, a column missing, or more than half of the rows unusable.
    """
    where = Path(path).expanduser()
    name = f"gauge.capability={where}"
    records = csv_records(read_text(where, name, _ANOTHER), name, _ANOTHER)
    columns = [_column(cell) for cell in next(records, (0, []))[1]]
    missing = [column for column in REQUIRED if column not in columns]
    if missing:
        raise UserError(f"{name} lacks the columns {', '.join(map(repr, missing))}. {_LAYOUT} {_ANOTHER}")
    letters = list(takewhile(columns.__contains__, ascii_uppercase))
    kept: dict[str, Item] = {}
    first: dict[str, int] = {}
    problems: list[str] = []
    for line, values in records:
        found = _item(values, columns, letters)
        if isinstance(found, Item) and found.id in kept:
            found = f"the same question and choices as on line {first[found.id]}"
        if isinstance(found, str):
            problems.append(f"line {line}: {found}; the row is left out.")
        else:
            kept[found.id], first[found.id] = found, line
    if len(problems) > len(kept) or not kept:
        shown = " ".join(problems[:3])
        raise UserError(
            f"{name}: {len(problems)} of {len(problems) + len(kept)} rows cannot be used. {shown} Mend it. {_ANOTHER}"
        )
    return tuple(kept.values()), tuple(problems)


def correct(item: Item, logprobs: Sequence[float]) -> tuple[float, float]:
    """1 or 0: whether the right choice has the highest log-probability, and the highest one per character.

    These are lm-evaluation-harness's `acc` and `acc_norm`, but for ties, which are wrong here wherever they stand.

    Args:
        item: the question.
        logprobs: of each choice, summed over its tokens; finite.
    """
    per_char = [value / len(choice) for value, choice in zip(logprobs, item.choices, strict=True)]
    return _alone_at_the_top(logprobs, item.answer), _alone_at_the_top(per_char, item.answer)


def _alone_at_the_top(values: Sequence[float], place: int) -> float:
    return float(all(values[place] > value for other, value in enumerate(values) if other != place))


def _column(cell: str) -> str:
    name = cell.strip()
    return name.upper() if len(name) == 1 else name.casefold()


def _item(values: Sequence[str], columns: Sequence[str], letters: Sequence[str]) -> Item | str:
    """The question of a row, or why there is none."""
    if any(value.strip() for value in values[len(columns) :]):
        return f"{len(values)} cells under {len(columns)} columns (a comma outside quotation marks?)"
    cells = dict.fromkeys(columns, "") | dict(zip(columns, map(str.strip, values), strict=False))
    given = [letter for letter in letters if cells[letter]]
    must = [column for column in (*REQUIRED, *letters[: len(given)]) if not cells[column]]
    if must:
        return f"nothing in {', '.join(dict.fromkeys(must))}"
    answer = cells["answer"].upper()
    if answer not in given:
        return f"the answer is {cells['answer']!r}, none of {', '.join(given)}"
    choices = tuple(cells[letter] for letter in given)
    if choices.count(cells[answer]) > 1:
        return f"the right answer {cells[answer]!r} stands there twice"
    identity = "\0".join((cells["question"], *choices))
    return Item(hashlib.sha256(identity.encode()).hexdigest()[:12], cells["question"], choices, given.index(answer))
