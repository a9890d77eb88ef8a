"""What a report is made from: every condition's rows, pooled over folds. Knows no numbers yet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from truthsteer.records import (
    Capability,
    Choice,
    Completion,
    ConditionKind,
    Letters,
    Neutral,
    Question,
    Sentinel,
    Verdict,
)


@dataclass(frozen=True)
class Row:
    """One row of the table: a condition, pooled over folds."""

    name: str
    kind: ConditionKind
    method: str
    """The method whose vector, or whose control, it is; empty where nothing is added."""
    layers: tuple[int, ...]
    """Distinct, over folds; empty where nothing is added."""
    coefficients: tuple[float, ...]
    choices: list[Choice]
    completions: list[Completion]
    verdicts: dict[str, list[Verdict]]
    """Judge -> one verdict per completion. The first judge that scores `true` fills the table."""
    prompt: str = ""
    """Name of another prompt under which it was asked; empty for the run's own."""
    letters: list[Letters] = field(default_factory=list)
    neutral: list[list[Neutral]] = field(default_factory=list)
    """Per fold; every fold has its own vector, and all read the same passages."""
    capability: list[list[Capability]] = field(default_factory=list)
    """Per fold, as `neutral`."""


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
    capability_problems: tuple[str, ...] = ()
    """Rows of the capability file that were left out, a sentence each."""
    sentinels: tuple[Sentinel, ...] = ()
    """Answers whose verdict is known."""
    sentinel_verdicts: dict[str, list[Verdict]] = field(default_factory=dict)
    """Judge -> one verdict per sentinel, in their order."""
    numerics: dict[str, Any] | None = None
    """The doctor's report, or that of the check before extraction (`thorough` false); None if there was neither."""
    record: dict[str, Any] = field(default_factory=dict)
    """Shown on the page and nowhere else: overrides, code, device. `facts.merged_answers` becomes a warning there."""

    def check(self) -> None:
        """Raise ValueError unless the rows fit the questions and each other."""
        known = {question.id for question in self.questions}
        if not self.rows or self.rows[0].kind is not ConditionKind.BASELINE:
            raise ValueError("The first row of a report must be the baseline.")
        for row in self.rows:
            answered = [completion.question for completion in row.completions]
            judged = {judge: [verdict.question for verdict in verdicts] for judge, verdicts in row.verdicts.items()}
            strangers = ({choice.question for choice in row.choices} | set(answered)) - known
            if strangers or len(set(answered)) < len(answered):
                raise ValueError(
                    f"condition {row.name}: unknown or repeated questions, such as {min(strangers | {''})!r}."
                )
            for judge, questions in judged.items():
                if questions != answered:
                    raise ValueError(
                        f"condition {row.name}: the verdicts of {judge} are not one per completion, in order."
                    )
