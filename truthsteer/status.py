"""`truthsteer status [SWEEP] [paths.root=DIR]`: how the jobs of a sweep are doing."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence

from truthsteer import sweeps
from truthsteer.sweeps import ALIVE, Doing, State, Sweep, SweepJob, command, different
from truthsteer.terminal import console, table

HELP = """\
Shows the jobs of a sweep that was started with hydra/launcher=slurm or local.

  truthsteer status                 the newest sweep
  truthsteer status SWEEP           another one, by its name or a part of it
  truthsteer status paths.root=DIR  of sweeps that were started with this root
"""
LINE = 90
"""Characters shown of a log's last line, or of a reason."""


def main(arguments: Sequence[str]) -> None:
    """Entry point.

    Raises:
        UserError: there is no such sweep.
    """
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(HELP)
        return
    name, root, _ = sweeps.typed(arguments)
    show(sweeps.find(root, name))


def show(sweep: Sweep) -> None:
    """Print the jobs of a sweep."""
    now = sweeps.doing(sweep)
    out = console()
    out.print(
        table(
            f"Sweep {sweep.name}",
            f"{sweep.kind}, submitted {sweep.created} in {sweep.folder}, {len(now)} jobs",
            {
                "run": [job.name for job in sweep.jobs],
                "job": [str(job.number) for job in sweep.jobs],
                "typed": different(sweep.jobs),
                "id": [job.id or "" for job in sweep.jobs],
                "state": [_state(item) for item in now],
                "stage": [sweeps.stage(job) for job in sweep.jobs],
            },
            dim=[place for place, item in enumerate(now) if item.state is State.finished],
        )
    )
    for job, item in zip(sweep.jobs, now, strict=True):
        line = _line(job, item)
        if line:
            out.print(line, soft_wrap=True, highlight=False, markup=False)
    counts = Counter(item.state for item in now)
    out.print(", ".join(f"{counts[state]} {state}" for state in State if counts[state]), highlight=False)
    if any(item.state not in (State.finished, *ALIVE) for item in now):
        out.print(f"`{command('resume', sweep)}` submits those again that did not finish.", soft_wrap=True)


def _state(item: Doing) -> str:
    restarts = f", {sweeps.restarts(item)}" if item.restarts else ""
    short = item.why if item.state in (*ALIVE, State.ended) else ""
    return f"{item.state}{f' ({short})' if short else ''}{restarts}"


def _line(job: SweepJob, item: Doing) -> str:
    """Why a job failed and where that is written, or the last line of one that runs or was killed."""
    if item.state is State.failed:
        return f"job {job.number}: {_short(item.why)}; log: {job.errors}"
    last = sweeps.last_line(job) if item.state in (State.running, State.ended) else ""
    return f"job {job.number}: {_short(last)}" if last else ""


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LINE else f"{line[:LINE]}..."
