"""From every condition's rows to the summary: all numbers of the report, each with its evidence, as plain JSON.

It knows no model and writes no file. The same results and seed give the same summary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from truthsteer import cautions, contrasts, costs, evidence, findings, metrics, reliability, stats, tuning
from truthsteer.evidence import Design
from truthsteer.metrics import HEADLINE, Scores, Setting
from truthsteer.multiplicity import holm
from truthsteer.records import MODEL_FREE, ConditionKind, Question
from truthsteer.reliability import Columns
from truthsteer.rendering import visible
from truthsteer.results import Results, Row
from truthsteer.surface import matched

SURFACE_MATCHED = "Surface-matched questions"
"""Where wording alone does not give the best answer away."""

NAMED = (ConditionKind.BASELINE, ConditionKind.CHOSEN)
"""Rows that were fixed before the test questions were opened."""

KEPT = ("n", "asked", "compared", "undecided", "floor", "ceiling", "withheld")
"""What stays in a cell that is withheld."""

DIFFERENCE = (
    "difference",
    "difference_low",
    "difference_high",
    "difference_category_low",
    "difference_category_high",
    "p",
    "p_adjusted",
    "mcnemar_p",
    "fixed",
    "broken",
    "mde",
)
"""What compares a cell with the baseline's."""

_GONE = {"withheld": True}
_SPREAD = ("subsets", "mean_cosine", "min_cosine")
_NORMALISED = tuple(f"{mc}_{norm}" for norm in metrics.NORMALISED for mc in ("mc1", "mc2"))
_LEVELS = ("all", "subset", "type", "category")


def scores_of(results: Results, columns: Columns) -> list[Scores]:
    """Every metric of every question, per condition."""
    return [_scores(row, columns, results.questions) for row in results.rows]


def _scores(row: Row, columns: Columns, questions: Sequence[Question]) -> Scores:
    found = metrics.choice_scores(row.choices, questions, row.kind in MODEL_FREE)
    found |= metrics.text_scores(row.completions, questions)
    if row.letters:
        found |= metrics.letter_scores(row.letters, questions)
    return found | metrics.judge_scores(row.verdicts, columns, questions)


def summarise(results: Results, scores: Sequence[Scores], columns: Columns, seed: int) -> dict[str, Any]:
    """What stands in summary.json.

    Args:
        results: every condition's rows.
        scores: of each condition (`scores_of`).
        columns: which judge fills which metric (`metrics.judge_columns`).
        seed: of bootstrap and permutation.

    Raises:
        ValueError: nothing was measured.
    """
    questions = results.questions
    design = Design(np.array([q.group for q in questions]), np.array([q.category for q in questions]), seed)
    known = (*HEADLINE, *metrics.BINARY_TASK, *_NORMALISED, *columns, *metrics.TEXT)
    judged = reliability.answers_judged(results, columns)
    asked = {name for own in judged for name, count in own.items() if count}
    names = [name for name in dict.fromkeys(known) if name in asked or _exists(name, scores)]
    named = [place for place, row in enumerate(results.rows) if row.kind in NAMED]
    table = evidence.cells(scores, names, design, judged, _families(results.rows))
    withheld = _withhold(table, names)
    shown = [name for name in names if name not in withheld]
    lead = next((name for name in ("true", "mc1", *shown) if name in shown), None)
    if lead is None:
        raise ValueError("Nothing was measured: the rows hold neither log-probabilities nor answers.")
    config = results.config
    setting = _setting(config, results.data)
    chosen_unit = config.get("steering", {}).get("coefficient_unit", "residual_norm")
    surface = _matched(results)
    usable = [
        {name: values for name, values in own.items() if name not in row or not row[name]["withheld"]}
        for own, row in zip(scores, table, strict=True)
    ]
    summary: dict[str, Any] = {
        "name": results.name,
        "model": str(config.get("model", {}).get("name", "")),
        "dataset": str(config.get("data", {}).get("name", "")),
        "seed": seed,
        "n": len(questions),
        "clusters": len(np.unique(design.clusters)),
        "folds": max(1, len(results.banks)),
        "unit": "residual norms" if chosen_unit == "residual_norm" else "times the raw vector",
        "lead": lead,
        "metrics": names,
        "units": {name: evidence.unit(name, scores) for name in names},
        "settings": {name: setting.of(name) for name in names if setting.of(name)},
        "judges": {metric: judge for metric, (judge, _) in columns.items()},
        "withheld": withheld,
        "conditions": [
            _condition(row, own, cells, setting) for row, own, cells in zip(results.rows, scores, table, strict=True)
        ],
        "contrasts": contrasts.against_the_chosen(results, usable, shown, design),
        "categories": _categories(results, scores, table, lead, design, surface),
        "surface_matched": _subset(results, scores, table, judged, design, surface),
        "selection": tuning.selection(results.banks),
        "spread": [
            {"fold": bank["fold"], "method": method} | {key: item["spread"][key] for key in _SPREAD}
            for bank in results.banks
            for method, item in bank["methods"].items()
            if item.get("spread")
        ],
        "pairs": [{"fold": bank["fold"], **bank["pairs"]} for bank in results.banks],
        "proof": [{"fold": bank["fold"], **bank["proof"]} for bank in results.banks if bank.get("proof")],
        "side_effects": costs.side_effects(results, seed),
        "known_answers": reliability.known_answers(results, columns),
        "agreement": reliability.between_judges(results, usable, columns, seed),
        "length_bias": reliability.length_bias([usable[place] for place in named], columns),
        "undecided": reliability.undecided(results, columns),
        "same_family": reliability.of_the_same_family(config),
        "few_shot": config.get("baselines", {}).get("few_shot", 0),
        "capability_problems": list(results.capability_problems),
        "numerics": _readable(results.numerics),
        "data": results.data,
    }
    summary = plain(summary)
    return summary | {"verdict": findings.verdict(summary), "warnings": cautions.warnings(summary)}


