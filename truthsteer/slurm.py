"""What Slurm says about jobs, asked with its own commands. Submits nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable

from truthsteer.errors import UserError

PATIENCE_S = 30
"""How long a command of Slurm may take."""


def require() -> None:
    """Raise unless jobs can be submitted from this machine."""
    missing = [name for name in ("sbatch", "srun", "squeue") if shutil.which(name) is None]
    if missing:
        raise UserError(
            f"hydra/launcher=slurm: there is no Slurm here ({', '.join(missing)} not found). Type hydra/launcher=local for "
            "processes of this machine, or the same command on a login node of the cluster."
        )


def queue(ids: Iterable[str]) -> dict[str, tuple[str, str]] | None:
    """Jobs that are queued or running: id -> (state, why it waits or where it runs). None: Slurm cannot be asked.

    A job that is not among them has ended.
    """
    arrays = sorted({job.partition("_")[0] for job in ids})
    if not arrays:
        return {}
    done = _run("squeue", "-h", "-r", "-o", "%i|%T|%r|%N", "-j", ",".join(arrays))
    if done is None or (done.returncode and "Invalid job id" not in done.stderr):
        return None
    found = {}
    for line in done.stdout.splitlines():
        job, state, reason, nodes = (cell.strip() for cell in line.split("|", 3))
        found[job] = (state, nodes or ("" if reason == "None" else reason))
    return found


def named(names: Iterable[str]) -> dict[str, str] | None:
    """The jobs of a name that are queued or running: name -> id, of the array if they are one. None: as `queue`."""
    wanted = set(names)
    if not wanted:
        return {}
    done = _run("squeue", "-h", "-o", "%F|%j", f"--name={','.join(sorted(wanted))}")
    if done is None or done.returncode:
        return None
    pairs = (line.strip().partition("|") for line in done.stdout.splitlines())
    return {name: job for job, _, name in pairs if name in wanted}


def ends(ids: Iterable[str]) -> dict[str, str]:
    """How jobs ended, such as `CANCELLED`, as far as anybody remembers: accounting if there is any, else the scheduler."""
    wanted = set(ids)
    if not wanted:
        return {}
    arrays = sorted({job.partition("_")[0] for job in wanted})
    found = {}
    done = _run("sacct", "-n", "-X", "-P", "-o", "JobID,State", "-j", ",".join(arrays))
    if done is not None and not done.returncode:
        for line in done.stdout.splitlines():
            job, _, state = line.partition("|")
            found[job] = state.partition(" ")[0]
    for job in wanted - found.keys():
        shown = _run("scontrol", "-o", "show", "job", job)
        state_of = re.search(r"JobState=(\S+)", shown.stdout) if shown is not None else None
        if state_of:
            found[job] = state_of[1]
    return {job: state for job, state in found.items() if job in wanted}


def _run(*words: str) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
