"""judge: the verdict of every judge on every completion. The steered model is freed first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from truthsteer.component import content
from truthsteer.config import Stage
from truthsteer.records import Completion, Splits
from truthsteer.store import Artifact, JournalRow, Key
from truthsteer.workspace import Workspace, questions_digest

VERSION = 1
ROWS_AT_ONCE = 512
"""Verdicts between two writes: what a killed judge loses at most."""


def run(ws: Workspace, split: Splits, completions: Sequence[Artifact]) -> dict[str, list[Artifact]]:
    """Judge name -> one artifact of `Verdict` rows per artifact of completions, in their order."""
    ws.free_model()
    return {name: _judge(ws, name, split, completions) for name in ws.judges}


def _judge(ws: Workspace, name: str, split: Splits, completions: Sequence[Artifact]) -> list[Artifact]:
    judge = ws.judges[name]
    keys = [
        Key.of(
            "verdicts",
            VERSION,
            completions=artifact.key,
            judge=content(ws.config.judge[name], judge),
            identity=judge.identity(),
            references=questions_digest(split.test),
        )
        for artifact in completions
    ]
    if not ws.runs(Stage.judge):
        return [ws.store.need(key, "judge") for key in keys]
    by_digest = {key.digest: artifact for key, artifact in zip(keys, completions, strict=True)}
    questions = {question.id: question for question in split.test}

    def compute(plan: Sequence[str], done: Callable[[int], bool]) -> Iterator[tuple[int, list[JournalRow]]]:
        work = [
            (owner, order, completion)
            for owner in plan
            for order, completion in enumerate(by_digest[owner].rows(Completion))
        ]
        with ws.progress(ws.label(f"judge: {name}", split), len(work)) as advance:
            for unit, first in enumerate(range(0, len(work), ROWS_AT_ONCE)):
                part = work[first : first + ROWS_AT_ONCE]
                if not done(unit):
                    verdicts = judge.judge(
                        [questions[row.question] for _, _, row in part], [row.text for _, _, row in part]
                    )
                    yield (
                        unit,
                        [
                            JournalRow(owner, order, verdict)
                            for (owner, order, _), verdict in zip(part, verdicts, strict=True)
                        ],
                    )
                advance(len(part))

    return ws.store.make_rows(keys, {"rows": ROWS_AT_ONCE}, compute)
