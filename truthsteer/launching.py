"""A sweep as jobs: every one is composed, checked and frozen here before the first is queued, then waited for.

The node only runs what it is given (jobs.py). What was submitted is on record (sweeps.py), so that the command that
waits can be stopped, and asked again, without losing anything.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hydra.core.utils import filter_overrides
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from truthsteer import slurm, sources, sweeps
from truthsteer.cli import EXAMINED, EXIT_INTERRUPTED, explain, rejudged, remove_if_empty, set_hub_cache, to_config
from truthsteer.config import Config, Stage, to_plain
from truthsteer.errors import UserError
from truthsteer.jobs import Job
from truthsteer.runs import RECORD, folder_for, git_state
from truthsteer.store import digest, read_json
from truthsteer.sweeps import ALIVE, Doing, State, Sweep, SweepJob
from truthsteer.terminal import console, table

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader

EXIT_FAILED = 1
OWN_KEYS = ("_target_", "submitit_folder", "max_num_timeout", "wait", "offline", "at_once")
"""Keys of hydra.launcher that are no parameters of a job."""
LOCAL_TIMEOUTS = 100
CONFIRM_S = 10
"""A job must be gone from the queue this long, without a word, before it counts as ended."""
PAUSE_S = {"slurm": (2.0, 15.0), "local": (0.3, 1.0)}
"""Between two looks at the jobs: the first pause, and the longest."""


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
    _use_one_cache(configs)
    dealt: set[str] = set()
    lacks: dict[int, UserError] = {}
    for config, job in planned:
        with _Named(job):
            lack = _check(config, job, offline, dealt)
        if lack is not None:
            lacks[job.number] = _of_job(job.number, job.overrides, lack)
    root = Path(configs[0].paths.root)
    notes = _notes(jobs, root)
    _show(jobs, notes, root)
    if any(config.dry_run for config in configs):
        for error in lacks.values():
            console().print(f"Not ready: {error}", soft_wrap=True, highlight=False, markup=False)
        return
    if lacks:
        raise next(iter(lacks.values()))
    todo = [job for job in jobs if not notes[job.number]]
    if kind == "slurm" and todo:
        slurm.require()
    whole = [job for job in jobs if not notes[job.number].startswith("as job")]
    name = sweeps.new_name([job.run for job in jobs])
    commit = git_state()["commit"]
    here, host = str(Path.cwd()), socket.gethostname()
    sweep = Sweep(
        str(root), name, kind, f"{datetime.now():%Y-%m-%d %H:%M:%S}", here, host, commit, sources.files(), whole
    )
    for job in todo:
        job.outcome = str(sweep.path / f"{job.number}.json")
    if todo:
        sweep.write()
    _mark_examined(master, planned)
    _submit_and_wait(sweep, todo, offline, recorded=bool(todo))


def resume(sweep: Sweep, typed: Mapping[str, Any]) -> None:
    """Submit again, with their frozen configs and the code as it is now, the jobs that are neither done nor under way.

    Args:
        sweep: which sweep.
        typed: keys of hydra.launcher to change.

    Raises:
        UserError, SystemExit: as `launch`.
    """
    now = sweeps.doing(sweep)
    if any(item.state is State.unknown for item in now):
        where = f"on {sweep.host}, where it was started" if sweep.kind == "local" else "on a login node"
        raise UserError(f"Whether jobs of {sweep.name} still run cannot be told here. Type the same {where}.")
    todo = [job for job, item in zip(sweep.jobs, now, strict=True) if item.state not in (State.finished, *ALIVE)]
    for job in sweep.jobs:
        unknown = [key for key in typed if key not in job.launcher]
        if unknown:
            raise UserError(
                f"hydra.launcher.{unknown[0]} is not a key of this sweep. Its keys are: {', '.join(job.launcher)}."
            )
        job.launcher |= typed
    elsewhere = _under_way(todo, Path(sweep.root), sweep.name)
    for job in todo:
        if job.number in elsewhere:
            console().print(f"job {job.number} is under way in {elsewhere[job.number]}", highlight=False)
    todo = [job for job in todo if job.number not in elsewhere]
    if not todo:
        console().print(f"Nothing is left to submit of {sweep.name}. `{command('status', sweep)}` shows its jobs.")
        return
    if sweep.kind == "slurm":
        slurm.require()
    for job in todo:
        if job.id is not None:
            job.earlier.append(job.id)
        job.id = job.log = None
        job.outcome = str(sweep.path / f"{job.number}.json")
    sweep.sources, sweep.commit, sweep.host = sources.files(), git_state()["commit"], socket.gethostname()
    sweep.write()
    _submit_and_wait(sweep, todo, _offline(sweep.jobs), recorded=True)


def command(name: str, sweep: Sweep) -> str:
    """What to type for a sweep: `truthsteer status NAME`."""
    usual = Path("multirun").resolve() == Path(sweep.root).resolve()
    return f"truthsteer {name} {sweep.name}{'' if usual else f' paths.root={sweep.root}'}"


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


def _is_finished(run: Path, config: Config) -> bool:
    """Whether the run has done all stages that are asked of it, under the code as it is now."""
    if not (run / RECORD).is_file():
        return False
    record = read_json(run / RECORD)
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


def _use_one_cache(configs: Sequence[Config]) -> None:
    caches = sorted({str(config.paths.hf_cache) for config in configs})
    if len(caches) > 1:
        raise UserError(
            f"paths.hf_cache has several values in one sweep ({', '.join(caches)}). Type one sweep for each."
        )
    set_hub_cache(configs[0].paths.hf_cache)


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


def _notes(jobs: Sequence[SweepJob], root: Path) -> dict[int, str]:
    """Why a job is not submitted: number -> `finished`, `as job 0`, or where it is under way. Empty: it is."""
    first: dict[str, int] = {}
    for job in jobs:
        first.setdefault(job.run + job.share, job.number)
    own = [job for job in jobs if first[job.run + job.share] == job.number]
    under_way = _under_way([job for job in own if not job.finished], root)
    notes: dict[int, str] = {}
    for job in jobs:
        same = first[job.run + job.share]
        notes[job.number] = (
            f"as job {same}" if same != job.number else "finished" if job.finished else under_way.get(job.number, "")
        )
    return notes


def _under_way(jobs: Sequence[SweepJob], root: Path, but: str = "") -> dict[int, str]:
    """Jobs whose run is queued or running in another sweep, which they then stand for: number -> where."""
    wanted = {job.run + job.share: job for job in jobs}
    found: dict[int, str] = {}
    for sweep in sweeps.all_of(root):
        if sweep.name == but or not any(job.run + job.share in wanted for job in sweep.jobs):
            continue
        for job, now in zip(sweep.jobs, sweeps.doing(sweep), strict=True):
            mine = wanted.get(job.run + job.share)
            if mine is None or mine.number in found or now.state not in ALIVE:
                continue
            mine.id, mine.outcome, mine.log = job.id, job.outcome, job.log
            mine.same_as = f"{sweep.name}, job {job.number}"
            found[mine.number] = f"{now.state} as {job.id} ({sweep.name})"
    return found


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


def different(jobs: Sequence[SweepJob]) -> list[str]:
    """What was typed for each job, without what was typed for all."""
    shared = set(jobs[0].overrides).intersection(*(job.overrides for job in jobs)) if len(jobs) > 1 else set()
    return [" ".join(word for word in job.overrides if word not in shared) for job in jobs]


def _mark_examined(master: DictConfig, planned: Sequence[tuple[Config, SweepJob]]) -> None:
    """The notes by which a sweep shows what the doctor found in all of its runs, once it has ended."""
    for config, job in planned:
        if Stage.doctor in config.stages:
            folder = Path(master.hydra.sweep.dir) / str(job.number)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / EXAMINED).write_text(job.run, encoding="utf-8")


# ------------------------------------------------------------------------------------------------ submit and wait


def _submit_and_wait(sweep: Sweep, todo: list[SweepJob], offline: bool, recorded: bool) -> None:
    out = console()
    if recorded:
        out.print(f"sweep {sweep.name}: {sweep.path / sweeps.FILE}", soft_wrap=True, highlight=False)
    pool = None
    if sweep.kind == "local":
        pool = _Pool(sweep, todo, offline)
    else:
        _submit(sweep, todo, offline)
        if not sweep.jobs[0].launcher["wait"]:
            for job in todo:
                out.print(f"job {job.number} is {job.id}; it writes to {job.log}", soft_wrap=True, highlight=False)
            if recorded:
                out.print(f"`{command('status', sweep)}` shows how they do.", soft_wrap=True, highlight=False)
            return
    try:
        ends = _wait(sweep, pool)
    except KeyboardInterrupt:
        _interrupted(sweep, pool, recorded)
    if _report(sweep, ends, recorded):
        sys.exit(EXIT_FAILED)


def _interrupted(sweep: Sweep, pool: _Pool | None, recorded: bool) -> NoReturn:
    if pool is not None:
        pool.stop()
        lost = f"`{command('resume', sweep)}` goes on from here, and so does the same command."
        sys.stderr.write(f"\nInterrupted, with its processes. {lost}\n")
    else:
        others = sorted({job.same_as.partition(",")[0] for job in sweep.jobs if job.same_as})
        shown = [sweep] if recorded else [replace(sweep, name=name) for name in others]
        for one in shown:
            sys.stderr.write(
                f"\nStopped waiting; the jobs go on. `{command('status', one)}` shows how they do, "
                f"`{command('resume', one)}` submits again what ends early.\n"
            )
    sys.exit(EXIT_INTERRUPTED)


def _job(sweep: Sweep, job: SweepJob, offline: bool, devices: str | None = None) -> Job:
    return Job(sweep.name, job.config, job.overrides, sweep.sources, job.outcome, sweep.folder, offline, devices)


def _executor(kind: str, launcher: Mapping[str, Any]) -> Any:
    """submitit's executor with the keys of hydra.launcher."""
    import submitit
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

    timeouts = launcher.get("max_num_timeout", LOCAL_TIMEOUTS)
    made = submitit.AutoExecutor(launcher["submitit_folder"], cluster=kind, **{f"{kind}_max_num_timeout": timeouts})
    shared = set(OmegaConf.structured(BaseQueueConf))
    keys = {key: value for key, value in launcher.items() if key not in OWN_KEYS and value is not None}
    if not keys.get("gpus_per_node"):
        keys.pop("gpus_per_node", None)  # a cluster without GPUs refuses to be asked for none
    made.update_parameters(**{key if key in shared else f"{kind}_{key}": value for key, value in keys.items()})
    return made


