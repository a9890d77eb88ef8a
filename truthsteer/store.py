"""Content-addressed artifacts: what a stage made, under the hash of exactly what determines it.

An artifact is a folder that appears by one rename and is never changed. Its files are hashed when it is first read: one
that is damaged is set aside and made again. Work in progress goes to a `journal`, so that a killed process loses at most
the unit it was in. No locks: processes that make the same artifact share its units, and the first to publish wins.

The store knows nothing of models or questions.
"""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from truthsteer.errors import UserError
from truthsteer.files import canonical, digest, file_sha256, read_json, remembered, sync, write_json
from truthsteer.journal import Journal, forget
from truthsteer.records import rows_from_json, to_json

log = logging.getLogger("truthsteer")

T = TypeVar("T")


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
    """All artifacts under one root.

    Args:
        root: the folder that holds it.
        share: which share of the units of work is this process's to do first, and how many shares there are.
    """

    def __init__(self, root: Path, share: tuple[int, int] = (0, 1)) -> None:
        self.root = root / ".store"
        self.facts: dict[str, Any] = {}
        """Recorded beside each artifact that is made (device, versions, counts); not part of its key."""
        self.used: set[str] = set()
        """Every artifact that was handed out: what a run rests on."""
        self.share = share

    def find(self, key: Key) -> Artifact | None:
        """The artifact, if it is there and whole.

        Raises:
            UserError: it is damaged and cannot be set aside.
        """
        path = self.root / key.kind / key.digest
        if not (path / "meta.json").exists():
            return None
        if str(key) not in self.used:
            with suppress(OSError):
                os.utime(path)  # before it is hashed: `gc` leaves what was wanted a short while ago
            what = damage(path)
            if what is not None and path.exists():
                aside = set_aside(self.root, path, what)
                log.warning("%s was damaged (%s) and is made again. The damaged one is in %s.", key, what, aside)
            if what is not None:
                return None
            self.used.add(str(key))
        return Artifact(str(key), path)

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
            meta = {"inputs": key.inputs, "files": files, "facts": self.facts}
            write_json(part / "meta.json", meta | {"sha256": digest(meta)})
            for path in part.rglob("*"):
                sync(path)
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
        """One artifact of rows per key, in the order given; those that are missing are computed together, and together
        with any other process that makes them.

        Args:
            wanted: keys of one kind; repeats are made once.
            layout: whatever, besides the keys, decides the units of work (such as the batch budget).
            compute: called with the digests to make and a test for units that it need not do, made right before each
                would be done; yields (unit number, rows). It is called again for what other processes left undone.
        """
        with self.journal(wanted, layout) as journal:
            if journal is not None:
                for done in journal.passes(*self.share):
                    for unit, rows in compute(journal.plan, done):
                        journal.append(unit, [[row.key, row.order, to_json(row.record)] for row in rows])
                made: dict[str, dict[int, Any]] = {}
                for owner, order, record in journal.rows():
                    made.setdefault(owner, {})[order] = record
                for key in self._own_first(wanted):
                    if self.find(key) is None and not journal.finished:
                        with self.publish(key) as folder:
                            write_rows(folder, [record for _, record in sorted(made.get(key.digest, {}).items())])
        return [self.need(key, key.kind) for key in wanted]

    @contextmanager
    def journal(self, wanted: Sequence[Key], layout: Mapping[str, Any]) -> Iterator[Journal | None]:
        """The journal for those of `wanted` that are missing, None if none is; forgotten if the block publishes them."""
        keys = {key.digest: key for key in wanted}
        missing = [name for name, key in keys.items() if self.find(key) is None]
        folder, kind = self.root / ".journal", wanted[0].kind if wanted else ""
        if not missing:
            self._tidy(folder, kind)
            yield None
            return

        def published(plan: Sequence[str]) -> bool:
            return all(self.find(keys[name]) is not None for name in plan)

        journal = Journal.of(folder, kind, list(keys), missing, dict(layout), published=published)
        try:
            yield journal
        except BaseException:
            journal.release()
            raise
        journal.close()
        self._tidy(folder, kind)

    def _tidy(self, folder: Path, kind: str) -> None:
        """Forget journals of which everything is published: of a process killed at that point, or of other units."""
        for path in folder.glob(f"{kind}-*/plan.json"):
            plan = remembered(path)
            if plan and all((self.root / kind / name / "meta.json").exists() for name in plan["keys"]):
                with suppress(OSError):
                    forget(path.parent)

    def _own_first(self, keys: Sequence[Key]) -> list[Key]:
        """Each key once, beginning at another place in each shard, so that they do not all publish the same."""
        unique = list({key.digest: key for key in keys}.values())
        shard, shards = self.share
        first = len(unique) * shard // shards
        return unique[first:] + unique[:first]


def damage(path: Path) -> str | None:
    """What is wrong with an artifact's folder, by its own record: None if it is as it was published."""
    try:
        meta = read_json(path / "meta.json")
        seal = meta.pop("sha256", None)
        older = seal is None and set(meta) == {"inputs", "files", "facts"}  # of a version that wrote none
        sealed = (older or seal == digest(meta)) and digest(meta["inputs"]) == path.name
    except FileNotFoundError:
        return "its meta.json is gone"
    except (ValueError, KeyError, TypeError, AttributeError):  # not JSON, not UTF-8, or not what was written
        sealed = False
    if not sealed:
        return "its meta.json was changed"
    for name, sha256 in meta["files"].items():
        try:
            if file_sha256(path / name) != sha256:
                return f"its {name} was changed"
        except FileNotFoundError:
            return f"its {name} is gone"
    return None


def set_aside(root: Path, path: Path, what: str) -> Path:
    """Move a damaged artifact out of the way, and say where it is now.

    Raises:
        UserError: it cannot be moved.
    """
    aside = root / ".damaged" / f"{path.parent.name}-{path.name}-{uuid.uuid4().hex[:8]}"
    try:
        aside.parent.mkdir(parents=True, exist_ok=True)
        os.rename(path, aside)
    except FileNotFoundError:
        pass  # another process was first
    except OSError as error:
        raise UserError(
            f"{path} is damaged ({what}) and cannot be moved away: {error.strerror}. Run `truthsteer store verify "
            f"paths.root={root.parent}` where that folder can be written, or type another paths.root=DIR."
        ) from error
    return aside


def _rename_unless_there(part: Path, final: Path) -> None:
    try:
        os.rename(part, final)
    except OSError:
        if not (final / "meta.json").exists():
            if not final.exists():
                raise
            set_aside(final.parent.parent, final, "it has no meta.json")  # such as a copy that was interrupted
            os.rename(part, final)
    sync(final.parent)
