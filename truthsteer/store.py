"""Content-addressed artifacts: what a stage made, under the hash of exactly what determines it.

An artifact is a folder that appears by one rename and is never changed. Work in progress goes to a journal, one line
per finished unit of work, so that a killed process loses at most the unit it was in. No locks: two processes that make
the same artifact both succeed, and the first to publish wins.

The store knows nothing of models or questions.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from truthsteer.errors import UserError
from truthsteer.records import rows_from_json, to_json

T = TypeVar("T")


def canonical(value: Any) -> str:
    """JSON with sorted keys and shortest floats; NaN is refused, since nothing may be keyed by it."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def digest(value: Any) -> str:
    """The first 20 hex digits of the sha256 of the canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:20]


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write atomically: a reader sees the old text or the new one."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_rows(folder: Path, records: Iterable[Any]) -> None:
    """Records, or their plain dicts, one JSON object a line: what `Artifact.rows` reads."""
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for record in records:
            file.write(canonical(record if isinstance(record, dict) else to_json(record)) + "\n")


@dataclass(frozen=True)
class Key:
    """Names an artifact: its kind and everything that determines it."""

    kind: str
    inputs: Mapping[str, Any]
    digest: str

    @classmethod
    def of(cls, kind: str, version: int, **inputs: Any) -> Key:
        """`version` is the stage's own: raise it whenever the same inputs would give another result."""
        full = {"kind": kind, "version": version, **inputs}
        return cls(kind, full, digest(full))

    def __str__(self) -> str:
        return f"{self.kind}/{self.digest}"


@dataclass(frozen=True)
class Artifact:
    """A published folder."""

    key: str
    path: Path

    def json(self, name: str) -> Any:
        return read_json(self.path / name)

    @property
    def facts(self) -> dict[str, Any]:
        """What was recorded when it was made."""
        found: dict[str, Any] = self.json("meta.json")["facts"]
        return found

    def rows(self, cls: type[T]) -> list[T]:
        return rows_from_json(cls, (self.path / "rows.jsonl").read_bytes())


@dataclass(frozen=True)
class JournalRow:
    """A record on its way into an artifact."""

    key: str
    """Digest of the artifact it belongs to."""
    order: int
    """Its place in the artifact."""
    record: Any


Compute = Callable[[Sequence[str], Callable[[int], bool]], Iterable[tuple[int, Sequence[JournalRow]]]]