def _classes(jobs: Sequence[SweepJob]) -> Iterator[tuple[dict[str, Any], list[SweepJob]]]:
    """Jobs that ask for the same, together."""

    def asks(job: SweepJob) -> str:
        return json.dumps(job.launcher, sort_keys=True)

    for _, members in groupby(sorted(jobs, key=asks), key=asks):
        group = list(members)
        yield group[0].launcher, group


def _submit(sweep: Sweep, todo: Sequence[SweepJob], offline: bool) -> None:
    """One array for each class of resources.

    Raises:
        UserError: Slurm refuses one; what was queued before stays.
    """
    from submitit.core.utils import FailedJobError

    for launcher, members in _classes(todo):
        try:
            executor = _executor("slurm", launcher)
            with executor.batch():
                made = [executor.submit(_job(sweep, job, offline)) for job in members]
        except (FailedJobError, OSError) as error:
            queued = [job.id for job in todo if job.id is not None]
            rest = (
                f"{len(queued)} other jobs are queued: `{command('status', sweep)}` shows them, and "
                f"`{command('resume', sweep)}` submits the rest."
                if queued
                else "Nothing was queued. Change hydra.launcher.KEY=VALUE and type the command again."
            )
            numbers = ", ".join(str(job.number) for job in members)
            raise UserError(f"Slurm refuses job {numbers}: {_last(str(error))} {rest}") from error
        for job, submitted in zip(members, made, strict=True):
            job.id, job.log = submitted.job_id, str(submitted.paths.stdout)
        sweep.write()


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = lines[-1] if lines else "no reason given"
    return line if line.endswith(".") else f"{line}."


