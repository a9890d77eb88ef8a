"""What a job does on its node: it runs the config that was frozen when the sweep was submitted. Composes nothing.

Imports are light, and heavier ones come after the signal handler is in place: the signal that announces a time limit or a
preemption kills a process that has no handler yet.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

EXIT_USER_ERROR = 2
REQUEUED = (-1, 144)
"""Exit codes by which submitit ends a process whose job it has queued again: on Slurm, and on this machine."""


@dataclass(frozen=True)
class Job:
    """One point of a sweep, as it travels to its node."""

    resume: str
    """The command that submits it again, for messages."""
    config: dict[str, Any]
    """The checked config, plain."""
    overrides: list[str]
    """What was typed, for the run's record."""
    sources: dict[str, str]
    """The code at submission: see `sources.files`."""
    outcome: str
    """Absolute path of the file that says how the job goes."""
    folder: str
    """Where the command was typed: relative paths of the config start there."""
    offline: bool
    """Whether hub libraries are kept from the network."""
    devices: str | None = None
    """CUDA_VISIBLE_DEVICES, where no scheduler sets it."""

    def __call__(self) -> None:
        keep_signal_here()
        os.chdir(self.folder)
        if self.offline:
            os.environ["HF_HUB_OFFLINE"] = "1"
        if self.devices is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.devices
        from truthsteer.errors import UserError

        try:
            self._note("running")
            self._run()
        except UserError as error:
            sys.stderr.write(f"truthsteer: {error}\n")
            self._note("failed", str(error))
            sys.exit(EXIT_USER_ERROR)
        except SystemExit as error:
            if error.code in REQUEUED:
                self._note("requeued")
            else:
                self._note("failed", str(error.code))
            raise
        except KeyboardInterrupt:
            self._note("interrupted")
            raise
        except BaseException as error:
            self._note("failed", f"{type(error).__name__}: {error}", traceback.format_exc())
            raise
        self._note("finished")

    def checkpoint(self) -> Any:
        """The job that is queued in place of this one: the same, since a run goes on from its folder and the store."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _run(self) -> None:
        from truthsteer import sources
        from truthsteer.errors import UserError

        changed = sources.changed(self.sources, sources.files())
        if changed:
            raise UserError(
                f"truthsteer was changed after this job was submitted ({', '.join(changed[:3])}"
                f"{f' and {len(changed) - 3} more files' if len(changed) > 3 else ''}). This start computed nothing. Type "
                f"`{self.resume}` to run it with the code as it is now, or put the code back first."
            )
        from truthsteer.cli import execute, from_plain, set_hub_cache

        config = from_plain(self.config)
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
        logging.getLogger("truthsteer").setLevel(logging.DEBUG if config.verbose else logging.INFO)
        set_hub_cache(config.paths.hf_cache)
        execute(config, self.overrides)

    def _note(self, state: str, error: str | None = None, trace: str | None = None) -> None:
        """Say how the job goes, if the disk lets it; of several tasks of one job, the first one says it."""
        from submitit import JobEnvironment

        from truthsteer.files import write_json

        environment = JobEnvironment()
        if environment.global_rank:
            return
        path = Path(self.outcome)
        said = {
            "state": state,
            "id": environment.job_id,
            "error": error,
            "traceback": trace,
            "host": socket.gethostname(),
            "restarts": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        }
        with suppress(OSError):  # what ended the job is said by its error log and its exit code too
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, said)


def keep_signal_here() -> None:
    """Let this process alone answer the signal that submitit queues the job again by, and let nothing swallow the answer.

    Slurm sends it to every process of the step. A forked child has submitit's handler too, and would queue the job a second
    time; so the signal is blocked in whatever is forked. A program that is started, such as git, has no handler and is
    killed by it: where that matters it is started in `cli.unwarned`. Where submitit gives up (too many time limits), it raises a
    RuntimeError wherever the program is; as SystemExit it passes through code that goes on without what failed.
    """
    number = getattr(signal, f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}")
    handler, owner = signal.getsignal(number), os.getpid()
    if not callable(handler):
        return

    def answer(received: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            return
        try:
            handler(received, frame)
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            raise SystemExit(str(error)) from error

    signal.signal(number, answer)
    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {number}),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, {number}),
    )
