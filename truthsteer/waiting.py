"""Waiting for the jobs of a sweep: what changed, as lines, and in the end what did not finish."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from truthsteer import sweeps
from truthsteer.cli import EXIT_INTERRUPTED, EXIT_TERMINATED
from truthsteer.errors import TerminatedError
from truthsteer.submitting import Pool, submit
from truthsteer.sweeps import ALIVE, Doing, State, Sweep, SweepJob, command, different
from truthsteer.terminal import console

EXIT_FAILED = 1
CONFIRM_S = 90
"""A job must be gone from the queue this long, without a word, before it counts as ended: its file may lie on a network file
system, whose clients see new files up to a minute late."""
PAUSE_S = {"slurm": (2.0, 15.0), "local": (0.3, 1.0)}
"""Between two looks at the jobs: the first pause, and the longest."""


def submit_and_wait(sweep: Sweep, todo: list[SweepJob], offline: bool, recorded: bool) -> None:
    out = console()
    if recorded:
        out.print(f"sweep {sweep.name}: {sweep.path / sweeps.FILE}", soft_wrap=True, highlight=False)
    pool = None
    if sweep.kind == "local":
        pool = Pool(sweep, todo, offline)
    else:
        submit(sweep, todo, offline)
        if not sweep.jobs[0].launcher["wait"]:
            for job in todo:
                out.print(f"job {job.number} is {job.id}; it writes to {job.log}", soft_wrap=True, highlight=False)
            if recorded:
                out.print(f"`{command('status', sweep)}` shows how they do.", soft_wrap=True, highlight=False)
            return
    try:
        ends = wait(sweep, pool)
    except KeyboardInterrupt as error:
        _interrupted(sweep, pool, recorded, isinstance(error, TerminatedError))
    if report(sweep, ends, recorded):
        sys.exit(EXIT_FAILED)


def _interrupted(sweep: Sweep, pool: Pool | None, recorded: bool, terminated: bool) -> NoReturn:
    if pool is not None:
        pool.stop()
        lost = f"`{command('resume', sweep)}` goes on from here, and so does the same command."
        sys.stderr.write(f"\n{'Terminated' if terminated else 'Interrupted'}, with its processes. {lost}\n")
    else:
        others = sorted({job.same_as.partition(",")[0] for job in sweep.jobs if job.same_as})
        shown = [sweep] if recorded else [replace(sweep, name=name) for name in others]
        for one in shown:
            sys.stderr.write(
                f"\nStopped waiting; the jobs go on. `{command('status', one)}` shows how they do, "
                f"`{command('resume', one)}` submits again what ends early.\n"
            )
    sys.exit(EXIT_TERMINATED if terminated else EXIT_INTERRUPTED)


def wait(sweep: Sweep, pool: Pool | None) -> list[Doing]:
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
        now = sweeps.doing(sweep, ends=False)
        if sweep.kind == "slurm":
            now = [_confirmed(place, said[place], item, missed) for place, item in enumerate(now)]
            if any(item.state is State.ended is not before.state for before, item in zip(said, now, strict=True)):
                now = sweeps.how_ended(sweep, now)
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
    if before.state is State.ended:
        return before
    since = missed.setdefault(place, time.monotonic())
    recent = time.monotonic() - since < CONFIRM_S
    return now if not recent else before if before.state in ALIVE else Doing(State.queued)


def report(sweep: Sweep, ends: Sequence[Doing], recorded: bool) -> bool:
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
