"""What is in a store and who needs it: `truthsteer store list`, `verify` and `gc`.

Only `verify` and `gc` change anything, and neither touches what is whole and needed. It may be run beside running runs.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from truthsteer.errors import UserError, did_you_mean
from truthsteer.runs import RECORD, read_record
from truthsteer.store import damage, set_aside
from truthsteer.terminal import console, table

USAGE = """\
truthsteer store list   [paths.root=DIR]     what is in the store of DIR (multirun): kinds, sizes, and which runs use it
truthsteer store verify [paths.root=DIR]     hash everything; what is damaged is set aside, and made again by the next run
truthsteer store gc     [paths.root=DIR] [dry_run=true] [hours=24]
                                             remove what no run there uses and is so many hours older than now, and
                                             than the first start of any run that is not finished
"""
HOURS = 24.0
"""What is younger may belong to a process that is running."""
WORKPLACES = (".part", ".journal", ".damaged")
"""Folders of what is not an artifact, or is none any more."""


@dataclass(frozen=True)
class Kept:
    """An artifact in the store."""

    key: str
    path: Path
    bytes: int


def main(arguments: Sequence[str]) -> None:
    """Answer one command.

    Raises:
        UserError: it is none, or there is no store.
    """
    command, words = (arguments[0], arguments[1:]) if arguments else ("--help", ())
    if command in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return
    commands = {"list": list_store, "verify": verify, "gc": collect}
    if command not in commands:
        raise UserError(f"store {command} is not a command. {did_you_mean(command, commands)}Type one of:\n{USAGE}")
    typed = {"paths.root": "multirun"} | ({"dry_run": "false", "hours": str(HOURS)} if command == "gc" else {})
    for word in ("dry_run=true" if word == "--dry-run" else word for word in words):
        key, equals, value = word.partition("=")
        if not equals or key not in typed:
            raise UserError(f"{word} is not something that store {command} knows. Type one of:\n{USAGE}")
        typed[key] = value
    root = Path(typed.pop("paths.root"))
    if not (root / ".store").is_dir():
        raise UserError(f"paths.root={root} has no store. Type paths.root=DIR, the folder that holds the runs.")
    if command == "gc":
        collect(root, dry_run=_is_true(typed["dry_run"]), hours=_hours(typed["hours"]))
    else:
        commands[command](root)


def _is_true(value: str) -> bool:
    if value not in ("true", "false"):
        raise UserError(f"dry_run={value} is neither true nor false. Type dry_run=true to see what would be removed.")
    return value == "true"


def _hours(value: str) -> float:
    try:
        hours = float(value)
    except ValueError:
        hours = -1.0
    if not 0 <= hours < float("inf"):
        raise UserError(f"hours={value} is not a number of hours. Type hours={HOURS:g}.")
    return hours


def list_store(root: Path) -> None:
    """Print a table of the kinds, and one of the runs."""
    out, found = console(), records(root)
    used = {name: set(record["artifacts"]) for name, record in found.items() if "artifacts" in record}
    needed = set().union(*used.values())
    kinds: dict[str, list[Kept]] = {}
    for kept in artifacts(root):
        kinds.setdefault(kept.key.split("/")[0], []).append(kept)
    columns: dict[str, list[str]] = {"kind": [], "artifacts": [], "size": [], "of no run": []}
    for kind, own in kinds.items():
        free = [kept for kept in own if kept.key not in needed]
        cells = (kind, str(len(own)), size(own), f"{len(free)} ({size(free)})" if free else "")
        for column, cell in zip(columns.values(), cells, strict=True):
            column.append(cell)
    everything = [kept for own in kinds.values() for kept in own]
    out.print(f"{root / '.store'}: {len(everything)} artifacts, {size(everything)}", soft_wrap=True, highlight=False)
    out.print(table("Kinds", "", columns))
    there = {kept.key: kept for kept in everything}
    runs = {
        "run": list(used),
        "artifacts": [str(len(keys)) for keys in used.values()],
        "size": [size([there[key] for key in keys if key in there]) for keys in used.values()],
        "gone": [str(len(keys - there.keys()) or "") for keys in used.values()],
    }
    out.print(table("Runs", "runs may share artifacts; gone: to be made again if the run is", runs))
    if older := sorted(found.keys() - used.keys()):
        out.print(f"of an older version, which did not record what they used: {', '.join(older)}", soft_wrap=True)


def verify(root: Path) -> None:
    """Hash every artifact, and set aside those that are not as they were published.

    Raises:
        UserError: some were damaged.
    """
    found = []
    for kept in artifacts(root):
        what = damage(kept.path)
        if what is not None and kept.path.exists():  # unless another process has removed it
            aside = set_aside(root / ".store", kept.path, what)
            found.append(f"{kept.key} ({what}; now {aside})")
            sys.stderr.write(f"damaged: {found[-1]}\n")
    whole = sum(1 for _ in artifacts(root))
    sys.stdout.write(f"{whole} artifacts are as they were published.\n")
    if found:
        raise UserError(
            f"{len(found)} of {whole + len(found)} artifacts were damaged, and set aside. Type the commands of the runs that "
            "use them again: they are made anew. Then look at the disk."
        )


def collect(root: Path, dry_run: bool = False, hours: float = HOURS) -> None:
    """Remove what no run uses, and what killed processes left behind, if nothing has changed there for so long.

    A run that is not finished has used, and left in journals, more than its record says. All of it was made or touched
    after the run's first start, so that nothing from then on is removed.

    Raises:
        UserError: a run's record cannot be read, so that nobody knows what it uses.
    """
    found = records(root)
    for name, record in found.items():
        if "artifacts" not in record:
            raise UserError(
                f"{root / name / RECORD} does not say which artifacts the run used: it was written by an older version. "
                "Type the run's command again, or remove the folder."
            )
    needed = {key for record in found.values() for key in record["artifacts"]}
    weights = {record["checkpoint"]["fingerprint"] for record in found.values() if "checkpoint" in record}
    began = {name: _began(record) for name, record in found.items() if record.get("state") != "finished"}
    store, before = root / ".store", min([time.time(), *began.values()]) - hours * 3600
    unused = [kept.path for kept in artifacts(root) if kept.key not in needed]
    unused += sorted(store.glob("[a-z]*/.gone-*"))  # of a gc that was killed
    unused += [path for place in WORKPLACES for path in sorted((store / place).glob("*"))]
    unused += [path for path in sorted((store / "overflow").glob("*.json")) if path.stem not in weights]
    unused += sorted(root.glob(f"*/.{RECORD}.*"))
    freed, removed = 0, 0
    for path in unused:
        if _changed(path) > before:
            continue
        freed, removed = freed + _bytes(path), removed + 1
        sys.stdout.write(f"{'would remove' if dry_run else 'removed'} {path}\n")
        if not dry_run:
            _remove(path)
    verb = "would be" if dry_run else "were"
    sys.stdout.write(f"{removed} things {verb} removed, {_readable(freed)}; {len(unused) - removed} are too young.\n")
    if began:
        first = min(began, key=lambda name: began[name])
        sys.stdout.write(
            f"Nothing that changed since {first} began was looked at: it is not finished. Type its command again, or remove "
            f"{root / first}, if it is not wanted any more.\n"
        )


def _began(record: dict[str, Any]) -> float:
    """When a run was first started, in seconds since the epoch; the beginning of time where its record does not say."""
    try:
        return datetime.fromisoformat(record["started"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return 0.0


def _remove(path: Path) -> None:
    """An artifact vanishes by one rename, as it came. It may have done so already."""
    with suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            gone = path.with_name(f".gone-{path.name}")
            path.rename(gone)
            shutil.rmtree(gone)
        else:
            path.unlink()


def artifacts(root: Path) -> Iterator[Kept]:
    """Everything that was published, by kind."""
    for path in sorted((root / ".store").glob("[a-z]*/[!.]*/meta.json")):
        folder = path.parent
        yield Kept(f"{folder.parent.name}/{folder.name}", folder, _bytes(folder))


def records(root: Path) -> dict[str, dict[str, Any]]:
    """Run -> its record, of all runs in `root`.

    Raises:
        UserError: a record is damaged.
    """
    return {path.parent.name: read_record(path.parent) for path in sorted(root.glob(f"*/{RECORD}"))}


def _inside(path: Path) -> Iterator[Path]:
    yield path
    if path.is_dir() and not path.is_symlink():
        yield from path.rglob("*")


def _changed(path: Path) -> float:
    """When something changed there last, in seconds since the epoch; a clock that ran ahead makes it young for longer."""
    try:
        return max(item.lstat().st_mtime for item in _inside(path))
    except FileNotFoundError:  # it changes under our eyes
        return float("inf")


def _bytes(path: Path) -> int:
    try:
        return sum(item.lstat().st_size for item in _inside(path) if item.is_file())
    except FileNotFoundError:
        return 0


def size(kept: Sequence[Kept]) -> str:
    """Of all of them together, such as `1.2 MB`."""
    return _readable(sum(item.bytes for item in kept))


def _readable(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
