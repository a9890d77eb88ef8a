"""How far the judges of a run can be trusted: known answers, agreement with each other, answers they left undecided."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from truthsteer import stats
from truthsteer.agreement import agreement, auc
from truthsteer.evidence import decided_of
from truthsteer.metrics import Scores
from truthsteer.records import MODEL_FREE, Verdict
from truthsteer.results import Results
from truthsteer.sentinels import EXPECTED, about_truth, expected

Columns = Mapping[str, tuple[str, str]]
"""Metric -> (judge, score): see `metrics.judge_columns`."""


def known_answers(results: Results, columns: Columns) -> list[dict[str, Any]]:
    """Per metric and sentinel: how many verdicts are what they should be, with an interval; an undecided one is not."""
    groups = {question.id: question.group for question in results.questions}
    table = []
    for metric, (judge, score) in columns.items():
        verdicts = results.sentinel_verdicts.get(judge, [])
        for name in EXPECTED:
            wanted = expected(name, score)
            own = (
                [v for s, v in zip(results.sentinels, verdicts, strict=True) if s.sentinel == name] if verdicts else []
            )
            if wanted is None or not own:
                continue
            passed = np.array([float(verdict.scores.get(score) == wanted) for verdict in own])
            found = stats.interval(passed, np.array([groups[verdict.question] for verdict in own]), binary=True)
            row = {"metric": metric, "judge": judge, "sentinel": name, "expected": wanted}
            table.append(row | {"passed": found.mean, "low": found.low, "high": found.high, "n": found.n})
    return table


def between_judges(results: Results, scores: Sequence[Scores], columns: Columns, seed: int) -> list[dict[str, Any]]:
    """Agreement of every two metrics about truth, and about information, over the different answers of all conditions
    that ask a model.
    """
    groups = np.array([question.group for question in results.questions])
    clusters = np.tile(groups, len(scores))
    empty = np.full(groups.size, math.nan)
    given = np.concatenate(_first_given(results))
    values = {metric: np.concatenate([row.get(metric, empty) for row in scores])[given] for metric in columns}
    yes_no = [metric for metric, found in values.items() if _binary(found)]
    table = []
    for first, second in combinations(yes_no, 2):
        kinds = [_kind(columns[metric][1]) for metric in (first, second)]
        if kinds[0] is not None and kinds[0] == kinds[1] and columns[first][0] != columns[second][0]:
            found = asdict(agreement(values[first], values[second], clusters[given], seed))
            table.append({"first": first, "second": second, "about": kinds[0], **found})
    return table


def _first_given(results: Results) -> list[NDArray[np.bool_]]:
    """Per condition, [questions] whether its answer is one of a model's that no condition before it gave."""
    seen: set[tuple[str, str]] = set()
    found = []
    for row in results.rows:
        answers = {} if row.kind in MODEL_FREE else {item.question: item.text for item in row.completions}
        new = [(q.id, answers[q.id]) if q.id in answers else None for q in results.questions]
        found.append(np.array([key is not None and key not in seen for key in new], dtype=bool))
        seen |= {key for key in new if key is not None}
    return found


def length_bias(scores: Sequence[Scores], columns: Columns) -> list[dict[str, Any]]:
    """Per metric about truth: how well the length of an answer alone predicts the verdict (AUC; one half is no bias)."""
    table = []
    for metric, (judge, score) in columns.items():
        pairs = [(row["length"], row[metric]) for row in scores if metric in row]
        values = np.concatenate([value for _, value in pairs]) if pairs else np.empty(0)
        lengths = np.concatenate([length for length, _ in pairs]) if pairs else np.empty(0)
        used = np.isfinite(values) & np.isfinite(lengths)
        if _kind(score) == "truth" and _binary(values):
            found = auc(lengths[used], values[used])
            table.append({"metric": metric, "judge": judge, "auc": found, "n": int(used.sum())})
    return table


def _kind(score: str) -> str | None:
    return "truth" if about_truth(score) else "information" if score == "info" else None


def _binary(values: NDArray[np.float64]) -> bool:
    finite = values[np.isfinite(values)]
    return finite.size > 0 and bool(np.isin(finite, (0.0, 1.0)).all())


def answers_judged(results: Results, columns: Columns) -> list[dict[str, int]]:
    """Per condition, metric -> how many answers its judge was given; `true_info` needs the judges of both."""
    asked = [
        {metric: len(row.verdicts.get(judge, ())) for metric, (judge, _) in columns.items()} for row in results.rows
    ]
    if {"true", "info"} <= set(columns):
        asked = [own | {"true_info": min(own["true"], own["info"])} for own in asked]
    return asked


def of_the_same_family(config: Mapping[str, Any]) -> list[dict[str, str]]:
    """Judges whose model is of the steered model's family, by name: they may share its mistakes."""
    model = config.get("model", {})
    steered = _family(str(model.get("id") or model.get("name") or ""))
    return [
        {"judge": name, "model": str(node["model"])}
        for name, node in config.get("judge", {}).items()
        if steered and isinstance(node, Mapping) and _family(str(node.get("model") or "")) == steered
    ]


def _family(name: str) -> str:
    """The letters that a model's name begins with: `gemma` of `google/gemma-3-4b-it`."""
    found = re.match(r"[a-z]+", name.rstrip("/").rpartition("/")[2].lower())
    return found[0] if found else ""


def undecided(results: Results, columns: Columns) -> list[dict[str, Any]]:
    """Per judged metric, over all conditions: answers asked, those undecided with their statuses, and whether the metric
    leaves them out or, as `match` does, counts them as 0.
    """
    table = []
    for metric, (judge, score) in columns.items():
        asked = [verdict for row in results.rows for verdict in row.verdicts.get(judge, ())]
        known = decided_of(score) if any(decided_of(score) in verdict.scores for verdict in asked) else score
        missing = [verdict for verdict in asked if verdict.scores.get(known) is None]
        table.append(
            {
                "metric": metric,
                "judge": judge,
                "asked": len(asked),
                "undecided": len(missing),
                "left_out": known == score,
                "statuses": dict(_counted(missing)),
            }
        )
    return table


def _counted(verdicts: Sequence[Verdict]) -> Iterator[tuple[str, int]]:
    statuses = [verdict.status for verdict in verdicts]
    for status in sorted(set(statuses)):
        yield status, statuses.count(status)
