"""Jobs on their way: to Slurm, in one array for each size, or to processes of this machine, so many at once."""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from truthsteer.errors import UserError
from truthsteer.jobs import Job
from truthsteer.shards import gpus
from truthsteer.sweeps import Sweep, SweepJob, command

OWN_KEYS = ("_target_", "submitit_folder", "max_num_timeout", "wait", "offline", "at_once")
"""Keys of hydra.launcher that are no parameters of a job."""
LOCAL_TIMEOUTS = 5
"""How often a local process may come to a `timeout_min` that was typed, and go on: submitit starts it six times at most."""
NO_LIMIT_MIN = 60 * 24 * 365 * 10
"""What submitit is told where there is no time limit."""


def _job(sweep: Sweep, job: SweepJob, offline: bool, devices: str | None = None) -> Job:
    resume = command("resume", sweep)
    return Job(resume, job.config, job.overrides, sweep.sources, job.outcome, sweep.folder, offline, devices)


def _executor(kind: str, launcher: Mapping[str, Any]) -> Any:
    """submitit's executor with the keys of hydra.launcher."""
    import submitit
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

    timeouts = launcher.get("max_num_timeout", LOCAL_TIMEOUTS)
    made = submitit.AutoExecutor(launcher["submitit_folder"], cluster=kind, **{f"{kind}_max_num_timeout": timeouts})
    shared = set(OmegaConf.structured(BaseQueueConf))
    keys = {key: value for key, value in launcher.items() if key not in OWN_KEYS and value is not None}
    keys.setdefault("timeout_min", NO_LIMIT_MIN)
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


def submit(sweep: Sweep, todo: Sequence[SweepJob], offline: bool) -> None:
    """One array for each class of resources.

    Raises:
        UserError: Slurm refuses one; what was queued before stays.
    """
    from submitit.core.utils import FailedJobError

    for launcher, members in _classes(todo):
        # A name of their own, on record before they are queued: they are found by it if this process ends in between.
        mark = f"{launcher['name']}-{sweep.name}-{uuid.uuid4().hex[:6]}"
        for job in members:
            job.mark = mark
        sweep.write()
        try:
            executor = _executor("slurm", launcher | {"name": mark})
            with executor.batch():
                made = [executor.submit(_job(sweep, job, offline)) for job in members]
        except (FailedJobError, OSError) as error:
            for job in members:
                job.mark = ""
            sweep.pid = None
            sweep.write()
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
    sweep.pid = None
    if todo:
        sweep.write()


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = lines[-1] if lines else "no reason given"
    return line if line.endswith(".") else f"{line}."


class Pool:
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
        self.devices = gpus() if any(job.launcher["gpus_per_node"] for job in todo) else []

    def fill(self) -> None:
        """Start what there is room for, in order."""
        self.running = [(process, devices) for process, devices in self.running if not process.done()]
        while self.waiting:
            devices = self._room(int(self.waiting[0].launcher["gpus_per_node"] or 0))
            if devices is None:
                return
            job = self.waiting.pop(0)
            executor = _executor("local", job.launcher)
            with _errors_to(self.sweep.path / "processes.log"):
                process = executor.submit(_job(self.sweep, job, self.offline, ",".join(devices)))
            job.id, job.log = process.job_id, str(process.paths.stdout)
            self.running.append((process, devices))
            self.sweep.write()

    def _room(self, wanted: int) -> tuple[str, ...] | None:
        """The devices that a job would have, if it may start now: those least used."""
        used = Counter(device for _, devices in self.running for device in devices)
        picked = tuple(sorted(self.devices, key=lambda device: used[device])[:wanted])
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


@contextmanager
def _errors_to(path: Path) -> Iterator[None]:
    """Let what is started inside write its errors to a file: submitit's processes do not take Ctrl-C silently."""
    sys.stderr.flush()
    terminal = os.dup(2)
    try:
        with path.open("ab") as file:
            os.dup2(file.fileno(), 2)
            yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
