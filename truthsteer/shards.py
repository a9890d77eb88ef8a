"""Several processes of this machine on one run: this one, and others that are given its composed config on standard input.

Each does its own share first and then what is missing (`journal`), so that one that dies loses nothing but time.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
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


def sweep_of(arguments: list[str]) -> list[str]:
    """What is typed for a sweep on a launcher, with one job for each of its shards.

    Raises:
        UserError: `shards` is swept over.
    """
    typed = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    launched = typed.get("hydra/launcher", "basic") != "basic"
    if not {"-m", "--multirun"} & set(arguments) or not launched or "shards" not in typed or "shard" in typed:
        return arguments
    if not typed["shards"].isdecimal():
        raise UserError(
            f"shards={typed['shards']} is not one number, so that jobs cannot be shared out. Type shards=4."
        )
    return [*arguments, "shard=" + ",".join(map(str, range(int(typed["shards"]))))]


@contextmanager
def others(config: Config, overrides: list[str], checkpoint: Checkpoint | None) -> Iterator[Config]:
    """Starts all shards but the first, and yields the config of that one; ends them when the block ends."""
    shares = devices(config.shards, os.environ.get(DEVICES), _gpus)
    os.environ |= shares[0]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // config.shards)))
    started = [
        _Shard(replace(config, shard=number), overrides, checkpoint, share)
        for number, share in enumerate(shares[1:], 1)
    ]
    try:
        yield replace(config, shard=0)
        for shard in started:
            shard.thread.join(GRACE)
    finally:
        for shard in started:
            shard.stop()
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


def devices(shards: int, visible: str | None, count: Callable[[], int]) -> list[dict[str, str]]:
    """What each shard's environment says of GPUs: a share of them each, or nothing where there are too few.

    Args:
        shards: how many there are.
        visible: the environment's own list of GPUs.
        count: called for their number where there is no list.
    """
    known = list(map(str, range(count()))) if visible is None else [name for name in visible.split(",") if name]
    if len(known) < max(2, shards):
        return [{} for _ in range(shards)]
    cuts = [len(known) * number // shards for number in range(shards + 1)]
    return [{DEVICES: ",".join(known[first:last])} for first, last in pairwise(cuts)]


def _gpus() -> int:
    """How many NVIDIA GPUs there are; asked of the driver's own tool, since torch would fix them for this process."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())


def main() -> None:
    """One shard, as `others` starts it."""
    from truthsteer.cli import ends_well, from_plain
    from truthsteer.pipeline import run

    asked = json.load(sys.stdin)
    with ends_well(quiet=True):
        weights = None if asked["checkpoint"] is None else Checkpoint(**asked["checkpoint"])
        run(from_plain(asked["config"]), asked["overrides"], weights)


if __name__ == "__main__":
    main()
