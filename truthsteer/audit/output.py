"""What an audit leaves behind: tables for the terminal, and one line of CSV per answer."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truthsteer.audit.labels import Labelled
from truthsteer.audit.measures import ALWAYS, LENGTH
from truthsteer.findings import bounds, change, p_value, value
from truthsteer.records import Verdict
from truthsteer.rendering import cell, visible
from truthsteer.terminal import needed, table

if TYPE_CHECKING:
    from rich.table import Table

Json = Mapping[str, Any]

QUESTION = {"truth": "Is the answer true?", "information": "Is the answer informative?"}
ESTIMATES = {
    "labelled_yes": ("yes by people", "fraction"),
    "judged_yes": ("yes by judge", "fraction"),
    "corrected_yes": ("corrected", "fraction"),
    "accuracy": ("accuracy", "fraction"),
    "kappa": ("kappa", "score"),
    "ac1": ("AC1", "score"),
    "recall_yes": ("recall yes", "fraction"),
    "recall_no": ("recall no", "fraction"),
    "auc": ("AUC", "score"),
    "ece": ("ECE", "score"),
}
"""Estimate -> its heading and unit, in every table."""
OVERVIEW = ("accuracy", "kappa", "ac1", "recall_yes", "recall_no", "auc", "ece")
BREAKDOWN = ("labelled_yes", "judged_yes", "corrected_yes", "accuracy", "kappa", "recall_yes", "recall_no")
OVER = "over length"
LEAST_FIRST = (*(ESTIMATES[name][0] for name in ("ece", "recall_yes", "recall_no", "ac1", "auc")), OVER)
"""The order in which columns leave a table that is too wide for its terminal."""


def write_answers(path: Path, rows: Sequence[Labelled], verdicts: Mapping[str, Sequence[Verdict]]) -> None:
    """One line per answer: the labels, and of every judge its values, probabilities, status and own words. Text that a
    spreadsheet would run as a formula is preceded by a quote mark.
    """
    scores = {judge: sorted({name for verdict in own for name in verdict.scores}) for judge, own in verdicts.items()}
    stated = {judge: {name for verdict in own for name in verdict.probabilities} for judge, own in verdicts.items()}
    header = ["line", "group", "question", "answer", "label", "info_label"]
    for judge, names in scores.items():
        for name in names:
            header += [f"{judge}_{name}", *([f"{judge}_{name}_probability"] if name in stated[judge] else [])]
        header += [f"{judge}_status", f"{judge}_raw"]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for place, row in enumerate(rows):
            cells: list[Any] = [row.line, row.group, row.question.text, row.text, int(row.label)]
            cells.append(None if row.info is None else int(row.info))
            for judge, names in scores.items():
                verdict = verdicts[judge][place]
                for name in names:
                    cells.append(verdict.scores.get(name))
                    cells += [verdict.probabilities.get(name)] if name in stated[judge] else []
                cells += [verdict.status, verdict.raw]
            writer.writerow(cell(item) if isinstance(item, str) else item for item in cells)


def tables(summary: Json, width: int) -> Iterator[Table]:
    """One table on truth, one on information, and below each a breakdown where there are groups.

    Args:
        summary: of `measures.measure`, plain.
        width: columns of the terminal; what does not fit is left out.
    """
    for about in summary["labels"]:
        rows = [row for row in summary["rows"] if row["about"] == about]
        yield _overview(summary, about, rows, width)
        groups = [row for row in rows if row.get("groups") and row["judge"] not in ALWAYS]
        if groups:
            yield _by_group(about, groups, width)


def _overview(summary: Json, about: str, rows: Sequence[Json], width: int) -> Table:
    label = summary["labels"][about]
    title = (
        f"{QUESTION[about]} {label['n']} labelled answers, {label['yes']} yes, "
        f"{summary['clusters']} groups of near-duplicate questions"
    )
    columns = {"judge": [_name(row) for row in rows], "n": [_decided(row) for row in rows]}
    for name in OVERVIEW:
        heading, unit = ESTIMATES[name]
        if any(_there(row.get(name)) for row in rows):
            gone = "withheld" if name == "accuracy" else ""
            columns[heading] = [gone if row["withheld"] else _cell(row[name], unit) for row in rows]
    columns[OVER] = [_over(row) for row in rows]
    caption = f"95% intervals by question. {OVER}: points more often right than the length rule, with paired p"
    return _table(title, caption, columns, rows, lambda row: row["trivial"], width)


def _by_group(about: str, rows: Sequence[Json], width: int) -> Table:
    groups = [(row, group) for row in rows for group in row["groups"]]
    columns = {
        "judge": [f"{_name(row)}\n{visible(group['group']) or '(no group)'}" for row, group in groups],
        "n": [_decided(group) for _, group in groups],
    }
    for name in BREAKDOWN:
        heading, unit = ESTIMATES[name]
        columns[heading] = [_cell(group[name], unit) for _, group in groups]
    caption = "corrected: for the errors that the judge makes in the other groups (Rogan & Gladen)"
    return _table(f"{QUESTION[about]} By group", caption, columns, [row for row, _ in groups], _name, width)


def _table(
    title: str,
    caption: str,
    columns: Mapping[str, Sequence[str]],
    rows: Sequence[Json],
    section: Callable[[Json], Any],
    width: int,
) -> Table:
    """The columns that fit; a line between rows of different sections, and what is no judge dimmed."""
    dim = {place for place, row in enumerate(rows) if row["trivial"]}
    ends = {place for place, pair in enumerate(pairwise(rows)) if section(pair[0]) != section(pair[1])}
    return table(title, caption, _fitting(columns, width), dim, ends)


def _fitting(columns: Mapping[str, Sequence[str]], width: int) -> dict[str, Sequence[str]]:
    """The columns that fit side by side, of which there are always three."""
    shown = dict(columns)
    for name in (*LEAST_FIRST, *reversed(list(columns)[2:])):
        if name in shown and len(shown) > 3 and needed(shown) > width:
            del shown[name]
    return shown


def _name(row: Json) -> str:
    """`semantic_acc`, not `semantic semantic_acc`."""
    judge, metric = row["judge"], row["metric"]
    return visible(metric if metric.startswith(judge) else f"{judge} {metric}".strip())


def _decided(row: Json) -> str:
    return f"{row['n']}\n{row['undecided']} undecided" if row["undecided"] else str(row["n"])


def _there(estimate: Json | None) -> bool:
    return estimate is not None and estimate["value"] is not None


def _cell(estimate: Json, unit: str) -> str:
    interval = bounds(unit, estimate["low"], estimate["high"]).replace(" ", "")
    return f"{value(unit, estimate['value'])}\n{interval}".rstrip()


def _over(row: Json) -> str:
    """How much more often it is right than the length rule is."""
    if row["withheld"] or (row["judge"] == LENGTH and row["trivial"]):
        return ""
    over = row["over_length"]
    interval = bounds("fraction", over["low"], over["high"], sign="+").replace(" ", "")
    p = p_value(over["p"]).replace(" ", "")
    return f"{change('fraction', over['difference'])} {p}\n{interval}".rstrip()