def _setting(config: Mapping[str, Any], data: Mapping[str, Any]) -> Setting:
    prompt, model = config.get("prompt", {}), config.get("model", {})
    chat = prompt.get("chat") if prompt.get("chat") is not None else model.get("chat_template", False)
    preset, version = (visible(str(item)) for item in (prompt.get("name", ""), data.get("version", "")))
    return Setting(preset, "chat" if chat else "text", version)


def _exists(name: str, scores: Sequence[Scores]) -> bool:
    return any(name in row and bool(np.isfinite(row[name]).any()) for row in scores)


def _families(rows: Sequence[Row]) -> list[list[int]]:
    """Places of rows whose p are corrected for each other: those that were not named before the test questions were
    opened, and the chosen ones, where several methods have one each.
    """
    chosen = [place for place, row in enumerate(rows) if row.kind is ConditionKind.CHOSEN]
    others = [place for place, row in enumerate(rows) if row.kind not in NAMED]
    return [others, *([chosen] if len(chosen) > 1 else [])]


def _withhold(table: Sequence[dict[str, dict[str, Any]]], names: Sequence[str]) -> list[str]:
    """Metrics whose judge left too many answers undecided over all conditions: their numbers leave the table.

    A single cell with too many loses its own, and a cell loses its difference where the baseline is withheld, or where too
    few answers are decided under both. Counts and bounds stay.
    """
    asked = {name: sum(row[name]["asked"] for row in table) for name in names}
    missing = {name: sum(row[name]["undecided"] for row in table) for name in names}
    whole = [name for name in names if missing[name] > evidence.WITHHELD_ABOVE * asked[name]]
    for place, row in enumerate(table):
        for name, cell in row.items():
            cell["withheld"] = cell["withheld"] or name in whole
            few = place > 0 and cell["compared"] < (1 - evidence.WITHHELD_ABOVE) * cell["asked"]
            if cell["withheld"]:
                blank(cell)
            elif place and (table[0][name]["withheld"] or few):
                cell |= dict.fromkeys(DIFFERENCE)
    return whole


def blank(cell: dict[str, Any]) -> None:
    """Leave counts and bounds alone."""
    cell |= {key: None for key in cell if key not in KEPT}


def _condition(row: Row, own: Scores, cells: dict[str, dict[str, Any]], setting: Setting) -> dict[str, Any]:
    asked = replace(setting, preset=row.prompt.replace("_", "-")) if row.prompt else setting
    return {
        "name": row.name,
        "setting": "" if row.kind in MODEL_FREE else asked.of("mc1"),
        "kind": str(row.kind),
        "method": row.method,
        "layers": list(row.layers),
        "coefficients": list(row.coefficients),
        "metrics": cells,
        "ties": int(np.nansum(own["ties"])) if row.kind not in MODEL_FREE else 0,
        "statuses": {judge: _count(v.status for v in rows) for judge, rows in row.verdicts.items()},
        "stop_reasons": _count(completion.stop_reason for completion in row.completions),
    }