class _Pool:
    """Processes of this machine, so many at once."""

    def __init__(self, sweep: Sweep, todo: Sequence[SweepJob], offline: bool) -> None:
        self.sweep, self.offline = sweep, offline
        self.waiting = list(todo)
        self.running: list[tuple[Any, tuple[str, ...]]] = []
        self.at_once: int | None = sweep.jobs[0].launcher["at_once"]
        if self.at_once is not None and self.at_once < 1:
            raise UserError(
                f"hydra.launcher.at_once={self.at_once} runs nothing. Type hydra.launcher.at_once=1 or more."
            )
        self.devices = _devices() if any(job.launcher["gpus_per_node"] for job in todo) else []

    def fill(self) -> None:
        """Start what there is room for, in order."""
        self.running = [(process, devices) for process, devices in self.running if not process.done()]
        while self.waiting:
            devices = self._room(int(self.waiting[0].launcher["gpus_per_node"] or 0))
            if devices is None:
                return
            job = self.waiting.pop(0)
            executor = _executor("local", job.launcher)
            process = executor.submit(_job(self.sweep, job, self.offline, ",".join(devices)))
            job.id, job.log = process.job_id, str(process.paths.stdout)
            self.running.append((process, devices))
            self.sweep.write()

    def _room(self, gpus: int) -> tuple[str, ...] | None:
        """The devices that a job would have, if it may start now: those least used."""
        used = Counter(device for _, devices in self.running for device in devices)
        picked = tuple(sorted(self.devices, key=lambda device: used[device])[:gpus])
        if self.at_once is not None:
            return picked if len(self.running) < self.at_once else None
        free = bool(picked) and not any(used[device] for device in picked)
        return picked if free or not self.running else None

    def stop(self) -> None:
        """Interrupt the processes that a Ctrl-C of the terminal has not reached."""
        time.sleep(1)
        for process, _ in self.running:
            if not process.done():
                process.cancel()


