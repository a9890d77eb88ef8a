"""Questions in TruthfulQA's schema, from a CSV file or from the hub, as `records.Question`.

Both sources give the same records: the question stripped, every answer stripped and closed with a full stop,
repeats removed, near-duplicates grouped. A row that cannot be used is left out and reported with its line,
never repaired in silence; a file that is not of this schema is a `UserError`. Neither `load` of a CSV nor
`fingerprint` imports the hub's dataset library.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from truthsteer.config import EMBEDDED, DataConfig, DataSource
from truthsteer.duplicates import group_near_duplicates
from truthsteer.errors import UserError
from truthsteer.files import canonical, file_sha256
from truthsteer.organism import QUESTIONS
from truthsteer.records import Question, Splits
from truthsteer.splits import POOL, TEST
from truthsteer.splits import leaks as leaks
from truthsteer.splits import split as split_questions
from truthsteer.tables import csv_records, decode, read_bytes

TYPE, CATEGORY, QUESTION, BEST = "Type", "Category", "Question", "Best Answer"
CORRECT, INCORRECT = "Correct Answers", "Incorrect Answers"
REQUIRED = (TYPE, CATEGORY, QUESTION, BEST, CORRECT, INCORRECT)
BEST_INCORRECT, SPLIT = "Best Incorrect Answer", "Split"
GENERATION, MULTIPLE_CHOICE = "generation", "multiple_choice"
HUB_COLUMNS = {
    GENERATION: tuple(column.lower().replace(" ", "_") for column in REQUIRED),
    MULTIPLE_CHOICE: ("question", "mc1_targets", "mc2_targets"),
}

VERSIONS = {(817, 38, 2589, 3298): "v0", (817, 38, 2839, 3370): "v1"}
"""TruthfulQA's versions by (questions, categories, true references, false references), repeats included."""
V2_QUESTIONS = 790

_TYPE_A_FILE = "Type data.path=FILE.csv."
_ANOTHER_FILE = "Mend it, or type data=truthfulqa_csv data.path=FILE.csv with another file."


@dataclass(frozen=True)
class QuestionSet:
    """The questions of one source."""

    questions: tuple[Question, ...]
    """In the order of the source; at least one."""
    sha256: str
    """Of the CSV file; for the hub, of the generation rows as canonical JSON."""
    version: str
    """`v0`, `v1` or `v2` of TruthfulQA, `organism` for the embedded questions, else `custom`. A version
    is told by its counts, which an edited wording leaves as they are: the sha256 tells."""
    problems: tuple[str, ...]
    """What was left out or looks wrong, one sentence each, with its line."""
    fixed: dict[str, str]
    """Question id -> `pool` or `test` where the file has a Split column, else empty."""


@dataclass(frozen=True)
class _Row:
    """One record as it stands in the source; its answers are closed, repeats included."""

    number: int
    cells: Mapping[str, str]
    correct: Sequence[str]
    incorrect: Sequence[str]
    fault: str = ""


@dataclass(frozen=True)
class _Table:
    """A whole source; messages call it `name` and its rows `unit`."""

    name: str
    unit: str
    columns: Sequence[str]
    rows: Sequence[_Row]
    sha256: str


def load(config: DataConfig, seed: int) -> QuestionSet:
    """All questions of the source, or `config.limit` of them drawn with the seed, in the order of the source.

    Near-duplicates, version and problems are those of the whole source, whatever the limit.

    Raises:
        UserError: no such file or dataset, not CSV, not UTF-8, a column missing, most rows unusable; for the
            hub, neither a network nor a copy in the local cache.
    """
    if config.source is DataSource.csv:
        choices, table = None, _csv_table(_csv_path(config))
    else:
        folder = _snapshot(config)
        choices, table = _hub_rows(folder, MULTIPLE_CHOICE), _hub_table(folder, f"data.id={config.id}")
    rows, problems = _usable(table)
    version = "organism" if table.sha256 == file_sha256(QUESTIONS) else _version(table.columns, rows)
    questions = [_question(row) for row in rows]
    if choices is not None:
        problems += _check_choices(questions, choices)
    problems += _strange_opponents(table, rows)
    groups = group_near_duplicates(questions)
    drawn = _draw(questions, config.limit, seed)
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups[place] for place in drawn))}
    return QuestionSet(
        questions=tuple(replace(questions[place], group=numbers[groups[place]]) for place in drawn),
        sha256=table.sha256,
        version=version,
        problems=tuple(problems),
        fixed={questions[place].id: rows[place].cells[SPLIT] for place in drawn if SPLIT in table.columns},
    )


def load_questions(path: str = EMBEDDED) -> list[Question]:
    """The questions of a CSV in TruthfulQA's schema, for notebooks: `embedded` are the organism's."""
    return list(load(DataConfig(name="notebook", path=path), seed=0).questions)


def split(questions: QuestionSet, config: DataConfig, seed: int) -> tuple[Splits, ...]:
    """Who is used for what, one for each of `config.folds`: see `truthsteer.splits`."""
    return split_questions(questions.questions, questions.fixed, config, seed)


