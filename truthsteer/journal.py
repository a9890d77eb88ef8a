"""Work in progress, in units: what is done survives a kill, and processes that make the same things share the work.

A journal is a folder: a plan, and one append-only file per process. A line says that a unit is finished, with its rows, or
that its process has begun one. The first is fact. The second only saves time: a unit that another living process has begun
is left to it for a while, and then done all the same, so that nothing waits for a node that is gone. There are no locks.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from truthsteer.files import canonical, digest, remembered, sync, write_json

if TYPE_CHECKING:
    from numpy import ndarray

PATIENCE = 10.0
"""Seconds that a unit is left to the process that has begun it, at least."""
SLOWEST = 3.0
"""The same in times the slowest unit so far."""
POLL = 0.05
"""Seconds between two looks at what others have done, where nothing else is left to do."""

Done = Callable[[int], bool]
"""Whether a unit need not be done: asked right before it would be, once."""


class PublishedError(Exception):
    """Another process has published what the journal makes, and removed it."""


class Journal:
    """Finished units of work.

    Args:
        path: the folder; made if it is not there.
        plan: digests of the artifacts that this journal makes, in the order that decides the units.
        layout: whatever else decides the units.
        published: whether all artifacts of a plan are there, so that a journal that is gone was not lost.
    """

    def __init__(self, path: Path, plan: list[str], layout: Any, published: Callable[[list[str]], bool]) -> None:
        self.path, self.plan, self.layout = path, plan, layout
        self.units: dict[int, list[Any]] = {}
        self.finished = False
        """Others have published everything that it makes."""
        self._published = published
        self._read: dict[str, int] = {}
        self._begun: dict[str, tuple[int, float]] = {}
        """Another process's file -> the unit it is at, and since when this process knows."""
        self._slowest = 0.0
        self._own: IO[bytes] | None = None
        self._name, self._started = "", 0.0
        self.refresh()

    @classmethod
    def of(cls, folder: Path, kind: str, wanted: list[str], missing: list[str], layout: Any, **named: Any) -> Journal:
        """The journal that an interrupted or another process left for this work, or a new one.

        A journal fixes its plan, so that a resumed run forms the same batches as an undisturbed one even if it was killed
        while some of its artifacts were already published. One of another layout is not continued.
        """
        for path in sorted(folder.glob(f"{kind}-*/plan.json")):
            plan = remembered(path)
            if plan is not None and plan["layout"] == layout and set(missing) <= set(plan["keys"]) <= set(wanted):
                return cls(path.parent, plan["keys"], layout, **named)
        return cls(folder / f"{kind}-{digest([missing, layout])}", missing, layout, **named)

    def passes(self, shard: int = 0, shards: int = 1) -> Iterator[Done]:
        """Tests for `Done`, one per walk over all units, until every unit is finished.

        The first walk does this shard's share (unit % shards == shard), the next what is missing. The last ones, if any,
        do what others began and did not finish.
        """
        left: set[int] = set()
        share = shards > 1

        def done(unit: int) -> bool:
            self.refresh()
            if self.finished or unit in self.units:
                return True
            if (share and unit % shards != shard) or self._taken(unit):
                left.add(unit)
                return True
            self._begin(unit)
            self.refresh()
            if self._taken(unit, self._name):  # two began at once: one of them leaves it to the other
                left.add(unit)
                return True
            return False

        yield done
        while left := self._missing(left):
            share = False
            while left and all(self._taken(unit) for unit in left):
                time.sleep(POLL)
                self.refresh()
                left = self._missing(left)
            if left:
                yield done

    def append(self, unit: int, rows: list[Any]) -> None:
        """Record a finished unit; on disk when this returns."""
        self.units[unit] = rows
        seconds = round(time.monotonic() - self._started, 3)
        self._slowest = max(self._slowest, seconds)
        self._write({"unit": unit, "rows": rows, "seconds": seconds}, safe=True)

    def rows(self) -> Iterator[Any]:
        for unit in sorted(self.units):
            yield from self.units[unit]

    def put(self, unit: int, what: str, arrays: Mapping[str, ndarray]) -> None:
        """Record a unit whose result is arrays: a file of its own. `what` says what they are of."""
        from safetensors.numpy import save

        content = save(dict(arrays))
        part = self.path / f".{uuid.uuid4().hex}"
        try:
            part.write_bytes(content)
            sync(part)
            os.replace(part, self._block(unit))
        except FileNotFoundError:  # the journal is gone, and with it the need for it, or the next walk does it again
            self.refresh()
            return
        finally:
            part.unlink(missing_ok=True)
        self.append(unit, [what, hashlib.sha256(content).hexdigest()])

    def get(self, unit: int, what: str) -> dict[str, ndarray] | None:
        """What `put` recorded; None, and the unit is to be done again, if it is of something else, or damaged.

        Raises:
            PublishedError: it is not needed any more.
        """
        from safetensors.numpy import load

        try:
            content = self._block(unit).read_bytes()
        except FileNotFoundError:
            self.refresh()
            if self.finished:
                raise PublishedError from None
            content = b""
        if self.units.get(unit) != [what, hashlib.sha256(content).hexdigest()]:
            self.units.pop(unit, None)
            return None
        found: dict[str, ndarray] = load(content)
        return found

    def refresh(self) -> None:
        """Read what other processes have written since the last time."""
        try:
            grown = [
                (entry.name, size)
                for entry in os.scandir(self.path)
                if entry.name.startswith("units-") and (size := entry.stat().st_size) > self._read.get(entry.name, 0)
            ]
        except FileNotFoundError:
            self.finished = self._published(self.plan)
            if not self.finished:
                self._restore()
            return
        for name, _ in sorted(grown):
            if name != self._name:
                self._read_on(name)

    def release(self) -> None:
        """Write no more; the journal stays."""
        if self._own is not None:
            self._own.close()
            self._own = None

    def close(self) -> None:
        """Forget the journal: its artifacts are published."""
        self.release()
        forget(self.path)

    def _missing(self, units: set[int]) -> set[int]:
        return set() if self.finished else {unit for unit in units if unit not in self.units}

    def _taken(self, unit: int, before: str = "~") -> bool:
        """Whether another process, alive as far as can be known, has begun a unit not long ago; of those whose file is
        named `before` another.
        """
        patience = max(PATIENCE, SLOWEST * self._slowest)
        return any(
            begun == unit and name < before and time.monotonic() - since < patience and _may_live(name)
            for name, (begun, since) in self._begun.items()
        )

    def _begin(self, unit: int) -> None:
        self._started = time.monotonic()
        self._write({"begun": unit})

    def _write(self, entry: dict[str, Any], safe: bool = False) -> None:
        """Append a line; where the journal has vanished meanwhile, `refresh` has said why."""
        if self._own is None:
            name = f"units-{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
            try:
                self._own = (self.path / name).open("ab", buffering=0)
            except FileNotFoundError:
                self.refresh()
                if self.finished:
                    return
                self._own = (self.path / name).open("ab", buffering=0)
            sync(self.path)
            self._name = name
        line = _line(entry)
        if self._own.write(line) != len(line):  # a disk that fills up takes a part first
            self._own.write(b"\n")
        if safe:
            os.fsync(self._own.fileno())

    def _read_on(self, name: str) -> None:
        try:
            with (self.path / name).open("rb") as file:
                file.seek(self._read.get(name, 0))
                text = file.read()
        except FileNotFoundError:
            return
        whole = text.rfind(b"\n") + 1  # the rest is torn, or not yet written
        self._read[name] = self._read.get(name, 0) + whole
        for line in text[:whole].splitlines():
            entry = _parse(line)
            if entry is None:
                continue
            if "begun" in entry:
                self._begun[name] = (entry["begun"], time.monotonic())
            else:
                self.units.setdefault(entry["unit"], entry["rows"])
                self._slowest = max(self._slowest, entry["seconds"])
                self._begun.pop(name, None)

    def _restore(self) -> None:
        """The folder, whole from the first moment, with all units known so far."""
        self.release()
        self._name, self._read = "", {}
        part = self.path.with_name(f".part-{uuid.uuid4().hex[:8]}")
        part.mkdir(parents=True)
        try:
            write_json(part / "plan.json", {"keys": self.plan, "layout": self.layout})
            if self.units:
                known = [_line({"unit": unit, "rows": rows, "seconds": 0.0}) for unit, rows in self.units.items()]
                (part / f"units-{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl").write_bytes(b"".join(known))
            os.replace(part, self.path)
        except OSError:
            if not (self.path / "plan.json").exists():  # otherwise another process was first
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _block(self, unit: int) -> Path:
        return self.path / f"unit-{unit}.safetensors"


