"""A sweep as jobs: every one is composed, checked and frozen here before the first is queued, then waited for.

The node only runs what it is given (jobs.py). What was submitted is on record (sweeps.py), so that the command that
waits can be stopped, and asked again, without losing anything.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import filter_overrides
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from truthsteer import slurm, sources, sweeps
from truthsteer.cli import EXAMINED, explain, rejudged, remove_if_empty, set_hub_cache, to_config
from truthsteer.config import ON_DEMAND, Config, Stage, to_plain
from truthsteer.errors import UserError
from truthsteer.files import digest
from truthsteer.runs import RECORD, folder_for, git_state, read_record
from truthsteer.sweeps import ALIVE, State, Sweep, SweepJob, command, different
from truthsteer.terminal import console, table
from truthsteer.waiting import submit_and_wait

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader

LOCKED_S = 30.0
"""Longer than any command takes to look and to write down what it submits."""
SECRET = r"""(?i)\b(\w*(?:TOKEN|SECRET|PASSWORD|PASSWD|KEY|CREDENTIALS?))=(?!["']?\$)\S"""
"""What gives a variable that holds a secret its value, and not another variable's or a command's."""


def launch(
    kind: str, loader: ConfigLoader, master: DictConfig, job_overrides: Sequence[Sequence[str]], first: int
) -> None:
    """Check, show and submit the jobs of a sweep, and wait for them.

    Args:
        kind: slurm or local.
        loader: composes a job's config.
        master: the sweep's own config.
        job_overrides: what is typed for each job.
        first: number of the first job.

    Raises:
        UserError: a job is wrong (nothing is queued then), or Slurm is not here or refuses one.
        SystemExit: a job failed (1), or waiting was interrupted (130).
    """
    scratch = Path(master.hydra.sweep.dir)
    (scratch / "multirun.yaml").unlink(missing_ok=True)  # Hydra's; what is submitted has a record of its own
    remove_if_empty(scratch)
    planned = [_planned(loader, master, overrides, first + place) for place, overrides in enumerate(job_overrides)]
    configs = [config for config, _ in planned]
    jobs = [job for _, job in planned]
    offline = _offline(jobs)
    _use_one("paths.hf_cache", [config.paths.hf_cache for config in configs])
    _use_one("paths.root", [config.paths.root for config in configs])
    set_hub_cache(configs[0].paths.hf_cache)
    dealt: set[str] = set()
    lacks: dict[int, UserError] = {}
    for config, job in planned:
        with _Named(job):
            lack = _check(config, job, offline, dealt)
        if lack is not None:
            lacks[job.number] = _of_job(job.number, job.overrides, lack)
    root, dry_run = Path(configs[0].paths.root), any(config.dry_run for config in configs)
    if dry_run or lacks:
        _show(jobs, _notes(kind, jobs, root, dry_run=True), root)
        if not dry_run:
            raise next(iter(lacks.values()))
        for error in lacks.values():
            console().print(f"Not ready: {error}", soft_wrap=True, highlight=False, markup=False)
        return
    unfinished = [job for job in jobs if not job.finished]
    if kind == "slurm" and unfinished:
        slurm.require()
    with _alone(root) if unfinished else nullcontext():
        notes = _notes(kind, jobs, root)
        todo = [job for job in jobs if not notes[job.number]]
        whole = [job for job in jobs if not notes[job.number] or job.finished or job.same_as]
        sweep = Sweep(
            str(root), sweeps.new_name([job.run for job in jobs]), kind, f"{datetime.now():%Y-%m-%d %H:%M:%S}",
            str(Path.cwd()), socket.gethostname(), git_state()["commit"], sources.files(), whole, os.getpid(),
        )  # fmt: skip
        for job in todo:
            job.outcome = str(sweep.path / f"{job.number}.json")
        if todo:
            sweep.write()
    _show(jobs, notes, root)
    _tell_left([job for job in jobs if job not in whole], notes)
    if not whole:
        return
    _mark_examined(master, planned)
    submit_and_wait(sweep, todo, offline, recorded=bool(todo))


def resume(sweep: Sweep, typed: Mapping[str, Any]) -> None:
    """Submit again, with their frozen configs and the code as it is now, the jobs that are neither done nor under way.

    Args:
        sweep: which sweep.
        typed: keys of hydra.launcher to change.

    Raises:
        UserError, SystemExit: as `launch`.
    """
    for job in sweep.jobs:
        unknown = [key for key in typed if key not in job.launcher]
        if unknown:
            raise UserError(
                f"hydra.launcher.{unknown[0]} is not a key of this sweep. Its keys are: {', '.join(job.launcher)}."
            )
    _refuse_secrets(typed)
    with _alone(Path(sweep.root)):
        sweep = sweeps.find(Path(sweep.root), sweep.name)  # as it is now
        now = sweeps.doing(sweep)
        if any(item.state is State.unknown for item in now):
            raise _undecided(sweep)
        todo = [job for job, item in zip(sweep.jobs, now, strict=True) if item.state not in (State.finished, *ALIVE)]
        elsewhere = _under_way(sweep.kind, todo, Path(sweep.root), sweep.name)
        for job in todo:
            if job.number in elsewhere:
                console().print(f"job {job.number} is under way: {elsewhere[job.number]}", highlight=False)
        todo = [job for job in todo if job.number not in elsewhere]
        if not todo:
            console().print(f"Nothing is left to submit of {sweep.name}. `{command('status', sweep)}` shows its jobs.")
            return
        if sweep.kind == "slurm":
            slurm.require()
        for job in todo:
            job.launcher |= typed
            if job.id is not None:
                job.earlier.append(job.id)
            job.id = job.log = None
            job.same_as = job.mark = ""
            job.outcome = str(sweep.path / f"{job.number}.json")
        sweep.sources, sweep.commit, sweep.host = sources.files(), git_state()["commit"], socket.gethostname()
        sweep.pid = os.getpid()
        sweep.write()
    submit_and_wait(sweep, todo, _offline(sweep.jobs), recorded=True)


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One command at a time looks what is under way and writes down what it submits, where the file system has locks. A lock
    that is held for long is a dead node's: it is not waited for."""
    import fcntl

    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{sweeps.FOLDER}.lock").open("w") as file:
        until = time.monotonic() + LOCKED_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < until:
                    time.sleep(0.1)
                    continue
            except OSError:
                pass
            break
        yield


def _undecided(sweep: Sweep) -> UserError:
    where = f"on {sweep.host}, where it was started" if sweep.kind == "local" else "on a login node"
    return UserError(
        f"Whether jobs of {sweep.name} still run cannot be told here. Type the same {where}"
        + (", or the sweep's own command again." if sweep.kind == "local" else ", when squeue answers there.")
    )


def _tell_left(left: Sequence[SweepJob], notes: Mapping[int, str]) -> None:
    """What this command does not wait for, though others are at it."""
    busy = [f"{job.number} ({notes[job.number]})" for job in left if not notes[job.number].startswith("as job ")]
    if busy:
        text = f"Left to others, and not waited for: job {', '.join(busy)}. Type the same command when they have ended."
        console().print(text, soft_wrap=True, highlight=False, markup=False)


# ------------------------------------------------------------------------------------------------ before anything


class _Named:
    """Errors inside the block name the job."""

    def __init__(self, job: SweepJob) -> None:
        self.job = job

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (UserError, HydraException, OmegaConfBaseException)):
            raise _of_job(self.job.number, self.job.overrides, error) from error


def _of_job(number: int, overrides: Sequence[str], error: BaseException) -> UserError:
    return UserError(f"Job {number} ({' '.join(overrides) or 'as composed'}): {explain(error)} Nothing was queued.")


def _planned(
    loader: ConfigLoader, master: DictConfig, overrides: Sequence[str], number: int
) -> tuple[Config, SweepJob]:
    """A job's checked config and its record, composed with its own model's resources."""
    typed = list(filter_overrides(overrides))
    try:
        whole = loader.load_sweep_config(master, list(overrides))
        launcher = OmegaConf.to_container(whole.hydra.launcher, resolve=True)
        assert isinstance(launcher, dict)
        _refuse_secrets(launcher)
        OmegaConf.set_struct(whole, False)
        whole.pop("hydra")
        config = to_config(whole)
        config.paths.root = str(Path(config.paths.root).resolve())
        shown = rejudged(config, typed)[0] if config.run is not None else config
        run = folder_for(shown)
    except (UserError, HydraException, OmegaConfBaseException) as error:
        raise _of_job(number, typed, error) from error
    plain = to_plain(config)
    share = f" {plain['shard'] + 1}/{plain['shards']}" if plain.get("shards", 1) > 1 else ""
    keys = {str(key): value for key, value in launcher.items()}
    done = _is_finished(run, shown)
    return config, SweepJob(number, typed, str(run), share, plain, keys, "", finished=done)


def _refuse_secrets(launcher: Mapping[Any, Any]) -> None:
    """What is typed for jobs is kept in files that others may read."""
    for key in ("setup", "additional_parameters"):
        lines = launcher.get(key) or ()
        for text in lines.values() if isinstance(lines, Mapping) else lines:
            if found := re.search(SECRET, str(text)):
                raise UserError(
                    f"hydra.launcher.{key} gives {found[1]} its value, which would be written down. Export it in the "
                    f"shell that you submit from, or type `export {found[1]}=$(cat FILE)` with a file that only you may read."
                )


def _is_finished(run: Path, config: Config) -> bool:
    """Whether the run has done all stages that are asked of it, under the code as it is now. Downloads and a look at the
    machine are done each time."""
    if not (run / RECORD).is_file() or set(ON_DEMAND) & set(config.stages):
        return False
    record = read_record(run)
    done = all(record["stages"].get(stage.value, {}).get("state") == "done" for stage in config.stages)
    same = record["code"].get("sources") == digest(sources.files())
    return bool(record["state"] == "finished" and done and same)


def _offline(jobs: Sequence[SweepJob]) -> bool:
    """Whether nodes have no network; then the check must not ask one either."""
    asked = jobs[0].launcher["offline"]
    offline = (
        bool(asked) if asked is not None else os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    )
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    return offline


def _use_one(key: str, values: Sequence[Any]) -> None:
    several = sorted(set(map(str, values)))
    if len(several) > 1:
        raise UserError(f"{key} has several values in one sweep ({', '.join(several)}). Type one sweep for each.")


def _check(config: Config, job: SweepJob, offline: bool, dealt: set[str]) -> UserError | None:
    """Check what can be known without weights; what is returned is what a node without a network would lack.

    Raises:
        UserError: the job is wrong.
    """
    from truthsteer import checkpoint, data, plan

    if config.run is not None:
        config = rejudged(config, job.overrides)[0]
    questions = digest([to_plain(config.data), config.seed])
    _, ws, _ = plan.check(config, deal=questions not in dealt)
    dealt.add(questions)
    if not offline or job.finished or Stage.prefetch in config.stages:
        return None
    try:
        if set(config.stages) - {Stage.judge, Stage.report}:
            checkpoint.require_cached(config.model)
        data.prefetch(config.data)
        if Stage.judge in config.stages:
            _ = ws.judge_identities
    except UserError as error:
        return error
    return None


def _notes(kind: str, jobs: Sequence[SweepJob], root: Path, dry_run: bool = False) -> dict[int, str]:
    """Why a job is not submitted: number -> `finished`, `as job 0`, or where it is under way. Empty: it is."""
    first: dict[str, int] = {}
    for job in jobs:
        first.setdefault(job.run + job.share, job.number)
    own = [job for job in jobs if first[job.run + job.share] == job.number]
    under_way = _under_way(kind, [job for job in own if not job.finished], root, dry_run=dry_run)
    notes: dict[int, str] = {}
    for job in jobs:
        same = first[job.run + job.share]
        notes[job.number] = (
            f"as job {same}" if same != job.number else "finished" if job.finished else under_way.get(job.number, "")
        )
    return notes


def _under_way(kind: str, jobs: Sequence[SweepJob], root: Path, but: str = "", dry_run: bool = False) -> dict[int, str]:
    """Jobs whose run is queued or running in another sweep: number -> where. They stand for those, if they can be waited for
    together. A run that is shared by another number of jobs is left to them.

    Raises:
        UserError: Slurm was given one, and cannot be asked now; a dry run only says so.
    """
    found: dict[int, str] = {}
    runs = {job.run for job in jobs}
    for sweep in sweeps.all_of(root):
        if sweep.name == but or not any(job.run in runs for job in sweep.jobs):
            continue
        for job, now in zip(sweep.jobs, sweeps.doing(sweep, ends=False), strict=True):
            # A machine that cannot be asked may be gone, with its processes; so may a cluster, seen from outside.
            lost = now.state is State.unknown and not (kind == sweep.kind == "slurm")
            if now.state not in ALIVE or lost:
                continue
            for mine in jobs:
                same = mine.share == job.share
                if mine.run != job.run or mine.number in found:
                    continue
                if not same and _shares(mine) == _shares(job):
                    continue  # another part of it
                if now.state is State.unknown and not dry_run:
                    raise _undecided(sweep)
                if same and sweep.kind == kind and job.id is not None:
                    mine.id, mine.outcome, mine.log = job.id, job.outcome, job.log
                    mine.same_as = f"{sweep.name}, job {job.number}"
                part = "" if same else f", part{job.share}"
                found[mine.number] = f"{now.state}{f' as {job.id}' if job.id else ''} ({sweep.name}{part})"
    return found


def _shares(job: SweepJob) -> str:
    """How many jobs share the run."""
    return job.share.partition("/")[2]


def _show(jobs: Sequence[SweepJob], notes: Mapping[int, str], root: Path) -> None:
    out = console()
    asked = [job.launcher for job in jobs]
    columns = {
        "run": [job.name for job in jobs],
        "job": [str(job.number) for job in jobs],
        "typed": different(jobs),
        "GPUs": [str(item.get("gres") or item["gpus_per_node"] or 0) for item in asked],
        "CPUs": [str(item["cpus_per_task"]) for item in asked],
        "GB": [str(item["mem_gb"]) for item in asked],
        "minutes": [str(item["timeout_min"]) for item in asked],
        "": [notes[job.number] or "to do" for job in jobs],
    }
    dim = [place for place, job in enumerate(jobs) if notes[job.number]]
    out.print(table("Jobs", f"runs are in {root}", columns, dim=dim))


def _mark_examined(master: DictConfig, planned: Sequence[tuple[Config, SweepJob]]) -> None:
    """The notes by which a sweep shows what the doctor found in all of its runs, once it has ended."""
    for config, job in planned:
        if Stage.doctor in config.stages:
            folder = Path(master.hydra.sweep.dir) / str(job.number)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / EXAMINED).write_text(job.run, encoding="utf-8")