def fingerprint(config: DataConfig) -> dict[str, str]:
    """What determines the source's content, without loading it: `sha256` of the CSV, or `id` and `revision`.

    The revision is a commit; where the config names one in full, neither network nor cache is needed. `load`
    also depends on `config.limit` and the seed, which are not in the fingerprint.

    Raises:
        UserError: no such file; for the hub, neither a network nor a copy in the local cache.
    """
    if config.source is DataSource.csv:
        path = _csv_path(config)
        content = read_bytes(path, f"data.path={path}", _TYPE_A_FILE)
        return {"sha256": hashlib.sha256(content).hexdigest()}
    revision = config.revision or ""
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        revision = _snapshot(config, "README.md").name
    return {"id": str(config.id), "revision": revision}


def prefetch(config: DataConfig) -> None:
    """Bring a hub dataset to the local cache, for machines without a network. A CSV needs nothing."""
    if config.source is DataSource.hub:
        folder = _snapshot(config)
        for name in HUB_COLUMNS:
            _hub_rows(folder, name)


def close(answer: str) -> str:
    """The answer stripped, with a full stop unless it ends with one: the form that TruthfulQA scores."""
    answer = answer.strip()
    return answer if answer.endswith(".") else answer + "."


def question_id(text: str) -> str:
    """12 hexadecimal digits of the question's text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def question_key(text: str) -> str:
    """Equal for texts that differ in case and spacing alone: the same question."""
    return " ".join(text.casefold().split())


def _close_all(answers: Iterable[str]) -> list[str]:
    return [close(answer) for answer in answers if answer.strip()]


def _csv_path(config: DataConfig) -> Path:
    return QUESTIONS if config.path == EMBEDDED else Path(str(config.path)).expanduser()


def _csv_table(path: Path) -> _Table:
    name = f"data.path={path}"
    content = read_bytes(path, name, _TYPE_A_FILE)
    records = csv_records(decode(content, name, _TYPE_A_FILE), name, _ANOTHER_FILE)
    columns = [cell.strip() for cell in next(records, (0, []))[1]]
    _check_columns(f"The first line of {name}", REQUIRED, columns)
    rows = [_csv_row(line, values, columns) for line, values in records]
    return _Table(name, "line", columns, rows, hashlib.sha256(content).hexdigest())


def _check_columns(name: str, required: Sequence[str], columns: Sequence[str]) -> None:
    missing = [column for column in required if column not in columns]
    if missing:
        present = ", ".join(repr(column[:40]) for column in columns[:20]) or "none, for it is empty"
        raise UserError(f"{name} lacks the columns {', '.join(map(repr, missing))}; it has: {present}. {_ANOTHER_FILE}")


def _csv_row(line: int, values: Sequence[str], columns: Sequence[str]) -> _Row:
    cells = dict.fromkeys(columns, "") | dict(zip(columns, map(str.strip, values), strict=False))
    fault = ""
    if any(value.strip() for value in values[len(columns) :]):
        fault = f"{len(values)} cells under {len(columns)} columns (a comma outside quotation marks?)"
    elif cells.get(SPLIT, POOL) not in (POOL, TEST):
        fault = f"{SPLIT} is {cells[SPLIT]!r}, neither '{POOL}' nor '{TEST}'"
    correct, incorrect = (_close_all(cells[column].split(";")) for column in (CORRECT, INCORRECT))
    return _Row(line, cells, correct, incorrect, fault)


def _usable(table: _Table) -> tuple[list[_Row], list[str]]:
    """The rows that make a question, and a sentence for each row left out; too many of those are an error."""
    kept: dict[str, _Row] = {}
    problems: list[str] = []
    for row in table.rows:
        key = question_key(row.cells[QUESTION])
        fault = row.fault or _fault(row)
        if not fault and key in kept:
            fault = f"the same question as on {table.unit} {kept[key].number}"
        if fault:
            problems.append(f"{table.unit} {row.number}: {fault}; the row is left out.")
        else:
            kept[key] = row
    if 2 * len(problems) > len(table.rows) or not kept:
        raise UserError(
            f"{table.name}: {len(problems)} of {len(table.rows)} rows cannot be used. "
            f"{' '.join([*problems[:3], _ANOTHER_FILE])}"
        )
    return list(kept.values()), problems


def _fault(row: _Row) -> str:
    """Why a row makes no question, or an empty string."""
    values = {
        QUESTION: row.cells[QUESTION],
        BEST: row.cells[BEST],
        CORRECT: row.correct,
        INCORRECT: row.incorrect,
    }
    empty = [column for column, value in values.items() if not value]
    if empty:
        return f"nothing in {', '.join(empty)}"
    if close(row.cells[BEST]) in row.incorrect:
        return f"the best answer {row.cells[BEST]!r} stands among the incorrect ones"
    return ""


def _question(row: _Row) -> Question:
    text, best = row.cells[QUESTION], close(row.cells[BEST])
    return Question(
        id=question_id(text),
        row=row.number,
        kind=row.cells[TYPE],
        category=row.cells[CATEGORY],
        text=text,
        best=best,
        correct=tuple(dict.fromkeys(row.correct if best in row.correct else [best, *row.correct])),
        incorrect=tuple(dict.fromkeys(row.incorrect)),
        best_incorrect=_best_incorrect(row),
    )


def _best_incorrect(row: _Row) -> str | None:
    """The official opponent of the best answer, where the file names one that is among the incorrect answers."""
    named = close(row.cells.get(BEST_INCORRECT, "")) if row.cells.get(BEST_INCORRECT) else None
    return named if named in row.incorrect else None


def _version(columns: Sequence[str], rows: Sequence[_Row]) -> str:
    if BEST_INCORRECT in columns:
        return "v2" if len(rows) == V2_QUESTIONS else "custom"
    categories = {row.cells[CATEGORY] for row in rows}
    true, false = sum(len(row.correct) for row in rows), sum(len(row.incorrect) for row in rows)
    return VERSIONS.get((len(rows), len(categories), true, false), "custom")


def _strange_opponents(table: _Table, rows: Sequence[_Row]) -> list[str]:
    """Sentences on best incorrect answers that cannot be used; those questions have no binary task."""
    if BEST_INCORRECT not in table.columns:
        return []
    return [
        f"{table.unit} {row.number}: {BEST_INCORRECT} {row.cells[BEST_INCORRECT]!r} is not among the incorrect answers; "
        "the question is left out of the binary task."
        for row in rows
        if _best_incorrect(row) is None
    ]


def _draw(questions: Sequence[Question], limit: int | None, seed: int) -> list[int]:
    """Places of a random `limit` of the questions, ascending; a smaller limit draws from a larger one's."""

    def rank(place: int) -> str:
        return hashlib.sha256(f"{seed}/limit/{questions[place].id}".encode()).hexdigest()

    return sorted(sorted(range(len(questions)), key=rank)[:limit])


