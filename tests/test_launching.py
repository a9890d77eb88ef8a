"""Sweeps as jobs: what is refused before anything is queued, what is on record, and what a job does on its node."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import REPO, run_cli
from hydra.errors import HydraException

from truthsteer import cli, launching, slurm, sources, submitting, sweeps, waiting
from truthsteer.errors import TerminatedError, UserError
from truthsteer.jobs import Job
from truthsteer.sweeps import Doing, State, Sweep, SweepJob

SMALL = ("steering.layers=[3]", "steering.coefficients=[0.4]", "data.limit=40", "stages=[extract,steer]")
SLURM = ("-m", "hydra/launcher=slurm")


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """A PATH with git and Python, and no Slurm."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("git", "sh"):
        (folder / name).symlink_to(f"/usr/bin/{name}")
    return {"PATH": str(folder)}


@pytest.fixture
def fake(tmp_path: Path, bare: dict[str, str]) -> dict[str, str]:
    """Commands that take jobs and say that they are queued, as long as there is a file `queue`. No sacct."""
    folder = Path(bare["PATH"])
    scripts = {
        "sbatch": 'echo x >>"$FAKE/count"; n=$(wc -l <"$FAKE/count"); cp "$1" "$FAKE/$n.sh"; echo "Submitted batch job 70$n"',
        "squeue": '[ -e "$FAKE/queue" ] || exit 0; while read -r line; do echo "$line"; done <"$FAKE/queue"',
        "srun": "exit 1",
    }
    for name in ("cp", "wc"):
        (folder / name).symlink_to(f"/usr/bin/{name}")
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return {**bare, "FAKE": str(tmp_path)}


def record(root: Path) -> dict:
    (path,) = root.glob(".sweeps/*/sweep.json")
    return json.loads(path.read_text())


def left(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("*")) if root.exists() else []


# ------------------------------------------------------------------------------------------- before anything is queued


def test_a_dry_run_shows_each_jobs_own_size_and_queues_nothing(tmp_path, bare):
    asked = (*SLURM, "model=gemma3_12b,gemma3_27b", "dtype=bf16,fp16", "dry_run=true")
    done = run_cli(*asked, root=tmp_path / "root", env=bare)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if "truthfulqa" in line]
    assert [row[3:8] for row in rows] == [
        ["dtype=bf16", "2", "12", "128", "300"],
        ["dtype=fp16", "2", "12", "128", "300"],
        ["dtype=bf16", "3", "16", "180", "1440"],
        ["dtype=fp16", "3", "16", "180", "1440"],
    ]
    typed = run_cli(*asked, "hydra.launcher.mem_gb=500", "model.resources.gpus=4", root=tmp_path / "root", env=bare)
    rows = [line.split() for line in typed.stdout.splitlines() if "truthfulqa" in line]
    assert [row[4:7] for row in rows] == [["4", "12", "500"]] * 2 + [["4", "16", "500"]] * 2
    assert not left(tmp_path / "root")


def test_without_slurm_one_sentence_names_the_local_launcher(tmp_path, bare):
    done = run_cli(*SLURM, "seed=1,2", root=tmp_path / "root", env=bare)
    assert done.returncode == 2
    assert "there is no Slurm here (sbatch, srun, squeue not found). Type hydra/launcher=local" in done.stderr
    assert "Traceback" not in done.stderr
    assert not left(tmp_path / "root")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("model=gemma3_4b,organism", "steering.layers=[9]"), "Job 1 (model=organism steering.layers=[9] "),
        (("seed=1,-2",), "Job 1 (seed=-2 "),
        (("judge=[reference],[llm]", "seed=3"), "Job 1 (judge=[llm] seed=3 "),
    ],
)
def test_the_first_wrong_job_is_named_before_any_is_queued(words, sentence, tmp_path, fake):
    done = run_cli(*SLURM, *words, root=tmp_path / "root", env=fake)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"truthsteer: {sentence}")
    assert done.stderr.endswith("Nothing was queued.\n")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "count").exists()


