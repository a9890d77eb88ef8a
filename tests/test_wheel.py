"""The wheel carries the configuration, the organism and the report's template, and runs away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile

import pytest
from conftest import REPO

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(REPO)],
        check=True,
        capture_output=True,
        timeout=120,
    )
    (path,) = out.glob("truthsteer-*.whl")
    return path


def test_the_wheel_holds_what_a_run_needs(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "truthsteer/conf/config.yaml",
        "truthsteer/conf/model/gemma3_27b.yaml",
        "truthsteer/conf/hydra/launcher/slurm.yaml",
        "hydra_plugins/truthsteer_launcher/__init__.py",
        "truthsteer/organism/weights/model.safetensors",
        "truthsteer/organism/weights/questions.csv",
        "truthsteer/templates/report.html.j2",
    ):
        assert name in names
    assert sum(item.file_size for item in zipfile.ZipFile(wheel).infolist()) < 5_000_000


def test_the_wheel_runs_elsewhere(wheel, tmp_path):
    """Installed into an empty folder, started from another one, it finds its own conf and weights."""
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            "--target",
            str(site),
            str(wheel),
        ],
        check=True,
        timeout=120,
    )
    env = {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    where = subprocess.run(
        [sys.executable, "-c", "import truthsteer.cli as c; print(c.__file__, c.conf_dir())"],
        capture_output=True, text=True, cwd=work, env=env, check=True,
    ).stdout.split()  # fmt: skip
    assert all(path.startswith(str(site)) for path in where)
    done = subprocess.run(
        [str(site / "bin" / "truthsteer"), "stages=[extract,steer]", "steering.layers=[3]", "steering.coefficients=[0.4]",
         "data.limit=48", "run_id=elsewhere"],
        capture_output=True, text=True, cwd=work, env=env, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (work / "multirun" / "elsewhere" / "run.json").exists()
    jobs = subprocess.run(
        [str(site / "bin" / "truthsteer"), "-m", "hydra/launcher=slurm", "model=gemma3_12b,gemma3_27b", "dry_run=true"],
        capture_output=True, text=True, cwd=work, env=env, timeout=60,
    )  # fmt: skip
    assert jobs.returncode == 0, jobs.stderr
    assert jobs.stdout.count("to do") == 2
