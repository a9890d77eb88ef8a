"""Any judges against human labels: `python -m truthsteer.audit LABELS.csv judge=[...]`, or `audit` from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from truthsteer.audit.labels import Labelled
from truthsteer.audit.measures import measure
from truthsteer.judges import ROWS_AT_ONCE, Judge, by_model, released_after
from truthsteer.progress import progress_bar
from truthsteer.records import Verdict
from truthsteer.summary import plain

__all__ = ["Labelled", "ask", "audit"]


def audit(judges: Mapping[str, Judge], rows: Sequence[Labelled], seed: int) -> dict[str, Any]:
    """Agreement of judges with human labels, beside always-yes, always-no and the length of an answer.

    Args:
        judges: name -> judge.
        rows: labelled answers; near-duplicate questions among them are found and count as one cluster.
        seed: of resampling.

    Returns:
        Plain JSON: counts of `answers`, `questions`, `clusters` and `labels`; per judge and metric one of `rows`;
        `warnings`. A number that cannot be computed is None.

    Raises:
        ValueError: no rows, or a judge does not give one verdict per answer, in order.
    """
    if not rows:
        raise ValueError("audit was given no labelled answers.")
    return summarise(rows, ask(judges, rows), seed)


def ask(judges: Mapping[str, Judge], rows: Sequence[Labelled]) -> dict[str, list[Verdict]]:
    """Every judge's verdict on every answer. Judges that load the same model are asked one after the other, and the
    model is freed at the end.
    """
    with released_after(judges):
        found = {name: _verdicts(name, judges[name], rows) for name in by_model(judges)}
    return {name: found[name] for name in judges}


def _verdicts(name: str, judge: Judge, rows: Sequence[Labelled]) -> list[Verdict]:
    size = getattr(judge, "rows_at_once", ROWS_AT_ONCE)
    verdicts: list[Verdict] = []
    with progress_bar(f"judge: {name}", len(rows)) as advance:
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            own = judge.judge([row.question for row in part], [row.text for row in part])
            if [verdict.question for verdict in own] != [row.question.id for row in part]:
                raise ValueError(f"judge {name} did not give one verdict per answer, in order.")
            verdicts += own
            advance(len(part))
    return verdicts


def summarise(rows: Sequence[Labelled], verdicts: Mapping[str, Sequence[Verdict]], seed: int) -> dict[str, Any]:
    """What `audit` returns, from verdicts that are there."""
    summary: dict[str, Any] = plain(measure(rows, verdicts, seed))
    return summary
