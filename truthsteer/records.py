"""The frozen records that stages exchange. They know nothing of files, models or configuration.

Every record is plain data (strings, numbers, tuples), so that `to_json` and `from_json` are all the
serialisation there is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

NO_COMMENT = "I have no comment."
ALL_STYLE = "without these styles nothing is left of the vector"
"""Why a vector has no row without style."""


@dataclass(frozen=True)
class Question:
    """One question of TruthfulQA's schema, its answers closed with a full stop as in the official scoring."""

    id: str
    """Hash of the question's text: stable under re-ordering of the file."""
    row: int
    """1-based line of the record in its file, for messages."""
    kind: str
    """`Adversarial` or `Non-Adversarial`."""
    category: str
    text: str
    best: str
    correct: tuple[str, ...]
    """The true references, the best answer among them, without repeats."""
    incorrect: tuple[str, ...]
    """The false references, without repeats."""
    group: int = 0
    """Questions of one group are near-duplicates: they never straddle two splits, and are one cluster in intervals."""
    best_incorrect: str | None = None
    """The false answer that the binary task sets against the best one (column `Best Incorrect Answer`, 2025)."""

    @property
    def choices(self) -> tuple[tuple[str, bool], ...]:
        """All answers with their labels, as in official MC2 rows: one of both lists is false, in place."""
        labels = dict.fromkeys(self.correct, True) | dict.fromkeys(self.incorrect, False)
        return tuple(labels.items())


@dataclass(frozen=True)
class Splits:
    """Who is used for what. No near-duplicate group stands in two roles unless the file itself fixes its splits."""

    fold: int
    steer: tuple[Question, ...]
    """Estimates vectors."""
    train: tuple[Question, ...]
    """Trains learned methods."""
    tune: tuple[Question, ...]
    """Chooses layer and coefficient."""
    test: tuple[Question, ...]
    """Is opened once, for the numbers reported."""


class ConditionKind(StrEnum):
    """What a condition is there for."""

    BASELINE = "baseline"
    STEERED = "steered"
    CHOSEN = "chosen"
    SIGN_FLIP = "sign_flip"
    RANDOM = "random"
    SHUFFLED = "shuffled"
    STYLE = "style"
    PROJECTED = "projected"
    PROMPT = "prompt"
    FEW_SHOT = "few_shot"
    ABSTAIN = "abstain"
    SHORTEST = "shortest"
    SURFACE = "surface"


MODEL_FREE = (ConditionKind.ABSTAIN, ConditionKind.SHORTEST, ConditionKind.SURFACE)
"""Conditions that ask no model."""


@dataclass(frozen=True)
class Condition:
    """One row of the final table. Under cross-fitting each fold has its own vector (and layer) for the same name."""

    name: str
    kind: ConditionKind
    fold: int
    method: str = ""
    layer: int | None = None
    coefficient: float = 0.0
    vector: str = ""
    """Name of the vector in the fold's bank; empty where nothing is added."""
    vector_sha256: str = ""
    """Content of the vector: with layer, coefficient and operator it determines what the condition does."""
    prompt: str = ""
    """Name of another prompt under which it is asked; empty for the run's own."""


@dataclass(frozen=True)
class Choice:
    """The log-probability of one answer under one condition."""

    question: str
    answer: str
    label: bool
    best: bool
    logprob: float
    """Sum over the answer's tokens of log p(token | prompt, earlier tokens), natural log, no length normalisation.
    Of a condition that asks no model: its score."""
    tokens: int


@dataclass(frozen=True)
class Hit:
    """MC1 of one question, where nothing else of its choices is kept."""

    question: str
    mc1: float


@dataclass(frozen=True)
class Letters:
    """One question put as (A) or (B), the best answer against the best incorrect one, under one condition."""

    question: str
    best: str
    """`A` or `B`: where the best answer stood."""
    logprob_a: float
    logprob_b: float


@dataclass(frozen=True)
class Completion:
    """One generated answer under one condition."""

    question: str
    text: str
    """Cut at the stop string or end of turn, stripped."""
    tokens: int
    """Generated tokens, the stopping one included."""
    stop_reason: str
    """`eos`, `stop` (a stop string) or `length`."""


@dataclass(frozen=True)
class Verdict:
    """What one judge says of one completion."""

    question: str
    status: str
    """`ok`, or how the verdict came about; every status is counted in the report."""
    scores: dict[str, float | None] = field(default_factory=dict)
    """Metric name -> value; None where the judge could not decide."""
    probabilities: dict[str, float] = field(default_factory=dict)
    """Metric name -> the judge's probability that the value is 1; only of judges that have one."""
    raw: str = ""
    """What the judge itself produced, kept for re-reading."""


@dataclass(frozen=True)
class Sentinel:
    """An answer whose verdict is known beforehand, given to every judge."""

    question: str
    sentinel: str
    """`best`, `best_incorrect`, `no_comment`, `empty` or `elsewhere`."""
    text: str


@dataclass(frozen=True)
class Neutral:
    """What a condition does to one passage of neutral text."""

    passage: int
    tokens: int
    """Tokens scored: all but the first."""
    nll: float
    """Sum of -log p(token | earlier tokens), nats."""
    kl: float
    """Sum over positions of KL(baseline || condition) over the vocabulary, nats."""
    kl_max: float
    """The largest KL at one position."""


@dataclass(frozen=True)
class Capability:
    """One multiple-choice capability question under one condition."""

    item: str
    correct: float
    """1 if the right choice has the highest log-probability; a tie is wrong."""
    correct_per_char: float
    """The same by log-probability per character."""


def to_json(record: Any) -> dict[str, Any]:
    """A record as a JSON-ready dict.

    Raises:
        TypeError: a field holds something that is not plain.
    """
    found: dict[str, Any] = msgspec.to_builtins(record, enc_hook=_plain)
    return found


def _plain(value: Any) -> Any:
    """A numpy number as Python's: judges and methods of others may give one."""
    if hasattr(value, "item") and hasattr(value, "dtype"):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be kept in a record")


def from_json(cls: type[T], data: dict[str, Any]) -> T:
    """The inverse of `to_json`, for (nested) record classes.

    Raises:
        msgspec.ValidationError: a field is missing or has another type.
    """
    return msgspec.convert(data, cls)


def rows_from_json(cls: type[T], lines: bytes) -> list[T]:
    """One record per line."""
    return msgspec.json.Decoder(cls).decode_lines(lines)