def forget(path: Path) -> None:
    """Remove a journal whose artifacts are published.

    It vanishes by one rename, since another process may be writing to it; that one then finds everything published.
    """
    gone = path.with_name(f".gone-{uuid.uuid4().hex[:8]}")
    try:
        os.replace(path, gone)
    except FileNotFoundError:
        return
    for each in (gone, *path.parent.glob(".gone-*")):  # those of processes that were killed at this point
        shutil.rmtree(each, ignore_errors=True)


def _line(entry: dict[str, Any]) -> bytes:
    """A line that shows whether it is whole and unchanged."""
    text = canonical(entry)
    return f"{hashlib.sha256(text.encode()).hexdigest()[:16]} {text}\n".encode()


def _parse(line: bytes) -> dict[str, Any] | None:
    """What a line says, or None for one that is torn or damaged (its unit is then done again)."""
    seal, _, text = line.partition(b" ")
    if hashlib.sha256(text).hexdigest()[:16].encode() != seal:
        return None
    found: dict[str, Any] = json.loads(text)
    return found


def _host() -> str:
    return socket.gethostname().replace("-", "_").replace(os.sep, "_")


def _may_live(name: str) -> bool:
    """Whether the process that writes this file may still run: known for this machine's, assumed of others'."""
    _, host, process, _ = name.split("-")
    if host != _host():
        return True
    if int(process) == os.getpid():
        return False  # an earlier journal of this process, which has ended
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
