"""Progress: bars on the terminal, nothing where there is none; and a file, for those who ask from elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from truthsteer.files import write_json

Advance = Callable[[int], None]
"""Called with the number of steps just done."""

console = Console(stderr=True)

FILE = "progress.json"
"""In a run's folder: what is being done, how many steps of how many; a shard but the first has one of its own."""
EVERY_S = 5.0
"""Between two looks that the file allows."""


def file_of(shard: int | None) -> str:
    """The name of a shard's file."""
    return f"progress-{shard}.json" if shard else FILE


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Advance]:
    """A bar from 0 to `total`; in a log file, one line when it is done."""
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total)
        yield lambda done: progress.advance(task, done)


def on_file(advance: Advance, folder: Path, description: str, total: int, shard: int | None = None) -> Advance:
    """The same, that also keeps a shard's `FILE` in a folder, written now and then."""
    done, next_time = 0, time.monotonic() + EVERY_S

    def step(count: int) -> None:
        nonlocal done, next_time
        advance(count)
        done += count
        if time.monotonic() >= next_time:
            with suppress(OSError):  # a full disk stops the run where something is lost by it, not here
                write_json(folder / file_of(shard), {"what": description, "done": done, "of": total})
            next_time = time.monotonic() + EVERY_S

    return step
