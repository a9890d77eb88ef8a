"""Run folders: which folder a config has, what is recorded there, and how a run is found again.

The same config is the same folder, on whatever machine and with or without a sweep, so that typing the same command again
is the whole recovery story.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from truthsteer import sources
from truthsteer.config import Config, check_run_id, identity, to_plain
from truthsteer.errors import UserError, did_you_mean
from truthsteer.store import digest, read_json, write_json

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
        UserError: `run_id` names a run of another config.
    """
    what = identity(config)
    name = f"{config.model.name}-{config.dtype.name}-{config.data.name}-{'+'.join(config.method)}-{digest(what)[:8]}"
    if config.run_id is None:
        check_run_id(name, "model.name, dtype.name, data.name and the methods' names together")
    folder = Path(config.paths.root) / (str(config.run_id) if config.run_id is not None else name)
    if (folder / RECORD).exists():
        differing = sorted(_differences(identity(read_json(folder / RECORD)["config"]), what))
        if differing:
            raise UserError(
                f"run_id={folder.name} is a run with another config: {', '.join(differing[:5])} differ. Nothing was "
                "overwritten: type another run_id, or leave it out."
            )
    elif folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"run_id={folder.name}: {folder} exists and is not a run. Type another run_id.")
    return folder


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
            return folder, read_json(folder / RECORD)
    known = sorted(path.parent.name for path in root.glob(f"*/{RECORD}"))
    listed = f"Runs there: {', '.join(known[:8])}. Type one, or" if known else "There are none there: type"
    named = f"{key}={name}" if key else name
    raise UserError(f"{named} is not a run under {root}. {did_you_mean(name, known)}{listed} {elsewhere}.")


@dataclass
class RunRecord:
    """run.json: what was asked, what it used, how each stage went. Written at every change."""

    folder: Path
    config: Config
    overrides: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.config.run_id is not None:
            check_run_id(str(self.config.run_id))
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / RECORD
        old = read_json(path) if path.exists() else {}
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
            "code": {
                **git_state(),
                "sources": digest(sources.files()),
                "versions": _versions(),
                "python": platform.python_version(),
            },
            "machine": {"platform": platform.platform(), "processors": os.cpu_count()},
        }
        self.write()

    def write(self) -> None:
        self.data["updated"] = _now()
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

    def finish(self, state: str, error: str | None = None) -> None:
        self.data["state"], self.data["error"] = state, error
        self.write()


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
