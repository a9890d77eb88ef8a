"""Run folders: which folder a config has, what is recorded there, and how a run is found again.

The same config is the same folder, on whatever machine and with or without a sweep, so that typing the same command again
is the whole recovery story.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
import uuid
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from truthsteer import progress, sources
from truthsteer.config import Config, check_run_id, identity, to_plain
from truthsteer.errors import UserError, did_you_mean
from truthsteer.files import create_json, digest, read_json, remembered, write_json

RECORD = "run.json"
PACKAGES = (
    "truthsteer",
    "torch",
    "transformers",
    "tokenizers",
    "sentence-transformers",
    "datasets",
    "huggingface-hub",
    "safetensors",
    "numpy",
    "scipy",
    "scikit-learn",
    "sacrebleu",
    "rouge-score",
    "hydra-core",
    "omegaconf",
)


def folder_for(config: Config) -> Path:
    """The run's folder.

    Raises:
        UserError: `run_id` names a run of another config, or a damaged one.
    """
    what = identity(config)
    name = f"{config.model.name}-{config.dtype.name}-{config.data.name}-{'+'.join(config.method)}-{digest(what)[:8]}"
    if config.run_id is None:
        check_run_id(name, "model.name, dtype.name, data.name and the methods' names together")
    folder = Path(config.paths.root) / (str(config.run_id) if config.run_id is not None else name)
    if folder.is_symlink():
        raise UserError(
            f"run_id={folder.name}: {folder} is a link to another place. Type another run_id, or another paths.root."
        )
    if (folder / RECORD).exists():
        _check_same(folder, what)
    elif folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"run_id={folder.name}: {folder} exists and is not a run. Type another run_id.")
    return folder


def read_record(folder: Path) -> dict[str, Any]:
    """What run.json says.

    Raises:
        UserError: it is damaged.
    """
    try:
        found = read_json(folder / RECORD)
    except ValueError as error:
        raise _damaged(folder) from error
    if not isinstance(found, dict):
        raise _damaged(folder)
    return found


def _damaged(folder: Path) -> UserError:
    return UserError(
        f"{folder / RECORD} is damaged. Delete {folder} and type the run's command again: what was computed is in the "
        "store, and nothing of it is lost."
    )


def _check_same(folder: Path, what: dict[str, Any]) -> None:
    try:
        known = identity(read_record(folder)["config"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _damaged(folder) from error
    differing = sorted(_differences(known, what))
    if differing:
        raise UserError(
            f"run_id={folder.name} is a run with another config: {', '.join(differing[:5])} differ. Nothing was "
            "overwritten: type another run_id, or leave it out."
        )


def _differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Dotted keys whose values differ."""
    for key in old | new:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from (f"{key}.{name}" for name in _differences(before, after))
        elif before != after:
            yield key


def find_run(root: Path, name: str, key: str = "run", elsewhere: str = "paths.root=DIR") -> tuple[Path, dict[str, Any]]:
    """The folder of a run and its record.

    Args:
        root: where runs are.
        name: of the run's folder there, or a path.
        key: what holds the name, for messages; empty where it is typed alone.
        elsewhere: what to type for another root.

    Raises:
        UserError: there is no such run.
    """
    for folder in (root / name, Path(name)):
        if (folder / RECORD).is_file():
            return folder, read_record(folder)
    known = sorted(path.parent.name for path in root.glob(f"*/{RECORD}"))
    listed = f"Runs there: {', '.join(known[:8])}. Type one, or" if known else "There are none there: type"
    named = f"{key}={name}" if key else name
    raise UserError(f"{named} is not a run under {root}. {did_you_mean(name, known)}{listed} {elsewhere}.")


@dataclass
class RunRecord:
    """run.json: what was asked, what it used, how each stage went. Written at every change.

    Of several processes on one run, the one that began last writes it, and then whichever has finished the run. A shard
    but the first writes a file of its own instead.
    """

    folder: Path
    config: Config
    overrides: list[str] = field(default_factory=list)
    used: Set[str] = frozenset()
    """The artifacts handed out so far, kept up to date by their store."""

    def __post_init__(self) -> None:
        if self.config.run_id is not None:
            check_run_id(str(self.config.run_id))
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / RECORD
        self._forget_progress()  # an earlier start's
        old = remembered(path) or {}
        self._known = frozenset(old.get("artifacts", ()))
        self.data: dict[str, Any] = {
            "name": self.folder.name,
            "overrides": self.overrides,
            "config": to_plain(self.config),
            "started": old.get("started", _now()),
            "attempts": old.get("attempts", 0) + 1,
            "state": "running",
            "error": None,
            "stages": old.get("stages", {}),
            "facts": old.get("facts", {}),
            "artifacts": sorted(self._known),
            "code": {
                **git_state(),
                "sources": digest(sources.files()),
                "versions": _versions(),
                "python": platform.python_version(),
            },
            "machine": {"platform": platform.platform(), "processors": os.cpu_count()},
            "writer": uuid.uuid4().hex,
        }
        if not create_json(path, self.data):
            _check_same(self.folder, identity(self.config))
            self.write(begin=True)

    @property
    def _own(self) -> Path | None:
        """The file of a shard but the first."""
        return self.folder / f"shard-{self.config.shard}.json" if self.config.shard else None

    def write(self, begin: bool = False) -> None:
        """Write, unless another process has begun since; with `begin`, all the same."""
        self.data["updated"] = _now()
        self.data["artifacts"] = sorted(self._known | self.used)
        if self._own is not None:
            stages = {
                name: {part: entry[part] for part in ("state", "seconds") if part in entry}
                for name, entry in self.data["stages"].items()
            }
            small = {name: self.data[name] for name in ("name", "state", "error", "updated")}
            write_json(self._own, {"shard": self.config.shard, **small, "stages": stages})
        elif begin or (remembered(self.folder / RECORD) or self.data).get("writer") == self.data["writer"]:
            write_json(self.folder / RECORD, self.data)

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Time a stage and record how it ended; the block may add to the dict it is given."""
        entry: dict[str, Any] = {"state": "running"}
        before = self.data["stages"].get(name, {}).get("seconds", 0.0)
        self.data["stages"][name] = entry
        self.write()
        start = time.monotonic()
        try:
            yield entry
            entry["state"] = "done"
        except BaseException:
            entry["state"] = "failed"
            raise
        finally:
            entry["seconds"] = round(before + time.monotonic() - start, 2)
            self.write()

    def _forget_progress(self) -> None:
        (self.folder / progress.file_of(self.config.shard)).unlink(missing_ok=True)

    def finish(self, state: str, error: str | None = None) -> None:
        """Record how the run ended. Of several processes on it, one that has finished has the last word."""
        self.data["state"], self.data["error"] = state, error
        self.write(begin=state == "finished")
        if state == "finished":
            self._forget_progress()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, Any]:
    """Commit and dirty flag of the checkout that the package runs from; nulls outside of one."""
    here = Path(__file__).parent
    try:
        _git(here, "ls-files", "--error-unmatch", Path(__file__).name)
        changed = _git(here, "status", "--porcelain", "--untracked-files=no")
        return {"commit": _git(here, "rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
