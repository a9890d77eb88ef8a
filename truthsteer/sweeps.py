"""Sweeps that were submitted: `<paths.root>/.sweeps/<name>/sweep.json`, and how their jobs are doing.

What a job is doing is read from the file that it writes itself and from the queue; no process has to stay for it.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from truthsteer import progress, slurm
from truthsteer.errors import UserError, did_you_mean
from truthsteer.files import digest, remembered, write_json
from truthsteer.runs import RECORD

FOLDER = ".sweeps"
FILE = "sweep.json"
TAIL_BYTES = 4096


class State(StrEnum):
    """Of a job."""

    new = "not submitted"
    queued = "queued"
    running = "running"
    finished = "finished"
    failed = "failed"
    ended = "ended early"
    """Gone from the queue without having said how it went: cancelled, or killed."""
    unknown = "unknown"
    """Slurm, or the machine that it was started on, cannot be asked from here."""


ALIVE = (State.queued, State.running, State.unknown)


@dataclass
class SweepJob:
    """One point of a sweep."""

    number: int
    overrides: list[str]
    """What was typed for it."""
    run: str
    """Its run's folder."""
    share: str
    """Which part of the run, where several processes share one; else empty."""
    config: dict[str, Any]
    """Checked and plain: what the job is given."""
    launcher: dict[str, Any]
    """Keys of hydra.launcher, resolved for this job."""
    outcome: str
    """The file by which the job says how it goes."""
    finished: bool = False
    """Whether the run was finished when the sweep was submitted."""
    same_as: str = ""
    """Another job that does the same, which this one left the work to."""
    id: str | None = None
    """Slurm's id, or of a local process."""
    mark: str = ""
    """Slurm's name for the jobs that it is submitted with, written down before they are."""
    earlier: list[str] = field(default_factory=list)
    """Ids under which it was submitted before."""
    log: str | None = None
    """Its output; its errors are in the same place, as .err."""

    @property
    def name(self) -> str:
        return Path(self.run).name + self.share

    @property
    def errors(self) -> str:
        """The file that its errors are in; the same as its output's, where the launcher joins them."""
        if self.log is None:
            return "none"
        path = Path(self.log)
        return str(path if self.launcher["stderr_to_stdout"] else path.with_suffix(".err"))


@dataclass
class Sweep:
    """What was submitted by one command."""

    root: str
    name: str
    kind: str
    """slurm or local."""
    created: str
    folder: str
    """Where the command was typed."""
    host: str
    commit: str | None
    sources: dict[str, str]
    """The code: see `sources.files`."""
    jobs: list[SweepJob]
    pid: int | None = None
    """The process, of `host`, that is about to submit or start the jobs that have no id."""

    @property
    def path(self) -> Path:
        return Path(self.root) / FOLDER / self.name

    def write(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / FILE, asdict(self))


@dataclass(frozen=True)
class Doing:
    """What a job is doing."""

    state: State
    why: str = ""
    """Where it runs, what it waits for, or why it failed."""
    restarts: int = 0


def restarts(item: Doing) -> str:
    """How often it was queued again by itself."""
    return f"{item.restarts} restart{'' if item.restarts == 1 else 's'}"


def new_name(runs: Sequence[str]) -> str:
    """Time, to the second, and four digits of what is run."""
    return f"{datetime.now():%Y%m%d-%H%M%S}-{digest([list(runs), os.getpid()])[:4]}"


def all_of(root: Path) -> Iterator[Sweep]:
    """Sweeps under a root, the newest first. One that cannot be read is left out, and said to be."""
    for path in sorted((root / FOLDER).glob(f"*/{FILE}"), reverse=True):
        try:
            whole = remembered(path)
            jobs = [SweepJob(**job) for job in whole.pop("jobs")]
            yield Sweep(**{**whole, "root": str(root)}, jobs=jobs)
        except (AttributeError, KeyError, TypeError):
            sys.stderr.write(f"{path} is damaged, or of another version of truthsteer: its jobs are not looked at.\n")


