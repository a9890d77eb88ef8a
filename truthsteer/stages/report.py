"""The report: from every condition's rows to numbers with their evidence, files, figures and one page.

It knows no model. What it writes (`summary.json`, `metrics.csv`, `answers.csv`, `figures/`, `report.html`)
holds no times, hosts or paths of its own and is the same, byte for byte, for the same `Results` and seed.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from truthsteer import figures, findings, metrics, rendering, stats
from truthsteer.metrics import HEADLINE, Scores
from truthsteer.records import Choice, Completion, ConditionKind, Question, Verdict
from truthsteer.rendering import table
from truthsteer.store import write_json

__all__ = ["Results", "Row", "run", "table"]

EXAMPLES = 4
"""Answers shown of each sort (fixed, broken), drawn with the seed, not picked."""

SHOWN = 600
"""Characters of an answer shown on the page; answers.csv has all."""


FILES = ("summary.json", "metrics.csv", "answers.csv", "report.html")
"""What a whole report has, besides its figures."""


@dataclass(frozen=True)
class Row:
    """One row of the table: a condition, pooled over folds."""

    name: str
    kind: ConditionKind
    method: str
    """The method whose vector, or whose control, it is; empty for the baseline."""
    layers: tuple[int, ...]
    """Distinct, over folds; empty for the baseline."""
    coefficients: tuple[float, ...]
    choices: list[Choice]
    completions: list[Completion]
    verdicts: dict[str, list[Verdict]]
    """Judge -> one verdict per completion. The first judge that scores `true` fills the table."""


@dataclass(frozen=True)
class Results:
    """Everything that a report is made from."""

    name: str
    """Of the run folder."""
    config: dict[str, Any]
    """Resolved, plain, without secrets."""
    questions: tuple[Question, ...]
    """The test questions of all folds, each once."""
    rows: tuple[Row, ...]
    """The baseline first."""
    banks: tuple[dict[str, Any], ...]
    """`bank.json` of each fold."""
    data: dict[str, Any]
    """`sha256`, `version`, `n`, `problems` (sentences), `leaks` (near-duplicates across roles), `sizes`
    (role -> n).
    """
    record: dict[str, Any] = field(default_factory=dict)
    """Shown on the page and nowhere else: overrides, code, device. `facts.merged_answers` becomes a warning there."""


def run(results: Results, folder: Path, seed: int) -> dict[str, Any]:
    """Write the whole report into `folder` and return what stands in summary.json.

    Args:
        results: every condition's rows.
        folder: exists already; files of an earlier report in it are replaced.
        seed: of bootstrap, permutation test and the draw of examples.

    Raises:
        ValueError: rows do not fit the questions, or a log-probability is not finite.
    """
    _check(results)
    columns = metrics.judge_columns([row.verdicts for row in results.rows])
    scores = [_scores(row, columns, results.questions) for row in results.rows]
    summary = _summarise(results, scores, columns, seed)
    write_json(folder / "summary.json", summary)
    rendering.write_metrics(folder / "metrics.csv", summary)
    _write_answers(folder / "answers.csv", results, scores)
    drawn = figures.draw(summary)
    (folder / "figures").mkdir(exist_ok=True)
    for figure in drawn:
        (folder / "figures" / f"{figure.name}.svg").write_text(figure.svg, encoding="utf-8")
    examples = _examples(results, scores, summary, seed)
    page = rendering.page(summary, results.config, results.record, drawn, examples)
    (folder / "report.html").write_text(page, encoding="utf-8")
    return summary


def _check(results: Results) -> None:
    known = {question.id for question in results.questions}
    if not results.rows or results.rows[0].kind is not ConditionKind.BASELINE:
        raise ValueError("The first row of a report must be the baseline.")
    for row in results.rows:
        answered = [completion.question for completion in row.completions]
        judged = {judge: [verdict.question for verdict in verdicts] for judge, verdicts in row.verdicts.items()}
        strangers = ({choice.question for choice in row.choices} | set(answered)) - known
        if strangers or len(set(answered)) < len(answered):
            raise ValueError(f"condition {row.name}: unknown or repeated questions, such as {min(strangers | {''})!r}.")
        for judge, questions in judged.items():
            if questions != answered:
                raise ValueError(f"condition {row.name}: the verdicts of {judge} are not one per completion, in order.")


def _scores(row: Row, columns: Mapping[str, tuple[str, str]], questions: Sequence[Question]) -> Scores:
    ids = [question.id for question in questions]
    scores = metrics.choice_scores(row.choices, ids)
    scores["length"] = metrics.lengths(row.completions, ids)
    return scores | metrics.judge_scores(row.verdicts, columns, ids)


def _summarise(
    results: Results, scores: Sequence[Scores], columns: Mapping[str, tuple[str, str]], seed: int
) -> dict[str, Any]:
    clusters = np.array([question.group for question in results.questions])
    names = [name for name in dict.fromkeys((*HEADLINE, *columns)) if _exists(name, scores)]
    lead = next((name for name in ("true", "mc1", *names) if name in names), None)
    if lead is None:
        raise ValueError("Nothing was measured: the rows hold neither log-probabilities nor answers.")
    unit = results.config.get("steering", {}).get("coefficient_unit", "residual_norm")
    summary: dict[str, Any] = {
        "name": results.name,
        "model": str(results.config.get("model", {}).get("name", "")),
        "dataset": str(results.config.get("data", {}).get("name", "")),
        "seed": seed,
        "n": len(results.questions),
        "clusters": len(np.unique(clusters)),
        "folds": max(1, len(results.banks)),
        "unit": "residual norms" if unit == "residual_norm" else "times the raw vector",
        "lead": lead,
        "metrics": names,
        "units": {name: _unit(name, scores) for name in names},
        "judges": {name: judge for name, (judge, _) in columns.items()},
        "conditions": _conditions(results, scores, names, clusters, seed),
        "categories": _categories(results, scores, lead, clusters, seed),
        "selection": _selection(results.banks),
        "spread": [
            {"fold": bank["fold"], "method": method} | {key: item["spread"][key] for key in _SPREAD}
            for bank in results.banks
            for method, item in bank["methods"].items()
            if item.get("spread")
        ],
        "pairs": [{"fold": bank["fold"], **bank["pairs"]} for bank in results.banks],
        "proof": [{"fold": bank["fold"], **bank["proof"]} for bank in results.banks if bank.get("proof")],
        "data": results.data,
    }
    summary = _plain(summary)
    return summary | {"verdict": findings.verdict(summary), "warnings": findings.warnings(summary)}


_SPREAD = ("subsets", "mean_cosine", "min_cosine")


def _unit(name: str, scores: Sequence[Scores]) -> str:
    """`fraction` (of questions, or of probability), `words`, or `score` on a judge's own scale."""
    if name == "length":
        return "words"
    fraction = name in ("mc2", "mc3") or _binary(name, scores)
    return "fraction" if fraction else "score"


