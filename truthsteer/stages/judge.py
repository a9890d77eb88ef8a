"""judge: the verdict of every judge on every completion, and on answers whose verdict is known. The steered model is
freed first; judges that load the same model are asked one after the other, so that it is loaded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from truthsteer.component import content
from truthsteer.config import Stage
from truthsteer.files import digest
from truthsteer.judges import ROWS_AT_ONCE, by_model, released_after
from truthsteer.records import Completion, Question, Sentinel
from truthsteer.sentinels import sentinels
from truthsteer.store import Artifact, JournalRow, Key
from truthsteer.workspace import Workspace, questions_digest

VERSION = 2


@dataclass(frozen=True)
class Judged:
    """What one judge made."""

    verdicts: list[list[Artifact]]
    """[fold][condition]: `Verdict` rows, in the order of the completions."""
    sentinels: Artifact
    """`Verdict` rows, in the order of `sentinels.sentinels`."""


def run(ws: Workspace, completions: Sequence[Sequence[Artifact]]) -> dict[str, Judged]:
    """The verdicts of each judge on the completions of every fold and condition, by the judge's name.

    A judge that fails leaves the others' verdicts, and its own finished ones, in the store.
    """
    ws.free_model()
    tested = tuple(question for split in ws.splits for question in split.test)
    known = sentinels(tested, ws.config.seed)
    asked = {sentinel.question for sentinel in known}
    used = tuple(question for question in tested if question.id in asked)
    named = f"sentinels/{digest([[row.question, row.sentinel, row.text] for row in known])}"
    judged = {}
    with released_after(ws.judges):
        for name in by_model(ws.judges):
            folds = [
                _verdicts(
                    ws,
                    name,
                    ws.label(f"judge: {name}", split),
                    split.test,
                    [(artifact.key, partial(artifact.rows, Completion)) for artifact in own],
                )
                for split, own in zip(ws.splits, completions, strict=True)
            ]
            [own] = _verdicts(ws, name, f"judge: {name}, known answers", used, [(named, lambda: known)])
            judged[name] = Judged(folds, own)
    return {name: judged[name] for name in ws.judges}


Rows = Callable[[], Sequence[Completion | Sentinel]]


def _verdicts(
    ws: Workspace,
    name: str,
    description: str,
    questions: tuple[Question, ...],
    answers: Sequence[tuple[str, Rows]],
) -> list[Artifact]:
    """One artifact of verdicts per entry of `answers` (what they are, their rows), in their order."""
    judge = ws.judges[name]
    identity, references = ws.judge_identities[name], questions_digest(questions)
    keys = [
        Key.of(
            "verdicts",
            VERSION,
            completions=what,
            judge=content(ws.config.judge[name], judge),
            identity=identity,
            references=references,
        )
        for what, _ in answers
    ]
    if not ws.runs(Stage.judge):
        return [ws.store.need(key, "judge") for key in keys]
    by_digest = {key.digest: rows for key, (_, rows) in zip(keys, answers, strict=True)}
    by_id = {question.id: question for question in questions}
    size = getattr(judge, "rows_at_once", ROWS_AT_ONCE)

    def compute(plan: Sequence[str], done: Callable[[int], bool]) -> Iterator[tuple[int, list[JournalRow]]]:
        # Conditions often answer alike: the same answer to the same question is judged once.
        owners: dict[tuple[str, str], list[tuple[str, int]]] = {}
        for owner in plan:
            for order, row in enumerate(by_digest[owner]()):
                owners.setdefault((row.question, row.text), []).append((owner, order))
        # Those to the same question stand together: what a prompt says before the answer is then computed once.
        places = {question.id: place for place, question in enumerate(questions)}
        answered = sorted(owners, key=lambda key: places[key[0]])
        with ws.progress(description, len(answered)) as advance:
            for unit, first in enumerate(range(0, len(answered), size)):
                part = answered[first : first + size]
                if not done(unit):
                    verdicts = judge.judge([by_id[question] for question, _ in part], [text for _, text in part])
                    rows = [
                        JournalRow(owner, order, verdict)
                        for key, verdict in zip(part, verdicts, strict=True)
                        for owner, order in owners[key]
                    ]
                    yield unit, rows
                advance(len(part))

    return ws.store.make_rows(keys, {"rows": size, "order": "questions"}, compute)