class Store:
    """All artifacts under one root."""

    def __init__(self, root: Path) -> None:
        self.root = root / ".store"
        self.facts: dict[str, Any] = {}
        """Recorded beside each artifact that is made (device, versions, counts); not part of its key."""

    def find(self, key: Key) -> Artifact | None:
        path = self.root / key.kind / key.digest
        return Artifact(str(key), path) if (path / "meta.json").exists() else None

    def need(self, key: Key, stage: str) -> Artifact:
        """The artifact, or an error that says which stage would make it."""
        found = self.find(key)
        if found is None:
            raise UserError(
                f"This run has no {key.kind} yet, and stages= leaves out '{stage}', which would make it. "
                f"Add {stage} to stages=[...], or leave stages out."
            )
        return found

    @contextmanager
    def publish(self, key: Key) -> Iterator[Path]:
        """A temporary folder that becomes the artifact when the block ends without an exception."""
        final = self.root / key.kind / key.digest
        part = self.root / ".part" / f"{key.kind}-{key.digest}-{uuid.uuid4().hex[:8]}"
        part.mkdir(parents=True)
        try:
            yield part
            files = {str(p.relative_to(part)): file_sha256(p) for p in sorted(part.rglob("*")) if p.is_file()}
            write_json(part / "meta.json", {"inputs": key.inputs, "files": files, "facts": self.facts})
            for path in part.rglob("*"):
                _sync(path)
            final.parent.mkdir(parents=True, exist_ok=True)
            _rename_unless_there(part, final)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def make(self, key: Key, write: Callable[[Path], object]) -> Artifact:
        """The artifact; `write(folder)` makes it if it is not there."""
        found = self.find(key)
        if found is None:
            with self.publish(key) as folder:
                write(folder)
            found = self.find(key)
            assert found is not None
        return found

    def make_rows(self, wanted: Sequence[Key], layout: Mapping[str, Any], compute: Compute) -> list[Artifact]:
        """One artifact of rows per key, in the order given; those that are missing are computed together.

        Args:
            wanted: keys of one kind; repeats are made once.
            layout: whatever, besides the keys, decides the units of work (such as the batch budget).
            compute: called with the digests to make and a test for units already done; yields (unit number, rows).
        """
        unique = list({key.digest: key for key in wanted}.values())
        if any(self.find(key) is None for key in unique):
            journal = self._journal(unique, layout)
            for unit, rows in compute(journal.plan, journal.units.__contains__):
                journal.append(unit, [[row.key, row.order, to_json(row.record)] for row in rows])
            made: dict[str, dict[int, Any]] = {}
            for owner, order, record in journal.rows():
                made.setdefault(owner, {})[order] = record
            for key in unique:
                if self.find(key) is None:
                    with self.publish(key) as folder:
                        write_rows(folder, [record for _, record in sorted(made.get(key.digest, {}).items())])
            journal.close()
        return [self.need(key, key.kind) for key in wanted]

    def _journal(self, wanted: Sequence[Key], layout: Mapping[str, Any]) -> Journal:
        """The journal for those of `wanted` that are not published, or the one that an interrupted run left.

        A journal fixes its plan (the artifacts it makes, in order), so that a resumed run forms the same batches as an
        undisturbed one even if it was killed while some of its artifacts were already published. `layout` is whatever
        else decides the batches; a journal of another layout is not continued.
        """
        kind = wanted[0].kind
        names = [key.digest for key in wanted]
        missing = {key.digest for key in wanted if self.find(key) is None}
        folder = self.root / ".journal"
        for path in sorted(folder.glob(f"{kind}-*/plan.json")):
            plan = read_json(path)
            if plan["layout"] == layout and missing <= set(plan["keys"]) <= set(names):
                return Journal(path.parent, plan["keys"])
        keys = [name for name in names if name in missing]
        path = folder / f"{kind}-{digest([keys, layout])}"
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / "plan.json", {"keys": keys, "layout": layout})
        return Journal(path, keys)


class Journal:
    """Finished units of work, each with its rows, in append-only files, one per process."""

    def __init__(self, path: Path, plan: list[str]) -> None:
        self.path = path
        self.plan = plan
        """Digests of the artifacts that this journal makes, in the order that decides the batches."""
        self.units: dict[int, list[Any]] = {}
        for file in sorted(path.glob("units-*.jsonl")):
            for line in file.read_bytes().splitlines(keepends=True):
                unit = _parse_line(line)
                if unit is not None:
                    self.units.setdefault(unit["unit"], unit["rows"])
        self._file = path / f"units-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"

    def append(self, unit: int, rows: list[Any]) -> None:
        """Record a finished unit; on disk when this returns."""
        line = canonical({"unit": unit, "rows": rows}) + "\n"
        self.path.mkdir(parents=True, exist_ok=True)  # another process may have finished, and removed it
        with self._file.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self.units[unit] = rows

    def rows(self) -> Iterator[Any]:
        for unit in sorted(self.units):
            yield from self.units[unit]

    def close(self) -> None:
        """Forget the journal: its artifacts are published."""
        shutil.rmtree(self.path, ignore_errors=True)


def _parse_line(line: bytes) -> dict[str, Any] | None:
    """The unit on a line, or None for the torn line of a killed process (its unit is then done again)."""
    if not line.endswith(b"\n"):
        return None
    try:
        unit = json.loads(line)
    except ValueError:
        return None
    return unit if isinstance(unit, dict) and unit.keys() >= {"unit", "rows"} else None


def _rename_unless_there(part: Path, final: Path) -> None:
    try:
        os.rename(part, final)
    except OSError:
        if not (final / "meta.json").exists():
            raise
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