def _binary(name: str, scores: Sequence[Scores]) -> bool:
    return metrics.is_binary(name, np.concatenate([row[name] for row in scores]))


def _exists(name: str, scores: Sequence[Scores]) -> bool:
    return any(name in row and bool(np.isfinite(row[name]).any()) for row in scores)


def _conditions(
    results: Results, scores: Sequence[Scores], names: Sequence[str], clusters: np.ndarray, seed: int
) -> list[dict[str, Any]]:
    binary = {name: _binary(name, scores) for name in names}
    conditions = []
    for place, (row, own) in enumerate(zip(results.rows, scores, strict=True)):
        measured = {name: _interval(name, own[name], clusters, binary[name]) for name in names}
        compared = stats.compare_all({n: own[n] for n in names}, scores[0], clusters, seed) if place else {}
        conditions.append(
            {
                "name": row.name,
                "kind": str(row.kind),
                "method": row.method,
                "layers": list(row.layers),
                "coefficients": list(row.coefficients),
                "metrics": {name: _evidence(measured[name], compared.get(name)) for name in names},
                "ties": int(np.nansum(own["ties"])),
                "statuses": {judge: _count(v.status for v in rows) for judge, rows in row.verdicts.items()},
                "undecided": {judge: _undecided(rows) for judge, rows in row.verdicts.items()},
                "stop_reasons": _count(completion.stop_reason for completion in row.completions),
            }
        )
    return conditions