def test_offline_nodes_need_weights_and_data_that_are_there(tmp_path, fake):
    asked = (*SLURM, "model=organism,gemma3_4b", "data=organism", "judge=[reference]")
    env = {**fake, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
    done = run_cli(*asked, "hydra.launcher.offline=true", root=tmp_path / "root", env=env)
    assert done.returncode == 2
    assert "Job 1 (model=gemma3_4b" in done.stderr
    assert "google/gemma-3-4b-it is not on this machine" in done.stderr
    assert "stages=[prefetch]" in done.stderr
    by_environment = run_cli(*asked, root=tmp_path / "root", env={**env, "HF_HUB_OFFLINE": "1"})
    assert "google/gemma-3-4b-it is not on this machine" in by_environment.stderr
    assert not (tmp_path / "count").exists()
    planned = run_cli(*asked, "hydra.launcher.offline=true", "dry_run=true", root=tmp_path / "root", env=env)
    assert planned.returncode == 0
    assert "Not ready: Job 1 (model=gemma3_4b" in planned.stdout
    asked = (*asked, "hydra.launcher.wait=false")
    assert run_cli(*asked, root=tmp_path / "root", env=env).returncode == 0, "nodes have a network"
    assert (tmp_path / "count").read_text().split() == ["x", "x"]
    snapshot = tmp_path / "hub" / "hub" / "models--google--gemma-3-4b-it"
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs" / "main").write_text("0" * 40)
    weights = snapshot / "snapshots" / ("0" * 40)
    weights.mkdir(parents=True)
    (weights / "config.json").write_text("{}")
    (weights / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part-1.safetensors"}}')
    partly = run_cli(*asked, "hydra.launcher.offline=true", root=tmp_path / "root", env=env)
    assert "part-1.safetensors of google/gemma-3-4b-it is not on this machine" in partly.stderr
    (weights / "part-1.safetensors").touch()
    partly = run_cli(*asked, "hydra.launcher.offline=true", root=tmp_path / "root", env=env)
    assert "tokenizer.json of google/gemma-3-4b-it is not on this machine" in partly.stderr
    (weights / "tokenizer.json").touch()
    assert run_cli(*asked, "hydra.launcher.offline=true", root=tmp_path / "root", env=env).returncode == 0
    assert (tmp_path / "count").read_text().split() == ["x"] * 4


def test_the_file_of_a_cluster_in_the_documents_works(tmp_path, fake):
    page = (REPO / "docs" / "slurm.md").read_text()
    (text,) = re.findall(r"```yaml\n# (?:site/hydra/launcher/mycluster.yaml)\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "site" / "hydra" / "launcher").mkdir(parents=True)
    (tmp_path / "site" / "hydra" / "launcher" / "mycluster.yaml").write_text(text)
    (line,) = re.findall(r"python -m truthsteer (-m --config-dir site .*) dry_run=true", page)
    words = line.replace("--config-dir site", f"--config-dir {tmp_path / 'site'}").split()
    assert "to do" in run_cli(*words, "dry_run=true", root=tmp_path / "root", env=fake).stdout
    done = run_cli(
        *words, "hydra.launcher.offline=false", "hydra.launcher.wait=false", root=tmp_path / "root", env=fake
    )
    assert done.returncode == 0, done.stderr
    scripts = [(tmp_path / f"{number}.sh").read_text() for number in (1, 2)]
    for text in scripts:
        for words in ("--partition=gpu", "--account=my-project", "--qos=normal", "--constraint=a100", "--requeue"):
            assert words in text
        assert text.index("\nmodule load cuda\n") < text.index("\nsrun ")
    assert sorted(re.findall(r"--gpus-per-node=\d+", "".join(scripts))) == ["--gpus-per-node=2", "--gpus-per-node=3"]


def test_a_launcher_without_a_sweep_is_refused(tmp_path):
    done = run_cli("hydra/launcher=slurm", root=tmp_path)
    assert done.returncode == 2
    assert "hydra/launcher=slurm is used by sweeps only. Type -m with it" in done.stderr


# --------------------------------------------------------------------------------------------------- with a fake Slurm


def test_jobs_are_on_record_submitted_once_and_by_size(tmp_path, fake):
    root = tmp_path / "root"
    asked = (*SLURM, "seed=1,2,3", "batch_tokens=4096,8192", *SMALL, "hydra.launcher.wait=false")
    sizes = ("hydra.launcher.partition=quick", "hydra.launcher.array_parallelism=2")
    done = run_cli(*asked, *sizes, root=root, env=fake)
    assert done.returncode == 0, done.stderr
    assert "as job 0" in done.stdout, "batch_tokens is no part of what a run is"
    assert "job 2 is 701_1; it writes to " in done.stdout
    script = (tmp_path / "1.sh").read_text()
    for words in (
        "--array=0-2%2",
        "--partition=quick",
        "--mem=8GB",
        "--cpus-per-task=2",
        "--requeue",
        "--signal=USR2@120",
    ):
        assert words in script
    assert "--gpus-per-node" not in script
    whole = record(root)
    assert [job["number"] for job in whole["jobs"]] == [0, 2, 4]
    assert whole["jobs"][0]["config"]["seed"] == 1
    assert Path(whole["jobs"][0]["config"]["paths"]["root"]) == root
    assert set(sources.files()) == set(whole["sources"])

    # Slurm has them: neither the same command nor resume submits them again.
    (tmp_path / "queue").write_text("".join(f"701_{n}|PENDING|Priority|\n" for n in range(3)))
    again = run_cli(*asked, *sizes, root=root, env=fake)
    assert again.returncode == 0, again.stderr
    assert f"queued as 701_2 ({whole['name']})" in again.stdout
    shown = run_cli("status", root=root, env=fake).stdout
    assert shown.count("queued (Priority)") == 3
    assert "Nothing is left to submit" in run_cli("resume", whole["name"][:6], root=root, env=fake).stdout
    assert len((tmp_path / "count").read_text().split()) == 1

    # One is lost, as nobody remembers why: it alone is submitted again, with what is typed now.
    (tmp_path / "queue").write_text("".join(f"701_{n}|RUNNING|None|node{n}\n" for n in (0, 2)))
    shown = run_cli("status", whole["name"], root=root, env=fake).stdout
    assert "running (node0)" in shown
    assert "2 running, 1 ended early" in shown
    assert f"`truthsteer resume {whole['name']} paths.root={root}`" in " ".join(shown.split())
    wrong = run_cli("resume", whole["name"], "hydra.launcher.memory=2", root=root, env=fake)
    assert "hydra.launcher.memory is not a key of this sweep" in wrong.stderr
    resumed = run_cli("resume", whole["name"], "hydra.launcher.mem_gb=16", root=root, env=fake)
    assert "job 2 is 702;" in resumed.stdout, resumed.stderr
    assert "--mem=16GB" in (tmp_path / "2.sh").read_text()
    assert record(root)["jobs"][1]["earlier"] == ["701_1"]
    assert [job["launcher"]["mem_gb"] for job in record(root)["jobs"]] == [8, 16, 8], "those that run are as they were"

    # From a machine without Slurm nobody can tell: nothing is started twice, and nothing is waited for in vain.
    away = {"PATH": str(tmp_path / "away")}
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "git").symlink_to("/usr/bin/git")
    without = run_cli(*asked, *sizes, root=root, env=away, timeout=60)
    assert without.returncode == 2
    assert "there is no Slurm here" in without.stderr
    (Path(fake["PATH"]) / "squeue").write_text("#!/bin/sh\nexit 1\n")
    mute = run_cli(*asked, *sizes, root=root, env=fake, timeout=60)
    assert mute.returncode == 2
    assert (
        f"Whether jobs of {whole['name']} still run cannot be told here. Type the same on a login node" in mute.stderr
    )
    assert "unknown as 701_0" in run_cli(*asked, "dry_run=true", root=root, env=fake).stdout
    local = run_cli("-m", "hydra/launcher=local", *asked[2:-1], "dry_run=true", root=root, env=away)
    assert local.stdout.count("to do") == 3, "they do not stand for jobs of this machine"
    assert len((tmp_path / "count").read_text().split()) == 2


def test_a_run_that_other_jobs_share_is_left_to_them(tmp_path, fake):
    root = tmp_path / "root"
    asked = (*SLURM, *SMALL, "hydra.launcher.wait=false")
    assert run_cli(*asked, "shards=2", root=root, env=fake).returncode == 0
    (tmp_path / "queue").write_text("701_0|RUNNING|None|n1\n")
    for words in (("shards=3", "shard=0,1,2"), ("seed=42",)):
        again = run_cli(*asked, *words, root=root, env=fake)
        assert again.returncode == 0, again.stderr
        assert "Left to others, and not waited for: job 0 (running as 701_0 (" in again.stdout
        assert ", part 1/2)" in again.stdout
    assert len((tmp_path / "count").read_text().split()) == 1
    lost = run_cli(*asked, "shards=2", "shard=0,1", root=root, env=fake)
    assert "job 1 is 702" in lost.stdout, "the other part is not under way"


@pytest.mark.parametrize("seeds", ["1", "1,2"])
def test_jobs_are_found_though_their_submission_was_killed(seeds, tmp_path, fake):
    """In between sbatch and the note of what it answered."""
    root, folder = tmp_path / "root", Path(fake["PATH"])
    for name in ("sed", "grep"):
        (folder / name).symlink_to(f"/usr/bin/{name}" if Path(f"/usr/bin/{name}").exists() else f"/bin/{name}")
    (folder / "sbatch").write_text(
        '#!/bin/sh\necho x >>"$FAKE/count"; sed -n "s/.*--job-name=//p" "$1" >"$FAKE/name"; kill -9 $PPID\n'
    )
    (folder / "squeue").write_text(
        '#!/bin/sh\nread -r name <"$FAKE/name"\ncase "$*" in *--name=$name*) echo "701|$name";; *--name=*) ;;\n'
        '*) while read -r line; do echo "$line"; done <"$FAKE/queue";; esac\n'
    )
    ids = ["701"] if seeds == "1" else ["701_0", "701_1"]
    (tmp_path / "queue").write_text("".join(f"{job}|PENDING|Priority|\n" for job in ids))
    asked = (*SLURM, f"seed={seeds}", *SMALL, "hydra.launcher.wait=false")
    assert run_cli(*asked, root=root, env=fake).returncode == -signal.SIGKILL
    assert [job["id"] for job in record(root)["jobs"]] == [None] * len(ids)
    shown = run_cli("status", root=root, env=fake).stdout
    assert f"{len(ids)} queued" in shown
    again = run_cli(*asked, root=root, env=fake)
    assert again.returncode == 0, again.stderr
    for job in ids:
        assert f"queued as {job} (" in again.stdout
    assert "Nothing is left to submit" in run_cli("resume", record(root)["name"], root=root, env=fake).stdout
    assert (tmp_path / "count").read_text().split() == ["x"]


def test_the_same_command_twice_at_once_submits_once(tmp_path, fake):
    asked = [*SLURM, "seed=1,2", *SMALL, "hydra.launcher.wait=false", f"paths.root={tmp_path / 'root'}"]
    (Path(fake["PATH"]) / "squeue").write_text(
        '#!/bin/sh\n[ ! -e "$FAKE/count" ] || printf "701_0|PENDING|None|\\n701_1|PENDING|None|\\n"\n'
    )
    whole = {**os.environ, **fake, "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-m", "truthsteer", *asked]
    both = [subprocess.Popen(words, cwd=REPO, env=whole, stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [process.wait(120) for process in both] == [0, 0, 0]
    assert (tmp_path / "count").read_text().split() == ["x"]


@pytest.mark.parametrize(
    ("word", "refused"),
    [
        ("export HF_TOKEN=hf_abc", "HF_TOKEN"),
        ("export WANDB_API_KEY='abc'", "WANDB_API_KEY"),
        ("export HF_TOKEN=$(cat token)", None),
        ("export HF_TOKEN=$HF_TOKEN", None),
        ("export TOKENIZERS_PARALLELISM=false", None),
    ],
)
def test_a_secret_is_not_written_down(word, refused):
    if refused is None:
        launching._refuse_secrets({"setup": [word]})
        return
    for launcher in ({"setup": ["set -e", word]}, {"setup": None, "additional_parameters": {"export": word[7:]}}):
        with pytest.raises(UserError, match=f"gives {refused} its value, which would be written down"):
            launching._refuse_secrets(launcher)


def test_a_secret_that_is_typed_stops_the_sweep_before_anything_is_written(tmp_path, fake):
    done = run_cli(*SLURM, "hydra.launcher.setup=['export HF_TOKEN=hf_abc']", root=tmp_path / "root", env=fake)
    assert done.returncode == 2
    assert "hydra.launcher.setup gives HF_TOKEN its value" in done.stderr
    assert "hf_abc" not in done.stderr
    assert not left(tmp_path / "root")


def test_a_sweep_has_one_root(tmp_path, fake):
    done = run_cli(*SLURM, root=f"{tmp_path / 'a'},{tmp_path / 'b'}", env=fake)
    assert done.returncode == 2
    assert "paths.root has several values in one sweep" in done.stderr


@pytest.mark.parametrize("text", ["", "{torn", "[]", '{"jobs": [{"number": 1}]}', '{"jobs": []}'])
def test_a_sweep_that_cannot_be_read_is_passed_over(text, tmp_path, capsys):
    good = made(tmp_path)
    good.write()
    bad = tmp_path / ".sweeps" / "a" / "sweep.json"
    bad.parent.mkdir()
    bad.write_text(text)
    assert [sweep.name for sweep in sweeps.all_of(tmp_path)] == ["s"]
    assert f"{bad} is damaged, or of another version" in capsys.readouterr().err


def test_a_refusal_of_slurm_is_one_sentence(tmp_path, fake):
    sbatch = Path(fake["PATH"]) / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: nope' >&2; exit 1\n")
    done = run_cli(*SLURM, "seed=1,2", root=tmp_path / "root", env=fake)
    assert done.returncode == 2
    assert (
        "Slurm refuses job 0, 1: sbatch: error: invalid partition specified: nope. Nothing was queued." in done.stderr
    )
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------------ what a job is doing


def made(tmp_path: Path, count: int = 2, kind: str = "slurm") -> Sweep:
    jobs = [
        SweepJob(
            n, [f"seed={n}"], str(tmp_path / f"run{n}"), "", {"stages": ["extract"]},
            {"stderr_to_stdout": False, "gpus_per_node": 1, "at_once": None}, str(tmp_path / f"{n}.json"), id=f"5_{n}",
        )
        for n in range(count)
    ]  # fmt: skip
    return Sweep(str(tmp_path), "s", kind, "", str(tmp_path), "host", None, {}, jobs)


def says(job: SweepJob, state: str, job_id: str | None = None, error: str | None = None) -> None:
    Path(job.outcome).write_text(json.dumps({"state": state, "id": job_id or job.id, "error": error, "restarts": 1}))


@pytest.mark.parametrize(
    ("said", "queue", "state"),
    [
        (None, {"5_0": ("PENDING", "Priority")}, State.queued),
        ("requeued", {"5_0": ("PENDING", "BeginTime")}, State.queued),
        ("running", {"5_0": ("RUNNING", "n1")}, State.running),
        ("running", {"5_0": ("COMPLETING", "n1")}, State.running),
        ("running", {}, State.ended),
        (None, {}, State.ended),
        ("requeued", {}, State.ended),
        ("finished", {}, State.finished),
        ("finished", {"5_0": ("COMPLETING", "n1")}, State.finished),
        ("failed", {}, State.failed),
        ("running", None, State.unknown),
        ("finished", None, State.finished),
        ("failed", {"5_0": ("PENDING", "Priority")}, State.queued),
        ("failed", {"5_0": ("COMPLETING", "n1")}, State.failed),
    ],
)
def test_what_a_job_does_follows_from_its_file_and_the_queue(said, queue, state, tmp_path, monkeypatch):
    sweep = made(tmp_path, 1)
    if said:
        says(sweep.jobs[0], said, error="why")
    monkeypatch.setattr(slurm, "queue", lambda ids: queue)
    monkeypatch.setattr(slurm, "ends", lambda ids: {})
    assert sweeps.doing(sweep)[0].state is state


def test_what_an_earlier_submission_said_does_not_count(tmp_path, monkeypatch):
    sweep = made(tmp_path, 1)
    says(sweep.jobs[0], "failed", job_id="4_0", error="then")
    monkeypatch.setattr(slurm, "queue", lambda ids: {"5_0": ("PENDING", "")})
    assert sweeps.doing(sweep)[0].state is State.queued


def test_a_jobs_word_that_cannot_be_read_is_none(tmp_path, monkeypatch):
    sweep = made(tmp_path, 1)
    Path(sweep.jobs[0].outcome).write_text("")
    monkeypatch.setattr(slurm, "queue", lambda ids: {"5_0": ("RUNNING", "n1")})
    assert sweeps.doing(sweep)[0].state is State.running


def test_another_machines_processes_are_known_there(tmp_path):
    sweep = made(tmp_path, 1, "local")
    sweep.host = "elsewhere"
    assert sweeps.doing(sweep) == [Doing(State.unknown, "elsewhere knows, where it was started")]
    sweep.jobs[0].id = None
    assert sweeps.doing(sweep) == [Doing(State.new)]
    sweep.pid = os.getpid() - 1
    assert sweeps.doing(sweep)[0].state is State.unknown, "what waits there may start"


def test_waiting_asks_once_how_a_job_ended(tmp_path, monkeypatch):
    sweep, asked = made(tmp_path), []
    looks = iter([{"5_0": ("RUNNING", "n1")}] * 6 + [{}] * 50)
    monkeypatch.setattr(slurm, "queue", lambda ids: next(looks))
    monkeypatch.setattr(slurm, "ends", lambda ids: asked.append(list(ids)) or dict.fromkeys(ids, "CANCELLED"))
    monkeypatch.setattr(waiting, "CONFIRM_S", 0.01)
    monkeypatch.setattr(waiting, "PAUSE_S", {"slurm": (0.02, 0.02)})
    assert waiting.wait(sweep, None) == [Doing(State.ended, "CANCELLED")] * 2
    assert asked == [["5_1"], ["5_0", "5_1"]]


@pytest.mark.parametrize(("end", "code", "word"), [(KeyboardInterrupt, 130, "Inter"), (TerminatedError, 143, "Termin")])
def test_sigterm_and_ctrl_c_have_codes_of_their_own(end, code, word, tmp_path, monkeypatch, capsys):
    def wait(*_):
        raise end

    monkeypatch.setattr(waiting, "wait", wait)
    monkeypatch.setattr(waiting, "Pool", lambda *_: type("Pool", (), {"stop": lambda self: None})())
    with pytest.raises(SystemExit) as stopped:
        waiting.submit_and_wait(made(tmp_path, kind="local"), [], offline=False, recorded=True)
    assert stopped.value.code == code
    assert f"\n{word}" in capsys.readouterr().err


def test_waiting_ends_when_a_job_is_killed_and_there_is_no_accounting(tmp_path, monkeypatch, capsys):
    """The queue loses one of two jobs; nobody says why."""
    sweep = made(tmp_path)
    looks = iter([{"5_0": ("RUNNING", "n1"), "5_1": ("RUNNING", "n1")}] * 2 + [{}] * 50)

    def queue(ids):
        found = next(looks)
        if not found:
            says(sweep.jobs[0], "finished")
        return found

    monkeypatch.setattr(slurm, "queue", queue)
    monkeypatch.setattr(slurm, "_run", lambda *words: None)
    monkeypatch.setattr(waiting, "CONFIRM_S", 0.05)
    monkeypatch.setattr(waiting, "PAUSE_S", {"slurm": (0.02, 0.02)})
    ends = waiting.wait(sweep, None)
    assert ends == [Doing(State.finished, "", 1), Doing(State.ended, "killed")]
    assert waiting.report(sweep, ends, recorded=True)
    said = capsys.readouterr().out
    assert "job 1 (seed=1) as 5_1: ended early: killed" in said
    assert "1 of 2 jobs finished. `truthsteer resume s" in said


@pytest.mark.parametrize(
    ("gpus", "devices", "at_once", "running"),
    [
        (0, [], None, [()]),
        (0, [], 3, [(), (), ()]),
        (1, ["4", "5"], None, [("4",), ("5",)]),
        (2, ["4", "5"], None, [("4", "5")]),
        (3, ["4", "5"], None, [("4", "5")]),
        (1, ["4", "5"], 4, [("4",), ("5",), ("4",), ("5",)]),
        (1, [], None, [()]),
    ],
)
def test_so_many_processes_run_at_once_as_there_are_gpus_for(gpus, devices, at_once, running, tmp_path, monkeypatch):
    sweep = made(tmp_path, 5, "local")
    for job in sweep.jobs:
        job.launcher |= {"gpus_per_node": gpus, "at_once": at_once}
    monkeypatch.setattr(submitting, "gpus", lambda: devices)

    class Process:
        job_id = "1"
        paths = type("Paths", (), {"stdout": "x.out"})

        def done(self):
            return False

    class Executor:
        def submit(self, job):
            return Process()

    monkeypatch.setattr(submitting, "_executor", lambda kind, launcher: Executor())
    sweep.path.mkdir(parents=True)
    pool = submitting.Pool(sweep, sweep.jobs, offline=False)
    pool.fill()
    pool.fill()
    assert [devices for _, devices in pool.running] == running


# ------------------------------------------------------------------------------------------------------- on the node


@pytest.fixture
def node(tmp_path, monkeypatch) -> Path:
    """This process as a job's."""
    for name, value in {"EXECUTOR": "local", "LOCAL_JOB_ID": "9", "FOLDER": str(tmp_path)}.items():
        monkeypatch.setenv(f"SUBMITIT_{name}", value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("truthsteer.jobs.keep_signal_here", lambda: None)
    return tmp_path / "outcome.json"


def test_a_job_stops_if_the_code_was_changed_while_it_was_queued(node, tmp_path, capsys):
    before = {**sources.files(), "truthsteer/gone.py": "0" * 16}
    with pytest.raises(SystemExit) as stopped:
        Job("truthsteer resume NAME", {}, [], before, str(node), str(tmp_path), offline=False)()
    assert stopped.value.code == 2
    said = json.loads(node.read_text())
    assert (said["state"], said["id"], said["traceback"]) == ("failed", "9", None)
    assert "changed after this job was submitted (truthsteer/gone.py). This start computed nothing." in said["error"]
    assert "Type `truthsteer resume NAME`" in said["error"]
    assert capsys.readouterr().err == f"truthsteer: {said['error']}\n"


@pytest.mark.parametrize(
    ("raised", "state"),
    [
        (None, "finished"),
        (ValueError("no"), "failed"),
        (UserError("type this"), "failed"),
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(-1), "requeued"),
        (SystemExit(144), "requeued"),
        (SystemExit("timed-out too many times"), "failed"),
    ],
)
def test_a_job_says_how_it_ended_and_slurm_sees_it(raised, state, node, tmp_path, monkeypatch):
    def run(self):
        if raised is not None:
            raise raised

    monkeypatch.setattr(Job, "_run", run)
    job = Job("truthsteer resume NAME", {}, [], {}, str(node), str(tmp_path), offline=False)
    if raised is None:
        job()
    else:
        with pytest.raises(SystemExit if isinstance(raised, UserError) else type(raised)):
            job()
    said = json.loads(node.read_text())
    assert said["state"] == state
    assert (said["traceback"] is not None) == isinstance(raised, ValueError)


def test_a_job_on_a_full_disk_says_why_it_ended(node, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    def run(self):
        raise UserError("the disk is full")

    monkeypatch.setattr("truthsteer.files.write_json", full)
    monkeypatch.setattr(Job, "_run", run)
    with pytest.raises(SystemExit) as stopped:
        Job("truthsteer resume NAME", {}, [], {}, str(node), str(tmp_path), offline=False)()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "truthsteer: the disk is full\n"


def test_the_code_is_all_that_comes_with_it():
    names = set(sources.files())
    assert {"truthsteer/templates/report.html.j2", "truthsteer/texts/neutral.txt", "truthsteer/cli.py"} <= names
    assert not [name for name in names if name.endswith((".pyc", ".yaml"))]


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="no POSIX signals")
def test_shards_of_a_job_are_started_without_its_signal(monkeypatch):
    """They have no handler yet, and it goes to every process of the job."""
    looks = "import signal; print(signal.SIGUSR2 in signal.pthread_sigmask(signal.SIG_BLOCK, ()))"
    seen = []

    @contextmanager
    def others(*_):
        seen.append(subprocess.run([sys.executable, "-c", looks], capture_output=True, text=True, check=True).stdout)
        yield

    def run(*_):
        seen.append(signal.SIGUSR2 in signal.pthread_sigmask(signal.SIG_BLOCK, ()))

    monkeypatch.setattr(cli, "others", others)
    monkeypatch.setattr("truthsteer.pipeline.run", run)
    monkeypatch.setattr("truthsteer.runs.folder_for", lambda config: Path("x"))
    cli.execute(type("Config", (), {"run": None, "dry_run": False, "shards": 2, "shard": None})(), [])
    assert seen == ["True\n", False]


SIGNALS = """
import os, signal, sys, time
from truthsteer.jobs import keep_signal_here

def submitit(number, frame):
    os.write(1, b"%d " % os.getpid())
    raise RuntimeError("timed-out too many times")

signal.signal(signal.SIGUSR2, submitit)
keep_signal_here()
child = os.fork()
if child == 0:
    time.sleep(0.5)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())  # and so it is in what this child executes
    os._exit(0 if signal.SIGUSR2 in blocked else 1)
os.kill(child, signal.SIGUSR2)
assert os.waitpid(child, 0)[1] == 0, "the child must not notice"
try:
    os.kill(os.getpid(), signal.SIGUSR2)
    time.sleep(1)
except RuntimeError:
    print("swallowed")
except SystemExit as end:
    print(os.getpid(), end)
"""


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="no POSIX signals")
def test_the_signal_reaches_the_job_alone_and_nothing_swallows_its_end():
    done = subprocess.run([sys.executable, "-c", SIGNALS], capture_output=True, text=True, cwd=REPO, timeout=30)
    assert done.returncode == 0, done.stderr
    first, second, *words = done.stdout.split()
    assert first == second
    assert " ".join(words) == "timed-out too many times"


def test_what_is_imported_before_the_signal_can_be_answered_is_light():
    heavy = {"hydra", "omegaconf", "numpy", "torch", "rich"}
    code = f"import sys, truthsteer.jobs\nheavy = {heavy} & set(sys.modules)\nassert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO)


# ------------------------------------------------------------------------------------------ processes of this machine


@pytest.mark.slow
def test_local_jobs_run_one_after_another_and_what_failed_is_resumed(tmp_path):
    root, gone = tmp_path / "root", tmp_path / "questions.csv"
    text = (REPO / "truthsteer" / "organism" / "weights" / "questions.csv").read_text()
    gone.write_text(text)
    asked = ("-m", "hydra/launcher=local", "seed=1,2", f"data.path={gone}", *SMALL)
    blocked = root / ".store" / "splits"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("in the way")  # of every job, on its node and not before
    bad = run_cli(*asked, root=root)
    assert bad.returncode == 1, bad.stderr
    whole = record(root)
    shown = " ".join(bad.stdout.split())
    assert "0 of 2 jobs finished" in shown
    assert f"`truthsteer resume {whole['name']} paths.root={root}`" in shown
    for job in whole["jobs"]:
        assert "Traceback" in Path(job["log"]).with_suffix(".err").read_text()
        assert "failed" in json.loads(Path(job["outcome"]).read_text())["state"]
    blocked.unlink()
    good = run_cli("resume", whole["name"], root=root)
    assert good.returncode == 0, good.stdout + good.stderr
    assert good.stdout.index("job 0 (seed=1) finished") < good.stdout.index("job 1 (seed=2) running"), "one at a time"
    for job in whole["jobs"]:
        assert json.loads((Path(job["run"]) / "run.json").read_text())["state"] == "finished"
    assert "2 finished" in run_cli("status", root=root).stdout
    again = run_cli(*asked, root=root)
    assert again.returncode == 0
    assert again.stdout.count(" finished ") == 2
    assert len(list(root.glob(".sweeps/*"))) == 1, "nothing was left to submit"


@pytest.mark.slow
def test_what_waits_for_its_turn_in_a_live_command_is_started_by_nobody_else(tmp_path):
    root = tmp_path / "root"
    asked = ("-m", "hydra/launcher=local", "seed=1,2", *SMALL)
    words = [sys.executable, "-m", "truthsteer", *asked, f"paths.root={root}"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(words, cwd=REPO, stdout=log, stderr=log, env=env)
        try:
            end = time.monotonic() + 60
            while not [path for path in root.glob(".sweeps/*/sweep.json") if '"id": "' in path.read_text()]:
                assert time.monotonic() < end
                time.sleep(0.05)
            first.send_signal(signal.SIGSTOP)
            name = record(root)["name"]
            assert f"queued (in process {first.pid})" in run_cli("status", root=root).stdout
            assert "Nothing is left to submit" in run_cli("resume", name, root=root).stdout
            again = run_cli(*asked, root=root)
            assert f"Left to others, and not waited for: job 1 (queued ({name}))" in again.stdout, again.stderr
            assert [job["id"] is None for job in record(root)["jobs"]] == [False, True]
        finally:
            first.send_signal(signal.SIGCONT)
        assert first.wait(120) == 0
    assert "2 finished" in run_cli("status", root=root).stdout


def test_processes_of_this_machine_have_no_time_limit(tmp_path):
    launcher = {"submitit_folder": str(tmp_path / "%j"), "gpus_per_node": 0, "timeout_min": None}
    executor = submitting._executor("local", launcher)
    assert executor._executor.parameters["timeout_min"] > 60 * 24 * 365
    typed = submitting._executor("local", launcher | {"timeout_min": 5})
    assert typed._executor.parameters["timeout_min"] == 5
    assert typed._executor.max_num_timeout == 5, "submitit starts a process six times"


# ------------------------------------------------------------------------------------------------------ what is typed


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("statsu",), "'statsu' is neither an override nor a command. Did you mean 'status'?"),
        (("status",), "There are no sweeps under"),
        (("status", "--all"), "'--all' is not known here. Type the sweep's name"),
        (("resume", "a", "b"), "'b' is not known here"),
        (("resume",), "There are no sweeps under"),
    ],
)
def test_mistyped_commands_fail_with_one_sentence(words, sentence, tmp_path):
    done = run_cli(*words, root=tmp_path)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name):
    done = subprocess.run(
        [sys.executable, "-m", "truthsteer", name, "--help"],
        capture_output=True,
        text=True,
        cwd=REPO,
        env={**os.environ},
    )
    assert done.returncode == 0
    assert f"truthsteer {name}" in done.stdout
    assert f"truthsteer {name}" in (REPO / "conf" / "hydra" / "help" / "truthsteer.yaml").read_text()


def test_a_process_counts_that_has_only_just_begun_but_not_one_that_has_ended(monkeypatch):
    import psutil

    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "submitit"]) as process:
        assert sweeps._alive(str(process.pid), "submitit")
        assert not sweeps._alive(str(process.pid), "another")
        monkeypatch.setattr(psutil.Process, "cmdline", lambda self: [])
        assert sweeps._alive(str(process.pid), "submitit"), "the kernel has not written its command yet"
        process.kill()
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert not sweeps._alive(str(process.pid), "submitit")
    assert not sweeps._alive(str(process.pid), "submitit")


def test_a_misspelt_key_of_the_launcher_is_told_from_its_own():
    said = cli.explain(HydraException("Could not override 'hydra.launcher.partiton'."))
    assert said.startswith(
        "'hydra.launcher.partiton' is not a key. Did you mean 'partition'? Those of hydra.launcher are: account, "
    )
    assert "at_once" in said
