"""Judges: each reads questions and generated answers and gives one verdict per answer.

A judge is a frozen dataclass, built from its YAML node by `component.build`, in a file of its own: file
stem, config option and class name agree (`semantic.py`, `judge=semantic`, `Semantic`). It works from
outside this package too, by its import path. It satisfies `Judge`; nothing needs to be inherited or
registered.

Two attributes are optional. `rows_at_once: ClassVar[int]`: so many answers are handed over at a time, and
finished verdicts are on disk that often; a judge that takes long per answer sets it low. `loads: str`: what
model it holds in memory, and how; judges that say the same are asked one after the other, so that it is
loaded once. A field that changes how fast verdicts come, not which, is marked `metadata=component.TRANSIENT`
(`device`, `batch_tokens`): changing it computes nothing again.

Judges that ask a language model get it from `judge_model` and make their verdicts from a `reading.Reading`
per aspect of the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from truthsteer import judge_model
from truthsteer.records import Question, Verdict

ROWS_AT_ONCE = 512
"""Answers that a judge is given at a time, unless it says otherwise."""


class Judge(Protocol):
    """What the judge stage expects of a judge."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The scores it gives: a class attribute, or a property where they follow from its fields. `true`,
        `info` and `abstain` fill the table's columns; others become columns of their own.
        """
        ...

    def identity(self) -> dict[str, Any]:
        """Everything beyond its fields that determines its verdicts, such as the commit of its model; plain
        JSON.

        It must not import torch or use the network: an unchanged run asks for it and then needs nothing else.

        Raises:
            UserError: something is missing on this machine, with what to type.
        """
        ...

    def prefetch(self) -> None:
        """Download whatever it needs; does nothing where nothing is needed."""
        ...

    def judge(self, questions: Sequence[Question], texts: Sequence[str]) -> list[Verdict]:
        """One verdict per (question, text), in order.

        A score that could not be reached is None, with a `status` that says why; the report counts every
        status.
        """
        ...


def by_model(judges: Mapping[str, Judge]) -> list[str]:
    """Their names, judges of one model side by side, and otherwise in the order given."""
    return sorted(judges, key=lambda name: _loads(judges[name]))


@contextmanager
def released_after(judges: Mapping[str, Judge]) -> Iterator[None]:
    """Frees the model that is held at the end, also after an error, if any of the judges loads one."""
    try:
        yield
    finally:
        if any(map(_loads, judges.values())):
            judge_model.release()


def _loads(judge: Judge) -> str:
    loads: str = getattr(judge, "loads", "")
    return loads