def _interval(name: str, values: np.ndarray, clusters: np.ndarray, binary: bool) -> stats.Interval:
    """The interval; a share's ends where shares end (a t interval knows no bounds)."""
    found = stats.interval(values, clusters, binary)
    shares = name in HEADLINE and name != "length"
    return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0)) if shares else found


def _evidence(found: stats.Interval, compared: stats.Difference | None) -> dict[str, Any]:
    """One cell of the table; the baseline has no difference to itself."""
    paired = asdict(compared) if compared else {}
    return asdict(found) | {
        "difference": paired.get("difference"),
        "difference_low": paired.get("low"),
        "difference_high": paired.get("high"),
        **{key: paired.get(key) for key in ("p", "mcnemar_p", "fixed", "broken")},
    }


def _undecided(verdicts: Sequence[Verdict]) -> int:
    return sum(None in verdict.scores.values() for verdict in verdicts)


def _count(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _categories(
    results: Results, scores: Sequence[Scores], lead: str, clusters: np.ndarray, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Method -> what its chosen condition changed in all questions, in each type and in each category."""
    questions = results.questions
    members = {("all", "All questions"): np.ones(len(questions), bool)}
    for level, labels in (
        ("type", [q.kind for q in questions]),
        ("category", [q.category for q in questions]),
    ):
        members |= {(level, name): np.array(labels) == name for name in sorted(set(labels))}
    found: dict[str, list[dict[str, Any]]] = {}
    for row, own in zip(results.rows, scores, strict=True):
        if row.kind is ConditionKind.CHOSEN:
            items = []
            for (level, name), used in members.items():
                pair = (own[lead][used], scores[0][lead][used])
                result = stats.compare(*pair, clusters[used], seed, resamples=2000)
                if result.n:
                    items.append({"level": level, "name": rendering.visible(name), **asdict(result)})
            items.sort(key=lambda item: (_LEVELS.index(item["level"]), -item["difference"], item["name"]))
            found[row.method] = items
    return found


_LEVELS = ("all", "type", "category")


def _selection(banks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Method -> the tune split's grid, averaged over folds, and what each fold chose from its own."""
    found: dict[str, Any] = {}
    for method in dict.fromkeys(method for bank in banks for method in bank["methods"]):
        items = [(bank["fold"], bank["methods"][method]) for bank in banks if method in bank["methods"]]
        cells: dict[tuple[int, float], list[float]] = {}
        for cell in (cell for _, item in items for cell in item["grid"]):
            here = cells.setdefault((int(cell["layer"]), float(cell["coefficient"])), [])
            here.extend([cell["mc1"]] if cell["mc1"] is not None else [])
        layers = sorted({layer for layer, _ in cells})
        coefficients = sorted({coefficient for _, coefficient in cells})
        found[method] = {
            "layers": layers,
            "coefficients": coefficients,
            "mc1": [[_mean(cells.get((layer, value), [])) for value in coefficients] for layer in layers],
            "baseline": _mean([item["baseline"]["mc1"] for _, item in items]),
            "chosen": [_chosen(fold, item) for fold, item in items],
        }
    return found


def _chosen(fold: int, item: Mapping[str, Any]) -> dict[str, Any]:
    """What one fold chose, and how the tune split scored there and without steering."""
    where = {"layer": item["chosen"]["layer"], "coefficient": item["chosen"]["coefficient"]}
    cell: Mapping[str, Any] = next((cell for cell in item["grid"] if where.items() <= cell.items()), {})
    return {
        "fold": fold,
        **where,
        "n": item.get("n"),
        "baseline_mc1": item["baseline"]["mc1"],
        "mc1": cell.get("mc1"),
        "baseline_margin": item["baseline"]["margin"],
        "margin": cell.get("margin"),
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _plain(value: Any) -> Any:
    """JSON-ready: tuples as lists, NaN as null, floats to six digits (later ones depend on how sums run)."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{round(float(value), 12):.6g}") if math.isfinite(value) else None
    return value


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
                    cells += [_plain(verdict.scores.get(name)) if verdict else None for name in names]
                    cells.append(verdict.status if verdict else "")
                cells += [_plain(float(own[name][place])) for name in ("mc1", "mc2", "mc3")]
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
