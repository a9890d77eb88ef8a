"""The report: from every condition's rows to numbers with their evidence, files, figures and one page.

It knows no model. What it writes (`summary.json`, `metrics.csv`, `answers.csv`, `figures/`, `report.html`)
holds no times, hosts or paths of its own and is the same, byte for byte, for the same `Results` and seed.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from truthsteer import figures, metrics, rendering
from truthsteer.files import write_json
from truthsteer.metrics import Scores
from truthsteer.records import ConditionKind, Question
from truthsteer.rendering import table
from truthsteer.results import Results
from truthsteer.summary import plain, scores_of, summarise

__all__ = ["Results", "run", "table"]

EXAMPLES = 4
"""Answers shown of each sort (fixed, broken), drawn with the seed, not picked."""

SHOWN = 600
"""Characters of an answer shown on the page; answers.csv has all."""


FILES = ("summary.json", "metrics.csv", "answers.csv", "report.html")
"""What a whole report has, besides its figures."""


def run(results: Results, folder: Path, seed: int) -> dict[str, Any]:
    """Write the whole report into `folder` and return what stands in summary.json.

    Args:
        results: every condition's rows.
        folder: exists already; files of an earlier report in it are replaced.
        seed: of bootstrap, permutation test and the draw of examples.

    Raises:
        ValueError: rows do not fit the questions, or a log-probability is not finite.
    """
    results.check()
    columns = metrics.judge_columns([row.verdicts for row in results.rows])
    scores = scores_of(results, columns)
    summary = summarise(results, scores, columns, seed)
    write_json(folder / "summary.json", summary)
    rendering.write_metrics(folder / "metrics.csv", summary)
    _write_answers(folder / "answers.csv", results, scores)
    drawn = figures.draw(summary)
    (folder / "figures").mkdir(exist_ok=True)
    for old in (folder / "figures").glob("*.svg"):
        old.unlink()
    for figure in drawn:
        (folder / "figures" / f"{figure.name}.svg").write_text(figure.svg, encoding="utf-8")
    examples = _examples(results, scores, summary, seed)
    page = rendering.page(summary, results.config, results.record, drawn, examples)
    (folder / "report.html").write_text(page, encoding="utf-8")
    return summary


def _write_answers(path: Path, results: Results, scores: Sequence[Scores]) -> None:
    """One row per condition and question. Text that a spreadsheet would run as a formula is preceded by a
    quote mark.
    """
    judged = {
        judge: sorted(
            {name for row in results.rows for verdict in row.verdicts.get(judge, ()) for name in verdict.scores}
        )
        for judge in dict.fromkeys(judge for row in results.rows for judge in row.verdicts)
    }
    header = ["condition", "question_id", "category", "type", "question", "answer", "stop_reason", "tokens"]
    header += [f"{judge}_{name}" for judge, names in judged.items() for name in (*names, "status")]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*header, "mc1", "mc2", "mc3"])
        for row, own in zip(results.rows, scores, strict=True):
            answers = {completion.question: completion for completion in row.completions}
            verdicts = {judge: {v.question: v for v in rows} for judge, rows in row.verdicts.items()}
            for place, question in enumerate(results.questions):
                answer = answers.get(question.id)
                cells: list[Any] = [row.name, question.id, question.category, question.kind, question.text]
                cells += [answer.text, answer.stop_reason, answer.tokens] if answer else ["", "", ""]
                for judge, names in judged.items():
                    verdict = verdicts.get(judge, {}).get(question.id)
                    cells += [plain(verdict.scores.get(name)) if verdict else None for name in names]
                    cells.append(verdict.status if verdict else "")
                cells += [plain(float(own[name][place])) if name in own else None for name in ("mc1", "mc2", "mc3")]
                writer.writerow(rendering.cell(cell) if isinstance(cell, str) else cell for cell in cells)


def _examples(
    results: Results, scores: Sequence[Scores], summary: Mapping[str, Any], seed: int
) -> list[dict[str, Any]]:
    """Per chosen condition, some answers that it fixed and some that it broke, beside the baseline's."""
    lead, found = summary["lead"], []
    before = {completion.question: completion.text for completion in results.rows[0].completions}
    for place, (row, own) in enumerate(zip(results.rows, scores, strict=True)):
        after = {completion.question: completion.text for completion in row.completions}
        if row.kind is not ConditionKind.CHOSEN or lead not in own or not (before and after):
            continue
        random = np.random.default_rng([seed, 2])
        for word, sign in (("fixed", 1), ("broken", -1)):
            changed = np.flatnonzero(sign * (own[lead] - scores[0][lead]) > 0)
            drawn = np.sort(random.permutation(changed)[:EXAMPLES])
            pairs = [_pair(results.questions[index], before, after) for index in drawn]
            name = summary["conditions"][place]["name"]
            found.append({"condition": name, "word": word, "n": len(changed), "pairs": pairs})
    return found


def _pair(question: Question, before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, Any]:
    sides = {"before": before.get(question.id, ""), "after": after.get(question.id, "")}
    return {"question": question.text, "best": question.best} | {side: _shown(text) for side, text in sides.items()}


def _shown(text: str) -> dict[str, Any]:
    return {"text": rendering.visible(text[:SHOWN]), "more": max(0, len(text) - SHOWN)}