def _devices() -> list[str]:
    """GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def _wait(sweep: Sweep, pool: _Pool | None) -> list[Doing]:
    """Stay until every job has ended, and say so whenever one changes."""
    out = console()
    typed = dict(zip((job.number for job in sweep.jobs), different(sweep.jobs), strict=True)) if sweep.jobs else {}
    pause, longest = PAUSE_S[sweep.kind]
    said: list[Doing] = [Doing(State.finished) if job.finished else Doing(State.new) for job in sweep.jobs]
    missed: dict[int, float] = {}
    """Place of a job -> when it was first found gone."""
    while True:
        if pool is not None:
            pool.fill()
        now = sweeps.doing(sweep)
        if sweep.kind == "slurm":
            now = [_confirmed(place, said[place], item, missed) for place, item in enumerate(now)]
        counts = Counter(item.state for item in now)
        for job, before, item in zip(sweep.jobs, said, now, strict=True):
            if (before.state, before.restarts) != (item.state, item.restarts) and not job.finished:
                again = f", {sweeps.restarts(item)}" if item.restarts else ""
                where = (
                    f" on {item.why}"
                    if item.state is State.running and item.why
                    else f" ({item.why})"
                    if item.why
                    else ""
                )
                out.print(
                    f"{datetime.now():%H:%M:%S} job {job.number} ({typed[job.number]}) {item.state}{again}{where} as "
                    f"{job.id}; {counts[State.finished]} of {len(now)} finished",
                    soft_wrap=True, highlight=False, markup=False,
                )  # fmt: skip
        said = now
        if not any(item.state in ALIVE for item in now) and (pool is None or not pool.waiting):
            return now
        time.sleep(pause)
        pause = min(pause * 1.3, longest)


def _confirmed(place: int, before: Doing, now: Doing, missed: dict[int, float]) -> Doing:
    """What counts while a job has only just gone: files of another node may come late."""
    if now.state is not State.ended:
        missed.pop(place, None)
        return now
    since = missed.setdefault(place, time.monotonic())
    recent = time.monotonic() - since < CONFIRM_S
    return now if not recent else before if before.state in ALIVE else Doing(State.queued)


def _report(sweep: Sweep, ends: Sequence[Doing], recorded: bool) -> bool:
    """List what did not finish; whether there is any."""
    out = console()
    typed = different(sweep.jobs) if sweep.jobs else []
    bad = [
        (job, words, end)
        for job, words, end in zip(sweep.jobs, typed, ends, strict=True)
        if end.state is not State.finished
    ]
    for job, words, end in bad:
        out.print(
            f"job {job.number} ({words}) as {job.id}: {end.state}: {end.why}; log: {job.errors}",
            soft_wrap=True, highlight=False, markup=False,
        )  # fmt: skip
    for job, end in zip(sweep.jobs, ends, strict=True):
        report = Path(job.run) / "report.html"
        if end.state is State.finished and report.is_file():
            out.print(f"report: {report}", soft_wrap=True, highlight=False)
    if bad:
        hint = f" `{command('resume', sweep)}` submits the others again." if recorded else ""
        out.print(f"{len(ends) - len(bad)} of {len(ends)} jobs finished.{hint}", soft_wrap=True, highlight=False)
    return bool(bad)