def _count(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _matched(results: Results) -> np.ndarray:
    """[questions] whether wording alone, out of fold, fails to give the best answer away; nothing without such a row."""
    row = next((row for row in results.rows if row.kind is ConditionKind.SURFACE), None)
    scores: dict[str, dict[str, float]] = {}
    for choice in row.choices if row else ():
        scores.setdefault(choice.question, {})[choice.answer] = choice.logprob
    kept = matched([question for question in results.questions if question.id in scores], scores)
    return np.array([question.id in kept for question in results.questions], dtype=bool)


def _subset(
    results: Results,
    scores: Sequence[Scores],
    table: Sequence[dict[str, dict[str, Any]]],
    judged: Sequence[Mapping[str, int]],
    design: Design,
    surface: np.ndarray,
) -> dict[str, Any]:
    """The headline metrics on the surface-matched questions: baseline and chosen rows, beside all questions elsewhere."""
    rows = [place for place, row in enumerate(results.rows) if row.kind in NAMED]
    shown = [name for name in HEADLINE if any(table[place].get(name, _GONE)["withheld"] is False for place in rows)]
    if not surface.any():
        return {"n": 0, "rows": []}
    part = Design(design.clusters[surface], design.categories[surface], design.seed)
    own = [{name: scores[place][name][surface] for name in shown if name in scores[place]} for place in rows]
    asked = [{name: int(surface.sum()) for name, count in judged[place].items() if count} for place in rows]
    cells = evidence.cells(own, shown, part, asked, [])
    for place, row in zip(rows, cells, strict=True):
        for name, cell in row.items():
            cell["withheld"] = cell["withheld"] or table[place][name]["withheld"]
    _withhold(cells, shown)
    return {
        "n": int(surface.sum()),
        "metrics": shown,
        "rows": [
            {
                "name": results.rows[place].name,
                "kind": str(results.rows[place].kind),
                "layers": list(results.rows[place].layers),
                "coefficients": list(results.rows[place].coefficients),
                "metrics": found,
            }
            for place, found in zip(rows, cells, strict=True)
        ],
    }


def _categories(
    results: Results,
    scores: Sequence[Scores],
    table: Sequence[dict[str, dict[str, Any]]],
    lead: str,
    design: Design,
    surface: np.ndarray,
) -> dict[str, list[dict[str, Any]]]:
    """Method -> what its chosen condition changed in all questions, in the surface-matched ones, in each type and category."""
    questions = results.questions
    members = {("all", "All questions"): np.ones(len(questions), bool)}
    if surface.any():
        members["subset", SURFACE_MATCHED] = surface
    for level, labels in (
        ("type", [q.kind for q in questions]),
        ("category", [q.category for q in questions]),
    ):
        members |= {(level, name): np.array(labels) == name for name in sorted(set(labels))}
    found: dict[str, list[dict[str, Any]]] = {}
    for row, own, cells in zip(results.rows, scores, table, strict=True):
        if row.kind is ConditionKind.CHOSEN and cells[lead]["difference"] is not None:
            items = []
            for (level, name), used in members.items():
                pair = (own[lead][used], scores[0][lead][used])
                result = stats.compare(*pair, design.clusters[used], design.seed, resamples=2000)
                if result.n:
                    items.append({"level": level, "name": visible(name), **asdict(result)})
            for level in _LEVELS:
                family = [item for item in items if item["level"] == level]
                for item, p in zip(family, holm([item["p"] for item in family]), strict=True):
                    item["p_adjusted"] = p
            items.sort(key=lambda item: (_LEVELS.index(item["level"]), -item["difference"], item["name"]))
            found[row.method] = items
    return found


def _readable(value: Any) -> Any:
    """A nest of values, every text `visible`: a token can be any bytes."""
    if isinstance(value, Mapping):
        return {key: _readable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_readable(item) for item in value]
    return visible(value) if isinstance(value, str) else value


def plain(value: Any) -> Any:
    """JSON-ready: tuples as lists, NaN as null, floats to six digits (later ones depend on how sums run)."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{round(float(value), 12):.6g}") if math.isfinite(value) else None
    return value
