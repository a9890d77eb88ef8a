"""The main job, killed with SIGKILL at random moments until it has been killed so often; each time the same command goes on.

    python tests/chaos.py 100 --seed 1 [--shards 4] [--seconds 110]

Every run that comes to its end must have the bytes of a run that nobody disturbed, and the same artifacts. Prints how many
kills there were, in which stages; exits with 1 if anything differs. Processes are forked from one that has imported the
libraries, so that they spend their time, and die, at work.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

SMALL = (
    "steering.layers=[2,3]",
    "steering.coefficients=[0.4]",
    "steering.controls.random=1",
    "steering.controls.envelope=4",
    "data.limit=48",
    "batch_tokens=512",
)
COMPARED = ("summary.json", "metrics.csv", "answers.csv")


def preload() -> None:
    """What a run imports, once for all."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    import matplotlib.pyplot  # noqa: F401
    import sklearn.linear_model  # noqa: F401
    import transformers.models.gemma3.modeling_gemma3  # noqa: F401

    import truthsteer.cli
    import truthsteer.decoding
    import truthsteer.doctor
    import truthsteer.extraction
    import truthsteer.model
    import truthsteer.pipeline
    import truthsteer.scoring  # noqa: F401


def start(root: Path, *more: str, before: Callable[[], object] = lambda: None) -> int:
    """The command, in a process of its own that first calls `before`; its id. What it says is in ROOT.log."""
    process = os.fork()
    if process:
        return process
    root.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(root.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    sys.argv = ["truthsteer", *SMALL, f"paths.root={root}", *more]
    status = 1
    try:
        import torch

        from truthsteer.cli import main

        torch.set_num_threads(
            1
        )  # renews the pool that a fork leaves behind, before several threads do so at once and fail
        before()
        main()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def ended(process: int, seconds: float) -> int | None:
    """The exit status, if the process ends within so many seconds."""
    until = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.002)


def at_work(root: Path) -> str:
    """The stage that the record says is running."""
    for path in root.glob("*/run.json"):
        stages = json.loads(path.read_text())["stages"]
        return next((name for name, entry in stages.items() if entry["state"] == "running"), "between stages")
    return "before the first stage"


def outcome(root: Path) -> tuple[dict[str, bytes], set[str]]:
    """What a finished run wrote, and the artifacts there are."""
    (record,) = root.glob("*/run.json")
    assert json.loads(record.read_text())["state"] == "finished"
    left = [path for path in root.glob(".store/.journal/*") if not path.name.startswith(".")]
    assert not left, left
    files = {name: (record.parent / name).read_bytes() for name in COMPARED}
    return files, {f"{path.parent.parent.name}/{path.parent.name}" for path in root.glob(".store/[a-z]*/*/meta.json")}


def storm(kills: int, seed: int, shards: int, seconds: float, scratch: Path) -> tuple[Counter[str], int, int]:
    """Kill so often, or until so long after the undisturbed run.

    Returns:
        Kills by stage; how many runs came to their end; how many of them differ from the undisturbed one.
    """
    draw = random.Random(seed)
    began = time.monotonic()
    calm = scratch / "calm"
    status = ended(start(calm), 300)
    assert status == 0, (calm.with_suffix(".log")).read_text()[-2000:]
    length, expected = time.monotonic() - began, outcome(calm)
    began = time.monotonic()
    killed: Counter[str] = Counter()
    finished = differing = 0
    root = scratch / "run-0"
    while killed.total() < kills and time.monotonic() - began < seconds:
        fresh, started = not root.exists(), time.monotonic()
        processes = [start(root, *([f"shards={shards}", f"shard={i}"] if shards > 1 else [])) for i in range(shards)]
        victim = draw.choice(processes)
        status = ended(victim, draw.uniform(0, length))
        if status is None:
            killed[at_work(root)] += 1
            os.kill(victim, signal.SIGKILL)
            status = ended(victim, 30)
        statuses = [status] + [ended(process, 300) for process in processes if process != victim]
        assert set(statuses) <= {0, -signal.SIGKILL}, (statuses, root.with_suffix(".log").read_text()[-3000:])
        if processes[0] == victim and status != 0:
            continue  # the others do not write the report
        if fresh and status == 0:
            length = min(length, time.monotonic() - started)
        finished += 1
        differing += outcome(root) != expected
        root = scratch / f"run-{finished}"
    if any(root.glob("*/run.json")):
        assert ended(start(root), 300) == 0, root.with_suffix(".log").read_text()[-2000:]
        finished += 1
        differing += outcome(root) != expected
    return killed, finished, differing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop killing after so many, besides the calm run's"
    )
    words = parser.parse_args()
    preload()
    with tempfile.TemporaryDirectory() as scratch:
        killed, finished, differing = storm(words.kills, words.seed, words.shards, words.seconds, Path(scratch))
    stages = ", ".join(f"{name} {count}" for name, count in sorted(killed.items()))
    sys.stdout.write(f"{killed.total()} kills ({stages}); {finished} runs finished, {differing} differ\n")
    sys.exit(differing > 0)


if __name__ == "__main__":
    main()
