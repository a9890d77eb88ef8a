"""Several processes on one run: what each is told of the machine. What they make is in test_faults."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from truthsteer import shards
from truthsteer.errors import UserError


@pytest.mark.parametrize(
    "words", [["-m", "shards=2", "LAUNCHER"], ["shards=2", "LAUNCHER", "-m"], ["LAUNCHER", "-m", "shards=2"]]
)
def test_a_sweep_has_a_job_for_each_shard_wherever_the_option_stands(words):
    """What is added stands beside what was typed: argparse takes no overrides on both sides of an option."""
    arguments = [word.replace("LAUNCHER", "hydra/launcher=slurm") for word in words]
    place = arguments.index("shards=2") + 1
    assert shards.sweep_of(arguments) == [*arguments[:place], "shard=0,1", *arguments[place:]]


@pytest.mark.parametrize(
    "arguments",
    [
        ["shards=2"],
        ["-m", "shards=2"],
        ["-m", "shards=2", "shard=1", "hydra/launcher=slurm"],
        ["-m", "shards=0", "hydra/launcher=slurm"],
    ],
    ids=["no_sweep", "no_launcher", "typed", "none"],
)
def test_otherwise_nothing_is_added(arguments):
    """Of no shards at all, the config has a sentence."""
    assert shards.sweep_of(arguments) == arguments


def test_shards_are_not_swept_over():
    with pytest.raises(UserError, match="shards=2,4 is not one number"):
        shards.sweep_of(["-m", "shards=2,4", "hydra/launcher=slurm"])


@pytest.mark.parametrize(
    ("count", "known", "shares"),
    [
        (2, "0123", ["0,1", "2,3"]),
        (3, "0123", ["0", "1", "2,3"]),
        (4, "01", [None] * 4),
        (2, "", [None] * 2),
        (1, "0", [None]),
    ],
)
def test_gpus_are_divided_where_there_are_enough(count, known, shares):
    found = shards.devices(count, list(known))
    assert [share.get("CUDA_VISIBLE_DEVICES") for share in found] == shares


def test_gpus_are_those_of_the_environment_or_of_the_driver(monkeypatch):
    listed = "GPU 0: One (UUID: GPU-a)\n  MIG 1g (UUID: MIG-b)\nGPU 1: One (UUID: GPU-c)\n"
    monkeypatch.setattr(subprocess, "run", lambda *words, **named: SimpleNamespace(stdout=listed))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert shards.gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-c")
    assert shards.gpus() == ["3", "GPU-c"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert shards.gpus() == []


class Started:
    """In place of a process."""

    def __init__(self, config, overrides, checkpoint, share) -> None:
        self.share = share
        self.thread = SimpleNamespace(join=lambda seconds: None)
        STARTED.append(self)

    def stop(self) -> None:
        STOPPED.append(self)

    def tell(self) -> None:
        pass


STARTED: list[Started] = []
STOPPED: list[Started] = []


@pytest.mark.parametrize("fails", [False, True])
def test_every_point_of_a_sweep_divides_all_gpus(fails, monkeypatch):
    """One process runs them one after the other: what the first was told is not left for the second."""
    monkeypatch.setattr(shards, "_Shard", Started)
    monkeypatch.setattr(shards, "replace", lambda config, **named: SimpleNamespace(**vars(config) | named))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for _ in range(2):
        STARTED.clear()
        try:
            with shards.others(SimpleNamespace(shards=2), [], None):
                assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
                assert "OMP_NUM_THREADS" in os.environ
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        assert [process.share for process in STARTED] == [{"CUDA_VISIBLE_DEVICES": "2,3"}]
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"
        assert "OMP_NUM_THREADS" not in os.environ


def test_those_that_were_started_end_if_another_cannot_be(monkeypatch):
    class Third(Started):
        def __init__(self, config, *more) -> None:
            if config.shard == 2:
                raise OSError("no more processes")
            super().__init__(config, *more)

    STARTED.clear()
    STOPPED.clear()
    monkeypatch.setattr(shards, "_Shard", Third)
    monkeypatch.setattr(shards, "replace", lambda config, **named: SimpleNamespace(**vars(config) | named))
    with pytest.raises(OSError, match="no more"), shards.others(SimpleNamespace(shards=3), [], None):
        pass
    assert len(STARTED) == 1
    assert STOPPED == STARTED


CHILD = """
import pathlib, sys, time
from truthsteer import cli, pipeline, shards

def work(*asked):
    pathlib.Path("ready").touch()
    time.sleep(60)

shards.POLL, cli.from_plain, pipeline.run = 0.02, lambda plain: None, work
try:
    shards.main()
finally:
    pathlib.Path("ended").write_text(str(sys.exc_info()[1]))
"""
PARENT = """
import json, os, subprocess, sys
asked = {"config": {}, "overrides": [], "checkpoint": None, "parent": os.getpid()}
subprocess.run([sys.executable, "-c", sys.argv[1]], input=json.dumps(asked), text=True)
"""


def test_a_shard_ends_when_the_first_process_is_killed(tmp_path):
    """As by a SIGTERM, so that its record says so; otherwise it would keep its GPUs for no one."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD], cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    wait_for(tmp_path / "ready")
    assert not (tmp_path / "ended").exists()
    parent.kill()
    parent.wait()
    wait_for(tmp_path / "ended")
    assert (tmp_path / "ended").read_text() == "143"


def wait_for(path: Path) -> None:
    for _ in range(1000):
        if path.exists() and (path.name == "ready" or path.read_text()):
            return
        time.sleep(0.02)
    pytest.fail(f"no {path.name}")
