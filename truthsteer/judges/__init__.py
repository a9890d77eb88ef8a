"""Judges: each reads questions and generated answers and gives one verdict per answer.

A judge is a frozen dataclass, built from its YAML node by `component.build`, in a file of its own: file
stem, config option and class name agree (`semantic.py`, `judge=semantic`, `Semantic`). It works from
outside this package too, by its import path. It satisfies `Judge`; nothing needs to be inherited or
registered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from truthsteer.records import Question, Verdict


class Judge(Protocol):
    """What the judge stage expects of a judge."""

    metrics: ClassVar[tuple[str, ...]]
    """The scores it gives. `true`, `info` and `abstain` fill the table's columns; others become columns of
    their own.
    """

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
