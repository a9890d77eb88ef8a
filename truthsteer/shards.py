"""Several processes of this machine on one run: this one, and others that are given its composed config on standard input.

Each does its own share first and then what is missing (`journal`), so that one that dies loses nothing but time.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import pairwise

from truthsteer.checkpoint import Checkpoint
from truthsteer.config import Config, to_plain
from truthsteer.errors import UserError

log = logging.getLogger("truthsteer")

GRACE = 10.0
"""Seconds that a process has to end by itself, and then again after it was asked to."""
DEVICES = "CUDA_VISIBLE_DEVICES"
THREADS = "OMP_NUM_THREADS"
POLL = 1.0
"""Seconds between two looks at whether the first process is still there."""


def sweep_of(arguments: list[str]) -> list[str]:
    """What is typed for a sweep on a launcher, with one job for each of its shards.

    Raises:
        UserError: `shards` is swept over.
    """
    typed = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    launched = typed.get("hydra/launcher", "basic") != "basic"
    if not {"-m", "--multirun"} & set(arguments) or not launched or "shards" not in typed or "shard" in typed:
        return arguments
    shards = typed["shards"]
    if not shards.isdecimal():
        raise UserError(f"shards={shards} is not one number, so that jobs cannot be shared out. Type shards=4.")
    if int(shards) < 1:
        return arguments  # the config says what is wrong with that
    numbers = "shard=" + ",".join(map(str, range(int(shards))))
    after = arguments.index(f"shards={shards}") + 1  # argparse takes no overrides on both sides of -m
    return [*arguments[:after], numbers, *arguments[after:]]


@contextmanager
def others(config: Config, overrides: list[str], checkpoint: Checkpoint | None) -> Iterator[Config]:
    """Starts all shards but the first, and yields the config of that one; ends them when the block ends."""
    before = {name: os.environ.get(name) for name in (DEVICES, THREADS)}  # a sweep's next point shares out anew
    shares = devices(config.shards, gpus())
    os.environ |= shares[0]
    os.environ.setdefault(THREADS, str(max(1, (os.cpu_count() or 1) // config.shards)))
    started: list[_Shard] = []
    try:
        for number, share in enumerate(shares[1:], 1):
            started.append(_Shard(replace(config, shard=number), overrides, checkpoint, share))
        yield replace(config, shard=0)
        for shard in started:
            shard.thread.join(GRACE)
    finally:
        for shard in started:
            shard.stop()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    for shard in started:
        shard.tell()


class _Shard:
    """A process, and a thread that waits for its end: without it a dead one would look alive."""

    def __init__(
        self, config: Config, overrides: list[str], checkpoint: Checkpoint | None, share: Mapping[str, str]
    ) -> None:
        asked = {
            "config": to_plain(config),
            "overrides": overrides,
            "checkpoint": None if checkpoint is None else asdict(checkpoint),
            "parent": os.getpid(),
        }
        self.number, self._said, self._stopped = config.shard, "", False
        self._process = subprocess.Popen(
            [sys.executable, "-m", "truthsteer.shards"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | share,
        )
        self.thread = threading.Thread(target=self._wait, args=(json.dumps(asked),), daemon=True)
        self.thread.start()

    def _wait(self, asked: str) -> None:
        _, self._said = self._process.communicate(asked)

    def stop(self) -> None:
        """End it, if it has not ended."""
        for end in (self._process.terminate, self._process.kill):
            if self.thread.is_alive():
                self._stopped = True
                end()
                self.thread.join(GRACE)

    def tell(self) -> None:
        """Say so if it failed. Others have done what it did not do."""
        if self._process.returncode and not self._stopped:
            last = (self._said.strip().splitlines() or ["it said nothing"])[-1]
            log.warning("shard %d ended with %d: %s", self.number, self._process.returncode, last)


def devices(shards: int, known: Sequence[str]) -> list[dict[str, str]]:
    """What each shard's environment says of GPUs: a share of the `known` ones, or nothing where there are too few."""
    if len(known) < max(2, shards):
        return [{} for _ in range(shards)]
    cuts = [len(known) * number // shards for number in range(shards + 1)]
    return [{DEVICES: ",".join(known[first:last])} for first, last in pairwise(cuts)]


def gpus() -> list[str]:
    """NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them. Where that is not set, the driver's own
    tool is asked, since torch would fix them for this process.
    """
    visible = os.environ.get(DEVICES)
    if visible is not None:
        return [name for name in visible.split(",") if name]
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return list(map(str, range(sum(line.startswith("GPU ") for line in done.stdout.splitlines()))))


def _end_with(parent: int) -> None:
    """End this process, as a SIGTERM would, once the one that started it is gone: it would keep its GPUs for no one."""
    while os.getppid() == parent:
        time.sleep(POLL)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)


def main() -> None:
    """One shard, as `others` starts it."""
    from truthsteer.cli import ends_well, from_plain
    from truthsteer.pipeline import run

    asked = json.load(sys.stdin)
    with ends_well(quiet=True):
        threading.Thread(target=_end_with, args=(asked["parent"],), daemon=True).start()
        weights = None if asked["checkpoint"] is None else Checkpoint(**asked["checkpoint"])
        run(from_plain(asked["config"]), asked["overrides"], weights)


if __name__ == "__main__":
    main()