def find(root: Path, name: str | None) -> Sweep:
    """The sweep of that name, or the newest.

    Raises:
        UserError: there is none.
    """
    known = list(all_of(root))
    found = [sweep for sweep in known if name is None or sweep.name == name] or [
        sweep for sweep in known if name and name in sweep.name
    ]
    if found and (name is None or len(found) == 1 or found[0].name == name):
        return found[0]
    names = [sweep.name for sweep in known]
    if not names:
        raise UserError(f"There are no sweeps under {root}. Type paths.root=DIR, the root that they were started with.")
    which = "is the beginning or part of several sweeps" if found else f"is not a sweep under {root}"
    raise UserError(f"{name} {which}. {did_you_mean(str(name), names)}There are: {', '.join(names[:8])}.")


def typed(words: Sequence[str], keys: bool = False) -> tuple[str | None, Path, dict[str, Any]]:
    """What follows `truthsteer status` or `resume`: a sweep, where it is, and keys of the launcher.

    Raises:
        UserError: anything else is typed.
    """
    name, root, launcher = None, Path("multirun"), {}
    for word in words:
        key, given, value = word.partition("=")
        if key == "paths.root" and value:
            root = Path(value)
        elif keys and key.startswith("hydra.launcher.") and value:
            launcher[key.removeprefix("hydra.launcher.")] = yaml_value(value)
        elif given or word.startswith("-") or name is not None:
            more = ", paths.root=DIR and hydra.launcher.KEY=VALUE" if keys else " and paths.root=DIR"
            raise UserError(f"'{word}' is not known here. Type the sweep's name{more}.")
        else:
            name = word
    return name, root.resolve(), launcher


def yaml_value(text: str) -> Any:
    """A value as the command line reads it."""
    return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index, call-overload]


def command(name: str, sweep: Sweep) -> str:
    """What to type for a sweep: `truthsteer status NAME`."""
    usual = Path("multirun").resolve() == Path(sweep.root).resolve()
    return f"truthsteer {name} {sweep.name}{'' if usual else f' paths.root={sweep.root}'}"


def different(jobs: Sequence[SweepJob]) -> list[str]:
    """What was typed for each job, without what was typed for all."""
    shared = set(jobs[0].overrides).intersection(*(job.overrides for job in jobs)) if len(jobs) > 1 else set()
    return [" ".join(word for word in job.overrides if word not in shared) for job in jobs]


def doing(sweep: Sweep, ends: bool = True) -> list[Doing]:
    """What each job is doing. The queue is asked first: a job that leaves it has written how it ended by then.

    Args:
        sweep: its jobs; one whose id was never written down is given it, if it can be found.
        ends: whether to ask Slurm how those ended that it does not know any more.
    """
    starting = sweep.pid is not None and sweep.pid != os.getpid()
    here = sweep.host == socket.gethostname()
    starting = starting and (_alive(str(sweep.pid), "truthsteer") if here else sweep.kind == "local")
    sure = starting or _find_ids(sweep)
    ids = [job.id for job in sweep.jobs if job.id is not None]
    queue = slurm.queue(ids) if sweep.kind == "slurm" else _processes(sweep, ids)
    found = [_doing(job, queue) for job in sweep.jobs]
    for place, (job, now) in enumerate(zip(sweep.jobs, found, strict=True)):
        if now.state is State.new and starting and not job.same_as:
            found[place] = Doing(State.queued, f"in process {sweep.pid}") if here else Doing(State.unknown)
        elif now.state is State.new and job.mark and not sure:
            found[place] = Doing(State.unknown)
        if found[place].state is State.unknown:
            why = "Slurm cannot be asked" if sweep.kind == "slurm" else f"{sweep.host} knows, where it was started"
            found[place] = replace(found[place], why=why)
    return how_ended(sweep, found) if ends else found


def how_ended(sweep: Sweep, found: Sequence[Doing]) -> list[Doing]:
    """The same, with Slurm's word for those that ended early."""
    gone = [str(job.id) for job, now in zip(sweep.jobs, found, strict=True) if now.state is State.ended]
    words = slurm.ends(gone) if sweep.kind == "slurm" else {}
    return [
        replace(now, why=words.get(str(job.id), now.why)) if now.state is State.ended else now
        for job, now in zip(sweep.jobs, found, strict=True)
    ]