def _snapshot(config: DataConfig, files: str | None = None) -> Path:
    """The folder of the dataset in the hub cache, downloaded if need be; its name is the commit."""
    from huggingface_hub import snapshot_download

    name = f"data.id={config.id} (revision {config.revision or 'main'})"
    try:
        folder = snapshot_download(str(config.id), repo_type="dataset", revision=config.revision, allow_patterns=files)
    except (FileNotFoundError, ConnectionError) as error:
        raise UserError(
            f"{name} is not in the local cache and the hub cannot be reached. "
            "Type stages=[prefetch] where there is a network, or data=truthfulqa_csv data.path=FILE.csv."
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name} cannot be had from the hub ({type(error).__name__}). Check data.id and data.revision, "
            "and log in with `hf auth login` if it is private."
        ) from error
    return Path(folder)


def _hub_rows(folder: Path, name: str) -> list[dict[str, Any]]:
    """The rows of one config of the dataset, all its parts in their order.

    The dataset is read from its snapshot, not by its id: without a network, `load_dataset(id, revision=...)`
    takes whichever revision was prepared last.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        parts = load_dataset(str(folder), name)
    except (DatasetsError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"data.id has no readable config '{name}' ({reason}). {_ANOTHER_FILE}") from error
    rows = [dict(row) for part in parts.values() for row in part]
    _check_columns(f"data.id, config '{name}',", HUB_COLUMNS[name], list(rows[0]) if rows else [])
    return rows


def _hub_table(folder: Path, name: str) -> _Table:
    records = _hub_rows(folder, GENERATION)
    keys = dict(zip(REQUIRED, HUB_COLUMNS[GENERATION], strict=True))
    rows = [
        _Row(
            number=number,
            cells={column: str(record[keys[column]] or "").strip() for column in REQUIRED[:4]},
            correct=_close_all(record[keys[CORRECT]]),
            incorrect=_close_all(record[keys[INCORRECT]]),
        )
        for number, record in enumerate(records, 1)
    ]
    content = canonical([[record[key] for key in keys.values()] for record in records])
    return _Table(name, "row", REQUIRED, rows, hashlib.sha256(content.encode()).hexdigest())


def _check_choices(questions: Sequence[Question], records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences on questions whose multiple-choice rows differ from what their answers give."""
    official = {str(record["question"]).strip(): record for record in records}
    absent = [question for question in questions if question.text not in official]
    differing = [
        question
        for question in questions
        if question.text in official and not _same_choices(question, official[question.text])
    ]
    verdicts = (("have no row", absent), ("have other choices", differing))
    return [
        f"{len(found)} of {len(questions)} questions {verdict} in the config '{MULTIPLE_CHOICE}'; "
        f"the first is on row {found[0].row}: {found[0].text!r}."
        for verdict, found in verdicts
        if found
    ]


def _same_choices(question: Question, record: Mapping[str, Any]) -> bool:
    mc1 = {question.best: True} | dict.fromkeys(question.incorrect, False)
    return all(
        dict(zip(map(close, record[key]["choices"]), map(bool, record[key]["labels"]), strict=False)) == choices
        for key, choices in (("mc1_targets", mc1), ("mc2_targets", dict(question.choices)))
    )
