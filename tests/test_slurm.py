"""A sweep on a real Slurm: two models of different size, a failure, a preemption, a cancelled job, a stopped launcher.

Skipped, with the reason, where no Slurm can be started; TRUTHSTEER_INSTALL_SLURM=1 lets it install Debian's packages.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
from conftest import REPO, run_cli

from truthsteer.sweeps import Sweep, all_of

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

SCRIPT = REPO / "tests" / "slurm_cluster.sh"
JUDGE = '''
import os, time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from truthsteer.records import Verdict


@dataclass(frozen=True)
class Gated:
    """Waits until the gate is open; fails once if it is told to."""

    name: str = "a"
    metrics: ClassVar[tuple[str, ...]] = ("long",)
    rows_at_once: ClassVar[int] = 64

    def identity(self):
        return {}

    def prefetch(self):
        pass

    def judge(self, questions, texts):
        gates = Path(os.environ["GATES"])
        parts = [os.environ.get(name, "") for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT")]
        (gates / "-".join(["here", *parts])).touch()
        try:
            (gates / "fail").unlink()
        except FileNotFoundError:
            pass
        else:
            raise ValueError("this judge fails once")
        while not (gates / "open").exists():
            time.sleep(0.05)
        return [Verdict(q.id, "ok", {"long": float(len(text) > 20)}) for q, text in zip(questions, texts)]
'''
SMALL = (
    "steering.layers=[3]",
    "steering.coefficients=[0.4]",
    "steering.controls.random=1",
    "steering.controls.envelope=0",
    "steering.controls.style=false",
    "baselines.few_shot=0",
    "data.limit=40",
    "gauge.passages=2",
    "generation.max_new_tokens=12",
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands find the cluster."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # munged runs as its own user
    install = ["--install"] if os.environ.get("TRUTHSTEER_INSTALL_SLURM") == "1" else []
    try:
        try:
            up = subprocess.run(
                ["bash", SCRIPT, "up", folder, *install],
                capture_output=True, text=True, timeout=400, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            pytest.skip("Slurm could not be installed and started within 400 s")
        if up.returncode == 75:
            pytest.skip(f"no Slurm can be started here: {up.stderr.strip().splitlines()[-1]}")
        assert up.returncode == 0, up.stderr
        yield {"SLURM_CONF": str(folder / "etc" / "slurm.conf"), "MUNGE_SOCKET": str(folder / "munge" / "socket")}
    finally:
        subprocess.run(["bash", SCRIPT, "down", folder], timeout=120, check=False)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a judge and a second model."""
    folder = tmp_path_factory.mktemp("own")
    twin = (REPO / "conf" / "model" / "organism.yaml").read_text()
    for old, new in {
        "dtype: fp32": "dtype: bf16",
        "name: organism": "name: twin",
        "gpus: 0": "gpus: 1",
        "min: 60": "min: 30",
    }.items():
        assert old in twin
        twin = twin.replace(old, new)
    for name, text in {
        "gated.py": JUDGE,
        "conf/judge/gated.yaml": "gated:\n  _target_: gated.Gated\n  name: a\n",
        "conf/model/twin.yaml": twin,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def until(happened: Callable[[], bool], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def slurm(env: dict[str, str], *words: str) -> str:
    return subprocess.run(words, env={**os.environ, **env}, capture_output=True, text=True, check=True).stdout.strip()


def started(log: IO[str], env: dict[str, str], *words: str) -> subprocess.Popen:
    whole = {**os.environ, **env, "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, "-m", "truthsteer", *words], cwd=REPO, stdout=log, stderr=log, env=whole)


def newest(root: Path) -> Sweep:
    return next(all_of(root))


def test_a_sweep_survives_what_a_cluster_does_to_it(cluster, own, tmp_path):
    root, gates = tmp_path / "root", tmp_path / "gates"
    gates.mkdir()
    (gates / "fail").touch()
    env = {**cluster, "GATES": str(gates), "PYTHONPATH": os.pathsep.join([str(own), str(REPO)]), "OMP_NUM_THREADS": "1"}
    sweep = ["--config-dir", str(own / "conf"), "-m", "model=organism,twin", "judge=[reference,gated]"]
    typed = [*sweep, "judge.gated.name=a,b,c", *SMALL, "hydra/launcher=slurm"]
    sized = [*typed, "hydra.launcher.mem_gb=1"]  # typed, so it wins over both models' own

    # Six jobs of two sizes; one of them fails.
    with (tmp_path / "first.log").open("w") as log:
        first = started(log, env, *sized, f"paths.root={root}")
        try:
            until(lambda: len(list(gates.glob("here-*"))) == 6)
            asked = (
                slurm(cluster, "squeue", "-h", "-r", "-o", "%C %m %b %l").replace("gres/gpu", "gres:gpu").splitlines()
            )
            assert set(asked) == {"2 1G N/A 1:00:00", "2 1G gres:gpu:1 30:00"}
            until(lambda: len(slurm(cluster, "squeue", "-h", "-r").splitlines()) == 5)
        finally:
            first.send_signal(signal.SIGINT)
        assert first.wait(180) == 130
    said = (tmp_path / "first.log").read_text()
    before = newest(root)
    assert f"the jobs go on. `truthsteer status {before.name} paths.root={root}`" in said
    assert len({job.id.partition("_")[0] for job in before.jobs}) == 2, "an array for each size"
    shown = run_cli("status", root=root, env=env).stdout
    assert "5 running, 1 failed" in shown
    assert "ValueError: this judge fails once" in shown
    (failed,) = [job for job in before.jobs if "failed" in Path(job.outcome).read_text()]
    assert "this judge fails once" in Path(failed.errors).read_text()
    assert "this judge fails once" in json.loads((Path(failed.run) / "run.json").read_text())["traceback"]
    assert re.search("JobState=FAILED", slurm(cluster, "scontrol", "show", "job", failed.id))

    # The same command again: it waits for five, and submits the one that failed.
    with (tmp_path / "second.log").open("w") as log:
        second = started(log, env, *sized, f"paths.root={root}")
        until(lambda: len(list(gates.glob("here-*"))) == 7)
        after = newest(root)
        assert {job.id for job in after.jobs} - {job.id for job in before.jobs} == {after.jobs[failed.number].id}
        assert len(slurm(cluster, "squeue", "-h", "-r").splitlines()) == 6
        cancelled, preempted = [job for job in after.jobs if job.number != failed.number][:2]
        slurm(cluster, "scancel", str(cancelled.id))
        slurm(cluster, "scancel", "--signal=USR2", str(preempted.id))
        until(lambda: len(list(gates.glob("here-*-1"))) == 1)
        (gates / "open").touch()
        assert second.wait(900) == 1, (tmp_path / "second.log").read_text()
    said = (tmp_path / "second.log").read_text()
    assert f"job {preempted.number} " in said
    assert ", 1 restart" in said
    assert re.search(rf"job {cancelled.number} .*ended early: CANCELLED; log: {re.escape(cancelled.errors)}", said)
    assert "5 of 6 jobs finished" in said

    # What was cancelled is submitted again, alone; then all is there, and as it would have been anyway.
    again = run_cli("resume", after.name, root=root, env=env)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "6 finished" in run_cli("status", root=root, env=env).stdout
    assert slurm(cluster, "squeue", "-h") == ""
    plain = tmp_path / "plain"
    undisturbed = run_cli(*typed[:-1], root=plain, env=env)
    assert undisturbed.returncode == 0, undisturbed.stderr
    runs = sorted(path.parent.name for path in plain.glob("*/run.json"))
    assert len(runs) == 6
    for name in runs:
        assert (root / name / "summary.json").read_bytes() == (plain / name / "summary.json").read_bytes()