def _find_ids(sweep: Sweep) -> bool:
    """Give their ids to jobs whose submission was killed before it wrote them down; False: Slurm had to be asked, and cannot."""
    lost = [job for job in sweep.jobs if job.mark and job.id is None and not job.same_as]
    arrays = slurm.named(job.mark for job in lost)
    for job in lost:
        said = remembered(Path(job.outcome)) or {}
        if said.get("id") not in (None, *job.earlier):
            job.id = said["id"]
        elif array := (arrays or {}).get(job.mark):
            together = [other for other in sweep.jobs if other.mark == job.mark]
            job.id = array if len(together) == 1 else f"{array}_{together.index(job)}"
        if job.id is not None:
            job.log = f"{job.launcher['submitit_folder'].replace('%j', job.id)}/{job.id}_0_log.out"
    return arrays is not None


def _doing(job: SweepJob, queue: dict[str, tuple[str, str]] | None) -> Doing:
    if job.finished:
        return Doing(State.finished, "before this sweep")
    if job.id is None:
        return Doing(State.new)
    said = outcome(job)
    restarts = said.get("restarts", 0)
    if said.get("state") == State.finished:
        return Doing(State.finished, "", restarts)
    state, where = (queue or {}).get(job.id, ("", ""))
    if state in ("PENDING", "REQUEUED", "SPECIAL_EXIT"):
        return Doing(State.queued, where, restarts)
    if said.get("state") == State.failed:
        return Doing(State.failed, said["error"] or "", restarts)
    if queue is None:
        return Doing(State.unknown, "", restarts)
    if state:
        return Doing(State.running, where, restarts)
    return Doing(State.ended, "killed" if said.get("state") != "interrupted" else "interrupted", restarts)


def outcome(job: SweepJob) -> dict[str, Any]:
    """What the job itself said last, under its present id."""
    said: dict[str, Any] = remembered(Path(job.outcome)) or {}
    return said if said.get("id") == job.id else {}


def _processes(sweep: Sweep, ids: Sequence[str]) -> dict[str, tuple[str, str]] | None:
    """The same as a queue, of processes of this machine."""
    if sweep.host != socket.gethostname():
        return None
    return {pid: ("RUNNING", "") for pid in ids if _alive(pid, "submitit")}


def _alive(pid: str, word: str) -> bool:
    """Whether a process is there whose command has a word in it: a number may be another process's by now. The command of
    one that has only just begun is empty."""
    import psutil

    try:
        process = psutil.Process(int(pid))
        command = process.cmdline()
        return process.status() != psutil.STATUS_ZOMBIE and (not command or any(word in part for part in command))
    except (psutil.Error, ValueError):
        return False


def stage(job: SweepJob) -> str:
    """How far its run has come, by its own files: `generate, 3 of 7 done; generate: answers 320/964`."""
    shard = job.config.get("shard")
    said = remembered(Path(job.run) / (f"shard-{shard}.json" if shard else RECORD))
    if not isinstance(said, dict):
        return ""
    stages, wanted = said.get("stages", {}), job.config["stages"]
    done = sum(stages.get(name, {}).get("state") == "done" for name in wanted)
    now = [name for name in wanted if stages.get(name, {}).get("state") == "running"]
    if not now:
        return f"{done} of {len(wanted)} done"
    step = remembered(Path(job.run) / progress.file_of(shard))
    begun = step is not None and str(step["what"]).startswith(now[0])
    within = f"; {step['what']} {step['done']}/{step['of']}" if step is not None and begun else ""
    return f"{now[0]}, {done} of {len(wanted)} done{within}"


def last_line(job: SweepJob) -> str:
    """The last line of what it wrote: to its error log, else to its run's log."""
    shard = job.config.get("shard")
    for path in (Path(job.errors), Path(job.run) / (f"shard-{shard}.log" if shard else "log.txt")):
        if path.is_file():
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - TAIL_BYTES))
                text = re.sub("[━╸╺]+", "", file.read().decode(errors="replace"))  # of progress bars
                lines = [line.strip() for line in text.splitlines()]
            if any(lines):
                return next(line for line in reversed(lines) if line)
    return ""
