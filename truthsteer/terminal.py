"""Tables on the terminal: how wide it is, what fits, and the one look that they share. Knows no numbers."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPED_WIDTH = 200
"""Columns where there is no terminal to ask."""


def console() -> Console:
    """Standard output, as wide as its terminal."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=PIPED_WIDTH)


def needed(columns: Mapping[str, Sequence[str]]) -> int:
    """The width of columns side by side: heading -> cells, each of one or more lines."""
    return sum(
        max(len(line) for cell in (name, *cells) for line in cell.split("\n")) + 3 for name, cells in columns.items()
    )


def table(
    title: str,
    caption: str,
    columns: Mapping[str, Sequence[str]],
    dim: Collection[int] = (),
    ends: Collection[int] = (),
) -> Table:
    """A table of plain text, whose first column alone may break its lines.

    Args:
        title: above it.
        caption: below it.
        columns: heading -> cells, one for each row.
        dim: rows that stand back.
        ends: rows that end a section, with a line below.
    """
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    made = Table(title=title, caption=caption, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for place, name in enumerate(columns):
        made.add_column(name, no_wrap=place > 0, overflow="fold")
    for place, cells in enumerate(zip(*columns.values(), strict=True)):
        made.add_row(*map(escape, cells), style="dim" if place in dim else "", end_section=place in ends)
    return made
